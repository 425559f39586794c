"""The models of flax.nnx as pure functions of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from normkit.backends.flax.batch_norms import MODES


class FlaxDifferentiates:
    """The gradients of flax.nnx, for :func:`normkit.diagnostics.objective`."""

    def parameters(self, model: nnx.Module) -> dict[str, Any]:
        """The variables of type nnx.Param; arrays that nobody can write to."""
        found = {_name(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        # A state is in alphabetical order, a model in that in which it was made.
        place = {name: i for i, name in enumerate(_names(model, "", ()))}
        return dict(sorted(found.items(), key=lambda item: place.get(item[0], len(place))))

    def value_and_grad(
        self,
        model: nnx.Module,
        loss: Callable[[Any], Any],
        call: Callable[[Any], Any],
        training: bool | None,
        seed: int,
    ) -> Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]]:
        """By a copy that is made of the parameters and of all else at each call."""

        @jax.jit
        @jax.value_and_grad
        def run(params: dict[str, Any], state: Any) -> Any:
            definition, own, _ = nnx.split(model, nnx.Param, ...)
            flat = [(path, variable.replace(params[_name(path)])) for path, variable in nnx.to_flat_state(own)]
            twin = nnx.merge(definition, nnx.from_flat_state(flat), state, copy=True)
            for _, module in nnx.iter_modules(twin) if training is not None else ():
                for name in MODES:
                    if name in vars(module):
                        setattr(module, name, not training)
            return loss(call(twin))

        return lambda params: run(params, nnx.split(model, nnx.Param, ...)[2])


def held(node: Any) -> list[tuple[Any, Any]]:
    """What a module, or what holds modules without being one, has by name or by number."""
    if isinstance(node, nnx.Variable):
        return []
    if isinstance(node, nnx.Pytree):
        return [(key, value) for key, value in vars(node).items() if not key.startswith("_pytree__")]
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else []


def _names(node: Any, name: str, above: tuple[int, ...]) -> Iterator[str]:
    """The variables in a module, by path."""
    if isinstance(node, nnx.Variable):
        yield name
    elif id(node) not in above:
        for key, value in held(node):
            yield from _names(value, f"{name}.{key}" if name else str(key), (*above, id(node)))


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
