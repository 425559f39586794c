"""The layers of ``normkit.flax``: those of flax.nnx, whose ``__call__`` is normkit's."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from jax import lax

from normkit import _masked, functional
from normkit import _validate as check
from normkit._dispatch import backend_of
from normkit._layer import call
from normkit._policies import SETTINGS, Policies, batch_norm, merged, policed, with_settings
from normkit.core.normalize import BatchStats

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]

Array = Any
Axes = tuple[int, ...]

#: As Flax has it: one value counts, with a variance of zero.
USUAL = Policies(single_value=None)
OURS = {**SETTINGS, "single_value": None}

_NO_MODE = (
    "No `use_running_average` argument was provided to BatchNorm: pass it to the constructor or to the call, or use "
    "`nnx.view`."
)

#: What flax's modules derive from: Python gives an object another class only if both are made alike.
Alike: Any = nnx.Pytree.__base__


@policed
class BatchNormForward(Alike):
    """Batch norm by the batch, whose statistics are counted, or by the running ones."""

    _policies = USUAL

    def __call__(self: Any, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        policies, modes = self._policies, (use_running_average, self.use_running_average)
        if modes == (None, None) and policies.use_batch_stats is not None:
            modes = (not policies.use_batch_stats,) * 2
        training = not first_from(*modes, error_msg=_NO_MODE)
        axes = _axes(self.axis, x.ndim)
        if len(axes) != 1:
            raise ValueError(f"BatchNorm has its channels at one axis; received axis={self.axis}.")
        (axis,) = axes
        mean, var, scale, bias = self.mean[...], self.var[...], _value(self.scale), _value(self.bias)
        x = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)[0]
        if not self._train_affine:
            scale, bias = lax.stop_gradient((scale, bias))
        options = {"axis": axis, "eps": self.epsilon}
        if not any(policies.modes(training)):
            return functional.batch_norm(x, mean, var, scale, bias, **options)
        shared = self.axis_name is not None
        train = functools.partial(_batch_norm_across, self) if shared else _masked.batch_norm_train
        options |= {"mask": _boolean(mask), "everywhere": True, "shared": shared}
        y, stats, _ = batch_norm(policies, training, call, train, x, mean, var, scale, bias, **options)
        if stats is not None:
            owner, backend = type(self).__name__, backend_of("mean", mean)
            mean, var, _ = merged(owner, backend, (mean, var, 0), stats, self.momentum, False, policies)
            self.mean[...], self.var[...] = lax.stop_gradient(mean), lax.stop_gradient(var)
        return y


class LayerNormForward(Alike):
    """Layer norm over any axes, with parameters along any others."""

    def __call__(self: Any, x: Array, *, mask: Array | None = None) -> Array:
        scale, bias = _value(self.scale), _value(self.bias)
        x = self.promote_dtype((x, scale, bias), dtype=self.dtype)[0]
        return _over(self, functional.layer_norm, x, self.reduction_axes, self.feature_axes, scale, bias, mask)


class RMSNormForward(Alike):
    """RMS norm over any axes, with a scale along any others."""

    def __call__(self: Any, x: Array, mask: Array | None = None) -> Array:
        scale = _value(self.scale)
        x = self.promote_dtype((x, scale), dtype=self.dtype)[0]
        return _over(self, functional.rms_norm, x, self.reduction_axes, self.feature_axes, scale, None, mask)


class InstanceNormForward(Alike):
    """Instance norm, channels at any axes but the first."""

    def __call__(self: Any, x: Array, *, mask: Array | None = None) -> Array:
        features = _axes(self.feature_axes, x.ndim)
        if 0 in features:
            raise ValueError(
                f"InstanceNorm has samples along axis 0, which holds no channels; received "
                f"feature_axes={self.feature_axes}."
            )
        scale, bias = _value(self.scale), _value(self.bias)
        x = self.promote_dtype((x, scale, bias), dtype=self.dtype)[0]
        if len(features) == 1 and self.axis_name is None:
            options = {"axis": features[0], "eps": self.epsilon}
            return _called(functional.instance_norm, mask, x, scale, bias, **options)
        reduced = tuple(a for a in range(1, x.ndim) if a not in features)
        return _over(self, functional.layer_norm, x, reduced, features, scale, bias, mask)


class GroupNormForward(Alike):
    """Group norm, channels last."""

    def __call__(self: Any, x: Array, *, mask: Array | None = None) -> Array:
        last = x.ndim - 1
        others = tuple(range(1, last))
        if self.reduction_axes is not None:
            reduced = _axes(self.reduction_axes, x.ndim)
            if last not in reduced:
                raise ValueError(
                    f"GroupNorm reduces the last axis, which holds the channels; received "
                    f"reduction_axes={self.reduction_axes}."
                )
            others = reduced[:-1]
        scale, bias = _value(self.scale), _value(self.bias)
        x = self.promote_dtype((x, scale, bias), dtype=self.dtype)[0]
        if others == tuple(range(1, last)) and self.axis_name is None:
            options = {"axis": last, "eps": self.epsilon}
            return _called(functional.group_norm, mask, x, self.num_groups, scale, bias, **options)
        grouped = x.reshape(*x.shape[:-1], self.num_groups, -1)
        if mask is not None:
            check.broadcasts(backend_of("x", x), x, mask := _boolean(mask))
            mask = jnp.broadcast_to(mask, x.shape).reshape(grouped.shape)
        wide = _wide(grouped)
        y = _over(self, functional.layer_norm, wide, (*others, last + 1), (), None, None, mask).reshape(x.shape)
        return _affine(y, (last,), scale, bias).astype(x.dtype)


def _over(
    layer: Any, fn: Any, x: Array, axes: Any, features: Any, scale: Array | None, bias: Array | None, mask: Array | None
) -> Array:
    """Layer or RMS norm over ``axes``, with parameters along ``features``."""
    axes, features = _axes(axes, x.ndim), _axes(features, x.ndim)
    if layer.axis_name is not None:
        y = _across(layer, x, axes, mask, center=fn is functional.layer_norm)[0]
        return _affine(y, features, scale, bias).astype(x.dtype)
    if axes != features and (scale is not None or bias is not None):
        y = _called(fn, mask, _wide(x), axis=axes, eps=layer.epsilon)
        return _affine(y, features, scale, bias).astype(x.dtype)
    lengths = tuple(x.shape[a] for a in axes)
    # One of another size goes on as it is: the function says what is wrong with it.
    params = (p if p is None or p.size != math.prod(lengths) else p.reshape(lengths) for p in (scale, bias))
    return _called(fn, mask, x, *params, axis=axes, eps=layer.epsilon)


def _called(fn: Any, mask: Array | None, *args: Any, **options: Any) -> Array:
    return fn(*args, **options) if mask is None else _masked.over(_boolean(mask), fn, *args, **options)


def _across(layer: Any, x: Array, axes: Axes, mask: Array | None, *, center: bool) -> tuple[Array, BatchStats]:
    """Normalized x, and the statistics of all devices' elements along a named axis, which JAX differentiates."""

    def total(values: Array) -> Array:
        values = jnp.sum(values, axes, keepdims=True)
        return lax.psum(values, layer.axis_name, axis_index_groups=layer.axis_index_groups)

    def average(values: Array) -> Array:
        return total(values if mask is None else jnp.where(mask, values, 0)) / jnp.maximum(count, 1)

    x = _wide(x)
    mask = _boolean(mask)
    if mask is not None:
        check.broadcasts(backend_of("x", x), x, mask)
    count = total(jnp.ones_like(x) if mask is None else jnp.where(mask, jnp.ones_like(x), 0))
    mean = jnp.zeros_like(count)
    if center:
        # By a constant first, so that what rounding takes from the mean is put back.
        mean = lax.stop_gradient(average(x))
        x = x - mean
        residue = average(x)
        x, mean = x - residue, mean + residue
    var = average(x * x)
    return x * lax.rsqrt(var + layer.epsilon), BatchStats(mean, var, count)


