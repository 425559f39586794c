"""PyTorch: one autograd function in eager mode; under compile and functorch, plain operations that they can trace."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
from torch.autograd import forward_ad

from normkit.backends import kernels
from normkit.backends.protocol import Array, ArrayBackend
from normkit.core.moments import Habits, Moments, rescue_if_needed
from normkit.core.normalize import BatchStats, Gradients, Operands, forward, returned_stats, vjp
from normkit.core.plan import Plan

#: torch sums in cascades along any axis: float32 suffices. On a GPU, looking at a value would wait for the device.
TRACED = Habits()
EAGER = Habits(rescue=rescue_if_needed)

#: What torch's autocast computes and returns in float32 on a GPU.
_AUTOCAST_TO_FLOAT32 = frozenset({"layer_norm", "rms_norm", "group_norm"})


class TorchBackend(ArrayBackend):
    """Gradients by :class:`torch.autograd.Function`, to any order: the backward pass is made of differentiable operations."""

    name = "torch"
    habits = TRACED

    def __init__(self) -> None:
        super().__init__(xp)

    def device(self, x: Array) -> torch.device:
        return x.device

    def peek(self, x: Array) -> Any | None:
        if _traced(x) or x.device.type != "cpu" or x.dtype == torch.bfloat16:
            return None
        return x.detach().numpy()

    def apply(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None]:
        x = operands.x
        if x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and _autocast(plan, "cuda"):
            operands = operands._replace(x=x.float())
        if _traced(x):
            return _plain(plan, operands, TRACED)
        if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in operands):
            function = _Fused if kernels.accelerates(plan, operands) else _Normalize
            y, *stats = function.apply(plan, *operands)
            return y, BatchStats(*stats) if stats else None
        if kernels.accelerates(plan, operands):
            y, packed = kernels.forward(plan, operands, save=plan.layer == "batch_norm_train")
            return y, kernels.batch_stats(plan, packed)
        return _plain(plan, operands, _habits(x))

    def create(self, values: Any, dtype: str, device: Any | None = None) -> Array:
        return torch.asarray(values, dtype=getattr(torch, dtype), device=device)


def _autocast(plan: Plan, device: str) -> bool:
    return plan.layer in _AUTOCAST_TO_FLOAT32 and torch.is_autocast_enabled(device)


def _habits(x: torch.Tensor) -> Habits:
    return EAGER if x.device.type == "cpu" else TRACED


def _traced(x: torch.Tensor) -> bool:
    """Whether a transformation follows the operations one by one, so that they must be torch's own and branch-free."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def _plain(plan: Plan, operands: Operands, habits: Habits) -> tuple[torch.Tensor, BatchStats | None]:
    y, used = forward(xp, plan, operands, habits)
    stats = returned_stats(xp, plan, operands, used)
    return y, stats and BatchStats(stats.mean.detach(), stats.var.detach(), stats.count)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *arrays):
        operands = Operands(*arrays)
        y, used = forward(xp, plan, operands, _habits(operands.x))
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
        used = Moments(mean, residue, None, rstd, ctx.count)
        return _composed(ctx, operands, used, dy)


class _Fused(torch.autograd.Function):
    """:class:`_Normalize` by the kernels; a gradient of the gradient is made of differentiable operations."""

    @staticmethod
    def forward(ctx, plan, *arrays):
        operands = Operands(*arrays)
        y, packed = kernels.forward(plan, operands)
        ctx.plan = plan
        ctx.save_for_backward(*arrays, packed)
        stats = kernels.batch_stats(plan, packed)
        if stats is None:
            return (y,)
        ctx.mark_non_differentiable(stats.mean, stats.var)
        ctx.set_materialize_grads(False)
        return y, *stats

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 7
        *arrays, packed = ctx.saved_tensors
        operands = Operands(*arrays)
        if torch.is_grad_enabled():
            return _composed(ctx, operands, None, dy)
        found = kernels.vjp(ctx.plan, operands, packed, dy, _needs(ctx))
        return None, found.x, found.weight, found.bias, found.mean, found.var, None


def _needs(ctx) -> Gradients:
    needs = dict(zip(Operands._fields, ctx.needs_input_grad[1:], strict=True))
    return Gradients(*map(needs.get, Gradients._fields))


def _composed(ctx, operands: Operands, used: Moments | None, dy: torch.Tensor):
    habits = _habits(operands.x)
    if torch.is_grad_enabled():
        # A gradient of this gradient is wanted: the moments are part of what is differentiated.
        used = forward(xp, ctx.plan, operands, habits)[1]
    found = vjp(xp, ctx.plan, operands, used, dy, habits, needs=_needs(ctx))
    return None, found.x, found.weight, found.bias, found.mean, found.var, None
