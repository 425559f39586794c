"""Normalization forward and backward, for every layer, as a plan says."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import powers
from .moments import (
    Habits,
    Moments,
    accumulation_dtype,
    at_least_one,
    centred,
    factors,
    is_number,
    masked,
    merged,
    moments,
    total,
)
from .plan import Plan, product

Array = Any


class Operands(NamedTuple):
    """The arrays of one call. ``mean`` and ``var`` are statistics brought along; ``mask`` marks the valid elements."""

    x: Array
    weight: Array | None = None
    bias: Array | None = None
    mean: Array | None = None
    var: Array | None = None
    mask: Array | None = None


class Gradients(NamedTuple):
    """One gradient for each of the operands that has one, in that operand's shape and dtype."""

    x: Array | None = None
    weight: Array | None = None
    bias: Array | None = None
    mean: Array | None = None
    var: Array | None = None


#: What is safe with any library.
PLAIN = Habits()

#: All of them.
EVERY = Gradients(True, True, True, True, True)


class BatchStats(NamedTuple):
    """Statistics of one batch, one value per channel, in the accumulation dtype.

    ``var`` is the biased variance (divided by ``count``). ``count`` is the number of elements behind each channel's
    statistics: an ``int``, or an array where a mask or an unknown axis length decides it.
    """

    mean: Array
    var: Array
    count: Array | int  # type: ignore[assignment]  # in place of tuple.count


def forward(
    xp, plan: Plan, operands: Operands, habits: Habits = PLAIN, *, count: Array | int | None = None
) -> tuple[Array, Moments]:
    """``y = (x - mean) * rstd * weight + bias``, in x's dtype, and the moments that were used.

    ``count`` stands in for ``plan.count`` where a traced graph does not know it.
    """
    x, mask = _viewed(xp, plan, operands.x), _mask_view(xp, plan, operands.mask)
    dtype = x.dtype
    hidden = None if plan.everywhere else mask
    x = masked(xp, hidden, x)
    if operands.mean is not None:
        used = _given_moments(xp, plan, operands, dtype)
        d, factor = x - used.mean, used.rstd
    else:
        count = plan.count if count is None else count
        if is_number(count) and count == 0:
            used = _moments_of_nothing(xp, plan, x)
            d, factor = x, used.rstd
        else:
            seen = x if mask is hidden else masked(xp, mask, x)
            d, factor, used = moments(xp, plan, seen, mask, habits, count)
            if mask is not hidden:
                d, factor = factors(xp, plan, x, used, habits)
    y = _rounded(xp, plan, d * factor, operands.x, habits)
    if operands.weight is not None:
        y = y * _weight_view(xp, plan, operands.weight, dtype)
    if operands.bias is not None:
        y = y + _param_view(xp, plan, operands.bias, dtype)
    return _unviewed(xp, plan, masked(xp, hidden, y), operands.x), used


def vjp(
    xp,
    plan: Plan,
    operands: Operands,
    used: Moments,
    dy: Array,
    habits: Habits = PLAIN,
    *,
    needs: Gradients = EVERY,
) -> Gradients:
    """Gradients of ``sum(y * dy)`` for the operands that ``needs`` marks.

    With n reduced elements, g = dy * weight and x̂ = (x - mean) * rstd::

        dx = rstd * (g - mean(g) - x̂ * mean(g * x̂))     (without mean(g) where the layer does not centre)
        dweight = sum(dy * x̂),  dbias = sum(dy)

    and with statistics brought along::

        dx = rstd * g,  dmean = -sum(rstd * g),  dvar = -1/2 * sum(g * x̂) * rstd**2
    """
    x, mask = _viewed(xp, plan, operands.x), _mask_view(xp, plan, operands.mask)
    dtype = x.dtype
    hidden, seen = (None, mask) if plan.everywhere else (mask, None)
    dy = masked(xp, hidden, _viewed(xp, plan, dy, dtype))
    inside, given = masked(xp, hidden, x), operands.mean is not None
    d, factor = (centred(inside, used), used.rstd) if given else factors(xp, plan, inside, used, habits)
    xhat = masked(xp, hidden, d * factor)

    def summed(values, axes):
        return total(xp, values, axes, habits)

    def like(gradient, operand):
        return xp.reshape(xp.astype(gradient, operand.dtype, copy=False), operand.shape)

    dx = dweight = dbias = dmean = dvar = None
    weight = None if operands.weight is None else _weight_view(xp, plan, operands.weight, dtype)
    # Of dy * x̂ and dy, over the axes that a set shares with a parameter: each is taken once, and weighted then. Where
    # no axis is shared, sets have sums of their own, of what is weighted before.
    common = tuple(a for a in plan.axes if a in plan.param_axes)
    across, rest = (tuple(a for a in axes if a not in common) for axes in (plan.param_axes, plan.axes))
    of_sets = needs.mean or needs.var or (needs.x and operands.mean is None)
    if needs.weight or (of_sets and common):
        products = summed(dy * xhat, common)
    if needs.bias or (of_sets and common):
        sums = summed(dy, common)
    if weight is not None and needs.weight:
        rounded = _rounded(xp, plan, xhat, operands.x, habits)
        found = summed(products, across) if rounded is xhat else summed(dy * rounded, plan.param_axes)
        dweight = like(found, operands.weight)
    if operands.bias is not None and needs.bias:
        dbias = like(summed(sums, across), operands.bias)

    def weighted(values):
        return values if weight is None else values * weight

    if of_sets or needs.x:
        g = weighted(dy)

    def products_of_sets():
        return summed(weighted(products) if common else g * xhat, rest)

    def sums_of_sets():
        return summed(weighted(sums) if common else g, rest)

    def average(found):
        found = found * share
        return habits.stored(found, plan.axes) if common else found  # else it is at hand where the set's sum ends

    if operands.mean is not None:
        if needs.x:
            dx = g * used.rstd
        if needs.mean:
            dmean = like(-sums_of_sets() * used.rstd, operands.mean)
        if needs.var:
            dvar = like(products_of_sets() * used.rstd * used.rstd * -0.5, operands.var)
    elif needs.x:
        divisor = at_least_one(xp, used.count)
        share = 1 / divisor
        if plan.power is None:
            turned = xhat * average(products_of_sets())
        else:
            values = centred(x, used) if plan.power.centred else x
            slope = powers.slope(xp, plan, masked(xp, mask, values), used.rstd, lambda a: summed(a, plan.axes), divisor)
            turned = slope * products_of_sets()
        dx = g - masked(xp, seen, turned)
        if plan.center:
            dx = dx - masked(xp, seen, average(sums_of_sets()))
        dx = masked(xp, hidden, dx * used.rstd)
    if dx is not None:
        dx = _unviewed(xp, plan, dx, operands.x)
    return Gradients(dx, dweight, dbias, dmean, dvar)


