"""PyTorch's own layers: torch.nn.functional, and torch.nn.BatchNorm for running statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from normkit.conformance.natives import Convention, axes_of, only

NAME = "torch"
CONVENTION = Convention(weights="new", unbiased=True, cumulative=True)

Array = Any
_CHANNELS = "torch has the channels at axis 1"


def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5) -> Array:
    """torch.nn.functional.layer_norm: trailing axes."""
    return F.layer_norm(x, _trailing(x, axis), weight, bias, eps)


def rms_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-6, weight_offset=0.0) -> Array:
    """torch.nn.functional.rms_norm: trailing axes, no bias."""
    only(bias is None, "torch's RMSNorm has no bias")
    only(weight_offset == 0, "torch's RMSNorm has no weight_offset")
    return F.rms_norm(x, _trailing(x, axis), weight, eps)


def group_norm(x, num_groups, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """torch.nn.functional.group_norm."""
    only(axes_of(axis, x.ndim) == (1,), _CHANNELS)
    only(weight is not None or bias is None, "torch's GroupNorm has no bias without a weight")
    return F.group_norm(x, num_groups, weight, bias, eps)


def instance_norm(x, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """torch.nn.functional.instance_norm."""
    only(axes_of(axis, x.ndim) == (1,), _CHANNELS)
    only(x.shape[2:].numel() > 1, "torch's InstanceNorm refuses one value per channel")
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


def batch_norm(x, mean, var, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """torch.nn.functional.batch_norm in inference; its statistics have no gradient."""
    only(axes_of(axis, x.ndim) == (1,), _CHANNELS)
    weight, bias = (p if p is None else p.to(mean.dtype) for p in (weight, bias))  # statistics and parameters agree
    return F.batch_norm(x, mean.detach(), var.detach(), weight, bias, training=False, eps=eps)


def batch_norm_train(x, weight=None, bias=None, *, axis=1, eps=1e-5) -> Array:
    """torch.nn.functional.batch_norm in training."""
    only(axes_of(axis, x.ndim) == (1,), _CHANNELS)
    only(eps > 0, "torch's BatchNorm wants eps > 0 in training")
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def running_statistics(steps, dtype, *, axis=1, momentum: float | None = 0.9) -> tuple[Array, Array]:
    """Running mean and variance of a torch.nn.BatchNorm after the batches in ``steps``."""
    x = steps[0]
    only(axes_of(axis, x.ndim) == (1,), _CHANNELS)
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}[x.ndim]
    layer = kind(x.shape[1], momentum=None if momentum is None else 1 - momentum, device=x.device)
    layer = layer.to(getattr(torch, dtype)).train()
    for x in steps:
        layer(x)
    return layer.running_mean, layer.running_var


def _trailing(x, axis):
    axes = axes_of(axis, x.ndim)
    only(axes == tuple(range(x.ndim - len(axes), x.ndim)), "torch normalizes trailing axes only")
    return tuple(x.shape[a] for a in axes)
