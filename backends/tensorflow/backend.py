"""TensorFlow: eager and in graphs, with the core's gradient as a custom gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.autograph.core import config as autograph
from tensorflow.python.eager import record

from normkit.backends import kernels
from normkit.backends.protocol import Array, ArrayBackend
from normkit.backends.tensorflow import graphs, namespace
from normkit.core.moments import (
    PART,
    Habits,
    Moments,
    Plain,
    Rescued,
    accumulation_dtype,
    is_number,
    rescue_always,
    rescue_if_needed,
)
from normkit.core.normalize import BatchStats, Gradients, Operands, counted, forward, returned_stats, vjp
from normkit.core.plan import Plan, Shape, product

#: The commonest first: to be the same object is quick to see.
_FLOATING = (tf.float32, tf.bfloat16, tf.float16, tf.float64)


def rescue_by_cond(plain: Plain, rescued: Rescued) -> tuple[Array, ...]:
    """In a graph the choice is part of it: as costly as LayerNorm itself are the other sums, and seldom wanted."""
    right, result = plain()
    return tf.cond(right, lambda: result, rescued)


#: For gradients, which are summed over leading axes whatever the layer normalizes.
WIDE = Habits(wide=True, moves=True)
WIDE_AT_HAND = Habits(wide=True, hasty=True)
#: A graph may be compiled, and XLA as TensorFlow ships it adds one by one along any axis.
GRAPH = Habits(longest=64, rescue=rescue_by_cond, moves=True, part=PART)
#: What is compiled is a loop for each sum and for each stage of one: where those are short, two sums in float64 are
#: faster than what GRAPH makes of them, and side by side where a set's numbers are few.
SHORT = GRAPH._replace(one_pass=True)
LANES = 16
#: Of so many elements, or neighbours in each set, a call is short; of so many neighbours lanes are faster; of so many
#: rows a sum over them in float64. ``normkit bench`` without kernels shows what they are worth.
SHORT_CALL, SHORT_RUN, LANES_RUN, SHORT_COLUMN = 1 << 16, 64, 256, 512

#: The type of tensors that have values; tf.Tensor is that of symbolic ones too.
EagerTensor = tf.__internal__.EagerTensor
_ARRAYS = (EagerTensor, tf.Tensor, tf.Variable)


# No function here looks at values as if it had them: TensorFlow need not rewrite what a graph calls.
autograph.CONVERSION_RULES = (autograph.DoNotConvert("normkit"), *autograph.CONVERSION_RULES)


class TensorflowBackend(ArrayBackend):
    """Sums along the last axes are trees; over leading axes TensorFlow adds one by one, so those are in float64."""

    name = "tensorflow"

    def __init__(self) -> None:
        super().__init__(namespace)

    def shape(self, x: Array) -> Shape:
        try:
            return tuple(x.shape.as_list())
        except ValueError:
            raise ValueError(
                "Arrays must have a known number of axes; received a tensor of unknown rank: give it a shape."
            ) from None

    def dtype(self, x: Array) -> str:
        dtype = x.dtype
        # There is one object of each dtype, and it is slow to hash.
        name = self._dtype_names.get(id(dtype))
        if name is None:
            name = self._dtype_names[id(dtype)] = dtype.name
        return name

    def suit(self, operands: Operands, shape: Shape, device: Any) -> bool:
        shape = tuple(shape)
        for a in operands[1:5]:
            if a is None:
                continue
            if not isinstance(a, _ARRAYS) or a.dtype not in _FLOATING or self.shape(a) != shape:
                return False
        return True

    def least(self, x: Array) -> float:
        if type(x) is not EagerTensor:
            if not (isinstance(x, tf.Variable) and tf.executing_eagerly()):
                return 0.0
            x = tf.convert_to_tensor(x)
        if kernels.negative(x) is False or not _on_host(x):
            return 0.0
        return min(float(x.numpy().astype("f8", copy=False).min()), 0.0)

    def at_hand(self, x: Array, *, wait: bool = False) -> bool:
        there = type(x) is EagerTensor or (isinstance(x, tf.Variable) and tf.executing_eagerly())
        return there and (wait or _on_host(x))

    def constant(self, x: Array) -> Array:
        return tf.stop_gradient(x)

    def positions(self, x: Array, axis: int, dtype: Any) -> Array:
        n = tf.shape(x)[axis]
        return tf.reshape(tf.cast(tf.range(n), dtype), [n, *(1 for _ in x.shape[axis + 1 :])])

    def apply(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None]:
        eager, operands = _eager(operands), _read(operands)
        served = kernels.accelerates(plan, operands, None if eager else graphs.program(derived=False))
        if served and eager and not record.could_possibly_record():
            y, packed = kernels.forward(plan, operands, save=plan.layer == "batch_norm_train")
            return y, kernels.batch_stats(plan, packed)
        names = tuple(name for name, a in zip(Operands._fields, operands, strict=True) if a is not None)
        arrays = (a for a in operands if a is not None)
        if served and eager:
            y, *stats = _recorded(plan, names, *arrays)
        elif served:
            y, *stats = graphs.normalizer(graphs.caller(), plan, names, _formula)(*arrays)
        else:
            y, *stats = _normalizer(plan, names)(*arrays)
            return y, counted(plan, operands.mask, BatchStats(*stats) if stats else None)
        return y, BatchStats(stats[0], stats[1], _count(plan, operands.x)) if stats else None

    def vjp(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None, Callable[[Array], Gradients]]:
        eager, operands = _eager(operands), _read(operands)
        served = kernels.accelerates(plan, operands, None if eager else graphs.program(derived=True))
        if served and eager:
            y, packed = kernels.forward(plan, operands)
            return y, kernels.batch_stats(plan, packed), lambda dy: kernels.vjp(plan, operands, packed, dy)
        if served:
            caller = graphs.caller()
            y, packed = graphs.forward(caller, plan, operands)
            stats = graphs.batch_stats(plan, packed, _count(plan, operands.x))
            return y, stats, lambda dy: graphs.vjp(caller, plan, operands, packed, dy)
        habits = _habits(plan, operands.x)
        y, used = forward(namespace, plan, operands, habits, count=_count(plan, operands.x))

        def pullback(dy: Array) -> Gradients:
            return vjp(namespace, plan, operands, used, dy, WIDE)

        return y, returned_stats(namespace, plan, operands, used), pullback

    def create(self, values: Any, dtype: str, device: Any | None = None) -> Array:
        with tf.device(device):
            return tf.convert_to_tensor(values, dtype)


# TensorFlow takes milliseconds to make a function with a custom gradient, so each is made once.
@functools.lru_cache(maxsize=4096)
def _normalizer(plan: Plan, names: tuple[str, ...]) -> Callable:
    @tf.custom_gradient
    def normalize(*arrays):
        operands = graphs.named(names, arrays)
        habits, count = _habits(plan, operands.x), _count(plan, operands.x)
        y, used = forward(namespace, plan, operands, habits, count=count)
        stats = returned_stats(namespace, plan, operands, used)
        stopped = tuple(map(tf.stop_gradient, stats or ()))
        if not tf.executing_eagerly():
            # TensorFlow has not all that is in the gradient of a conditional's gradient, and XLA still less.
            constant = Moments(*(a if a is None or is_number(a) else tf.stop_gradient(a) for a in used))
            pullback = functools.partial(_pullback, plan, constant)
            twice = graphs.twice(plan, names, pullback, _formula)
            return (y, *stopped), lambda dy, *_: twice(dy, arrays)

        def gradient(dy, *_):
            found = vjp(namespace, plan, operands, used, dy, WIDE)._asdict()
            return [found.get(name) for name in names]

        return (y, *stopped), gradient

    return lambda *arrays: normalize(*map(tf.convert_to_tensor, arrays))


def _pullback(plan: Plan, used: Moments, operands: Operands, dy: Array) -> Gradients:
    return vjp(namespace, plan, operands, used, dy, _habits_of_gradients(plan))


def _recorded(plan: Plan, names: tuple[str, ...], *arrays: Array) -> tuple[Array, ...]:
    """y and the batch's statistics by a kernel, for a tape: tf.custom_gradient would take ten times a small kernel."""
    operands = graphs.named(names, arrays)
    with record.stop_recording():
        y, packed = kernels.forward(plan, operands)
        found = (y, *(kernels.batch_stats(plan, packed) or ())[:2])

    def gradient(dy: Array, *_: Array) -> list[Array | None]:
        if type(dy) is EagerTensor and not record.could_possibly_record():
            gradients = kernels.vjp(plan, operands, packed, dy)
        else:
            # A gradient of this gradient is wanted: the moments are part of what is differentiated.
            gradients = _formula(plan, operands, dy)
        return [getattr(gradients, name) for name in names]

    record.record_operation("normkit", found, arrays, gradient)
    return found


