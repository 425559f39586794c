"""The models of tf_keras: which layers are batch norms, and their moving statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tf_keras

from normkit.backends.keras.averages import Averages, walk

_BATCH: Any = tf_keras.layers.BatchNormalization
_BASE: Any = next(kind for kind in _BATCH.__mro__ if "call" in vars(kind))


class TfKerasModels(Averages):
    """Models of tf_keras, for :func:`normkit.recalibrate`."""

    batch = _BASE

    def refuse(self, model: Any, function: str = "recalibrate") -> None:
        """Raise where numbers are needed for what is not built."""
        for name, layer in self.layers(model):
            if isinstance(layer, _BASE) and not layer.built:
                where = name or "the model"
                raise ValueError(
                    f"{function} needs numbers; {where} is not built yet: run one batch through the model."
                )

    def layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        """All layers, named by those they are in."""
        return walk(model)

    def unknown(self, layer: Any) -> str | None:
        """By the class and by its options."""
        if layer.renorm:
            return "renorm=True: normkit has no batch renormalization"
        if any(getattr(type(layer), name) is not getattr(_BASE, name) for name in ("__call__", "call")):
            return "it is a subclass with a call of its own"
        return None

    def numbers(self, a: Any) -> Any:
        """A tensor or variable as a NumPy array in float64."""
        return np.array(a.numpy(), "f8")

    def kept(self, layer: Any, inputs: Any, mask: Any) -> Any:
        """By the mask, which lacks the last axis of x; the fused layer has none."""
        if mask is None or layer.fused:
            return None
        return np.broadcast_to(np.asarray(mask)[..., None] != 0, inputs.shape)

    def unbiased(self, layer: Any) -> bool:
        """Where the layer is fused."""
        return bool(layer.fused)
