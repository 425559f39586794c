"""Running statistics in a layer's buffers: merged by the core, written in place, and not twice when that is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from normkit import functional
from normkit._policies import USUAL, Policies, merged
from normkit.backends.torch import graphs, ops
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


def _empty(stats: BatchStats) -> bool:
    return stats.count == 0


def _merge(
    mean: Tensor | None,
    var: Tensor | None,
    seen: Tensor | None,
    batch_mean: Tensor,
    batch_var: Tensor,
    count: Any,
    momentum: float | None,
    unbiased: bool,
) -> None:
    """Into a layer's buffers: those that it has, and of means and variances no unweighted ones without a count."""
    if seen is not None:
        seen.add_(1)
    if mean is None or var is None or (seen is None and momentum is None):
        return
    before, keep = 0 if seen is None else seen - 1, None if momentum is None else 1 - momentum
    stats = BatchStats(batch_mean, batch_var, count)
    with torch.no_grad():
        new_mean, new_var, _ = running.update(xp, mean, var, before, stats, keep, unbiased)
        mean.copy_(new_mean)
        var.copy_(new_var)


def _count(*arguments_and_label: Any) -> None:
    _merge(*arguments_and_label[:-1])


ops.implement_count(_count)


def _counted_in_graphs(count_batch: Callable) -> Callable:
    """What torch.compile reads of it: one operator."""
    count, label, merge = torch.ops.normkit.count.default, graphs.label, _merge

    def short(layer, stats, unbiased=True):
        name = label(count_batch, "")
        held = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if stats.count == 0:
            return
        batch = stats.mean, stats.var, stats.count
        if name is None or held[0] is None:
            merge(*held, *batch, layer.momentum, unbiased)
        else:
            count(*held, *batch, layer.momentum, unbiased, name)

    return short


@graphs.shortened(_counted_in_graphs)
def count_batch(layer: Any, stats: BatchStats, unbiased: bool = True) -> None:
    """Merge the statistics of a batch into the buffers of a batch norm layer; one without elements does not count."""
    if not _repeated() and not _empty(stats):
        _merge(layer.running_mean, layer.running_var, layer.num_batches_tracked, *stats, layer.momentum, unbiased)


def count_by(policies: Policies, layer: Any, stats: BatchStats, unbiased: bool = True) -> None:
    """The same, as the policies have it."""
    seen = layer.num_batches_tracked
    if not _repeated() and layer.running_mean is not None and (seen is not None or layer.momentum is not None):
        after = _merged(layer, stats, 0 if seen is None else seen, layer.momentum, unbiased, policies)
        if seen is not None:
            seen.copy_(torch.as_tensor(after))


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
            _merge(layer.running_mean, layer.running_var, None, mean, var, stats.count, layer.momentum, True)


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
