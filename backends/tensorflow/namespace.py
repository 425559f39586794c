"""The array API functions that the core and the study use, spelled in TensorFlow; array-api-compat has none."""

from __future__ import annotations

import tensorflow as tf

float32 = tf.float32
float64 = tf.float64
int32 = tf.int32

abs = tf.abs
all = tf.reduce_all
any = tf.reduce_any
exp = tf.exp
isfinite = tf.math.is_finite
log = tf.math.log
matrix_transpose = tf.linalg.matrix_transpose
maximum = tf.maximum
minimum = tf.minimum
ones_like = tf.ones_like
permute_dims = tf.transpose
sign = tf.sign
sqrt = tf.sqrt
tanh = tf.tanh
where = tf.where
zeros_like = tf.zeros_like


def astype(x, dtype, *, copy=True):
    return x if x.dtype == dtype else tf.cast(x, dtype)


def concat(arrays, *, axis):
    return tf.concat(arrays, axis)


def full_like(x, value):
    return tf.fill(tf.shape(x), tf.constant(value, x.dtype))


def max(x, *, axis, keepdims=False):
    return tf.reduce_max(x, axis, keepdims)


def sum(x, *, axis=None, dtype=None, keepdims=False):
    return tf.reduce_sum(x if dtype is None else astype(x, dtype), axis, keepdims)


def lengths(x, shape):
    """The axis lengths of a view of x. Those that the graph does not know are x's, in their order; -1 stays."""
    if None not in shape:
        return shape
    given = tf.shape(x)
    unknown = iter([given[a] for a, n in enumerate(x.shape) if n is None and not (a < len(shape) and shape[a] == -1)])
    return [next(unknown) if n is None else n for n in shape]


def reshape(x, shape):
    return tf.reshape(x, lengths(x, list(shape)))
