"""What a call of a kernel is inside a compiled program: its arrays by name, and the shapes of its results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
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
    """What src/tensorflow.cpp reads: the call on arrays of these dtypes, the statistics among them as :data:`STATS`.

    ``times`` names the size that is times the length of the batch, which comes as an operand before all others.
    """
    types = [TYPES[dtypes[name]] if name in dtypes else -1 for name in SLOTS]
    numbers = int("dy" in dtypes), *the_route(plan)[:5], plan.eps, plan.weight_offset, int(plan.center), *types
    return " ".join(map(str, (times, *numbers) if times else numbers))


class Sample(NamedTuple):
    """A call on a batch of unknown length: the plan for one sample of it, and which size of its route grows with it."""

    plan: Plan
    times: str


@functools.lru_cache(maxsize=1024)
def sample(plan: Plan) -> Sample | None:
    """The call where the length of the first axis alone is unknown, and a kernel needs no other order of axes."""
    if len(plan.shape) < 2 or plan.shape[0] is not None or None in (*plan.shape[1:], *plan.view[1:], *plan.param_shape):
        return None
    # Not of one, which might be in any place.
    plans = [dataclasses.replace(plan, shape=(n, *plan.shape[1:]), view=(n, *plan.view[1:])) for n in (1, 2, 3)]
    one, two, three = (route(p, False) for p in plans)
    for times in ("outer", "inner"):
        if one is not None and two is not None and three is not None:
            size = getattr(one, times)
            grown = [one._replace(**{times: n * size, "moments_shape": two.moments_shape}) for n in (2, 3)]
            if [two, three._replace(moments_shape=two.moments_shape)] == grown:
                return Sample(plans[0], times)
    return None


@functools.lru_cache(maxsize=1024)
def turned(plan: Plan) -> tuple[Plan, Order | None, Order | None]:
    """The plan for x with its axes in another order, that order and its inverse, where a kernel needs it."""
    if route(plan, False) is not None:
        return plan, None, None
    found = reordered(plan)
    assert found is not None, "accelerates() was not asked"
    shape = tuple(plan.shape[a] for a in found.order)
    if plan.layer == "group_norm":
        return group_plan(shape, found.route.groups, 1, plan.eps), found.order, found.inverse
    axes = tuple(sorted(map(found.inverse.__getitem__, plan.axes)))
    view = tuple(plan.param_view[a] for a in found.order)
    return dataclasses.replace(plan, shape=shape, view=shape, axes=axes, param_view=view), found.order, found.inverse
