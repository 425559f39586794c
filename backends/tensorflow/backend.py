"""TensorFlow: eager and in graphs, with the core's gradient as a custom gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from normkit.backends.protocol import Array, ArrayBackend
from normkit.backends.tensorflow import namespace
from normkit.core.moments import Habits, accumulation_dtype, rescue_always, rescue_if_needed
from normkit.core.normalize import BatchStats, Gradients, Operands, forward, returned_stats, vjp
from normkit.core.plan import Plan, Shape


class TensorflowBackend(ArrayBackend):
    """Sums along the last axes are trees; over leading axes TensorFlow adds one by one, so they are taken in float64."""

    name = "tensorflow"

    def __init__(self) -> None:
        super().__init__(namespace)

    def shape(self, x: Array) -> Shape:
        return tuple(x.shape)

    def dtype(self, x: Array) -> str:
        return x.dtype.name

    def peek(self, x: Array) -> Any | None:
        return x.numpy() if tf.executing_eagerly() and _on_host(x) and x.dtype != tf.bfloat16 else None

    def apply(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None]:
        operands = _tensors(operands)
        names = [name for name in Gradients._fields if getattr(operands, name) is not None]

        @tf.custom_gradient
        def normalize(*arrays):
            given = operands._replace(**dict(zip(names, arrays, strict=True)))
            habits, count = _habits(plan, given.x), _count(plan, given.x)
            y, used = forward(namespace, plan, given, habits, count=count)
            stats = returned_stats(namespace, plan, given, used)

            def gradient(dy, *_):
                found = vjp(namespace, plan, given, used, dy, habits)
                return [getattr(found, name) for name in names]

            return (y, *(stats or ())), gradient

        y, *stats = normalize(*(getattr(operands, name) for name in names))
        return y, BatchStats(*map(tf.stop_gradient, stats)) if stats else None

    def vjp(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None, Callable[[Array], Gradients]]:
        operands = _tensors(operands)
        habits = _habits(plan, operands.x)
        y, used = forward(namespace, plan, operands, habits, count=_count(plan, operands.x))

        def pullback(dy: Array) -> Gradients:
            return vjp(namespace, plan, operands, used, dy, habits)

        return y, returned_stats(namespace, plan, operands, used), pullback

    def create(self, values: Any, dtype: str, device: Any | None = None) -> Array:
        with tf.device(device):
            return tf.convert_to_tensor(values, dtype)


def _tensors(operands: Operands) -> Operands:
    return Operands(*(None if a is None else tf.convert_to_tensor(a) for a in operands))


def _on_host(x: Array) -> bool:
    return x.device.endswith("CPU:0")


def _habits(plan: Plan, x: Array) -> Habits:
    if not tf.executing_eagerly():
        # The graph may be compiled: XLA as TensorFlow ships it adds one by one along any axis.
        return Habits(wide=True)
    return Habits(wide=not plan.trailing, rescue=rescue_if_needed if _on_host(x) else rescue_always)


def _count(plan: Plan, x: Array) -> Array | int:
    if plan.count is not None:
        return plan.count
    lengths = namespace.lengths(x, plan.view)
    return math.prod(tf.cast(lengths[a], accumulation_dtype(namespace, x.dtype)) for a in plan.axes)
