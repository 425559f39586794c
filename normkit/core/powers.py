"""p-norms in the place of the root of variance or mean square: their squares, and what they turn with x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .plan import Plan

Array = Any
#: The sum of values, over the reduced axes, which stay at length 1.
Reduce = Callable[[Array], Array]
#: The same, by a count.
Quotient = Callable[[Array, Array | int], Array]


def square(xp, plan: Plan, values: Array, quotient: Quotient, divisor: Array | int) -> Array:
    """The square of the norm of values that are zero where they do not count."""
    assert plan.power is not None
    p, _, total, _, factor = plan.power
    n = 1 if total else divisor
    if p == 2:
        found = quotient(values * values, n)
    else:
        size = xp.abs(values)
        norm = quotient(size, n) if p == 1 else xp.max(size, axis=plan.axes, keepdims=True)
        found = norm * norm
    return found if factor == 1 else found * factor**2


def slope(xp, plan: Plan, values: Array, rstd: Array, summed: Reduce, divisor: Array | int) -> Array:
    """``norm * dnorm/dx / sqrt(norm**2 + eps)``: what is taken from dx for each unit of ``sum(g * x̂)``.

    ``dnorm/dx`` is ``x / norm`` over n elements (p = 2), ``sign(x)`` over n (p = 1), or ``sign(x)`` where ``|x|`` is
    largest, shared where several are (p = inf). Of the norm of x - mean, it is less its mean.
    """
    assert plan.power is not None
    p, centred, total, floor, factor = plan.power
    n = 1 if total else divisor
    if p == 2:
        found = values * (rstd / n)
    else:
        size, sign = xp.abs(values), xp.sign(values)
        if p == 1:
            found = sign * (summed(size) / n * rstd / n)
        else:
            norm = xp.max(size, axis=plan.axes, keepdims=True)
            peaks = xp.where(size >= norm, sign, xp.zeros_like(sign))
            found = peaks * (norm * rstd / xp.maximum(summed(xp.abs(peaks)), xp.ones_like(norm)))
        if centred:
            found = found - summed(found) / divisor
    if factor != 1:
        found = found * factor**2
    if floor and plan.eps:
        # Below the floor rstd is 1 / sqrt(eps) but for its rounding, and the norm turns nothing.
        low = rstd * math.sqrt(plan.eps) > 1 - 2.0**-16
        found = xp.where(low, xp.zeros_like(found), found)
    return found
