"""What the Keras tests need of a backend: arrays in and out, and gradients of a layer's or a model's call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

BACKEND = keras.backend.backend()


def numbers(*shape: int, seed: int = 0, spread: float = 2.0, offset: float = 3.0) -> np.ndarray:
    """Some float32 input."""
    return (np.random.default_rng(seed).normal(size=shape) * spread + offset).astype("f4")


def array(a: Any) -> np.ndarray:
    """What a tensor or a variable holds, in float64."""
    a = a.value if isinstance(a, keras.Variable) else a
    return (a if isinstance(a, np.ndarray) else keras.ops.convert_to_numpy(a)).astype("f8")


@contextlib.contextmanager
def computing(dtype: str) -> Iterator[None]:
    """With layers and arrays of that dtype where none is said."""
    try:
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        yield
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


def called(layer: Any, x: np.ndarray, dy: np.ndarray, **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """``y``, and the gradients of ``sum(y * dy)`` for x and the trainable weights; moving statistics move."""
    inputs, weights = keras.ops.convert_to_tensor(x), list(layer.trainable_variables)
    cotangent = keras.ops.convert_to_tensor(dy)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = layer(inputs, **options)
            loss = tf.reduce_sum(tf.cast(y, cotangent.dtype) * cotangent)
        found = tape.gradient(loss, [inputs, *(w.value for w in weights)])
    elif BACKEND == "torch":
        inputs = inputs.detach().requires_grad_()
        y = layer(inputs, **options)
        loss = (y.to(cotangent.dtype) * cotangent).sum()
        import torch

        found = torch.autograd.grad(loss, [inputs, *(w.value for w in weights)])
    else:
        import jax

        def run(inputs: Any, trained: Any) -> Any:
            y, state = layer.stateless_call(
                trained, [v.value for v in layer.non_trainable_variables], inputs, **options
            )
            return keras.ops.sum(keras.ops.cast(y, cotangent.dtype) * cotangent), (y, state)

        gradients, (y, state) = jax.jit(jax.grad(run, (0, 1), has_aux=True))(inputs, [w.value for w in weights])
        for variable, value in zip(layer.non_trainable_variables, state, strict=True):
            variable.assign(value)
        found = [gradients[0], *gradients[1]]
    return array(y), [array(g) for g in found]
