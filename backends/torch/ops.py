"""The kernels as operators of PyTorch's own (``torch.ops.normkit``), for graphs that ``torch.compile`` makes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import array_api_compat.torch as xp
import torch
from torch.autograd import forward_ad

from normkit.backends import kernels
from normkit.core import plan as plans
from normkit.core.moments import Habits
from normkit.core.normalize import BatchStats, Gradients, Operands, forward, vjp
from normkit.core.plan import Plan, Shape

_CALL = "int layer, int axes, int groups, float eps, float weight_offset"
_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var"

#: Safe in any layout; of branch-free operations.
_HABITS = Habits(wide=True, staged=True)

#: From so many elements a graph has the operator, without a gradient and with one: to call it, and for a gradient
#: twice, costs what Inductor's own loops take for these, and those join their neighbours. Measured.
SMALLEST = (1 << 15, 3 << 15)
#: And where no moments are computed: with a gradient, for without one that is one loop.
SMALLEST_GIVEN = 1 << 20
#: From so many a buffer for each row's factor costs less than to compute it anew for each vector of the row.
SMALLEST_STORED = 1 << 11
#: From so many one for each row's mean does.
SMALLEST_MEAN = 1 << 13
#: Of so many sets or more, each sum along memory is taken in so many side by side: the numbers of a vector. Of fewer,
#: Inductor would have all threads share each sum.
LANES = 16

_library = torch.library.Library("normkit", "DEF")
_library.define("kept(Tensor x) -> Tensor")
# A whole call, as a graph first has it; it is never run, for it is made of what follows.
_library.define(f"call(Tensor x, {_PARAMETERS}, str label, SymInt[] axes, Scalar[] numbers) -> Tensor[]")
# A batch's statistics, merged into a layer's buffers; made of other operations in the same way.
_library.define(
    "count(Tensor(a!) mean, Tensor(b!) var, Tensor(c!)? seen, Tensor batch_mean, Tensor batch_var, SymInt count, "
    "float? momentum, bool unbiased, str label) -> ()"
)
# What a user calls, differentiable; and what becomes of it in a graph. The latter run without Python where PyTorch lets
# an extension in, and hand what is not plain memory to the last two.
_library.define(f"normalize(Tensor x, {_PARAMETERS}, {_CALL}) -> (Tensor y, Tensor stats)")
for _name in ("forward", "forward_of_any"):
    _library.define(f"{_name}(Tensor x, {_PARAMETERS}, {_CALL}) -> (Tensor y, Tensor stats)")
for _name in ("y", "y_of_any"):
    _library.define(f"{_name}(Tensor x, {_PARAMETERS}, {_CALL}) -> Tensor")
for _name in ("backward", "backward_of_any"):
    _library.define(f"{_name}(Tensor x, {_PARAMETERS}, Tensor stats, Tensor dy, {_CALL}, int needs) -> Tensor[]")


def program(recorded: bool) -> kernels.Program:
    """What torch.compile makes of a call, whose gradient may be taken or not: whether it may be one operator.

    Exported programs are to run without normkit. Without a gradient and with given statistics it is one loop, best left
    to Inductor.
    """

    def may(plan: Plan, operands: Operands) -> bool:
        x = operands.x
        smallest = SMALLEST[recorded] if operands.mean is None else SMALLEST_GIVEN
        return (
            x.is_cpu
            and (recorded or operands.mean is None)
            # Before the size, which a program for any size would be bound to.
            and not torch.compiler.is_exporting()
            and x.numel() >= smallest
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
        )

    return may


def apply(plan: Plan, operands: Operands, recorded: bool) -> tuple[torch.Tensor, BatchStats | None]:
    """Normalize by the operator."""
    if not recorded and plan.layer != "batch_norm_train":
        return torch.ops.normkit.y(*operands[:5], *_call(plan)), None
    y, stats = torch.ops.normkit.normalize(*operands[:5], *_call(plan))
    if plan.layer != "batch_norm_train":
        return y, None
    mean, var = ((a.reshape(plan.stats_shape)).detach() for a in (stats[0] + stats[1], stats[2]))
    return y, BatchStats(mean, var, plan.count)


def kept(x: torch.Tensor) -> torch.Tensor:
    """A copy of a buffer that is about to be written, for the backward pass.

    A graph that is compiled takes an operator's result as it is; ``clone`` it would form anew, of what was written.
    """
    return torch.ops.normkit.kept(x) if torch.compiler.is_compiling() else x.clone()


class Call(NamedTuple):
    """A plan in numbers, without the shape: the operators' last arguments."""

    #: An index of :data:`LAYERS`, and a bit for each of the axes.
    layer: int
    axes: int
    groups: int
    eps: float
    weight_offset: float


#: As in src/operators.cpp.
LAYERS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_train")


def _call(plan: Plan) -> Call:
    """The call that :func:`_plan` makes this plan of again."""
    (axis, *_) = axes = plan.features
    groups = plan.view[axis] if plan.layer == "group_norm" else 1
    assert groups is not None
    return Call(LAYERS.index(plan.layer), sum(1 << a for a in axes), groups, plan.eps, plan.weight_offset)


