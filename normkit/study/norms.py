"""The norms that the study compares, as functions with their gradients: y, and dy -> (dx, dweight, dbias)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from normkit import functional, lp_norms, vjp

Array = Any
Pullback = Callable[[Array], tuple[Array, ...]]

EPS = 1e-5


class Statistics(NamedTuple):
    """What a norm divides by, one value per channel: of this batch, or of the whole training set."""

    mean: Array
    var: Array


def batch(x: Array, weight: Array, bias: Array, eps: float = EPS) -> tuple[Array, Pullback, Statistics]:
    """Batch norm."""
    (y, stats), pullback = vjp(functional.batch_norm_train, x, weight, bias, eps=eps)
    return y, pullback, Statistics(stats.mean, stats.var)


def stop_gradient(x: Array, weight: Array, bias: Array) -> tuple[Array, Pullback, Statistics]:
    """Batch norm whose statistics are constants in the gradient: dx = dy weight / std."""
    _, stats = functional.batch_norm_train(x)
    y, pullback = vjp(functional.batch_norm, x, stats.mean, stats.var, weight, bias, eps=EPS)

    def back(dy: Array) -> tuple[Array, ...]:
        dx, _, _, dweight, dbias = pullback(dy)
        return dx, dweight, dbias

    return y, back, Statistics(stats.mean, stats.var)


def given(x: Array, weight: Array, bias: Array, known: Statistics) -> tuple[Array, Pullback]:
    """Any of them in inference."""
    y, pullback = vjp(functional.batch_norm, x, known.mean, known.var, weight, bias, eps=EPS)

    def back(dy: Array) -> tuple[Array, ...]:
        dx, _, _, dweight, dbias = pullback(dy)
        return dx, dweight, dbias

    return y, back


def layer(x: Array, weight: Array, bias: Array) -> tuple[Array, Pullback, None]:
    """Layer norm over everything but the batch."""
    axes = tuple(range(1, len(x.shape)))
    if len(axes) == 1:
        return *vjp(functional.layer_norm, x, weight, bias), None
    return group(x, weight, bias, 1)


def group(x: Array, weight: Array, bias: Array, groups: int = 8) -> tuple[Array, Pullback, None]:
    """Group norm."""
    return *vjp(functional.group_norm, x, groups, weight, bias), None


def p_norm(p: float) -> Callable[[Array, Array, Array], tuple[Array, Pullback, Statistics]]:
    """Less the mean, over the mean p-norm of x as it is."""

    def norm(x, weight, bias):
        (y, stats), pullback = vjp(lp_norms.lp_batch_norm_train, x, weight, bias, p=p, eps=EPS)
        return y, pullback, Statistics(stats.mean, stats.var)

    return norm


def ghost(size: int) -> Callable[[Array, Array, Array], tuple[Array, Pullback, Statistics]]:
    """Batch norm by so many samples at a time."""

    def norm(x, weight, bias):
        (y, stats), pullback = vjp(functional.batch_norm_train, x, weight, bias, eps=EPS, virtual_batch_size=size)
        return y, pullback, Statistics(stats.mean, stats.var)

    return norm


#: Norms without a statistic of the batch: the same in training and inference.
SAMPLEWISE = {"layer": layer, "group": group, "instance": lambda x, w, b: group(x, w, b, x.shape[1])}
#: Norms by statistics of the batch, which inference replaces by the training set's.
BATCHWISE: dict[str, Callable] = {
    "batch": batch,
    "ghost 8": ghost(8),
    "l1": p_norm(1),
    "l2": p_norm(2),
    "linf": p_norm(float("inf")),
    "noisy": batch,
    "stop_gradient": stop_gradient,
}
