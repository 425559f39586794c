"""Running statistics in a layer's buffers: merged by the core, written in place, and not twice when that is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from normkit import functional
from normkit.core import running
from normkit.core.normalize import BatchStats

#: How many :func:`count_once` are open; of the process, since backward passes run in threads of their own.
_once = 0


@contextlib.contextmanager
def count_once() -> Iterator[None]:
    """Count no batch twice: a forward pass that the backward pass repeats leaves running statistics alone.

    Activation checkpointing (:mod:`torch.utils.checkpoint`, reentrant or not) computes a part of the model again during
    the backward pass. Around a training step::

        with normkit.torch.count_once():
            loss(model(x)).backward()

    Notes
    -----
    It holds for normkit's layers, in eager mode, and for all threads of the process.
    """
    global _once
    _once += 1
    try:
        yield
    finally:
        _once -= 1


def _repeated() -> bool:
    """Whether this is a forward pass within a backward pass, which is not to be counted."""
    return not torch.compiler.is_compiling() and _once > 0 and torch._C._current_graph_task_id() != -1


def count_batch(layer: Any, stats: BatchStats, unbiased: bool = True) -> None:
    """Merge the statistics of a batch into the buffers of a batch norm layer; one without elements does not count."""
    seen = layer.num_batches_tracked
    if _repeated() or _empty(stats):
        return
    if seen is not None:
        seen.add_(1)
    if layer.running_mean is not None and (seen is not None or layer.momentum is not None):
        _merge(layer, stats, 0 if seen is None else seen - 1, layer.momentum, unbiased)


def count_instances(layer: Any, input: Tensor) -> None:
    """Merge the averages of the samples' statistics into the buffers of an instance norm layer.

    As in torch, ``num_batches_tracked`` stays, and so does everything where momentum is None.
    """
    if _repeated() or layer.momentum is None:
        return
    samples, channels = input.shape[:2]
    with torch.no_grad():
        flat = input.reshape(1, samples * channels, *input.shape[2:])
        if samples == 0:
            return
        _, stats = functional.batch_norm_train(flat)
        if not _empty(stats):
            mean, var = (a.reshape(samples, channels).mean(0) for a in stats[:2])
            _merge(layer, BatchStats(mean, var, stats.count), 0, layer.momentum)


def _empty(stats: BatchStats) -> bool:
    return stats.count == 0


@torch.no_grad()
def _merge(layer: Any, stats: BatchStats, before: Tensor | int, momentum: float | None, unbiased: bool = True) -> None:
    keep = None if momentum is None else 1 - momentum
    mean, var, _ = running.update(xp, layer.running_mean, layer.running_var, before, stats, keep, unbiased)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
