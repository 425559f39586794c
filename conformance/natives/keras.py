"""Keras 3's own layers on its TensorFlow backend, called without state of their own."""

from __future__ import annotations

import functools
from typing import Any

import keras

from normkit.conformance.natives import Convention, axes_of, only

NAME = "keras"
CONVENTION = Convention(weights="old", unbiased=False)

Array = Any


def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5) -> Array:
    """keras.layers.LayerNormalization: any axes."""
    axes = axes_of(axis, len(x.shape))
    return _called(
        keras.layers.LayerNormalization, x, weight, bias, axis=axes if len(axes) > 1 else axes[0], epsilon=eps
    )


def rms_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-6, weight_offset=0.0) -> Array:
    """keras.layers.RMSNormalization: trailing axes, with weight, no bias."""
    only(bias is None, "Keras's RMSNormalization has no bias")
    only(weight is not None, "Keras's RMSNormalization always has a weight")
    only(weight_offset == 0, "Keras's RMSNormalization has no weight_offset")
    axes = axes_of(axis, len(x.shape))
    only(
        axes == tuple(range(len(x.shape) - len(axes), len(x.shape))),
        "Keras's RMSNormalization takes trailing axes only",
    )
    # Before 3.14 it takes no tuple.
    layer = _built(keras.layers.RMSNormalization, x, axis=axes if len(axes) > 1 else axes[0], epsilon=eps)
    return layer.stateless_call([weight], [], x)[0]


def group_norm(x, num_groups, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """keras.layers.GroupNormalization."""
    (axis,) = axes_of(axis, len(x.shape))
    return _called(keras.layers.GroupNormalization, x, weight, bias, groups=num_groups, axis=axis, epsilon=eps)


def instance_norm(x, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """keras.layers.GroupNormalization with one group for each channel, as Keras has no other."""
    (axis,) = axes_of(axis, len(x.shape))
    return _called(keras.layers.GroupNormalization, x, weight, bias, groups=x.shape[axis], axis=axis, epsilon=eps)


def batch_norm(x, mean, var, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """keras.layers.BatchNormalization in inference."""
    return _batch_norm(x, weight, bias, [mean, var], axis, eps, training=False)


def batch_norm_train(x, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None) -> Array:
    """keras.layers.BatchNormalization in training."""
    only(mask is None, "Keras's mask has one dimension less than x, and divides by count + 1e-7")
    return _batch_norm(x, weight, bias, None, axis, eps, training=True)


def running_statistics(steps, dtype, *, axis=-1, momentum: float | None = 0.9) -> tuple[Array, Array]:
    """Moving mean and variance of a BatchNormalization after the batches in ``steps``."""
    only(momentum is not None, "Keras has no cumulative average")
    x = steps[0]
    layer = _new(keras.layers.BatchNormalization, x.dtype.name, tuple(x.shape), axis=axis, momentum=momentum)
    for x in steps:
        layer(x, training=True)
    return layer.moving_mean.value, layer.moving_variance.value


def _batch_norm(x, weight, bias, stats, axis, eps, *, training):
    affine = {"scale": weight is not None, "center": bias is not None}
    layer = _built(keras.layers.BatchNormalization, x, axis=axis, epsilon=eps, **affine)
    stats = stats or [v.value for v in layer.non_trainable_variables]
    return layer.stateless_call([p for p in (weight, bias) if p is not None], stats, x, training=training)[0]


def _called(kind, x, weight, bias, **options):
    layer = _built(kind, x, scale=weight is not None, center=bias is not None, **options)
    return layer.stateless_call([p for p in (weight, bias) if p is not None], [], x)[0]


def _built(kind, x, **options):
    """Made once, as a program would: parameters and statistics are given in each call."""
    return _remembered(kind, x.dtype.name, tuple(x.shape), **options)


def _new(kind, dtype, shape, **options):
    backend = keras.backend.backend()
    only(backend == "tensorflow", f"Keras runs on {backend} here; TensorFlow is measured")
    layer = kind(dtype=dtype, **options)
    layer.build(shape)
    return layer


_remembered = functools.lru_cache(maxsize=256)(_new)
