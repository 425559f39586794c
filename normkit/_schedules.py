"""The bounds of batch renormalization as a layer has them: numbers, or what follows the number of batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from . import _validate as check

#: A number, pairs of a number of batches and a number, or a function of the number of batches.
Bound = float | tuple[tuple[float, float], ...] | Callable[[Any], Any] | None


def checked(virtual_batch_size: int | None, r_max: Bound, d_max: Bound) -> tuple[int | None, Bound, Bound]:
    """What a layer does in training besides batch norm: one thing, if anything."""
    size = None if virtual_batch_size is None else check.positive_int("virtual_batch_size", virtual_batch_size)
    if size is not None and not (r_max is None and d_max is None):
        raise ValueError(
            f"virtual_batch_size excludes batch renormalization; received {size} with r_max={r_max} and d_max={d_max}."
        )
    return size, _bound("r_max", r_max, 1), _bound("d_max", d_max, 0)


def at(bound: Bound, seen: Any, unbounded: float) -> Any:
    """The bound after so many batches; what stands for None is said."""
    if bound is None:
        return unbounded
    if callable(bound):
        return bound(seen)
    if not isinstance(bound, tuple):
        return bound
    seen, (_, last) = float(seen), bound[-1]
    if seen <= bound[0][0]:
        return bound[0][1]
    for (start, low), (end, high) in itertools.pairwise(bound):
        if seen < end:
            return low + (high - low) * (seen - start) / (end - start)
    return last


def _bound(name: str, bound: Bound, least: float) -> Bound:
    if bound is None or callable(bound):
        return bound
    if not isinstance(bound, (tuple, list)):
        return check.bound(name, bound, least)
    try:
        pairs = tuple((check.finite(name, n), check.bound(name, value, least)) for n, value in bound)
    except (TypeError, ValueError) as error:
        if str(error).startswith(name):
            raise
        pairs = ()
    if not pairs or any(n >= after for (n, _), (after, _) in itertools.pairwise(pairs)):
        raise ValueError(
            f"{name} must be a number, a function, or pairs (num_batches, bound) in ascending order; received {bound}."
        )
    return pairs