def _formula(plan: Plan, operands: Operands, dy: Array) -> Gradients:
    """The gradients, and what they are gradients of, in TensorFlow's own operations."""
    eager = tf.executing_eagerly()
    # Not rescue_by_cond: XLA has not all that is in the gradient of a gradient's branch.
    habits = _habits(plan, operands.x) if eager else GRAPH._replace(rescue=rescue_always)
    used = forward(namespace, plan, operands, habits, count=_count(plan, operands.x))[1]
    return vjp(namespace, plan, operands, used, dy, _habits_of_gradients(plan))


def _eager(operands: Operands) -> bool:
    """Whether the arrays have values now."""
    kinds = {type(a) for a in operands} - {EagerTensor, type(None)}
    return all(issubclass(kind, tf.Variable) for kind in kinds) and tf.executing_eagerly()


def _read(operands: Operands) -> Operands:
    """Tensors in place of variables, and of a mask whose lengths a graph cannot tell from x's one of x's shape."""
    read = Operands(*(a if a is None or type(a) is EagerTensor else tf.convert_to_tensor(a) for a in operands))
    x, mask = read.x, read.mask
    if mask is None or all(
        n in (1, m) and n is not None for n, m in zip(mask.shape[::-1], x.shape[::-1], strict=False)
    ):
        return read
    return read._replace(mask=tf.ensure_shape(tf.broadcast_to(mask, tf.shape(x)), x.shape))


def _on_host(x: Array) -> bool:
    return x.device.endswith("CPU:0")


def _habits(plan: Plan, x: Array) -> Habits:
    if not tf.executing_eagerly():
        size, run = product(plan.view), plan.run
        if size is None or run is None or not graphs.compiles() or not (size <= SHORT_CALL or 1 < run <= SHORT_RUN):
            return GRAPH
        return SHORT._replace(lanes=LANES if LANES <= run <= LANES_RUN else 0)
    if _on_host(x):
        return Habits(wide=True, staged=True, rescue=rescue_if_needed, hasty=True)
    return Habits(wide=not plan.trailing)


def _habits_of_gradients(plan: Plan) -> Habits:
    if tf.executing_eagerly():
        return WIDE_AT_HAND
    rows = product(plan.view[a] for a in plan.param_axes)
    short = plan.trailing and rows is not None and GRAPH.longest < rows <= SHORT_COLUMN
    return WIDE if short and graphs.compiles() else GRAPH


def _count(plan: Plan, x: Array) -> Array | int:
    if plan.count is not None:
        return plan.count
    lengths = namespace.lengths(x, plan.view)
    return math.prod(tf.cast(lengths[a], accumulation_dtype(namespace, x.dtype)) for a in plan.axes)