def _plan(shape: Shape, layer: int, bits: int, groups: int, eps: float, weight_offset: float) -> Plan:
    name, axes = LAYERS[layer], tuple(a for a in range(len(shape)) if bits >> a & 1)
    if name == "layer_norm":
        return plans.layer_plan(shape, axes, eps)
    if name == "rms_norm":
        return plans.rms_plan(shape, axes, eps, weight_offset)
    if name == "group_norm":
        return plans.group_plan(shape, groups, axes[0], eps)
    if name == "instance_norm":
        return plans.instance_plan(shape, axes[0], eps)
    return plans.batch_plan(shape, axes[0], eps, given=name == "batch_norm")


_kept_plan = functools.lru_cache(maxsize=4096)(_plan)


def _room(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Uninitialized statistics."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if plan.layer == "batch_norm":
        return x.new_empty(0, dtype=dtype)
    shape = (1 if a in plan.axes else n for a, n in enumerate(plan.view))
    return x.new_empty((4 if plan.center else 2, *shape), dtype=dtype)


torch.library.impl(_library, "kept", "CompositeExplicitAutograd")(torch.clone)
torch.library.register_fake("normkit::kept", lib=_library)(torch.empty_like)


def _forward(x, weight, bias, mean, var, *call):
    plan, operands = _kept_plan(tuple(x.shape), *call), Operands(x, weight, bias, mean, var)
    if plan.empty:
        return torch.empty_like(x), _room(x, plan).zero_()
    y, stats = kernels.forward(plan, operands)
    return y, _room(x, plan) if stats is None else stats


def _y(x, weight, bias, mean, var, *call):
    plan, operands = _kept_plan(tuple(x.shape), *call), Operands(x, weight, bias, mean, var)
    return torch.empty_like(x) if plan.empty else kernels.forward(plan, operands, save=False)[0]


def _needed(bits: int) -> list[bool]:
    return [bool(bits >> i & 1) for i in range(5)]


def _backward(x, weight, bias, mean, var, stats, dy, *call_and_needs):
    *call, bits = call_and_needs
    plan, operands, needs = _kept_plan(tuple(x.shape), *call), Operands(x, weight, bias, mean, var), _needed(bits)
    if plan.empty:
        return [torch.zeros_like(a) for a, needed in zip(operands, needs, strict=False) if needed]
    found = kernels.vjp(plan, operands, stats if mean is None else None, dy, Gradients(*needs))
    return [g for g in found if g is not None]


def _forward_fake(x, weight, bias, mean, var, *call):
    return torch.empty_like(x), _room(x, _plan(tuple(x.shape), *call))


def _y_fake(x, weight, bias, mean, var, *call):
    return torch.empty_like(x)


def _backward_fake(x, weight, bias, mean, var, stats, dy, *call_and_needs):
    of_x, *of_parameters = _needed(call_and_needs[-1])
    found = [torch.empty_like(x)] if of_x else []
    for a, needed in zip((weight, bias, mean, var), of_parameters, strict=True):
        if needed:
            found.append(torch.empty_like(a, memory_format=torch.contiguous_format))
    return found


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        y, stats = torch.ops.normkit.forward(*arguments)
        ctx.call = Call(*arguments[5:])
        ctx.save_for_backward(*arguments[:5], stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return y, stats

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 10
        *arrays, stats = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: the moments are part of what is differentiated.
            plan, operands = _plan(tuple(arrays[0].shape), *ctx.call), Operands(*arrays)
            used = forward(xp, plan, operands, _HABITS)[1]
            found = list(vjp(xp, plan, operands, used, dy, _HABITS, needs=Gradients(*needs)))
        else:
            bits = sum(needed << i for i, needed in enumerate(needs))
            given = iter(torch.ops.normkit.backward(*arrays, stats, dy, *ctx.call, bits))
            found = [next(given) if needed else None for needed in needs]
        return (*found, *(None,) * 5)


def _normalize(*arguments):
    return _Normalize.apply(*arguments)


def implement_call(call: Callable[..., list[torch.Tensor]]) -> None:
    """Say what a whole call is made of, which the backend knows."""
    _library.impl("call", call, "CompositeImplicitAutograd")


def implement_count(count: Callable[..., None]) -> None:
    """Say what becomes of statistics, which the layers know."""
    _library.impl("count", count, "CompositeImplicitAutograd")


_library.impl("normalize", _normalize, "CompositeImplicitAutograd")
#: Whether graphs call the kernels without Python.
native = kernels.torch_operators(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
for _names, _run, _fake in (
    (("forward", "forward_of_any"), _forward, _forward_fake),
    (("y", "y_of_any"), _y, _y_fake),
    (("backward", "backward_of_any"), _backward, _backward_fake),
):
    for _name in _names:
        torch.library.register_fake(f"normkit::{_name}", _fake, lib=_library)
        if _name.endswith("_of_any") or not native:
            _library.impl(_name, _run, "CPU")
