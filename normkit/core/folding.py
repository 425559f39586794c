"""Batch norm with given statistics as part of a linear map: weights of shape (groups, outputs, inputs, taps)."""

from __future__ import annotations

from typing import Any

Array = Any


def affine(xp, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float) -> tuple[Array, Array]:
    """Scale and shift: ``(x - mean) / sqrt(var + eps) * weight + bias = x * scale + shift``."""
    scale = 1 / xp.sqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def after(xp, weight: Array, bias: Array | None, scale: Array, shift: Array) -> tuple[Array, Array]:
    """The map and then the norm: each output is scaled and shifted, outputs counted from group to group."""
    folded = weight * xp.reshape(scale, (*weight.shape[:2], 1, 1))
    return folded, shift if bias is None else bias * scale + shift


def before(xp, weight: Array, bias: Array | None, scale: Array, shift: Array) -> tuple[Array, Array]:
    """The norm and then the map, which meets the shift at every tap: no zeros may have been padded to it."""
    groups, _, inputs, _ = weight.shape
    met = weight * xp.reshape(shift, (groups, 1, inputs, 1))
    constant = xp.reshape(xp.sum(met, axis=(2, 3)), (-1,))
    return weight * xp.reshape(scale, (groups, 1, inputs, 1)), constant if bias is None else constant + bias
