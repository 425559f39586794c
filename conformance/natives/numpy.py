"""The formulas as people write them by hand in NumPy: one statement each, in x's own dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from normkit.conformance.natives import Convention, axes_of, only

NAME = "textbook"
CONVENTION = Convention(weights="old", unbiased=True, cumulative=True)

Array = Any


def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5) -> Array:
    """``(x - x.mean()) / sqrt(x.var() + eps) * weight + bias``."""
    axes = axes_of(axis, x.ndim)
    return _affine(_standardized(x, axes, eps), weight, bias, axes)


def rms_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-6, weight_offset=0.0) -> Array:
    """``x / sqrt((x * x).mean() + eps) * weight + bias``."""
    axes = axes_of(axis, x.ndim)
    y = x / np.sqrt((x * x).mean(axis=axes, keepdims=True) + eps)
    return _affine(y, None if weight is None else weight + weight_offset, bias, axes)


def group_norm(x, num_groups, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """Reshape to groups, standardize, reshape back."""
    (axis,) = axes_of(axis, x.ndim)
    only(axis > 0, "samples are along axis 0")
    groups = x.reshape(*x.shape[:axis], num_groups, x.shape[axis] // num_groups, *x.shape[axis + 1 :])
    over = tuple(a for a in range(groups.ndim) if a not in (0, axis))
    return _affine(_standardized(groups, over, eps).reshape(x.shape), weight, bias, (axis,))


def instance_norm(x, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """Standardize each channel of each sample."""
    (axis,) = axes_of(axis, x.ndim)
    over = tuple(a for a in range(x.ndim) if a not in (0, axis))
    return _affine(_standardized(x, over, eps), weight, bias, (axis,))


def batch_norm(x, mean, var, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """Standardize by given statistics."""
    axes = axes_of(axis, x.ndim)
    y = (x - _expand(mean, x, axes)) / np.sqrt(_expand(var, x, axes) + eps)
    return _affine(y, weight, bias, axes).astype(x.dtype)


def batch_norm_train(x, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """Standardize each channel."""
    (axis,) = axes_of(axis, x.ndim)
    over = tuple(a for a in range(x.ndim) if a != axis)
    return _affine(_standardized(x, over, eps), weight, bias, (axis,))


def running_statistics(steps, dtype, *, axis=1, momentum: float | None = 0.9) -> tuple[Array, Array]:
    """Running mean and variance over the batches in ``steps``."""
    (axis,) = axes_of(axis, steps[0].ndim)
    over = tuple(a for a in range(steps[0].ndim) if a != axis)
    mean, var = np.zeros(steps[0].shape[axis], dtype), np.ones(steps[0].shape[axis], dtype)
    for k, x in enumerate(steps):
        keep = k / (k + 1) if momentum is None else momentum
        mean = keep * mean + (1 - keep) * x.mean(axis=over)
        var = keep * var + (1 - keep) * x.var(axis=over, ddof=1)
    return mean, var


def _standardized(x, over, eps):
    return (x - x.mean(axis=over, keepdims=True)) / np.sqrt(x.var(axis=over, keepdims=True) + eps)


def _expand(param, x, axes):
    return param.reshape([n if a in axes else 1 for a, n in enumerate(x.shape)])


def _affine(y, weight, bias, axes):
    y = y if weight is None else y * _expand(weight, y, axes)
    return y if bias is None else y + _expand(bias, y, axes)


def _with_gradient(function):
    """Attach ``vjp``: with x̂ = y without affine, dx = rstd * (g - mean(g) - x̂ * mean(g * x̂)), as textbooks have it."""

    defaults = function.__kwdefaults__

    def vjp(x, *args, **options):
        y = function(x, *args, **options)
        options = {**defaults, **options}
        name, args, eps = function.__name__, list(args), options["eps"]
        axes = axes_of(options["axis"], x.ndim)
        groups = args.pop(0) if name == "group_norm" else None
        given = [args.pop(0) for _ in range(2)] if name == "batch_norm" else None
        weight, bias = (*args, None, None)[:2]
        view, over = _sets(name, x.shape, axes, groups)
        seen = x.reshape(view)
        if given:
            mean, var = (_expand(a, x, axes) for a in given)
        elif name == "rms_norm":
            mean, var = 0, (seen * seen).mean(axis=over, keepdims=True)
        else:
            mean, var = seen.mean(axis=over, keepdims=True), seen.var(axis=over, keepdims=True)
        rstd = 1 / np.sqrt(var + eps)
        xhat = (seen - mean) * rstd

        def pullback(dy):
            others = tuple(a for a in range(x.ndim) if a not in axes)
            scale = None if weight is None else _expand(weight + options.get("weight_offset", 0.0), x, axes)
            g = (dy if scale is None else dy * scale).reshape(view)
            if given:
                dx = g * rstd
                found = [-dx.sum(axis=others), (g * xhat * rstd * rstd).sum(axis=others) / -2]
            else:
                dx = g - xhat * (g * xhat).mean(axis=over, keepdims=True)
                dx = (dx if name == "rms_norm" else dx - g.mean(axis=over, keepdims=True)) * rstd
                found = []
            if weight is not None:
                found.append((dy * xhat.reshape(x.shape)).sum(axis=others))
            if bias is not None:
                found.append(dy.sum(axis=others))
            return dx.reshape(x.shape).astype(x.dtype), *found

        return y, pullback

    function.vjp = vjp
    return function


def _sets(name, shape, axes, groups):
    if name in ("layer_norm", "rms_norm"):
        return shape, axes
    (axis,) = axes
    if name == "group_norm":
        view = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
        return view, tuple(a for a in range(len(view)) if a not in (0, axis))
    kept = (0, axis) if name == "instance_norm" else (axis,)
    return shape, tuple(a for a in range(len(shape)) if a not in kept)


for _function in (layer_norm, rms_norm, group_norm, instance_norm, batch_norm, batch_norm_train):
    _with_gradient(_function)
