"""Fused CPU kernels for NumPy, PyTorch, TensorFlow and JAX, and the one place that decides when they serve a call.

``NORMKIT_KERNELS`` is ``1`` (the default: wherever they are of use), ``0`` (never) or ``require`` (a call that they
cannot serve raises; gradients of gradients, and what is traced for a compiler or a graph and is not given to them, are
made of plain operations in any mode). ``NORMKIT_ISA`` names an instruction set of :func:`info`;
``NORMKIT_HUGEPAGES=0`` leaves large outputs on small pages.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from normkit.backends.kernels.libraries import library_of
from normkit.backends.kernels.routes import KINDS, Reordered, Route, reordered, route, unwritten
from normkit.core.moments import Moments
from normkit.core.normalize import BatchStats, Gradients, Operands
from normkit.core.plan import Plan

try:
    _kernels: Any = importlib.import_module("normkit.backends.kernels._kernels")
except ImportError as _error:
    if os.environ.get("NORMKIT_ISA"):
        raise
    _kernels, _missing = None, f"The kernels are not built into this installation ({_error})."

Array = Any
ALL = Gradients(True, True, True, True, True)

built = _kernels is not None
_apply: Any = _kernels.apply if built else None
_pull_back: Any = _kernels.pull_back if built else None

#: Whether a value of an array in host memory is negative; ``None`` where the kernels cannot read it.
negative: Callable[[Array], bool | None] = _kernels.negative if built else lambda x: None

MODES = ("0", "1", "require")
mode = os.environ.get("NORMKIT_KERNELS") or "1"
if mode not in MODES:
    raise ValueError(f"NORMKIT_KERNELS must be 0, 1 or require; received {mode!r}.")


def current() -> str:
    """The mode, as a compiler is to read it: with another it reads again."""
    return mode


class KernelError(RuntimeError):
    """A kernel was required and cannot serve the call."""


#: Of a program that is being written, and whose arrays are to come: whether it may have a kernel for this call.
Program = Callable[[Plan, Operands], bool]


def accelerates(plan: Plan, operands: Operands, program: Program | None = None) -> bool:
    """Whether a kernel serves this call: then :func:`forward` and :func:`vjp` take the place of the core's.

    However small x is: a native layer is never called in place of a kernel, for its numbers are others, and accuracy is
    what is promised. Where PyTorch's own layer is faster on one thread (medians of turns, float32): layer norm below
    40 KB (by 1.4 of 4.5 µs at most); with a gradient, where the time is that of autograd's Python functions, layer norm
    below 250 KB, batch norm below 60 KB, of matrices below 200 KB, with given statistics below 800 KB, and by a few per
    cent group norm below 400 KB.

    What torch.compile reads, and graphs of TensorFlow, are programs: ``program`` in backends/torch/ops.py and in
    backends/tensorflow/graphs.py says what else counts there. One that may not have a kernel (it is exported, or
    vectorized, or faster without) is made of the library's operations, also where kernels are required.
    """
    if mode == "0":
        return False
    if program is None:
        return allows(plan, refusal(plan, operands))
    return built and operands.mask is None and unwritten(plan) is None and program(plan, operands)


def allows(plan: Plan, reason: str | None) -> bool:
    """Whether there is no ``reason`` against a kernel; where one is required, a reason raises."""
    if mode == "0":
        return False
    if reason is not None and mode == "require" and not plan.empty:
        raise KernelError(f"NORMKIT_KERNELS=require, but no kernel serves this {plan.layer}: {reason}")
    return reason is None


def refusal(plan: Plan, operands: Operands) -> str | None:
    """Why no kernel serves this call; ``None`` where one does."""
    if _kernels is None:
        return _missing
    x, weight, bias, mean, var, mask = operands
    library = library_of(type(x))
    if library is None:
        return f"arrays of type {type(x).__qualname__} have none."
    if library.elsewhere is not None:
        return library.elsewhere
    if mask is not None:
        return "a mask was given."
    layout = library.layout(x)
    if layout is None:
        return "x is not of native floating-point numbers in host memory."
    if route(plan, layout == "last") is None and reordered(plan) is None:
        return unwritten(plan) or f"there is none for axes {plan.axes} of shape {tuple(plan.view)}, {layout}."
    for operand in (weight, bias, mean, var):
        if operand is not None and library.layout(operand) is None:
            return "a parameter is not of native floating-point numbers in host memory."
    return None


class Applied(NamedTuple):
    """What became of a call: ``y``, the packed statistics where they are wanted, those of the batch if it has any."""

    y: Array
    packed: Array | None
    stats: BatchStats | None


def at_once(plan: Plan, x: Array, weight: Any, bias: Any, mean: Any, var: Any, save: bool = False) -> Applied | None:
    """What :func:`apply` returns, where it has served this plan; ``None`` where the arrays are others than it was for.

    Nothing need have been looked at but the shape of x: arrays that do not fit are among the others.
    """
    bound = plan.memo.get(x.dtype)
    if bound is None or mode == "0":
        return None
    made = _apply(bound, x, weight, bias, mean, var, save)
    if made is None:
        return None
    y, packed, batch_mean, batch_var = made
    return Applied(y, packed, None if batch_mean is None else BatchStats(batch_mean, batch_var, plan.count))


def apply(plan: Plan, operands: Operands, *, save: bool = False) -> Applied | None:
    """Run the kernel where one serves the call; ``save`` keeps what :func:`vjp` takes."""
    x, mask = operands.x, operands.mask
    if mask is None and plan.memo:
        found = at_once(plan, *operands[:5], save)
        if found is not None:
            return found
    if not accelerates(plan, operands):
        return None
    library, at = library_of(type(x)), route(plan, False)
    if at is not None and library.exports(x.dtype):
        # What was said of these arrays holds for all of this dtype in a known order.
        rows, last, scalars = 4 if plan.center else 2, route(plan, True), (plan.eps, plan.weight_offset, plan.center)
        plan.memo[x.dtype] = _kernels.bind(
            library.kinds,
            library.negated,
            library.empty_like,
            library.room(x, (rows, *at.moments_shape)),
            library.room(x, plan.stats_shape) if plan.stats_shape else None,
            plan.param_shape,
            *(*at[:5], *scalars),
            *(() if last is None else (*last[:5], *scalars)),
        )
    y, stats = forward(plan, operands, save=save or plan.layer == "batch_norm_train")
    return Applied(y, stats, batch_stats(plan, stats))


def forward(plan: Plan, operands: Operands, *, save: bool = True) -> tuple[Array, Array | None]:
    """``y`` and the packed statistics: one row each of mean, residue, var, rstd, or of var, rstd where not centred.

    There are no statistics where they were brought along, or where ``save`` is false.
    """
    library, at, order, x, params = _found(plan, operands)
    y = library.empty_like(x)
    stats = library.statistics(x, 4 if plan.center else 2, at.moments_shape) if save and operands.mean is None else None
    _call(library, False, plan, at, x, None, *params, y, stats, None, None, None, None)
    return (y if order is None else library.restored(y, order.inverse, operands.x)), stats


def gradients_at_once(
    plan: Plan, x: Array, dy: Array, weight: Any, bias: Any, mean: Any, var: Any, stats: Any, needs: Sequence[Any]
) -> tuple[Array | None, ...] | None:
    """What :func:`vjp` returns, without its name, where :func:`at_once` has served this plan; else ``None``."""
    bound = plan.memo.get(x.dtype)
    return None if bound is None else _pull_back(bound, x, dy, weight, bias, mean, var, stats, needs)


def vjp(plan: Plan, operands: Operands, stats: Array | None, dy: Array, needs: Gradients = ALL) -> Gradients:
    """Gradients of ``sum(y * dy)`` for the operands that are given and that ``needs`` marks."""
    found = gradients_at_once(plan, operands.x, dy, *operands[1:5], stats, needs)
    return gradients(plan, operands, stats, dy, needs) if found is None else Gradients(*found)


def gradients(plan: Plan, operands: Operands, stats: Array | None, dy: Array, needs: Gradients) -> Gradients:
    """What :func:`vjp` returns, where :func:`gradients_at_once` does not."""
    library, at, order, x, params = _found(plan, operands)
    dx = library.empty_like(x) if needs.x else None
    dparams = [
        library.empty_like(param) if param is not None and needed else None
        for param, needed in zip(params, needs[1:], strict=True)
    ]
    dy = library.like(dy if order is None else library.ordered(dy, order.order), x)
    _call(library, True, plan, at, x, dy, *params, dx, stats, *dparams)
    if dx is not None and order is not None:
        dx = library.restored(dx, order.inverse, operands.x)
    return Gradients(dx, *dparams)


def moments(plan: Plan, stats: Array) -> Moments:
    """The packed statistics as the core knows them."""
    count = plan.count or 0
    if plan.center:
        return Moments(stats[0], stats[1], stats[2], stats[3], count)
    return Moments(None, None, stats[0], stats[1], count)


def batch_stats(plan: Plan, stats: Array | None) -> BatchStats | None:
    """The packed statistics as they leave :func:`normkit.batch_norm_train`; ``None`` for every other layer."""
    if stats is None or plan.layer != "batch_norm_train":
        return None
    library = library_of(type(stats))
    mean, var = (library.statistics(stats, *plan.stats_shape, ()) for _ in range(2))
    _kernels.batch_stats(*library.exported((stats, mean, var)))
    return BatchStats(mean, var, plan.count)


class _Found(NamedTuple):
    """What a call needs, with x as the kernel sees it: where it is, or as a copy with its axes reordered."""

    library: Any
    route: Route
    order: Reordered | None
    x: Array
    params: list[Array | None]


def _found(plan: Plan, operands: Operands) -> _Found:
    x, weight, bias, mean, var, _ = operands
    library = library_of(type(x))
    params = [p if p is None or library.layout(p) == "first" else library.ordered(p) for p in (weight, bias, mean, var)]
    layout = library.layout(x)
    at = None if layout == "strided" else route(plan, layout == "last")
    if at is not None:
        return _Found(library, at, None, x, params)
    order = reordered(plan)
    assert order is not None, "accelerates() was not asked"
    return _Found(library, order.route, order, library.ordered(x, order.order), params)


def _call(library, backward: bool, plan: Plan, at: Route, *arrays: Array | None) -> None:
    _kernels.call(
        backward, at.kind, at.outer, at.groups, at.channels, at.inner, plan.eps, plan.weight_offset, plan.center,
        *(library.exported(arrays)),
    )  # fmt: skip


class Served(NamedTuple):
    """How many calls kernels have served."""

    forward: int = 0
    backward: int = 0

    def since(self, before: Served) -> Served:
        """What came after ``before``."""
        return Served(self.forward - before.forward, self.backward - before.backward)

    def path(self, **calls: int) -> str:
        """What served so many calls forward, backward: "kernel", "plain" (the library's operations) or "mixed"."""
        parts = [getattr(self, name) >= count for name, count in calls.items()]
        return "kernel" if all(parts) else "mixed" if any(self) else "plain"


def served() -> Served:
    """How many calls kernels have served in this process, in whatever library: counted where they run."""
    return Served() if _kernels is None else Served(*_kernels.served())


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Within, no kernel serves a call, for comparisons: the mode is the process's, so leave no other thread at work."""
    global mode
    before, mode = mode, "0"
    try:
        yield
    finally:
        mode = before


def limit_threads(count: int) -> None:
    """Use at most ``count`` threads; 0 lifts the limit. Results do not depend on it."""
    if _kernels is not None:
        _kernels.limit_threads(count)


def xla_handler() -> Any:
    """The kernels as a handler of XLA's foreign function interface, in a capsule."""
    return _kernels.xla_handler()


def tensorflow_calls(library: Path) -> bool:
    """Let the XLA of this libtensorflow_cc call the kernels; false where it cannot."""
    return _kernels is not None and _kernels.tensorflow_calls(str(library))


def tensorflow_operation(library: Path) -> bool:
    """Define the kernels' operation in this libtensorflow_framework, once; false where it cannot be."""
    return _kernels is not None and _kernels.tensorflow_operation(str(library))


def torch_operators(library: Path) -> bool:
    """Implement the operators of backends/torch/ops.py for this libtorch without Python; false where it is too old."""
    return _kernels is not None and _kernels.torch_operators(str(library))


def info() -> dict[str, Any]:
    """What is in use: the mode, and where the kernels are built the instruction set, threads and page size."""
    if _kernels is None:
        return {"mode": mode, "built": False, "reason": _missing}
    return {"mode": mode, "built": True, "kernels": KINDS, **_kernels.info()}


__all__ = [
    "MODES",
    "Applied",
    "KernelError",
    "Program",
    "Served",
    "accelerates",
    "allows",
    "apply",
    "at_once",
    "batch_stats",
    "forward",
    "gradients",
    "gradients_at_once",
    "info",
    "limit_threads",
    "mode",
    "moments",
    "negative",
    "off",
    "refusal",
    "served",
    "tensorflow_calls",
    "tensorflow_operation",
    "torch_operators",
    "vjp",
    "xla_handler",
]
