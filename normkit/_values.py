"""The checks that look at values of masks and statistics, where they are there to be looked at."""

from __future__ import annotations

import math
from typing import Any

from .backends import Backend
from .core.moments import is_number
from .core.normalize import BatchStats
from .core.plan import Plan


def several_valid(backend: Backend, plan: Plan, mask: Any) -> None:
    """A mask leaves every channel more than one value, or none, where looking costs nothing."""
    if not backend.at_hand(mask):
        return
    import numpy as np

    shape, view = ([n or 0 for n in lengths] for lengths in (plan.shape, plan.view))
    valid = np.asarray(mask)
    valid = valid[(None,) * (len(shape) - valid.ndim)]
    if plan.virtual:
        valid = np.broadcast_to(valid, shape).reshape(view)
    repeated = math.prod(n for a, n in enumerate(view) if a in plan.axes and valid.shape[a] == 1)
    counts = np.count_nonzero(valid, axis=plan.axes) * repeated
    lone = np.broadcast_to(counts == 1, [n for a, n in enumerate(view) if a not in plan.axes])
    if lone.any():
        sets = "channels of virtual batches" if plan.virtual else "channels"
        raise ValueError(
            f"batch_norm_train needs more than one value per channel, one has no variance; received a mask that leaves "
            f"one in {np.count_nonzero(lone)} of {lone.size} {sets}: {FOR_ONE}."
        )


#: What is done about one value per channel.
FOR_ONE = (
    'use a larger batch, single_value="zero", or batch_norm with running statistics (in a layer: '
    'single_value="running")'
)


def several_counted(backend: Backend, stats: BatchStats, policy: str | None) -> None:
    """Statistics of more than one value per channel, or of none, where looking costs nothing."""
    count: Any = stats.count
    if is_number(count):
        lone, channels = int(count == 1), 1
    elif backend.at_hand(count):
        lone, channels = _number_of(backend, count == 1), math.prod(count.shape)
    else:
        return
    if lone:
        where = f" in {lone} of {channels} channels" if channels > 1 else ""
        what, do = 'single_value="raise"', "a larger batch"
        if policy is None:
            what, do = "unbiased=True", "unbiased=False"
        raise ValueError(
            f"{what} needs more than one value per channel; received a count of 1{where}: use {do}, or "
            f'single_value="zero", which leaves such statistics out.'
        )


def elements(owner: str, backend: Backend, stats: BatchStats) -> None:
    """Statistics of any elements at all."""
    count = stats.count
    if not is_number(count):
        _there(owner, backend, count, 'empty_batch="raise"', "keep")
        count = _number_of(backend, count > 0)
    if count == 0:
        raise ValueError(f'{owner} has empty_batch="raise"; received a batch without elements.')


def finite(owner: str, backend: Backend, stats: BatchStats, fewest: int) -> None:
    """Statistics without infinity or NaN, in the channels that count."""
    mean, var, count = stats
    if is_number(count) and count < fewest:
        return
    _there(owner, backend, mean, 'nonfinite="raise"', "skip")
    xp = backend.namespace(mean)
    wrong = ~(xp.isfinite(mean) & xp.isfinite(var))
    number = _number_of(backend, wrong if is_number(count) else wrong & (count >= fewest))
    if number:
        raise ValueError(
            f'{owner} has nonfinite="raise"; received statistics that are not finite in {number} of {mean.shape[0]} '
            f'channels: look for the first NaN or infinity before it, or set nonfinite="skip".'
        )


def _there(owner: str, backend: Backend, a: Any, setting: str, instead: str) -> None:
    if not backend.at_hand(a, wait=True):
        raise ValueError(
            f"{owner} with {setting} looks at values, and a program that is being traced has none: "
            f'set it to "{instead}", or call it outside.'
        )


def _number_of(backend: Backend, truths: Any) -> int:
    """How many are true."""
    xp = backend.namespace(truths)
    ones = xp.astype(truths, xp.int32)
    return int(xp.sum(ones, axis=0) if len(ones.shape) else ones)
