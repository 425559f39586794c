"""Which kernel a plan is for, and the sizes it is called with; no array is touched here."""

from __future__ import annotations

import math
from typing import NamedTuple

from normkit.core.plan import Plan

ROWS, CHANNELS, COLUMNS = range(3)
KINDS = ("rows", "channels", "columns")


class Route(NamedTuple):
    """A kernel and its sizes (see ``Args`` in src/kernels.h), and the shape of its statistics as the core has them."""

    kind: int
    outer: int
    groups: int
    channels: int
    inner: int
    moments_shape: tuple[int, ...]


_routes: dict[tuple[int, bool], tuple[Plan, Route | None]] = {}


def route(plan: Plan, channels_last: bool) -> Route | None:
    """The route for an array in row-major order, or with axis 1 last in memory; ``None`` where there is none.

    Remembered by the plan's identity: plans are cached, and hashing one takes longer than a small kernel.
    """
    found = _routes.get((id(plan), channels_last))
    if found is not None and found[0] is plan:
        return found[1]
    if len(_routes) > 1024:
        _routes.clear()
    new = None if None in plan.shape or 0 in plan.shape else _find(plan, channels_last)
    _routes[id(plan), channels_last] = plan, new
    return new


def _find(plan: Plan, channels_last: bool) -> Route | None:
    view = tuple(n for n in plan.view if n is not None)  # all of them: route() sees to it
    kept = tuple(a for a in range(len(view)) if a not in plan.axes)
    moments_shape = tuple(1 if a in plan.axes else n for a, n in enumerate(view))

    def made(kind, outer, groups, channels, inner):
        return Route(kind, outer, groups, channels, inner, moments_shape)

    if plan.layer in ("layer_norm", "rms_norm"):
        if channels_last or not plan.trailing:
            return None
        return made(ROWS, math.prod(view[a] for a in kept), 1, plan.count, 1)
    if plan.layer in ("batch_norm", "batch_norm_train"):
        (axis,) = kept
        before, after = math.prod(view[:axis]), math.prod(view[axis + 1 :])
        if channels_last:
            return made(COLUMNS, 1, view[1], 1, before * after) if axis == 1 else None
        if after == 1:
            return made(COLUMNS, 1, view[axis], 1, before)
        return made(CHANNELS, before, 1, view[axis], after)
    if plan.layer in ("group_norm", "instance_norm") and len(kept) == 2 and kept[0] == 0:
        axis = kept[1]
        per_group = view[axis + 1] if plan.layer == "group_norm" else 1
        end = axis + 2 if plan.layer == "group_norm" else axis + 1
        if channels_last:
            return made(COLUMNS, view[0], view[1], per_group, math.prod(view[end:])) if axis == 1 else None
        if axis == 1:
            return made(ROWS, view[0], view[1], per_group, math.prod(view[end:]))
        if end == len(view):
            return made(COLUMNS, view[0], view[axis], per_group, math.prod(view[1:axis]))
    return None
