"""The fused CPU kernels in JAX: a primitive that lowers to them on one processor, and to the core's formula else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

from normkit.backends import kernels
from normkit.backends.kernels import programs
from normkit.backends.kernels.programs import GRADIENTS, OPERANDS, SLOTS, TARGET, the_route, turned
from normkit.backends.protocol import FLOATING
from normkit.core import normalize
from normkit.core.moments import PART, Habits, Moments, Plain, Rescued, first_of
from normkit.core.normalize import Gradients, Operands
from normkit.core.plan import Plan

Array = Any


def rescue_by_cond(plain: Plain, rescued: Rescued) -> tuple[Array, ...]:
    """Under XLA the predicate is data: one branch runs on the device, both under vmap."""
    right, result = plain()
    return jax.lax.cond(right, lambda: result, rescued)


def reduced(xp: Any, values: Array, dtype: Any) -> Array:
    """XLA leaves out a cast there and back, but not this."""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(values, kind.nexp, kind.nmant)


def explicit() -> bool:
    """Whether arrays have shardings as part of their types, as on the meshes that jax.make_mesh makes."""
    return jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def one_of(values: Array, axes: tuple[int, ...]) -> Array:
    """Of an axis that several devices share, JAX has no slice that one has."""
    return jnp.max(values, axis=axes, keepdims=True) if explicit() else first_of(values, axes)


#: XLA's reductions are trees: float32 suffices.
HABITS = Habits(rescue=rescue_by_cond, moves=True, part=PART, rounded=reduced, one_of=one_of)


def forward(plan: Plan, operands: Operands, *, save: bool) -> tuple[Array, Moments]:
    """``y``, and the moments as far as they are wanted: those that a gradient needs, or those of a batch."""
    plan, order, inverse = turned(plan)
    operands = _transposed(operands, order)
    wanted: tuple[str, ...] = ()
    if operands.mean is None and (save or plan.layer == "batch_norm_train"):
        wanted = programs.saved(plan)
    found = _bind(plan, programs.given(operands), ("y", *wanted))
    y = found["y"] if inverse is None else jnp.transpose(found["y"], inverse)
    return y, Moments(found.get("mean"), found.get("residue"), found.get("var"), found.get("rstd"), plan.count or 0)


def vjp(plan: Plan, operands: Operands, used: Moments, dy: Array) -> Gradients:
    """Gradients of ``sum(y * dy)``; those that turn out not to be needed are not computed."""
    plan, order, inverse = turned(plan)
    operands = _transposed(operands, order)
    dy = dy.astype(operands.x.dtype)
    given = {**programs.given(operands), "dy": dy if order is None else jnp.transpose(dy, order)}
    given |= {name: a for name, a in used._asdict().items() if name in ("mean", "residue", "rstd") and a is not None}
    wanted = [slot for name, slot in zip(OPERANDS, GRADIENTS, strict=True) if name in given]
    found = _bind(plan, given, wanted)
    if inverse is not None:
        found["y"] = jnp.transpose(found["y"], inverse)
    return Gradients(*map(found.get, GRADIENTS))


def _transposed(operands: Operands, order: tuple[int, ...] | None) -> Operands:
    return operands if order is None else operands._replace(x=jnp.transpose(operands.x, order))


def _bind(plan: Plan, given: dict[str, Array], results: Sequence[str]) -> dict[str, Array]:
    names = tuple(name for name in SLOTS if name in given)
    params = {"plan": plan, "operands": names, "results": tuple(results), "batch": None, "batched": ()}
    return dict(zip(results, fused_p.bind(*(given[name] for name in names), **params), strict=True))


def _composed(*arrays: Array, plan: Plan, operands, results, batch=None, batched=()) -> list[Array]:
    """What the primitive computes, in JAX's own operations."""
    if batch is not None:
        axes = tuple(0 if name in batched else None for name in operands)

        def one(*arrays):
            return _composed(*arrays, plan=plan, operands=operands, results=results)

        return jax.vmap(one, axes, axis_size=batch)(*arrays)
    given = dict(zip(operands, arrays, strict=True))
    call = Operands(*map(given.get, OPERANDS))
    if "dy" not in given:
        y, used = normalize.forward(jnp, plan, call, HABITS)
        found = {**used._asdict(), "y": y}
    else:
        if call.mean is None:
            used = Moments(given.get("mean"), given.get("residue"), None, given["rstd"], plan.count or 0)
        else:
            used = normalize.forward(jnp, plan, call, HABITS)[1]
        needs = Gradients(*(name in results for name in GRADIENTS))
        gradients = normalize.vjp(jnp, plan, call, used, given["dy"], HABITS, needs=needs)
        found = dict(zip(GRADIENTS, gradients, strict=True))
    return [found[name] for name in results]


def _abstract(*avals, plan: Plan, operands, results, batch, batched):
    dtypes = {name: a.dtype for name, a in zip(operands, avals, strict=True)}
    found = programs.layouts(plan, dtypes, jnp.float64 if dtypes["x"] == jnp.float64 else jnp.float32)
    lead = () if batch is None else (batch,)
    return [jax.core.ShapedArray((*lead, *shape), dtype) for shape, dtype in map(found.__getitem__, results)]


