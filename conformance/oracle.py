"""The layers' definitions in extended precision NumPy, with closed-form and numeric gradients; without the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

#: 64 bits of mantissa on x86, so that float64 can be judged too; where it is float64 itself, float32 and narrower can.
Real = np.longdouble
EXTENDED = np.finfo(Real).nmant > np.finfo(np.float64).nmant

Array = np.ndarray

DEFAULT_EPS = {"rms_norm": 1e-6}
DEFAULT_AXIS = {"layer_norm": -1, "rms_norm": -1}


class Statistics(NamedTuple):
    """Mean, biased variance and number of elements of each channel."""

    mean: Array
    var: Array
    count: Array  # type: ignore[assignment]  # in place of tuple.count


class Sets(NamedTuple):
    """Which elements share a statistic: those of ``view`` along ``over``. Parameters have the axes ``params`` of x."""

    view: tuple[int, ...]
    over: tuple[int, ...]
    params: tuple[int, ...]


def sets(layer: str, shape: tuple[int, ...], *, axis=None, num_groups: int | None = None, **_) -> Sets:
    """How ``layer`` divides an array of ``shape`` into sets that are normalized each by itself."""
    axis = DEFAULT_AXIS.get(layer, 1) if axis is None else axis
    axes = tuple(sorted(a % len(shape) for a in (axis if isinstance(axis, tuple | list) else (axis,))))
    every = range(len(shape))
    if layer in ("layer_norm", "rms_norm"):
        return Sets(shape, axes, axes)
    (channel,) = axes
    if layer == "group_norm":
        split = (num_groups, shape[channel] // num_groups)
        view = (*shape[:channel], *split, *shape[channel + 1 :])
        return Sets(view, tuple(a for a in range(len(view)) if a not in (0, channel)), axes)
    kept = (0, channel) if layer == "instance_norm" else (channel,)
    return Sets(shape, tuple(a for a in every if a not in kept), axes)


def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5, mask=None) -> Array:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over ``axis``."""
    return _normalize("layer_norm", x, weight, bias, eps=eps, axis=axis, mask=mask)


def rms_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-6, weight_offset=0.0, mask=None) -> Array:
    """``x / sqrt(mean(x**2) + eps) * (weight + weight_offset) + bias`` over ``axis``."""
    return _normalize("rms_norm", x, weight, bias, eps=eps, axis=axis, weight_offset=weight_offset, mask=mask)


def group_norm(x, num_groups, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None) -> Array:
    """:func:`layer_norm` of each sample's groups of neighbouring channels, with one parameter per channel."""
    return _normalize("group_norm", x, weight, bias, eps=eps, axis=axis, num_groups=num_groups, mask=mask)


def instance_norm(x, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None) -> Array:
    """:func:`layer_norm` of each sample's channels, with one parameter per channel."""
    return _normalize("instance_norm", x, weight, bias, eps=eps, axis=axis, mask=mask)


