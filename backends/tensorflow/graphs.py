"""The fused CPU kernels in TensorFlow's graphs, differentiated by the core's formula: XLA's calls, and an operation."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import tensorflow as tf
from tensorflow.python.eager import forwardprop_util, record
from tensorflow.python.framework import op_def_library
from tensorflow.python.ops import control_flow_util
from tensorflow.python.ops.parallel_for import control_flow_ops as parallel_for
from tensorflow.python.saved_model import save_context

from normkit.backends import kernels
from normkit.backends.kernels import programs
from normkit.backends.kernels.programs import (
    GRADIENTS,
    SLOTS,
    STATS,
    TARGET,
    TYPES,
    Sample,
    description,
    sample,
    turned,
)
from normkit.backends.kernels.routes import reordered, route
from normkit.backends.protocol import Array
from normkit.backends.tensorflow import modules
from normkit.core.normalize import BatchStats, Gradients, Operands
from normkit.core.plan import Plan

#: The operation that src/operation.cpp defines.
OPERATION = "NormkitCall"
_PROCESSORS = {"CPU", "XLA_CPU"}
_OPERATIONS = ("XlaCustomCallV2", "XlaCallModule", OPERATION)
#: What registered gradients are named by: no name may come twice.
_numbers = itertools.count()
#: What is asked for a graph; and what makes one call of many, of operations that TensorFlow knows how to.
_ASKED = type(tf.function(lambda: None)).get_concrete_function.__code__
_VECTORIZES = getattr(getattr(parallel_for, "_pfor_impl", None), "__code__", None)

#: The formula's values and gradients in this graph: what derivatives of the kernels' gradients are made of.
Formula = Callable[[Plan, Operands, Array], Gradients]


class Call(NamedTuple):
    """A kernel's call with its operands, as the graph is to hold it: of one length, where lengths are unknown."""

    plan: Plan
    one: Sample | None
    given: dict[str, Array]
    results: dict[str, modules.Layout]

    @property
    def text(self) -> str:
        """What the kernel reads."""
        layouts = {name: a.dtype.name for name, a in self.given.items()}
        layouts |= {name: dtype.name for name, (_, dtype) in self.results.items()}
        return description(self.one.plan, layouts, self.one.times) if self.one else description(self.plan, layouts)

    @property
    def dtypes(self) -> list[tf.DType]:
        """Those of the results."""
        return [dtype for _, dtype in self.results.values()]


#: How a graph comes to hold a call: its results in order.
Caller = Callable[[Call], Sequence[Array]]


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
    return found if kernels.tensorflow_calls(_library("cc")) else None


@functools.cache
def _operation() -> bool:
    """Whether this TensorFlow has the operation now."""
    return kernels.tensorflow_operation(_library("framework"))


def _library(name: str) -> Path:
    return Path(tf.__file__).parent / f"libtensorflow_{name}.so.2"


def compiles() -> bool:
    """Whether what is being written is a graph that XLA compiles."""
    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(_graph())


def program(*, derived: bool) -> kernels.Program:
    """What the graph that is being written may have: a kernel's call, of which gradients are taken or not.

    Kernels serve on processors, where all of their sizes are known, or all but one. A graph that is written while a
    model is saved (again, then) must run where normkit is not. So must one that is frozen or converted, of which is
    known while it is written that somebody asked for it, and that it is for inference: without a compiler, such a graph
    has a kernel only where they are required. What TensorFlow vectorizes has none.
    """

    def may(plan: Plan, operands: Operands) -> bool:
        arrays = [a for a in operands if a is not None]
        served = route(plan, False) or reordered(plan) or sample(plan)
        if served is None or not all(a.dtype.name in TYPES for a in arrays) or save_context.in_save_context():
            return False
        devices = tf.config.list_logical_devices()
        alone = len({d.name.partition("/device:")[0] for d in devices}) == 1
        if not alone or any(d.device_type not in _PROCESSORS for d in devices):
            return False
        # Forward accumulators pass over custom gradients in a graph.
        if forwardprop_util.pack_tangents(arrays).tangents or _for(_VECTORIZES):
            return False
        if compiles():
            return _operations() is not None
        trains, runs = derived or record.could_possibly_record(), isinstance(_graph(), tf.__internal__.FuncGraph)
        return _operation() and (trains or kernels.mode == "require" or (runs and not _for(_ASKED)))

    return may


def caller() -> Caller:
    """How the graph that is being written calls a kernel, where it may have one: its gradients do the same."""
    return _by_xla if compiles() else _by_operation


def _graph() -> tf.Graph:
    return tf.compat.v1.get_default_graph()