def _batch_norm_across(
    layer: Any, x: Array, scale: Any = None, bias: Any = None, *, axis: int, mask: Array | None, **_: Any
) -> tuple[Array, BatchStats]:
    y, stats = _across(layer, x, tuple(a for a in range(x.ndim) if a != axis), mask, center=True)
    return _affine(y, (axis,), scale, bias).astype(x.dtype), BatchStats(*(jnp.reshape(s, -1) for s in stats))


def _affine(y: Array, features: Axes, scale: Array | None, bias: Array | None) -> Array:
    shape = [n if a in features else 1 for a, n in enumerate(y.shape)]
    if scale is not None:
        y = y * scale.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _axes(axes: Any, rank: int) -> Axes:
    """Axes counted from the front, ascending."""
    check.an_axis("x", rank)
    return tuple(sorted({a % rank for a in ((axes,) if isinstance(axes, int) else axes)}))


def _value(variable: Any) -> Array | None:
    return None if variable is None else variable[...]


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _boolean(mask: Array | None) -> Array | None:
    return None if mask is None else jnp.asarray(mask, bool)


class BatchNorm(BatchNormForward, nnx.BatchNorm):
    """:class:`flax.nnx.BatchNorm` with normkit's numbers.

    ``y = (x - mean) / sqrt(var + epsilon) * scale + bias``, with mean and biased variance of the batch, or of the
    running statistics where ``use_running_average`` says so. Arguments, state and dtypes are those of
    :class:`flax.nnx.BatchNorm`; ``momentum`` is the weight of the old value.

    Notes
    -----
    Three things differ. A batch without (unmasked) elements moves no statistics. With ``axis_name``, devices count by
    their unmasked elements, not all alike. The variance is never that of ``use_fast_variance``, whatever it says; this
    holds for all the layers.

    Arguments and attributes beside Flax's: ``single_value``, ``empty_batch``, ``nonfinite``, ``use_batch_stats`` and
    ``update_stats`` as in :class:`normkit.BatchNorm`, where ``not use_running_average`` is what None follows;
    ``single_value=None`` is as Flax: one value counts, with a variance of zero. ``train_affine=False``: the gradient of
    scale and bias is zero.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {name: kwargs.pop(name) for name in OURS if name in kwargs}
        super().__init__(*args, **kwargs)
        for name, value in settings.items():
            setattr(self, name, value)

    __init__.__signature__ = with_settings(nnx.BatchNorm, OURS)  # type: ignore[attr-defined]


class LayerNorm(LayerNormForward, nnx.LayerNorm):
    """:class:`flax.nnx.LayerNorm` with normkit's numbers, those of :func:`normkit.layer_norm`."""


class RMSNorm(RMSNormForward, nnx.RMSNorm):
    """:class:`flax.nnx.RMSNorm` with normkit's numbers, those of :func:`normkit.rms_norm`."""


class InstanceNorm(InstanceNormForward, nnx.InstanceNorm):
    """:class:`flax.nnx.InstanceNorm` with normkit's numbers, those of :func:`normkit.instance_norm`."""


class GroupNorm(GroupNormForward, nnx.GroupNorm):
    """:class:`flax.nnx.GroupNorm` with normkit's numbers, those of :func:`normkit.group_norm`.

    With ``reduction_axes`` that leave more than one axis out, groups are normalized as the argument says.
    """
