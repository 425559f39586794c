"""Counts, means and sums of squared deviations of parts, merged to those of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Array = Any


class Population(NamedTuple):
    """Of some values of each channel: how many there are, their mean, and the sum of squares of what they are from it.

    Arrays of one length in float64: with the operators of arrays, in any library that has it.
    """

    count: int = 0  # type: ignore[assignment]  # in place of tuple.count
    mean: Array = 0.0
    m2: Array = 0.0

    def merge(self, other: Population) -> Population:
        """Those of both: ``m2 + m2' + (mean' - mean)² n n' / (n + n')``."""
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        apart, share = other.mean - self.mean, other.count / count
        return Population(count, self.mean + apart * share, self.m2 + other.m2 + apart * apart * (self.count * share))

    def var(self, unbiased: bool) -> Array:
        """``m2 / n``, or ``m2 / (n - 1)``; that of one value is zero."""
        return self.m2 / max(self.count - unbiased, 1)


def of_channels(xp, x: Array, axis: int | Sequence[int], kept: Array | None = None) -> Population:
    """Of the channels along one axis or several, in one row; ``kept``, as x and alike in all channels, leaves out."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    last = tuple(range(-len(axes), 0))
    x = xp.moveaxis(x, axes, last)
    if kept is not None:
        x = x[xp.moveaxis(kept, axes, last)[(..., *(0 for _ in axes))]]
    x = xp.reshape(x, (-1, math.prod(x.shape[-len(axes) :])))
    if not x.shape[0]:
        return Population()
    mean = xp.mean(x, axis=0)
    return Population(x.shape[0], mean, xp.sum((x - mean) ** 2, axis=0))
