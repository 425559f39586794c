"""Keras's models: which layers are norms, what takes their place, and what a model has to forget then."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.saving.object_registration import GLOBAL_CUSTOM_NAMES

from normkit.backends.keras import layers
from normkit.backends.keras.averages import walk
from normkit.backends.keras.batch_norms import KerasRecalibrates
from normkit.backends.keras.folding import KerasFolds
from normkit.backends.keras.objective import KerasDifferentiates
from normkit.backends.models import original_of, stand_in

#: Keras's layers, and ours in their place.
OURS = {getattr(keras.layers, kind): getattr(layers, kind) for kind in layers.__all__ if hasattr(keras.layers, kind)}

#: What ours puts before another class.
CALL = {kind: next(base for base in ours.__mro__ if base.__name__.endswith("Call")) for kind, ours in OURS.items()}

#: What a layer can be asked for that ours have not.
OPTIONS = {
    "synchronized": "synchronized=True: its statistics are those of all replicas, which normkit's are not",
    "renorm": "renorm=True: normkit has no batch renormalization",
    "rms_scaling": "rms_scaling=True divides by the root of the variance, which normkit does not",
}

#: Methods that make a subclass compute something else.
METHODS = ("__call__", "call", "_moments", "_reshape_into_groups", "_apply_normalization")

_NORM = re.compile(r"norm(?!al$)", re.IGNORECASE)
#: Layers of which the name says so, and which are none.
_NONE = (keras.layers.Normalization, keras.layers.Wrapper)


class KerasModels(KerasFolds, KerasRecalibrates, KerasDifferentiates):
    """Models of Keras on any backend, for :func:`normkit.replace` and what it shares with fold and recalibrate."""

    def refuse(self, model: Any, function: str = "replace") -> None:
        """Raise for what was exported or quantized, and where numbers are needed for what is not built."""
        if isinstance(model, getattr(keras.layers, "TFSMLayer", ())):
            raise ValueError(f"{function} comes before a model is exported; received a {type(model).__name__}.")
        for name, layer in self.layers(model):
            if getattr(layer, "quantization_mode", None):
                where = f"{name} in this {type(model).__name__}" if name else f"this {type(model).__name__}"
                raise ValueError(f"{function} comes before a model is quantized; {where} is quantized already.")
            if function != "replace" and isinstance(layer, keras.layers.BatchNormalization) and not layer.built:
                where = name or "the model"
                raise ValueError(
                    f"{function} needs numbers; {where} is not built yet: run one batch through the model."
                )

    def layers(self, model: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
        """All layers, named by those they are in."""
        return walk(model)

    def verdict(self, layer: keras.Layer) -> type | str | None:
        """By the class, and by the options that it was made with."""
        kind: Any = type(layer)
        if original_of(layer) is not None:
            return "it was replaced before"
        if kind.__module__ == layers.__name__:
            return "it is normkit's already"
        base = next((c for c in kind.__mro__ if c in OURS), None)
        if base is None:
            return _unknown(layer)
        for name, reason in OPTIONS.items():
            if getattr(layer, name, False):
                return reason
        if "call" in vars(layer):
            return "its call was set on the instance"
        if kind is base:
            return stand_in(kind, OURS[kind])
        if any(getattr(kind, name, None) is not getattr(base, name, None) for name in METHODS):
            return f"it is a subclass of keras.layers.{base.__name__} with a call of its own"
        made = stand_in(kind, CALL[base])
        # It is saved as what it was.
        GLOBAL_CUSTOM_NAMES[made] = keras.saving.get_registered_name(kind)
        return made

    def changed(self, model: keras.Layer) -> None:
        """Let every model trace its steps anew; its optimizer and the rest of what compile() set stay."""
        for _, layer in self.layers(model):
            for name in ("train", "test", "predict"):
                if getattr(layer, f"{name}_function", None) is None:
                    continue
                setattr(layer, f"{name}_function", None)
                if keras.backend.backend() == "jax":
                    import jax

                    # JAX knows a method by its object, which is still the same.
                    jax.jit(getattr(layer, f"{name}_step")).clear_cache()


def _unknown(layer: Any) -> str | None:
    """Why a norm that nobody knows is left; ``None`` for what is no norm, or is made of layers."""
    if isinstance(layer, keras.layers.UnitNormalization):
        return "normkit has no unit normalization"
    if isinstance(layer, (keras.Model, *_NONE)) or not _NORM.search(type(layer).__name__):
        return None
    return (
        None
        if any(inner.weights for inner in layer._flatten_layers(include_self=False))
        else "normkit does not know this class"
    )
