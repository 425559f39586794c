"""JAX: one jitted function per plan, with the core's gradient as its custom VJP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from normkit.backends import kernels
from normkit.backends.jax import fused
from normkit.backends.jax.fused import HABITS
from normkit.backends.protocol import Array, ArrayBackend
from normkit.core.normalize import BatchStats, Gradients, Operands, counted, forward, returned_stats, vjp
from normkit.core.plan import Plan


class JaxBackend(ArrayBackend):
    """Eager calls are jitted too: one dispatch instead of a dozen."""

    name = "jax"
    habits = HABITS

    def __init__(self) -> None:
        super().__init__(jnp)

    def at_hand(self, x: Array, *, wait: bool = False) -> bool:
        return wait and not isinstance(x, jax.core.Tracer)

    def constant(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def apply(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None]:
        return _compiled(plan, kernels.mode)(*operands)

    def vjp(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None, Callable[[Array], Gradients]]:
        mode = kernels.mode
        (y, stats), saved = _jitted_forward(plan, mode, operands)
        return y, counted(plan, operands.mask, stats), lambda dy: _jitted_vjp(plan, mode, saved, dy)

    def create(self, values: Any, dtype: str, device: Any | None = None) -> Array:
        return jnp.asarray(values, dtype=dtype, device=device)


# Static arguments of jit cost more than this at every call. What was compiled in another mode is not to be found again.
@functools.lru_cache(maxsize=4096)
def _compiled(plan: Plan, mode: str) -> Callable[..., tuple[Array, BatchStats | None]]:
    @jax.jit
    def apply(*operands):
        return _normalize(plan, mode, Operands(*operands))

    def apply_and_count(*operands):
        y, stats = apply(*operands)
        return y, counted(plan, operands[-1], stats)

    return apply_and_count if plan.stats_shape else apply


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(plan: Plan, mode: str, operands: Operands):
    return _forward(plan, mode, operands, save=False)[0]


def _forward(plan, mode, operands, save=True):
    if kernels.accelerates(plan, operands):
        y, used = fused.forward(plan, operands, save=save)
    else:
        y, used = forward(jnp, plan, operands, HABITS)
    return (y, returned_stats(jnp, plan, operands, used)), (operands, used)


def _backward(plan, mode, saved, cotangents):
    found = _vjp(plan, mode, saved, cotangents[0])
    gradients = Operands(found.x, found.weight, found.bias, found.mean, found.var, None)
    return (jax.tree.map(_placed, gradients, saved[0]._replace(mask=None)),)


def _placed(gradient: Array, of: Array) -> Array:
    """The gradient on the devices of what it is of, where that is part of its type."""
    return jax.sharding.reshard(gradient, jax.typeof(of).sharding) if fused.explicit() else gradient


def _vjp(plan, mode, saved, dy) -> Gradients:
    operands, used = saved
    if kernels.accelerates(plan, operands):
        return fused.vjp(plan, operands, used, dy)
    return vjp(jnp, plan, operands, used, dy, HABITS)


#: Outside of jit, each call would compile the conditional anew.
_jitted_forward = jax.jit(_forward, static_argnums=(0, 1))
_jitted_vjp = jax.jit(_vjp, static_argnums=(0, 1))

_normalize.defvjp(_forward, _backward)