def _jvp(primals, tangents, **params):
    """Derivatives of values and of gradients alike are those of the composition."""
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def of(*values):
        arrays = list(primals)
        for i, value in zip(moving, values, strict=True):
            arrays[i] = value
        return _composed(*arrays, **params)

    return jax.jvp(of, [primals[i] for i in moving], [tangents[i] for i in moving])


def _vmap(arrays, axes, *, plan, operands, results, batch, batched):
    """One call with a leading axis on the arrays that have it; of two such axes one is made."""
    size = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)
    mapped = {name for name, axis in zip(operands, axes, strict=True) if axis is not None}
    arrays = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True)]
    total = size if batch is None else size * batch
    names = tuple(name for name in operands if name in mapped or name in batched)
    if batch is not None:
        for i, name in enumerate(operands):
            if name in names:
                a = arrays[i] if name in mapped else arrays[i][None]
                a = a if name in batched else a[:, None]
                inner = a.shape[2:]
                arrays[i] = jnp.broadcast_to(a, (size, batch, *inner)).reshape(total, *inner)
    found = fused_p.bind(*arrays, plan=plan, operands=operands, results=results, batch=total, batched=names)
    if batch is not None:
        found = [a.reshape(size, batch, *a.shape[1:]) for a in found]
    return found, [0] * len(found)


def _without_unused(used: Sequence[bool], equation):
    """A backward call computes what is asked of it alone; a forward call is nothing without y."""
    if not any(used):
        return [False] * len(equation.invars), None
    params = equation.params
    always = () if "dy" in params["operands"] else ("y",)
    kept = [u or name in always for u, name in zip(used, params["results"], strict=True)]
    results = tuple(itertools.compress(params["results"], kept))
    outvars = list(itertools.compress(equation.outvars, kept))
    return [True] * len(equation.invars), equation.replace(params={**params, "results": results}, outvars=outvars)


def _lower(context, *arrays, plan, **params):
    """The kernel, where the program is for this one processor and stays here."""
    module = context.module_context
    reason = None
    if module.lowering_parameters.for_export:
        reason = "the program is exported, and must run where normkit is not."
    elif getattr(module.axis_context, "num_devices", 1) != 1:
        reason = f"the program is partitioned over {module.axis_context.num_devices} devices."
    if not kernels.allows(plan, reason):
        return _lower_composed(context, *arrays, plan=plan, **params)
    return jax.ffi.ffi_lowering(TARGET)(context, *arrays, **_attributes(plan, **params))


def _lower_elsewhere(context, *arrays, plan, **params):
    kernels.allows(plan, f"the program is for {', '.join(context.module_context.platforms)}.")
    return _lower_composed(context, *arrays, plan=plan, **params)


def _attributes(plan: Plan, operands, results, batch, batched) -> dict[str, Any]:
    def bits(names):
        return np.int64(sum(1 << SLOTS.index(name) for name in names))

    sizes = {name: np.int64(n) for name, n in the_route(plan)._asdict().items() if isinstance(n, int)}
    return {
        **sizes,
        "eps": np.float64(plan.eps),
        "offset": np.float64(plan.weight_offset),
        "center": np.int64(plan.center),
        "operands": bits(operands),
        "results": bits(results),
        "batch": np.int64(1 if batch is None else batch),
        "batched": bits(batched),
    }


#: One call of a kernel, forward or backward: with ``dy`` among its operands it is backward.
fused_p = Primitive("normkit")
fused_p.multiple_results = True
fused_p.def_impl(_composed)  # under jax.disable_jit alone: elsewhere a call is compiled
fused_p.def_abstract_eval(_abstract)
ad.primitive_jvps[fused_p] = _jvp
batching.primitive_batchers[fused_p] = _vmap
partial_eval.dce_rules[fused_p] = _without_unused
_lower_composed = mlir.lower_fun(_composed, multiple_results=True)
mlir.register_lowering(fused_p, _lower_elsewhere)
mlir.register_lowering(fused_p, _lower, platform="cpu")


def _register() -> str | None:
    """Tell XLA of the handler; why it refuses, if it does."""
    if not kernels.info()["built"]:
        return None
    try:
        jax.ffi.register_ffi_target(TARGET, kernels.xla_handler(), platform="cpu")
    except Exception as error:  # of whatever type a jaxlib with another interface has for it
        return f"jaxlib {jax.lib.__version__} refuses them ({error})."
    return None


_refused = _register()


class JaxArrays:
    """JAX: whether the kernels can be built into a program; its arrays are row-major, wherever they are."""

    @property
    def elsewhere(self) -> str | None:
        """Why no kernel can serve here, whatever the arrays."""
        if _refused is None and not jax.sharding.get_abstract_mesh().empty:
            return "the program is written for a mesh of devices."
        return _refused

    def layout(self, x: Array) -> str | None:
        """``"first"``: XLA sees to it; ``None`` for a dtype that the kernels do not know."""
        return "first" if x.dtype.name in FLOATING else None


__all__ = ["HABITS", "JaxArrays", "forward", "fused_p", "vjp"]