def batch_norm(x, mean, var, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None) -> Array:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with statistics that are given."""
    return _normalize("batch_norm", x, weight, bias, eps=eps, axis=axis, mean=mean, var=var, mask=mask)


def batch_norm_train(x, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None) -> tuple[Array, Statistics]:
    """Batch norm by the statistics of the valid elements of x; y is 0 where the mask is false."""
    y = _normalize("batch_norm_train", x, weight, bias, eps=eps, axis=axis, mask=mask)
    return y, batch_statistics(x, axis=axis, mask=mask)


def batch_statistics(x, *, axis=1, mask=None) -> Statistics:
    """What :func:`batch_norm_train` knows of each channel; zero where there is no valid element."""
    x = np.asarray(x, Real)
    over = sets("batch_norm_train", x.shape, axis=axis).over
    valid = _valid(x, mask)
    count = valid.sum(axis=over)
    with np.errstate(invalid="ignore"):  # a NaN stays in its own set
        origin, centred = _centred(x, over, valid)
        mean = (origin + _mean(np.where(valid, x - origin, 0), over, valid)).reshape(count.shape)
        return Statistics(mean, _mean(centred**2, over, valid).reshape(count.shape), count)


def running_statistics(
    steps, mean, var, *, axis=1, momentum: float | None = 0.9, unbiased=True, num_batches=0
) -> tuple[Array, Array, int]:
    """Running mean and variance after the batches in ``steps``; momentum weights the old value, None averages all."""
    mean, var = np.asarray(mean, Real), np.asarray(var, Real)
    for x in steps:
        batch = batch_statistics(x, axis=axis)
        n = int(batch.count[0]) if batch.count.size else 0
        if n == 0:
            continue
        num_batches += 1
        keep = Real(momentum) if momentum is not None else 1 - 1 / Real(num_batches)
        mean = keep * mean + (1 - keep) * batch.mean
        var = keep * var + (1 - keep) * batch.var * (Real(n) / (n - 1) if unbiased else 1)
    return mean, var, num_batches


def forward(layer: str, operands: Mapping[str, Array], options: Mapping) -> Array:
    """y of ``layer`` for named operands (x, weight, bias, mean, var, mask)."""
    y = globals()[layer](**{k: v for k, v in operands.items() if k != "dy"}, **options)
    return y[0] if isinstance(y, tuple) else y


def vjp(layer: str, operands: Mapping[str, Array], dy: Array, options: Mapping) -> dict[str, Array]:
    """Closed-form gradients of ``sum(y * dy)``, one for each operand that has one."""
    return _backward(layer, operands, dy, options)[0]


def vjp_and_scales(
    layer: str, operands: Mapping[str, Array], dy: Array, options: Mapping
) -> tuple[dict[str, Array], dict[str, Array]]:
    """:func:`vjp`, and what an error in each gradient is to be compared with.

    For x: the largest ``|dy * weight| * rstd`` of its set, which dx is a difference of. For a parameter: the root of
    the sum of squares of the terms that are added, which a sum of independent terms is as large as, with the largest
    ``|x̂|`` of the set in the place of x̂. Where a gradient is larger than that, itself.
    """
    return _backward(layer, operands, dy, options)


def numeric_vjp(
    layer: str, operands: Mapping[str, Array], dy: Array, options: Mapping, h: float = 2.0**-20
) -> dict[str, Array]:
    """Gradients of ``sum(y * dy)`` by central differences, element by element, extrapolated once (Richardson)."""

    def loss(values: Mapping[str, Array]) -> Real:
        return (forward(layer, values, options) * np.asarray(dy, Real)).sum()

    def slope(name: str, index: tuple[int, ...], step: Real) -> Real:
        sides = []
        for moved in (step, -step):
            array = np.array(operands[name], Real)
            array[index] += moved
            sides.append(loss({**operands, name: array}))
        return (sides[0] - sides[1]) / (2 * step)

    gradients = {}
    for name in ("x", "weight", "bias", "mean", "var"):
        if operands.get(name) is None:
            continue
        gradients[name] = np.empty(np.shape(operands[name]), Real)
        for index in np.ndindex(gradients[name].shape):
            coarse, fine = slope(name, index, Real(2 * h)), slope(name, index, Real(h))
            gradients[name][index] = fine + (fine - coarse) / 3
    return gradients


def hessian_product(
    layer: str,
    operands: Mapping[str, Array],
    dy: Array,
    options: Mapping,
    directions: Mapping[str, Array],
    h: float = 2.0**-20,
) -> dict[str, Array]:
    """The second derivative of ``sum(y * dy)`` times ``directions``: central differences of the closed form."""

    def gradient(step: Real) -> dict[str, Array]:
        moved = {k: np.asarray(operands[k], Real) + step * np.asarray(v, Real) for k, v in directions.items()}
        return vjp(layer, {**operands, **moved}, dy, options)

    def slope(step: Real) -> dict[str, Array]:
        ahead, behind = gradient(step), gradient(-step)
        return {k: (ahead[k] - behind[k]) / (2 * step) for k in ahead}

    coarse, fine = slope(Real(2 * h)), slope(Real(h))
    return {k: fine[k] + (fine[k] - coarse[k]) / 3 for k in fine}


def _valid(x: Array, mask) -> Array:
    return np.ones(x.shape, bool) if mask is None else np.broadcast_to(np.asarray(mask, bool), x.shape)


def _mean(x: Array, over: tuple[int, ...], valid: Array) -> Array:
    return x.sum(axis=over, keepdims=True) / np.maximum(valid.sum(axis=over, keepdims=True), 1)


def _centred(x: Array, over: tuple[int, ...], valid: Array) -> tuple[Array, Array]:
    """The smallest valid value of each set, and x less its mean: from there, differences are exact, constants zero."""
    origin = x.min(axis=over, keepdims=True, where=valid, initial=np.inf)
    origin = np.where(valid.any(axis=over, keepdims=True), origin, 0)
    d = np.where(valid, x - origin, 0)
    return origin, np.where(valid, d - _mean(d, over, valid), 0)


def _expand(param, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    return np.asarray(param, Real).reshape([n if a in axes else 1 for a, n in enumerate(shape)])


@np.errstate(invalid="ignore")  # a NaN stays in its own set
def _standardized(layer, x, s: Sets, *, eps, mean=None, var=None, mask=None) -> tuple[Array, Array, Array]:
    """x̂, rstd (both in x's shape) and the valid elements."""
    valid = _valid(x, mask)
    if layer == "batch_norm":
        d = x - _expand(mean, x.shape, s.params)
        power = np.broadcast_to(_expand(var, x.shape, s.params), x.shape)
    else:
        seen, seen_valid = x.reshape(s.view), valid.reshape(s.view)
        d = np.where(seen_valid, seen, 0) if layer == "rms_norm" else _centred(seen, s.over, seen_valid)[1]
        power = np.broadcast_to(_mean(d**2, s.over, seen_valid), s.view).reshape(x.shape)
        d = d.reshape(x.shape)
    spread = power + Real(eps)
    rstd = 1 / np.sqrt(np.where(spread == 0, 1, spread))
    return d * rstd, rstd, valid


def _normalize(layer, x, weight, bias, *, eps, weight_offset=0.0, mean=None, var=None, mask=None, **where) -> Array:
    x = np.asarray(x, Real)
    s = sets(layer, x.shape, **where)
    y, _, valid = _standardized(layer, x, s, eps=eps, mean=mean, var=var, mask=mask)
    if weight is not None:
        y = y * (_expand(weight, x.shape, s.params) + Real(weight_offset))
    if bias is not None:
        y = y + _expand(bias, x.shape, s.params)
    return np.where(valid, y, 0)


def _backward(layer, operands, dy, options) -> tuple[dict[str, Array], dict[str, Array]]:
    options = {"eps": DEFAULT_EPS.get(layer, 1e-5), **options}
    eps, weight_offset = options.pop("eps"), Real(options.pop("weight_offset", 0.0))
    x, weight = np.asarray(operands["x"], Real), operands.get("weight")
    s = sets(layer, x.shape, **options)
    xhat, rstd, valid = _standardized(layer, x, s, eps=eps, **{k: operands.get(k) for k in ("mean", "var", "mask")})
    dy = np.where(valid, np.asarray(dy, Real), 0)
    g = dy if weight is None else dy * (_expand(weight, x.shape, s.params) + weight_offset)

    others = tuple(a for a in range(x.ndim) if a not in s.params)
    gradients, scales = {}, {}

    def largest(values: Array) -> Array:
        """The largest magnitude in each set, in x's shape."""
        peak = np.abs(values).reshape(s.view).max(axis=s.over, keepdims=True, initial=0)
        return np.broadcast_to(peak, s.view).reshape(x.shape)

    def add(name: str, factor: Array, xhat: Array | None = None) -> None:
        gradients[name] = (factor if xhat is None else factor * xhat).sum(axis=others)
        terms = factor if xhat is None else factor * largest(xhat)
        scales[name] = np.maximum(np.sqrt((terms**2).sum(axis=others)), np.abs(gradients[name]))

    if layer == "batch_norm":
        gradients["x"] = g * rstd
        add("mean", -g * rstd)
        add("var", g * rstd**2 / -2, xhat)
    else:
        g_, xhat_, valid_ = g.reshape(s.view), xhat.reshape(s.view), valid.reshape(s.view)
        inner = g_ - xhat_ * _mean(g_ * xhat_, s.over, valid_)
        if layer != "rms_norm":
            inner = inner - _mean(g_, s.over, valid_)
        gradients["x"] = np.where(valid, inner.reshape(x.shape) * rstd, 0)
    scales["x"] = np.maximum(largest(g * rstd), np.abs(gradients["x"]))
    if weight is not None:
        add("weight", dy, xhat)
    if operands.get("bias") is not None:
        add("bias", dy)
    return gradients, scales
