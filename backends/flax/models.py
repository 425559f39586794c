"""The models of flax.nnx: which modules are norms, and what takes their place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from normkit.backends.flax import layers
from normkit.backends.flax.batch_norms import SEVERAL, FlaxRecalibrates, several_axes
from normkit.backends.flax.objective import FlaxDifferentiates, held
from normkit.backends.models import original_of, stand_in

#: Flax's layers, and ours in their place.
OURS = {getattr(nnx, kind): getattr(layers, kind) for kind in layers.__all__}

#: What ours puts before another class.
FORWARD = {
    kind: next(base for base in ours.__mro__ if base.__name__.endswith("Forward")) for kind, ours in OURS.items()
}

#: Norms that normkit has not.
OTHERS = {
    nnx.SpectralNorm: "normkit has no spectral norm",
    nnx.WeightNorm: "normkit has no weight norm",
}

_NORM = re.compile(r"norm(?!al)", re.IGNORECASE)


class FlaxModels(FlaxRecalibrates, FlaxDifferentiates):
    """Models of flax.nnx, for :func:`normkit.replace` and what it shares with recalibrate."""

    def refuse(self, model: Any, function: str = "replace") -> None:
        """Raise for a module whose classes are known by what was traced, and where numbers are needed for shapes."""
        leaves = jax.tree.leaves(nnx.state(model))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise ValueError(
                f"{function} comes before a model is traced; received a {type(model).__name__} within jit."
            )
        if function != "replace" and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise ValueError(f"{function} needs numbers; this {type(model).__name__} has only their shapes.")

    def layers(self, model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
        """All modules, by all their names."""
        return _walk(model, "", ())

    def verdict(self, layer: nnx.Module) -> type | str | None:
        """By the class."""
        kind: Any = type(layer)
        if original_of(layer) is not None:
            return "it was replaced before"
        if kind.__module__ == layers.__name__:
            return "it is normkit's already"
        if kind in OTHERS:
            return OTHERS[kind]
        base = next((c for c in kind.__mro__ if c in OURS), None)
        if base is None:
            return _unknown(layer)
        if base is nnx.BatchNorm and several_axes(layer):
            return SEVERAL.format(layer.axis)
        if kind is base:
            return stand_in(kind, OURS[kind])
        if kind.__call__ is not base.__call__:
            return f"it is a subclass of flax.nnx.{base.__name__} with a __call__ of its own"
        return stand_in(kind, FORWARD[base])

    def changed(self, model: nnx.Module) -> None:
        """Nothing is remembered of a model: nnx.jit knows its classes."""


def _walk(node: Any, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """The modules in a module, and in what holds modules without being one."""
    if id(node) in above:
        return
    if isinstance(node, nnx.Module):
        yield name, node
    for key, value in held(node):
        yield from _walk(value, f"{name}.{key}" if name else str(key), (*above, id(node)))


def _unknown(layer: nnx.Module) -> str | None:
    """Why a norm that nobody knows is left; ``None`` for what is no norm, or is made of layers."""
    if not _NORM.search(type(layer).__name__):
        return None
    inner = [module for _, module in _walk(layer, "", ()) if module is not layer]
    return None if any(nnx.state(module) for module in inner) else "normkit does not know this class"
