"""The kernels as operators of PyTorch's own (``torch.ops.normkit``), for graphs that ``torch.compile`` makes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch.autograd import forward_ad

from normkit.backends import kernels
from normkit.backends.kernels.routes import unwritten
from normkit.core import plan as plans
from normkit.core.moments import Habits
from normkit.core.normalize import BatchStats, Gradients, Operands, forward, vjp
from normkit.core.plan import Plan, Shape

_CALL = "str layer, int[] axes, int groups, float eps, float weight_offset"
_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var"

#: Safe in any layout; of branch-free operations.
_HABITS = Habits(wide=True, staged=True)

#: From so many elements a graph has the operator: to call it costs what Inductor's own loops take for 50 thousand
#: (forward) or 120 thousand (with the gradient), and more where no moments are computed. Measured.
SMALLEST = 1 << 16
SMALLEST_GIVEN = 1 << 20

_library = torch.library.Library("normkit", "DEF")
_library.define(f"forward(Tensor x, {_PARAMETERS}, {_CALL}) -> (Tensor y, Tensor stats)")
_library.define("kept(Tensor x) -> Tensor")
_library.define(f"backward(Tensor x, {_PARAMETERS}, Tensor stats, Tensor dy, {_CALL}, bool[] needs) -> Tensor[]")


def serves(plan: Plan, operands: Operands) -> bool:
    """Whether a call that is being compiled becomes one operator; exported programs are to run without normkit."""
    x = operands.x
    return (
        kernels.mode != "0"
        and kernels.built
        and operands.mask is None
        and unwritten(plan) is None
        and x.is_cpu
        and x.numel() >= (SMALLEST if operands.mean is None else SMALLEST_GIVEN)
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def apply(plan: Plan, operands: Operands) -> tuple[torch.Tensor, BatchStats | None]:
    """Normalize by the operator."""
    y, stats = torch.ops.normkit.forward(*operands[:5], *_call(plan))
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

    layer: str
    axes: list[int]
    groups: int
    eps: float
    weight_offset: float


def _call(plan: Plan) -> Call:
    """The call that :func:`_plan` makes this plan of again."""
    (axis, *_) = axes = plan.features
    groups = plan.view[axis] if plan.layer == "group_norm" else 1
    assert groups is not None
    return Call(plan.layer, list(axes), groups, plan.eps, plan.weight_offset)


def _plan(shape: Shape, call: Call) -> Plan:
    layer, axes, groups, eps, weight_offset = call
    if layer == "layer_norm":
        return plans.layer_plan(shape, tuple(axes), eps)
    if layer == "rms_norm":
        return plans.rms_plan(shape, tuple(axes), eps, weight_offset)
    if layer == "group_norm":
        return plans.group_plan(shape, groups, axes[0], eps)
    if layer == "instance_norm":
        return plans.instance_plan(shape, axes[0], eps)
    return plans.batch_plan(shape, axes[0], eps, given=layer == "batch_norm")


@functools.lru_cache(maxsize=4096)
def _kept_plan(shape: Shape, layer: str, axes: tuple[int, ...], *rest: Any) -> Plan:
    return _plan(shape, Call(layer, list(axes), *rest))


def _known(x: torch.Tensor, call: tuple[Any, ...]) -> Plan:
    layer, axes, *rest = call
    return _kept_plan(tuple(x.shape), layer, tuple(axes), *rest)


def _room(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Uninitialized statistics."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if plan.layer == "batch_norm":
        return x.new_empty(0, dtype=dtype)
    shape = (1 if a in plan.axes else n for a, n in enumerate(plan.view))
    return x.new_empty((4 if plan.center else 2, *shape), dtype=dtype)


torch.library.impl(_library, "kept", "CompositeExplicitAutograd")(torch.clone)
torch.library.register_fake("normkit::kept", lib=_library)(torch.empty_like)


@torch.library.impl(_library, "forward", "CPU")
def _forward(x, weight, bias, mean, var, *call):
    plan, operands = _known(x, call), Operands(x, weight, bias, mean, var)
    if plan.empty:
        return torch.empty_like(x), _room(x, plan).zero_()
    y, stats = kernels.forward(plan, operands)
    return y, _room(x, plan) if stats is None else stats


@torch.library.impl(_library, "backward", "CPU")
def _backward(x, weight, bias, mean, var, stats, dy, *call_and_needs):
    *call, needs = call_and_needs
    plan, operands = _known(x, tuple(call)), Operands(x, weight, bias, mean, var)
    if plan.empty:
        return [torch.zeros_like(a) for a, needed in zip(operands, needs, strict=False) if needed]
    found = kernels.vjp(plan, operands, stats if mean is None else None, dy, Gradients(*needs))
    return [g for g in found if g is not None]


@torch.library.register_fake("normkit::forward", lib=_library)
def _forward_fake(x, weight, bias, mean, var, *call):
    return torch.empty_like(x), _room(x, _plan(tuple(x.shape), Call(*call)))


@torch.library.register_fake("normkit::backward", lib=_library)
def _backward_fake(x, weight, bias, mean, var, stats, dy, *call_and_needs):
    of_x, *of_parameters = call_and_needs[-1]
    found = [torch.empty_like(x)] if of_x else []
    for a, needed in zip((weight, bias, mean, var), of_parameters, strict=True):
        if needed:
            found.append(torch.empty_like(a, memory_format=torch.contiguous_format))
    return found


def _save(ctx, inputs, output):
    ctx.call = Call(*inputs[5:])
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, _):
    if dy is None:
        return (None,) * 10
    *arrays, stats = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    if torch.is_grad_enabled():
        # A gradient of this gradient is wanted: the moments are part of what is differentiated.
        plan, operands = _plan(tuple(arrays[0].shape), ctx.call), Operands(*arrays)
        used = forward(xp, plan, operands, _HABITS)[1]
        found = list(vjp(xp, plan, operands, used, dy, _HABITS, needs=Gradients(*needs)))
    else:
        given = iter(torch.ops.normkit.backward(*arrays, stats, dy, *ctx.call, needs))
        found = [next(given) if needed else None for needed in needs]
    return (*found, *(None,) * 5)


torch.library.register_autograd("normkit::forward", _gradient, setup_context=_save, lib=_library)
