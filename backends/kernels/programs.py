"""What a call of a kernel is inside a compiled program: its arrays by name, and the shapes of its results."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from normkit.backends.kernels.routes import Order, Route, reordered, route
from normkit.core.normalize import Operands
from normkit.core.plan import Plan, Shape, group_plan

Array = Any

#: What XLA knows the kernels by.
TARGET = "normkit"
#: The arrays of a call, in the order in which those that are there are passed; the same as Slot in src/programs.h.
SLOTS = (
    "x", "dy", "weight", "bias", "given_mean", "given_var",
    "y", "mean", "residue", "var", "rstd", "dweight", "dbias", "dmean", "dvar",
)  # fmt: skip
#: The operands of a plan, and where each one's gradient is.
OPERANDS = ("x", "weight", "bias", "given_mean", "given_var")
GRADIENTS = ("y", "dweight", "dbias", "dmean", "dvar")
#: Numbers as in src/kernels.h.
TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
#: The place of the statistics where they travel together: that of the last of them.
STATS = "rstd"


def given(operands: Operands) -> dict[str, Array]:
    """The operands that are there, by name."""
    return {name: a for name, a in zip(OPERANDS, operands, strict=False) if a is not None}


def saved(plan: Plan) -> tuple[str, ...]:
    """The statistics that a forward call gives where it computes them."""
    return ("mean", "residue", "var", "rstd") if plan.center else ("var", "rstd")


def the_route(plan: Plan) -> Route:
    """The route of a plan that has one."""
    found = route(plan, False)
    assert found is not None, "accelerates() was not asked"
    return found


def layouts(plan: Plan, dtypes: Mapping[str, Any], accumulation: Any) -> dict[str, tuple[Shape, Any]]:
    """Shape and dtype of all results that there can be, where the operands have these dtypes."""
    found: dict[str, tuple[Shape, Any]] = {"y": (plan.shape, dtypes["x"])}
    found |= dict.fromkeys(("mean", "residue", "var", "rstd"), (the_route(plan).moments_shape, accumulation))
    for name, gradient in zip(OPERANDS[1:], GRADIENTS[1:], strict=True):
        if name in dtypes:
            found[gradient] = (plan.param_shape, dtypes[name])
    return found


def description(plan: Plan, dtypes: Mapping[str, str], times: str = "") -> str:
    """What src/description.cpp reads: the call on arrays of these dtypes, the statistics among them as :data:`STATS`.

    ``times`` names the size that is times a number which comes as an operand before all others.
    """
    types = [TYPES[dtypes[name]] if name in dtypes else -1 for name in SLOTS]
    numbers = int("dy" in dtypes), *the_route(plan)[:5], plan.eps, plan.weight_offset, int(plan.center), *types
    return " ".join(map(str, (times, *numbers) if times else numbers))


class Sample(NamedTuple):
    """A call on x of which lengths are unknown: the plan where they are one, and which size of its route they grow."""

    plan: Plan
    times: str


@functools.lru_cache(maxsize=1024)
def sample(plan: Plan) -> Sample | None:
    """The call where axes of unknown length make one size of a kernel's, and it needs no other order of axes."""
    unknown = [a for a, n in enumerate(plan.shape) if n is None]
    if not unknown or None in plan.param_shape:
        return None

    def route_of(lengths: Mapping[int, int]) -> Route | None:
        return route(filled(plan, [lengths.get(a, 1) for a in unknown]), False)

    one = route_of({})
    # One might stand in any place: it must be so for others, by themselves and together.
    tried = [{a: n} for a in unknown for n in (2, 3)] + [dict.fromkeys(unknown, 2)]
    for times in ("outer", "inner"):
        grown = [(math.prod(lengths.values()), route_of(lengths)) for lengths in tried]
        if one is not None and all(r is not None and _sizes(r) == _sizes(one, times, n) for n, r in grown):
            return Sample(filled(plan, [1] * len(unknown)), times)
    return None


def filled(plan: Plan, lengths: Sequence[int]) -> Plan:
    """The plan with these in the place of the lengths that it does not know."""

    def known(sizes: Shape) -> Shape:
        rest = iter(lengths)
        return tuple(next(rest) if n is None else n for n in sizes)

    return dataclasses.replace(plan, shape=known(plan.shape), view=known(plan.view))


def _sizes(r: Route, times: str = "outer", n: int = 1) -> tuple[int, ...]:
    return r._replace(**{times: n * getattr(r, times)})[:5]


@functools.lru_cache(maxsize=1024)
def turned(plan: Plan) -> tuple[Plan, Order | None, Order | None]:
    """The plan for x with its axes in another order, that order and its inverse, where a kernel needs it."""
    if route(plan, False) is not None or sample(plan) is not None:
        return plan, None, None
    found = reordered(plan)
    assert found is not None, "accelerates() was not asked"
    shape = tuple(plan.shape[a] for a in found.order)
    if plan.layer == "group_norm":
        return group_plan(shape, found.route.groups, 1, plan.eps), found.order, found.inverse
    axes = tuple(sorted(map(found.inverse.__getitem__, plan.axes)))
    view = tuple(plan.param_view[a] for a in found.order)
    return dataclasses.replace(plan, shape=shape, view=shape, axes=axes, param_view=view), found.order, found.inverse