def _for(code: CodeType | None) -> bool:
    """Whether it is for this code that the graph is written."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def forward(caller: Caller, plan: Plan, operands: Operands) -> tuple[Array, Array | None]:
    """``y``, and the statistics that a gradient needs, row by row as :func:`programs.saved` names them."""
    found = _call(caller, plan, programs.given(operands), ("y",) if operands.mean is not None else ("y", STATS))
    return found["y"], found.get(STATS)


def vjp(caller: Caller, plan: Plan, operands: Operands, stats: Array | None, dy: Array) -> Gradients:
    """Gradients of ``sum(y * dy)`` for all operands that are given."""
    given = programs.given(operands)
    wanted = [slot for name, slot in zip(programs.OPERANDS, GRADIENTS, strict=True) if name in given]
    given["dy"] = tf.cast(dy, operands.x.dtype)
    if stats is not None:
        given[STATS] = stats
    return Gradients(*map(_call(caller, plan, given, wanted).get, GRADIENTS))


def batch_stats(plan: Plan, stats: Array | None, count: Array | int) -> BatchStats | None:
    """The statistics as they leave :func:`normkit.batch_norm_train`; ``None`` for every other layer."""
    if not plan.stats_shape or stats is None:
        return None
    used = kernels.moments(plan, stats)
    assert used.mean is not None
    mean, var = (tf.reshape(a, plan.stats_shape) for a in (used.mean + used.residue, used.var))
    return BatchStats(mean, var, count)


def named(names: Sequence[str], arrays: Sequence[Array]) -> Operands:
    """The operands with these names."""
    return Operands(**dict(zip(names, arrays, strict=True)))


@functools.lru_cache(maxsize=4096)
def normalizer(caller: Caller, plan: Plan, names: tuple[str, ...], formula: Formula) -> Callable:
    """The call as one differentiable function of the operands with these names.

    The operation itself has the gradient: tf.custom_gradient would pass all operands through an operation of its own,
    and a tape around the compiled function would take each of them, and a zero for its gradient, out of it and back.
    """
    straight, order, inverse = turned(plan)
    results = ("y",) if "mean" in names else ("y", STATS)

    def gradients(dy, inputs, packed):
        def kernel(operands, dy):
            return vjp(caller, straight, operands, packed, dy)

        pullback = functools.partial(formula, straight) if _for(_VECTORIZES) else kernel
        return twice(straight, names, pullback, formula)(dy, inputs)

    @tf.RegisterGradient(registered := f"normkit_{next(_numbers)}")
    def of_operation(op, dy, *_):
        return gradients(dy, op.inputs, *op.outputs[1:] or (None,))

    def normalize(*arrays):
        x, *params = map(tf.convert_to_tensor, arrays)
        inputs = [x if order is None else tf.transpose(x, order), *params]
        with record.stop_recording(), _graph().gradient_override_map(dict.fromkeys(_OPERATIONS, registered)):
            found = _call(caller, straight, programs.given(named(names, inputs)), results)
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
        found = pullback(named(names, arrays), dy)

        def derivative(*slopes):
            moving = [a for a in arrays if a.dtype.is_floating]
            # A tape sees nothing while a forward accumulator is at work.
            with forwardprop_util.push_forwardprop_state(), tf.GradientTape() as tape:
                tape.watch([dy, *moving])
                gradients = formula(plan, named(names, arrays), dy)
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


def _call(caller: Caller, plan: Plan, given: dict[str, Array], results: Sequence[str]) -> dict[str, Array]:
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
    found = caller(Call(plan, one, given, {name: layouts[name] for name in results}))
    by_name = dict(zip(results, found, strict=True))
    if inverse is not None:
        by_name["y"] = tf.transpose(by_name["y"], inverse)
    return by_name


def _by_xla(call: Call) -> Sequence[Array]:
    operations = _operations()
    assert operations is not None, "accelerates() was not asked"
    if call.one:
        return modules.call(operations.module, call.plan, call.text, call.given, call.results)
    return operations.custom_call(
        operands=list(call.given.values()),
        call_target_name=TARGET,
        backend_config=call.text,
        has_side_effect=False,
        result_dtypes=call.dtypes,
        result_shapes=[shape for shape, _ in call.results.values()],
    )


def _by_operation(call: Call) -> Sequence[Array]:
    x = call.given["x"]
    shapes = modules.shapes(call.plan, [*range(-1, -1 - x.shape.rank, -1)], call.results)
    found = op_def_library.apply_op(
        OPERATION,
        operands=list(call.given.values()),
        Tresults=call.dtypes,
        text=call.text,
        shapes=[n for shape in shapes for n in (len(shape), *shape)],
    )
    for a, shape in zip(found, shapes, strict=True):
        a.set_shape([x.shape[-1 - n] if n < 0 else n for n in shape])
    return found


def _accumulation(dtype: tf.DType) -> tf.DType:
    return tf.float64 if dtype == tf.float64 else tf.float32
