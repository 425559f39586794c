"""flax.nnx's own layers with their defaults, but for eps, a dtype that stays x's, and zeros where a mask is false."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from normkit.conformance.natives import Convention, axes_of, only

NAME = "flax"
CONVENTION = Convention(weights="old", unbiased=False)

Array = Any
_LAST = "flax has the channels last"


def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5, mask=None) -> Array:
    """flax.nnx.LayerNorm: any axes."""
    axes = axes_of(axis, x.ndim)
    only(len(axes) == 1 or weight is bias is None, "flax.nnx.LayerNorm makes parameters of one axis only")
    return _called(nnx.LayerNorm, x, weight, bias, axes[-1], eps, mask, reduction_axes=axes, feature_axes=axes)


def rms_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-6, weight_offset=0.0, mask=None) -> Array:
    """flax.nnx.RMSNorm: any axes, no bias."""
    only(bias is None, "flax.nnx.RMSNorm has no bias")
    only(weight_offset == 0, "flax.nnx.RMSNorm has no weight_offset")
    axes = axes_of(axis, x.ndim)
    only(len(axes) == 1 or weight is None, "flax.nnx.RMSNorm makes parameters of one axis only")
    options = {"use_scale": weight is not None, "reduction_axes": axes, "feature_axes": axes}
    return _masked(_filled(_built(nnx.RMSNorm, x, axes[-1], eps, **options), weight, None), x, mask)


def group_norm(x, num_groups, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None) -> Array:
    """flax.nnx.GroupNorm."""
    only(axes_of(axis, x.ndim) == (x.ndim - 1,), _LAST)
    return _called(nnx.GroupNorm, x, weight, bias, -1, eps, mask, num_groups=num_groups)


def instance_norm(x, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None) -> Array:
    """flax.nnx.InstanceNorm."""
    return _called(nnx.InstanceNorm, x, weight, bias, axis, eps, mask, feature_axes=axis)


def batch_norm(x, mean, var, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """flax.nnx.BatchNorm in inference."""
    layer = _batch_norm(x, weight, bias, axis, eps, use_running_average=True)
    layer.mean.set_value(mean)
    layer.var.set_value(var)
    return layer(x)


def batch_norm_train(x, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None) -> Array:
    """flax.nnx.BatchNorm in training."""
    return _masked(_batch_norm(x, weight, bias, axis, eps, use_running_average=False), x, mask)


def running_statistics(steps, dtype, *, axis=-1, momentum: float | None = 0.9) -> tuple[Array, Array]:
    """Running mean and variance of a BatchNorm after the batches in ``steps``."""
    only(momentum is not None, "flax has no cumulative average")
    layer = _batch_norm(steps[0], None, None, axis, 1e-5, use_running_average=False, momentum=momentum)
    for x in steps:
        layer(x)
    return layer.mean[...], layer.var[...]


def _batch_norm(x, weight, bias, axis, eps, **options):
    affine = {"use_scale": weight is not None, "use_bias": bias is not None}
    return _filled(_built(nnx.BatchNorm, x, axis, eps, axis=axis, **affine, **options), weight, bias)


def _called(kind, x, weight, bias, axis, eps, mask, **options):
    affine = {"use_scale": weight is not None, "use_bias": bias is not None}
    return _masked(_filled(_built(kind, x, axis, eps, **affine, **options), weight, bias), x, mask)


def _masked(layer, x, mask):
    return layer(x) if mask is None else jnp.where(mask, layer(x, mask=mask), 0)


def _built(kind, x, feature, eps, **options):
    """A layer with a state of its own, from a definition that is made once, as a program would."""
    made = _defined(kind, x.shape[feature], epsilon=eps, dtype=x.dtype, param_dtype=x.dtype, **options)
    return nnx.merge(*made, copy=True)


@functools.lru_cache(maxsize=256)
def _defined(kind, size, **options):
    with jax.ensure_compile_time_eval():  # under jit too, the first state is made of values
        return nnx.split(kind(size, rngs=nnx.Rngs(0), **options))


def _filled(layer, weight, bias):
    if weight is not None:
        layer.scale.set_value(weight)
    if bias is not None:
        layer.bias.set_value(bias)
    return layer
