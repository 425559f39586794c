"""Running statistics: how those of a new batch are merged into the old."""

from __future__ import annotations

import math
from typing import Any

from .moments import is_number
from .normalize import BatchStats

Array = Any


def update(
    xp,
    mean: Array,
    var: Array,
    num_batches: Array | int,
    batch: BatchStats,
    momentum: float | None,
    unbiased: bool,
    *,
    fewest: int = 1,
    finite: bool = False,
) -> tuple[Array, Array, Array | int]:
    """``new = momentum * old + (1 - momentum) * batch``; ``momentum=None`` weights all batches alike.

    ``unbiased`` multiplies the batch's variance by n / (n - 1). A channel of less than ``fewest`` elements (two, where
    ``unbiased``) keeps its old statistics, with ``finite`` also one whose new mean or variance is not finite; a batch
    of no other channels does not count.
    """
    count = batch.count
    known = is_number(count)
    fewest = max(fewest, 2) if unbiased else fewest
    if known and count < fewest:
        return mean, var, num_batches
    dtype = batch.var.dtype
    new_mean, new_var = batch.mean, batch.var
    present = None if known else count >= fewest
    if unbiased and known:
        new_var = new_var * (count / (count - 1))
    elif unbiased:
        n = xp.astype(count, dtype)
        new_var = new_var * (n / xp.maximum(n - 1, xp.ones_like(n)))
    if finite:
        right = xp.isfinite(new_mean) & xp.isfinite(new_var)
        present = right if present is None else present & right
    seen = num_batches + (1 if present is None else xp.astype(xp.any(present), xp.int32))

    if momentum is None:
        share = 1 / seen if isinstance(seen, int) else 1 / xp.astype(xp.maximum(seen, xp.ones_like(seen)), dtype)
        keep = 1 - share
    else:
        keep, share = momentum, 1 - momentum

    def merge(old, new):
        merged = xp.astype(old, dtype, copy=False) * keep + new * share
        merged = xp.astype(merged, old.dtype, copy=False)
        return merged if present is None else xp.where(present, merged, old)

    return merge(mean, new_mean), merge(var, new_var), seen


def debiased(rate: float, smallest: float) -> int:
    """The least count at which ``rate ** count`` is below the smallest number, so that 1 minus it divides nothing."""
    if rate >= 1:
        raise ValueError(f"A zero-debiased average wants a decay rate below 1; received {rate}.")
    if rate == 0:
        return 1
    count = math.ceil((math.log(smallest) - math.log(4)) / math.log(rate))
    if count >= 2**31:
        raise ValueError(f"decay rate {rate} is too near 1 for a count that debiases no more.")
    return max(count, 1)
