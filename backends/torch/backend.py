"""PyTorch: one autograd function in eager mode; under functorch, and in most of a compiled graph, plain operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch
from torch.autograd import forward_ad

from normkit import _calls
from normkit._dispatch import _by_type
from normkit.backends import kernels
from normkit.backends.kernels import Applied
from normkit.backends.protocol import Array, ArrayBackend
from normkit.backends.torch import graphs, ops
from normkit.core.moments import Habits, Moments, rescue_if_needed, there_and_back, unchanged
from normkit.core.normalize import PLAIN, BatchStats, Gradients, Operands, forward, returned_stats, vjp
from normkit.core.plan import Plan, Shape

_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

#: Of whose tensors torch's own operations make what the core wants; jagged ones have an axis of many lengths.
_LAYOUTS = frozenset((torch.strided, torch.jagged))

#: What torch's autocast computes and returns in float32 on a GPU.
_AUTOCAST_TO_FLOAT32 = frozenset({"layer_norm", "rms_norm", "group_norm"})


def _short(values: torch.Tensor, axes: tuple[int, ...]) -> bool:
    """Whether Inductor's loop, which adds one vector to the next, adds up to 32 numbers, or 128 to each of eight."""
    n = math.prod(values.shape[a] for a in axes)
    along = values.ndim - 1 in axes and values.stride(-1) == 1
    return type(n) is int and n <= (1024 if along else 32)


