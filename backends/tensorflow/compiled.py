"""The fused CPU kernels in what XLA compiles for TensorFlow: custom calls, differentiated by the core's formula."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf
from tensorflow.python.eager import forwardprop_util, record
from tensorflow.python.ops import control_flow_util
from tensorflow.python.saved_model import save_context

from normkit.backends import kernels
from normkit.backends.kernels import programs
from normkit.backends.kernels.programs import GRADIENTS, SLOTS, STATS, TARGET, TYPES, description, sample, turned
from normkit.backends.protocol import Array
from normkit.backends.tensorflow import modules
from normkit.core.normalize import BatchStats, Gradients, Operands
from normkit.core.plan import Plan

_PROCESSORS = {"CPU", "XLA_CPU"}
_OPERATIONS = ("XlaCustomCallV2", "XlaCallModule")
#: What registered gradients are named by: no name may come twice.
_numbers = itertools.count()

#: The formula's values and gradients in this graph: what derivatives of the kernels' gradients are made of.
Formula = Callable[[Plan, Operands, Array], Gradients]


class Operations(NamedTuple):
    """How XLA is told to call a function: of arrays whose shapes are known, and by a module where lengths are not."""

    custom_call: Callable
    module: Callable


@functools.cache
def _operations() -> Operations | None:
    """The operations that call a function of ours in XLA; ``None`` where this TensorFlow has them not."""
    try:
        from tensorflow.compiler.tf2xla.ops import gen_xla_ops

        found = Operations(gen_xla_ops.xla_custom_call_v2, gen_xla_ops.xla_call_module)
    except (ImportError, AttributeError):
        return None
    return found if kernels.tensorflow_calls(Path(tf.__file__).parent / "libtensorflow_cc.so.2") else None


def compiles() -> bool:
    """Whether what is being written is a graph that XLA compiles."""
    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def serves(plan: Plan, operands: Operands) -> bool:
    """Whether kernels serve a call in such a graph: on processors, with all of a kernel's sizes known, or all but one.

    A graph that is written while a model is saved (again, then) must run where normkit is not.
    """
    arrays = [a for a in operands if a is not None]
    if operands.mask is not None or not all(a.dtype.name in TYPES for a in arrays):
        return False
    one = sample(plan)
    if not kernels.could_serve(one.plan if one else plan):
        return False
    if save_context.in_save_context() or any(
        d.device_type not in _PROCESSORS for d in tf.config.list_logical_devices()
    ):
        return False
    # Forward accumulators pass over custom gradients in a graph.
    return not forwardprop_util.pack_tangents(arrays).tangents and _operations() is not None


def forward(plan: Plan, operands: Operands) -> tuple[Array, Array | None]:
    """``y``, and the statistics that a gradient needs, row by row as :func:`programs.saved` names them."""
    found = _call(plan, programs.given(operands), ("y",) if operands.mean is not None else ("y", STATS))
    return found["y"], found.get(STATS)


def vjp(plan: Plan, operands: Operands, stats: Array | None, dy: Array) -> Gradients:
    """Gradients of ``sum(y * dy)`` for all operands that are given."""
    given = programs.given(operands)
    wanted = [slot for name, slot in zip(programs.OPERANDS, GRADIENTS, strict=True) if name in given]
    given["dy"] = tf.cast(dy, operands.x.dtype)
    if stats is not None:
        given[STATS] = stats
    return Gradients(*map(_call(plan, given, wanted).get, GRADIENTS))


def batch_stats(plan: Plan, stats: Array | None, count: Array | int) -> BatchStats | None:
    """The statistics as they leave :func:`normkit.batch_norm_train`; ``None`` for every other layer."""
    if not plan.stats_shape or stats is None:
        return None
    used = kernels.moments(plan, stats)
    assert used.mean is not None
    mean, var = (tf.reshape(a, plan.stats_shape) for a in (used.mean + used.residue, used.var))
    return BatchStats(mean, var, count)


def _pullback(plan: Plan, packed: Array | None, operands: Operands, dy: Array) -> Gradients:
    return vjp(plan, operands, packed, dy)


def _named(names: Sequence[str], arrays: Sequence[Array]) -> Operands:
    return Operands(**dict(zip(names, arrays, strict=True)))


@functools.lru_cache(maxsize=4096)
def normalizer(plan: Plan, names: tuple[str, ...], formula: Formula) -> Callable:
    """The call as one differentiable function of the operands with these names.

    The custom call itself has the gradient: tf.custom_gradient would pass all operands through an operation of its own,
    and a tape around the compiled function would take each of them, and a zero for its gradient, out of it and back.
    """
    straight, order, inverse = turned(plan)
    results = ("y",) if "mean" in names else ("y", STATS)

    def gradients(dy, inputs, packed):
        pullback = functools.partial(_pullback, straight, packed)
        return twice(straight, names, pullback, formula)(dy, inputs)

    @tf.RegisterGradient(registered := f"normkit_{next(_numbers)}")
    def of_operation(op, dy, *_):
        return gradients(dy, op.inputs, *op.outputs[1:] or (None,))

    def normalize(*arrays):
        x, *params = map(tf.convert_to_tensor, arrays)
        inputs = [x if order is None else tf.transpose(x, order), *params]
        graph = tf.compat.v1.get_default_graph()
        with record.stop_recording(), graph.gradient_override_map(dict.fromkeys(_OPERATIONS, registered)):
            found = _call(straight, programs.given(_named(names, inputs)), results)
        y, packed = found["y"], found.get(STATS)
        record.record_operation(registered, list(found.values()), inputs, lambda dy, *_: gradients(dy, inputs, packed))
        # What becomes of the statistics where x moves, the formula says.
        stats = batch_stats(plan, packed if packed is None else tf.stop_gradient(packed), 0)
        return (y if inverse is None else tf.transpose(y, inverse), *(stats[:2] if stats else ()))

    return normalize


def twice(
    plan: Plan, names: tuple[str, ...], pullback: Callable[[Operands, Array], Gradients], formula: Formula
) -> Callable[[Array, Sequence[Array]], list[Array | None]]:
    """The gradients, of dy and the operands with these names, whose own gradients are those of the formula."""
    with_gradient = [name for name in names if name != "mask"]

    @tf.custom_gradient
    def pull_back(dy, *arrays):
        found = pullback(_named(names, arrays), dy)

        def derivative(*slopes):
            moving = [a for a in arrays if a.dtype.is_floating]
            # A tape sees nothing while a forward accumulator is at work.
            with forwardprop_util.push_forwardprop_state(), tf.GradientTape() as tape:
                tape.watch([dy, *moving])
                gradients = formula(plan, _named(names, arrays), dy)
                values = [getattr(gradients, name) for name in with_gradient]
            first, *others = tape.gradient(values, [dy, *moving], slopes)
            rest = iter(others)
            return [first, *(next(rest) if a.dtype.is_floating else None for a in arrays)]

        return [getattr(found, name) for name in with_gradient], derivative

    def gradients(dy, arrays):
        # Identities: a gradient may be a graph of its own, and its gradient another, which sees no further back.
        found = iter(pull_back(dy, *map(tf.identity, arrays)))
        return [None if name == "mask" else next(found) for name in names]

    return gradients


def _call(plan: Plan, given: dict[str, Array], results: Sequence[str]) -> dict[str, Array]:
    """The results by name; what is in the place of y has x's axes as they were."""
    plan, order, inverse = turned(plan)
    if order is not None:
        given |= {name: tf.transpose(given[name], order) for name in ("x", "dy") if name in given}
    given = {name: given[name] for name in SLOTS if name in given}
    dtypes = {name: a.dtype for name, a in given.items()}
    one = sample(plan)
    layouts = programs.layouts(one.plan if one else plan, dtypes, _accumulation(dtypes["x"]))
    shape, dtype = layouts[STATS]
    layouts[STATS] = (len(programs.saved(plan)), *shape), dtype
    wanted = {name: layouts[name] for name in results}
    there = {name: dtype.name for name, dtype in (dtypes | {n: dtype for n, (_, dtype) in wanted.items()}).items()}
    operations = _operations()
    assert operations is not None, "serves() was not asked"
    if one:
        text = description(one.plan, there, one.times)
        found = modules.call(operations.module, plan, text, given, wanted)
    else:
        found = operations.custom_call(
            operands=list(given.values()),
            call_target_name=TARGET,
            backend_config=description(plan, there),
            has_side_effect=False,
            result_dtypes=[dtype for _, dtype in wanted.values()],
            result_shapes=[shape for shape, _ in wanted.values()],
        )
    by_name = dict(zip(results, found, strict=True))
    if inverse is not None:
        by_name["y"] = tf.transpose(by_name["y"], inverse)
    return by_name


def _accumulation(dtype: tf.DType) -> tf.DType:
    return tf.float64 if dtype == tf.float64 else tf.float32
