"""Running statistics in a layer's buffers: merged by the core, written in place, and not twice when that is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from normkit import functional
from normkit._policies import USUAL, Policies, merged
from normkit.backends.torch.backend import BACKEND
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


def count_batch(layer: Any, stats: BatchStats, unbiased: bool = True, policies: Policies = USUAL) -> None:
    """Merge the statistics of a batch into the buffers of a batch norm layer; one without elements does not count."""
    seen = layer.num_batches_tracked
    if _repeated():
        return
    if policies is not USUAL:
        if layer.running_mean is not None and (seen is not None or layer.momentum is not None):
            after = _merged(layer, stats, 0 if seen is None else seen, layer.momentum, unbiased, policies)
            if seen is not None:
                seen.copy_(torch.as_tensor(after))
        return
    if _empty(stats):
        return
    if seen is not None:
        seen.add_(1)
    if layer.running_mean is not None and (seen is not None or layer.momentum is not None):
        _merge(layer, stats, 0 if seen is None else seen - 1, layer.momentum, unbiased)


def count_instances(layer: Any, input: Tensor, policies: Policies = USUAL) -> None:
    """Merge the averages of the samples' statistics into the buffers of an instance norm layer.

    As in torch, ``num_batches_tracked`` stays, and so does everything where momentum is None.
    """
    if _repeated() or layer.momentum is None:
        return
    samples, channels = input.shape[:2]
    with torch.no_grad():
        flat = input.reshape(1, samples * channels, *input.shape[2:])
        if samples == 0:
            mean = var = layer.running_mean
            stats = BatchStats(mean, var, 0)
        else:
            _, stats = functional.batch_norm_train(flat, single_value="zero")
            mean, var = (a.reshape(samples, channels).mean(0) for a in stats[:2])
        if policies is not USUAL:
            _merged(layer, BatchStats(mean, var, stats.count), 0, layer.momentum, True, policies)
        elif not _empty(stats):
            _merge(layer, BatchStats(mean, var, stats.count), 0, layer.momentum)


def _empty(stats: BatchStats) -> bool:
    return stats.count == 0


@torch.no_grad()
def _merge(layer: Any, stats: BatchStats, before: Tensor | int, momentum: float | None, unbiased: bool = True) -> None:
    keep = None if momentum is None else 1 - momentum
    mean, var, _ = running.update(xp, layer.running_mean, layer.running_var, before, stats, keep, unbiased)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)


@torch.no_grad()
def _merged(
    layer: Any, stats: BatchStats, before: Tensor | int, momentum: float | None, unbiased: bool, policies: Policies
) -> Tensor | int:
    """As the policies have it; the number of batches after."""
    keep, held = None if momentum is None else 1 - momentum, (layer.running_mean, layer.running_var)
    mean, var, after = merged(type(layer).__name__, BACKEND, (*held, before), stats, keep, unbiased, policies)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    return after
