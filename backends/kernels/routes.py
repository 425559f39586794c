"""Which kernel a plan is for, and the sizes it is called with; no array is touched here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from normkit.core.plan import Plan

ROWS, CHANNELS, COLUMNS = range(3)
KINDS = ("rows", "channels", "columns")

Order = tuple[int, ...]


class Route(NamedTuple):
    """A kernel and its sizes (see ``Args`` in src/kernels.h), and the shape of its statistics as the core has them."""

    kind: int
    outer: int
    groups: int
    channels: int
    inner: int
    moments_shape: tuple[int, ...]


class Reordered(NamedTuple):
    """The order of axes in which a row-major copy of any x has a route, and the way back."""

    order: Order
    inverse: Order
    route: Route


def unwritten(plan: Plan) -> str | None:
    """What of a plan no kernel is written for; ``None`` where there is nothing of the kind."""
    if plan.virtual:
        return "the batch is normalized as several."
    if plan.power is not None:
        return "x is divided by a p-norm."
    if plan.layer == "filter_response_norm":
        return "channels are not centred."
    if plan.cast != "output":
        return "what is normalized is rounded before the weight."
    return None


def route(plan: Plan, channels_last: bool) -> Route | None:
    """The route for x where it is, in row-major order or with axis 1 last in memory; ``None`` where there is none."""
    return _remembered(plan, "last" if channels_last else "first", _route)


def reordered(plan: Plan) -> Reordered | None:
    """The route for a copy of x; ``None`` where there is no element, or sizes are not known yet."""
    return _remembered(plan, "reordered", _reordered)


def _remembered(plan: Plan, what: str, find: Callable[[Plan, str], Any]) -> Any:
    try:
        return plan.memo[what]
    except KeyError:
        known = all(type(n) is int and n > 0 for n in plan.shape) and unwritten(plan) is None
        found = plan.memo[what] = find(plan, what) if known else None
        return found


def _route(plan: Plan, layout: str) -> Route | None:
    axes = range(len(plan.shape))
    if layout == "first":
        return _along(plan, tuple(axes))
    return _along(plan, (0, *axes[2:], 1)) if len(axes) > 2 else None


def _reordered(plan: Plan, _: str) -> Reordered:
    axes = tuple(range(len(plan.shape)))
    front: Order = ()
    if plan.layer in ("layer_norm", "rms_norm"):
        front = tuple(a for a in axes if a not in plan.axes)
    elif plan.layer in ("group_norm", "instance_norm"):
        front = _kept(plan)
    order = (*front, *(a for a in axes if a not in front))
    found = _along(plan, order)
    assert found is not None
    return Reordered(order, tuple(sorted(axes, key=order.__getitem__)), found)


def _along(plan: Plan, order: Order) -> Route | None:
    """The route for dense memory with x's axes in this order."""
    shape = tuple(n for n in plan.shape if n is not None)  # all of them: _remembered() sees to it
    moments_shape = tuple(1 if a in plan.axes else n for a, n in enumerate(plan.view) if n is not None)

    def made(kind: int, outer: int, groups: int, channels: int, inner: int) -> Route:
        return Route(kind, outer, groups, channels, inner, moments_shape)

    def size(axes: Order) -> int:
        return math.prod(shape[a] for a in axes)

    if plan.layer in ("layer_norm", "rms_norm"):
        kept = _kept(plan)
        wanted = [a for a in (*kept, *plan.axes) if shape[a] > 1]
        if [a for a in order if shape[a] > 1] != wanted:
            return None
        return made(ROWS, size(kept), 1, size(plan.axes), 1)
    channel = _kept(plan)[-1]
    at = order.index(channel)
    if plan.layer in ("batch_norm", "batch_norm_train", "weight_standardization"):
        before, after = size(order[:at]), size(order[at + 1 :])
        if after == 1:
            return made(COLUMNS, 1, shape[channel], 1, before)
        return made(CHANNELS, before, 1, shape[channel], after)
    samples = shape[0] if channel else 1
    groups = shape[channel] if plan.layer == "instance_norm" else plan.view[channel]
    assert groups is not None
    rest = math.prod(shape) // (samples * shape[channel])
    if at <= 1:
        return made(ROWS, samples, groups, shape[channel] // groups, rest)
    if at + 1 == len(order):
        return made(COLUMNS, samples, groups, shape[channel] // groups, rest)
    return None


def _kept(plan: Plan) -> Order:
    """The axes of x that are not reduced, or reduced within a group of channels only."""
    return tuple(a for a in range(len(plan.shape)) if a not in plan.axes)