def returned_stats(xp, plan: Plan, operands: Operands, used: Moments) -> BatchStats | None:
    """The moments as they leave :func:`normkit.batch_norm_train`, one value per channel; elsewhere they stay inside."""
    if not plan.stats_shape or operands.mean is not None:
        return None
    assert used.mean is not None
    mean, var = used.mean + used.residue, used.var
    count: Any = used.count
    if plan.virtual:
        assert plan.split is not None
        mean, var, count = merged(xp, used, plan.split, plan.view[plan.split])
    if not is_number(count) and count.ndim > 0:
        count = xp.reshape(count, plan.stats_shape)
    return BatchStats(xp.reshape(mean, plan.stats_shape), xp.reshape(var, plan.stats_shape), count)


def counted(plan: Plan, mask: Array | None, stats: BatchStats | None) -> BatchStats | None:
    """The statistics with a number for a count where it is one: what carries arrays alone has made an array of it."""
    if stats is None or mask is not None:
        return stats
    count = product(n for a, n in enumerate(plan.shape) if a not in plan.features)
    return stats if count is None else BatchStats(stats.mean, stats.var, count)


def _viewed(xp, plan: Plan, x: Array, dtype=None) -> Array:
    dtype = accumulation_dtype(xp, x.dtype) if dtype is None else dtype
    x = xp.astype(x, dtype, copy=False)
    return x if plan.view == plan.shape else xp.reshape(x, plan.view)


def _unviewed(xp, plan: Plan, y: Array, x: Array) -> Array:
    y = xp.astype(y, x.dtype, copy=False)
    if plan.view == plan.shape:
        return y
    axis = plan.split
    if axis is not None and plan.shape[axis] is None:
        return xp.reshape(y, (*plan.shape[:axis], -1, *plan.shape[axis + 1 :]))
    return xp.reshape(y, x.shape)


def _mask_view(xp, plan: Plan, mask: Array | None) -> Array | None:
    """A mask that broadcasts to the view as it broadcast to x."""
    axis = plan.split
    if mask is None or axis is None:
        return mask
    shape = list(mask.shape)
    at = axis - len(plan.shape) + len(shape)
    if at < 0:
        return mask
    shape[at : at + 1] = (1, 1) if shape[at] == 1 else plan.view[axis : axis + 2]
    return xp.reshape(mask, tuple(shape))


def _rounded(xp, plan: Plan, values: Array, x: Array, habits: Habits) -> Array:
    """The values, as x's dtype has them where the plan casts before the weight."""
    if plan.cast == "output" or values.dtype == x.dtype:
        return values
    return habits.rounded(xp, values, x.dtype)


def _param_view(xp, plan: Plan, param: Array, dtype) -> Array:
    return xp.reshape(xp.astype(param, dtype, copy=False), plan.param_view)


def _weight_view(xp, plan: Plan, weight: Array, dtype) -> Array:
    weight = _param_view(xp, plan, weight, dtype)
    return weight + plan.weight_offset if plan.weight_offset else weight


def _given_moments(xp, plan: Plan, operands: Operands, dtype) -> Moments:
    mean, var = (_param_view(xp, plan, a, dtype) for a in (operands.mean, operands.var))
    spread = var + plan.eps
    if plan.eps == 0:
        spread = xp.where(spread > 0, spread, xp.ones_like(spread))
    return Moments(mean, None, var, 1 / xp.sqrt(spread), plan.count or 0)


def _moments_of_nothing(xp, plan: Plan, x: Array) -> Moments:
    zero = total(xp, x, plan.axes, PLAIN)
    return Moments(zero if plan.center else None, zero if plan.center else None, zero, zero + 1, 0)
