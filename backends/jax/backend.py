"""JAX: one jitted function per plan, with the core's gradient as its custom VJP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from normkit.backends.protocol import Array, ArrayBackend
from normkit.core.moments import Habits, Plain, Rescued
from normkit.core.normalize import BatchStats, Gradients, Operands, forward, returned_stats, vjp
from normkit.core.plan import Plan


def rescue_by_cond(plain: Plain, rescued: Rescued) -> tuple[Array, ...]:
    """Under XLA the predicate is data: one branch runs on the device, both under vmap."""
    right, result = plain()
    return jax.lax.cond(right, lambda: result, rescued)


#: XLA's reductions are trees: float32 suffices.
HABITS = Habits(rescue=rescue_by_cond)


class JaxBackend(ArrayBackend):
    """Eager calls are jitted too: one dispatch instead of a dozen."""

    name = "jax"
    habits = HABITS

    def __init__(self) -> None:
        super().__init__(jnp)

    def apply(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None]:
        return _apply(plan, operands)

    def vjp(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None, Callable[[Array], Gradients]]:
        (y, stats), saved = _jitted_forward(plan, operands)
        return y, stats, lambda dy: _jitted_vjp(plan, saved, dy)

    def create(self, values: Any, dtype: str, device: Any | None = None) -> Array:
        return jnp.asarray(values, dtype=dtype, device=device)


@functools.partial(jax.jit, static_argnums=0)
def _apply(plan: Plan, operands: Operands):
    return _normalize(plan, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(plan: Plan, operands: Operands):
    return _forward(plan, operands)[0]


def _forward(plan, operands):
    y, used = forward(jnp, plan, operands, HABITS)
    return (y, returned_stats(jnp, plan, operands, used)), (operands, used)


def _backward(plan, saved, cotangents):
    operands, used = saved
    found = vjp(jnp, plan, operands, used, cotangents[0], HABITS)
    return (Operands(found.x, found.weight, found.bias, found.mean, found.var, None),)


@functools.partial(jax.jit, static_argnums=0)
def _jitted_vjp(plan: Plan, saved, dy: Array) -> Gradients:
    operands, used = saved
    return vjp(jnp, plan, operands, used, dy, HABITS)


#: Outside of jit, each call would compile the conditional anew.
_jitted_forward = jax.jit(_forward, static_argnums=0)

_normalize.defvjp(_forward, _backward)
