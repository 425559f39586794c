"""Mean, variance and reciprocal spread that keep their digits: large offsets, huge and tiny scales, constants."""

from __future__ import annotations

from typing import Any, NamedTuple

from .plan import Plan

Array = Any


class Moments(NamedTuple):
    """What is known of each reduced set, with the reduced axes kept at length 1, in the accumulation dtype.

    The mean is ``mean + residue``: the first is the mean rounded to the dtype, the second what that rounding took.
    """

    mean: Array | None
    residue: Array | None
    var: Array | None
    rstd: Array
    count: Array | int  # type: ignore[assignment]  # in place of tuple.count


class _Range(NamedTuple):
    """Powers of two that bring squares back into range: ``large`` and ``small`` bound |x|, the others multiply it.

    A variance beyond ``most`` is given as ``most``, a quarter of the dtype's range: n / (n - 1) times it is finite.
    """

    large: float
    down: float
    small: float
    up: float
    most: float

    def needs_up(self, eps: float) -> bool:
        """Whether ``eps`` is too small to hide squares that underflow."""
        return eps < self.up**-2 * 2.0**64


_RANGES = {
    "float32": _Range(large=2.0**50, down=2.0**-80, small=2.0**-30, up=2.0**70, most=2.0**126),
    "float64": _Range(large=2.0**450, down=2.0**-600, small=2.0**-400, up=2.0**500, most=2.0**1022),
}


def accumulation_dtype(xp, dtype):
    """float64 for float64, float32 for everything narrower."""
    return xp.float64 if dtype == xp.float64 else xp.float32


def total(xp, x: Array, axes: tuple[int, ...], *, wide: bool) -> Array:
    """The sum over ``axes``, kept at length 1; ``wide`` sums in float64 and rounds once."""
    if not axes:
        return x
    if wide and x.dtype != xp.float64:
        return xp.astype(xp.sum(x, axis=axes, dtype=xp.float64, keepdims=True), x.dtype)
    return xp.sum(x, axis=axes, keepdims=True)


def moments(
    xp, plan: Plan, x: Array, mask: Array | None, *, wide: bool, count: Array | int
) -> tuple[Array, Array, Moments]:
    """Standardize ``x`` (in the accumulation dtype, shaped ``plan.view``) by its own statistics.

    Two passes and a correction: ``d = x - m`` is exact where it matters because ``m`` is near ``x``, and its mean is
    the rounding error of ``m``, taken out again. Squares are formed of ``d`` times a power of two, so that they neither
    overflow nor vanish; a set whose largest and smallest values agree is constant, and its ``d`` is exactly zero.

    Returns
    -------
    d, rscale, moments
        ``d * rscale`` is the standardized x; ``d`` carries the power of two, and is 0 where the mask is false.
    """
    kept = {"axis": plan.axes, "keepdims": True}
    if mask is None:
        highest, lowest = xp.max(x, **kept), xp.min(x, **kept)
    else:
        count = total(xp, xp.astype(mask, x.dtype), plan.axes, wide=wide)
        x = xp.where(mask, x, xp.zeros_like(x))
        highest = xp.max(xp.where(mask, x, xp.full_like(x, -float("inf"))), **kept)
        lowest = xp.min(xp.where(mask, x, xp.full_like(x, float("inf"))), **kept)
    divisor = at_least_one(xp, count)

    mean = residue = None
    d = x
    if plan.center:
        constant = highest == lowest
        mean = xp.where(constant, highest, total(xp, x, plan.axes, wide=wide) / divisor)
        d = x - mean
        if mask is not None:
            d = xp.where(mask, d, xp.zeros_like(d))
        residue = total(xp, d, plan.axes, wide=wide) / divisor
        residue = xp.where(constant, xp.zeros_like(residue), residue)
        d = d - residue
        if mask is not None:
            d = xp.where(mask, d, xp.zeros_like(d))

    # Of d, not of x: a constant has d = 0, however large it is.
    peak = highest - lowest if plan.center else xp.maximum(highest, -lowest)
    bounds = _RANGES["float64" if x.dtype == xp.float64 else "float32"]
    scale, eps = _in_range(xp, peak, bounds, plan.eps)
    d = d * scale
    power = total(xp, d * d, plan.axes, wide=wide) / divisor
    spread = power + eps
    if plan.eps == 0:
        spread = xp.where(spread > 0, spread, xp.ones_like(spread))
    rscale = 1 / xp.sqrt(spread)
    var = None
    if plan.stats_shape:
        down = xp.minimum(scale, xp.ones_like(scale))
        var = xp.minimum(power, bounds.most * down * down) / scale / scale
    return d, rscale, Moments(mean, residue, var, scale * rscale, count)


def at_least_one(xp, count: Array | int) -> Array | int:
    """A count to divide by: sums over nothing are zero, not NaN."""
    if isinstance(count, int):
        return count or 1
    return xp.maximum(count, xp.ones_like(count))


def _in_range(xp, peak: Array, bounds: _Range, eps: float) -> tuple[Array, Array]:
    """The power of two that x is multiplied by before squaring, and eps times its square."""

    def full(value):
        return xp.full_like(peak, value)

    large = peak > bounds.large
    scale = xp.where(large, full(bounds.down), full(1.0))
    scaled_eps = xp.where(large, full(eps * bounds.down**2), full(eps))
    if bounds.needs_up(eps):
        small = peak < bounds.small
        scale = xp.where(small, full(bounds.up), scale)
        scaled_eps = xp.where(small, full(eps * bounds.up**2), scaled_eps)
    return scale, scaled_eps
