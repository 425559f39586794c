"""TensorFlow's own functions without Keras: the fused batch norm, and tf.nn.batch_normalization in inference."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from normkit.conformance.natives import Convention, Unsupported, axes_of, only

NAME = "tf.nn"
CONVENTION = Convention(weights="old", unbiased=True)

Array = Any


def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5) -> Array:
    """Not in tf.nn."""
    raise Unsupported("tf.nn has no layer norm; Keras has")


def rms_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-6, weight_offset=0.0) -> Array:
    """Not in tf.nn."""
    raise Unsupported("tf.nn has no RMS norm; Keras has")


def group_norm(x, num_groups, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """Not in tf.nn."""
    raise Unsupported("tf.nn has no group norm; Keras has")


def instance_norm(x, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """Not in tf.nn."""
    raise Unsupported("tf.nn has no instance norm; Keras has group norm")


def batch_norm(x, mean, var, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """tf.nn.batch_normalization."""
    only(axes_of(axis, x.shape.rank) == (x.shape.rank - 1,), "tf.nn has the channels last on the CPU")
    only(x.dtype in (tf.float32, tf.float64), "tf.nn.batch_normalization wants the statistics in x's dtype")
    return tf.nn.batch_normalization(x, mean, var, bias, weight, eps)


def batch_norm_train(x, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """tf.compat.v1.nn.fused_batch_norm."""
    return _fused(x, weight, bias, axis, eps)[0]


def running_statistics(steps, dtype, *, axis=-1, momentum: float | None = 0.9) -> tuple[Array, Array]:
    """Running mean and variance, merged from what the fused batch norm returns."""
    if momentum is None:
        raise Unsupported("tf.nn has no cumulative average")
    mean, var = tf.zeros(steps[0].shape[-1], dtype), tf.ones(steps[0].shape[-1], dtype)
    for x in steps:
        _, batch_mean, batch_var = _fused(x, None, None, axis, 1e-3)
        mean = momentum * mean + (1 - momentum) * batch_mean
        var = momentum * var + (1 - momentum) * batch_var
    return mean, var


def _fused(x, weight, bias, axis, eps):
    only(x.shape.rank == 4 and axes_of(axis, 4) == (3,), "the fused batch norm takes NHWC on the CPU")
    only(x.dtype != tf.float64, "the fused batch norm has no float64")
    channels = x.shape[-1]
    weight = tf.ones(channels) if weight is None else tf.cast(weight, tf.float32)
    bias = tf.zeros(channels) if bias is None else tf.cast(bias, tf.float32)
    return tf.compat.v1.nn.fused_batch_norm(x, weight, bias, epsilon=eps, is_training=True)