def _stages(values: torch.Tensor, axes: tuple[int, ...]) -> tuple[list[int], tuple[int, ...], tuple[int, ...]] | None:
    """How such a loop adds up to 32 numbers across memory, and another up to 32 of these sums."""
    shape, last = list(values.shape), axes[-1]
    if any(type(n) is not int for n in shape) or last == values.ndim - 1:
        return None
    run = next((k for k in range(min(32, shape[last]), 1, -1) if shape[last] % k == 0), 1)
    shape[last : last + 1] = [shape[last] // run, run]
    return (shape, (last + 1,), (*axes, last + 1)) if math.prod(shape[a] for a in axes) <= 32 else None


def _stored(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """The same, of which Inductor makes a buffer: it would take the root again for each vector of a row.

    It is of the shape that sums over ``axes`` have there, and takes the place of one.
    """
    flat = values.squeeze(axes)
    return flat.as_strided(flat.shape, flat.stride()).reshape(values.shape)


#: For gradients within such loops.
_ADDED_BY_ONE = Habits(wide=True, short=_short, stages=_stages, flat=True, stored=_stored)
#: And where values can be looked at.
_AT_HAND = Habits(hasty=True)


class TorchBackend(ArrayBackend):
    """Gradients by :class:`torch.autograd.Function`, whose backward pass is differentiable in turn."""

    name = "torch"

    def __init__(self) -> None:
        super().__init__(xp)
        # Those that torch.compile would find missing once, and compile again.
        self._dtype_names |= {dtype: str(dtype).rpartition(".")[2] for dtype in (*_FLOATING, torch.bool)}

    def dtype(self, x: Array) -> str:
        name = super().dtype(x)
        return f"{name} in layout {x.layout}" if x.layout not in _LAYOUTS else name

    def device(self, x: Array) -> torch.device:
        return x.device

    def suit(self, operands: Operands, shape: Shape, device: Any) -> bool:
        for a in operands[1:5]:
            if a is None:
                continue
            if not isinstance(a, torch.Tensor) or a.layout is not torch.strided or a.dtype not in _FLOATING:
                return False
            if a.shape != shape or a.device != device:
                return False
        return True

    def least(self, x: Array) -> float:
        if not self.at_hand(x) or (kernels.negative(x) is False and not x.is_neg()):
            return 0.0
        return min(x.detach().min().item(), 0.0)

    def at_hand(self, x: Array, *, wait: bool = False) -> bool:
        return not _traced(x) and (x.is_cpu or (wait and not x.is_meta))

    def constant(self, x: Array) -> Array:
        return x.detach()

    def at_once(self, plan: Plan, x: Array, weight: Any, bias: Any, mean: Any, var: Any) -> Applied | None:
        if _traced(x):
            return None
        if torch.is_grad_enabled() and _wants_gradient(x, weight, bias, mean, var):
            done = kernels.at_once(plan, x, weight, bias, mean, var, True)
            return done and Applied(_fused(done, plan, x, weight, bias, mean, var), None, done[2])
        return kernels.at_once(plan, x, weight, bias, mean, var)

    def apply(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None]:
        operands = _widened(plan, operands)
        x = operands.x
        recorded = _recorded(operands)
        if torch.compiler.is_compiling() and kernels.accelerates(plan, operands, ops.program(recorded)):
            return ops.apply(plan, operands, recorded)
        traced = _traced(x)
        done = None if traced else kernels.apply(plan, operands, save=recorded)
        if done is not None:
            return _fused(done, plan, *operands[:5]) if recorded else done.y, done.stats
        if not recorded or traced:
            return _plain(plan, operands)
        y, *stats = _Normalize.apply(plan, *operands)
        return y, BatchStats(*stats) if stats else None

    def vjp(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None, Callable[[Array], Gradients]]:
        if not _recorded(operands) and not _traced(operands.x):
            done = kernels.apply(plan, operands, save=True)
            if done is not None:
                return done.y, done.stats, lambda dy: kernels.vjp(plan, operands, done.packed, dy)
        y, used = forward(xp, plan, operands, _habits(plan, operands.x))
        return y, returned_stats(xp, plan, operands, used), lambda dy: vjp(xp, plan, operands, used, dy)

    def tracing(self) -> bool:
        return torch.compiler.is_compiling()

    def create(self, values: Any, dtype: str, device: Any | None = None) -> Array:
        return torch.asarray(values, dtype=getattr(torch, dtype), device=device)


def _widened(plan: Plan, operands: Operands) -> Operands:
    """As torch's autocast would have x."""
    x = operands.x
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and _autocast(plan, "cuda"):
        return operands._replace(x=x.float())
    return operands


def _autocast(plan: Plan, device: str) -> bool:
    return plan.layer in _AUTOCAST_TO_FLOAT32 and torch.is_autocast_enabled(device)


def _habits(plan: Plan, x: torch.Tensor) -> Habits:
    rounded = _rounded if torch.compiler.is_compiling() else there_and_back
    if x.device.type != "cpu":
        # Sums are trees, and looking at a value would wait for the device.
        return Habits(rounded=rounded)
    # Sums are cascades along one axis or the last ones in memory, and one by one over some sets of others.
    if _traced(x):
        return Habits(wide=not (plan.trailing and x.is_contiguous()), staged=True, rounded=rounded)
    return Habits(wide=True, staged=True, rescue=rescue_if_needed, hasty=True, rounded=rounded)


def _rounded(_: Any, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """TorchInductor leaves out a cast there and back: here float32 is rounded in units of its own power of two."""
    kind, wide = torch.finfo(dtype), torch.finfo(values.dtype)
    power = (values.detach().view(torch.int32) & 0x7F800000).view(values.dtype)
    step = power.clamp(min=max(kind.tiny, wide.tiny / kind.eps)) * kind.eps
    return values + (torch.round(values / step) * step - values).detach()


def _recorded(operands: Operands) -> bool:
    """Whether autograd wants a gradient."""
    return torch.is_grad_enabled() and _wants_gradient(*operands[:5])


def _wants_gradient(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> bool:
    """Of whatever these are: spelled out, for this is asked in every call."""
    return (
        x.requires_grad
        or (weight is not None and getattr(weight, "requires_grad", False))
        or (bias is not None and getattr(bias, "requires_grad", False))
        or (mean is not None and (getattr(mean, "requires_grad", False) or getattr(var, "requires_grad", False)))
    )


def _traced(x: torch.Tensor) -> bool:
    """Whether a transformation follows the operations one by one, so that they must be torch's own and branch-free."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def _mapped(dy: torch.Tensor) -> bool:
    """Whether a gradient stands for many, or has a tangent: is_grads_batched maps as no transformation does."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._functorch.is_legacy_batchedtensor(dy)
    )


def _plain(plan: Plan, operands: Operands) -> tuple[torch.Tensor, BatchStats | None]:
    y, used = forward(xp, plan, operands, _habits(plan, operands.x))
    stats = returned_stats(xp, plan, operands, used)
    if stats is None:
        return y, None
    mean, var, count = stats.mean.detach(), stats.var.detach(), stats.count
    if not isinstance(count, torch.Tensor) and torch._C._are_functorch_transforms_active():
        # vmap carries nothing but tensors.
        count = torch.full((), count, dtype=mean.dtype, device=mean.device)
    return y, BatchStats(mean, var, count)


def _fused_habits(plan: Plan, x: torch.Tensor, habits: Habits) -> Habits:
    """Of what Inductor makes loops of, on a processor."""
    habits = habits._replace(one_pass=True, flat=True)
    n, along = x.numel(), x.stride(-1) == 1 and len(plan.view) - 1 in plan.axes
    if x.is_contiguous() and _many_in_lanes(plan, n):
        habits = habits._replace(lanes=ops.LANES)
    if n < ops.SMALLEST_STORED:
        return habits
    return habits._replace(stored=_stored, stored_mean=unchanged if along and n < ops.SMALLEST_MEAN else _stored)


def _many_in_lanes(plan: Plan, n: Any) -> bool:
    """Whether n numbers are known to be many sets of as many numbers or more next to each other."""
    run, count = plan.run, plan.count
    return type(n) is int and type(run) is int and type(count) is int and run >= ops.LANES and n >= ops.LANES * count


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *arrays):
        operands = Operands(*arrays)
        habits = _habits(plan, operands.x)
        if operands.x.is_cpu and _traced(operands.x):
            habits = _fused_habits(plan, operands.x, habits)
        y, used = forward(xp, plan, operands, habits)
        y = y.detach()  # no view of what else is gone: an activation may write to it
        ctx.plan, ctx.count = plan, used.count
        ctx.save_for_backward(*arrays, used.mean, used.residue, used.rstd)
        stats = returned_stats(xp, plan, operands, used)
        if stats is None:
            return (y,)
        ctx.mark_non_differentiable(*(s for s in stats if isinstance(s, torch.Tensor)))
        ctx.set_materialize_grads(False)
        return y, *stats

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 7
        *arrays, mean, residue, rstd = ctx.saved_tensors
        operands = Operands(*arrays)
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: the moments are part of what is differentiated.
            used = forward(xp, ctx.plan, operands, _habits(ctx.plan, operands.x))[1]
        else:
            used = Moments(mean, residue, None, rstd, ctx.count)
        needs = dict(zip(Operands._fields, ctx.needs_input_grad[1:], strict=True))
        habits = PLAIN if not operands.x.is_cpu else _ADDED_BY_ONE if _traced(operands.x) else _AT_HAND
        found = vjp(xp, ctx.plan, operands, used, dy, habits, needs=Gradients(*map(needs.get, Gradients._fields)))
        return None, found.x, found.weight, found.bias, found.mean, found.var, None


class _Fused(torch.autograd.Function):
    """Gives y, which the kernels have made, its gradient; the gradient of that is made of differentiable operations.

    The statistics stay outside: each tensor that passes through costs a microsecond.
    """

    @staticmethod
    def forward(ctx, done, plan, *arrays):
        ctx.plan = plan
        ctx.save_for_backward(*arrays, done.packed)
        return done.y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, var, packed = ctx.saved_tensors
        # A gradient of this gradient is wanted, or those of many dy are, or its derivative along one.
        followed, needed = torch.is_grad_enabled() or _mapped(dy), ctx.needs_input_grad[2:]
        if not followed:
            found = kernels.gradients_at_once(ctx.plan, x, dy, weight, bias, mean, var, packed, needed)
            if found is not None:
                return None, None, *found
        operands, needs = Operands(x, weight, bias, mean, var), Gradients(*needed)
        if followed:
            used = forward(xp, ctx.plan, operands, _habits(ctx.plan, operands.x))[1]
            return None, None, *vjp(xp, ctx.plan, operands, used, dy, needs=needs)
        return None, None, *kernels.gradients(ctx.plan, operands, packed, dy, needs)


#: ``_Fused.apply`` without what it does for torch.func's transformations: where kernels serve, none is at work.
_fused = super(torch.autograd.Function, _Fused).apply

BACKEND = TorchBackend()
# torch.compile follows the look-up of a type that is known, not the search for one that is not.
_by_type.update(dict.fromkeys((torch.Tensor, torch.nn.Parameter), BACKEND))


def _call(x, weight, bias, mean, var, label, axes, numbers):
    """y, and mean and variance of a batch; nothing where the arguments are refused: by words, in Python."""
    axis = axes[0] if len(axes) == 1 else axes
    given = Operands(x, weight, bias, mean, var)
    try:
        plan = getattr(_calls, label.partition(" ")[0])(tuple(x.shape), axis, *numbers)
    except (TypeError, ValueError):
        return []
    if x.dtype not in _FLOATING or not BACKEND.suit(given, plan.param_shape, x.device):
        return []
    recorded = _recorded(given)
    if kernels.accelerates(plan, given, ops.program(recorded)):
        y, stats = ops.apply(plan, given, recorded)
        return [y] if stats is None else [y, *stats[:2]]
    y, *stats = _Normalize.apply(plan, *_widened(plan, given))
    return [y, *stats[:2]]


ops.implement_call(_call)
_calls.compiling, _calls.met = torch.compiler.is_dynamo_compiling, graphs.met
