"""Which of a Keras model's layers are batch norms that compute as Keras's, and what their variables hold."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
from keras import ops

from normkit.backends.keras import layers
from normkit.backends.keras.averages import Averages

_BATCH: Any = keras.layers.BatchNormalization


def unknown(layer: Any) -> str | None:
    """Why nobody knows by what formula a batch norm computes, if so."""
    if getattr(layer, "renorm", False):
        return "renorm=True: normkit has no batch renormalization"
    if "call" in vars(layer):
        return "its call was set on the instance"
    if getattr(layer, "use_batch_stats", None):
        return "it normalizes by the batch in inference too"
    ours = isinstance(layer, layers.BatchNormalizationCall)
    if not ours and any(getattr(type(layer), name) is not getattr(_BATCH, name) for name in ("__call__", "call")):
        return "it is a subclass with a call of its own"
    return None


def numbers(a: Any) -> Any:
    """A tensor or variable as a NumPy array in float64."""
    return None if a is None else np.array(ops.convert_to_numpy(a), "f8")


def without_gradients() -> contextlib.AbstractContextManager:
    """What keeps the backend from recording for gradients."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


class KerasRecalibrates(Averages):
    """Keras's moving statistics, for :func:`normkit.recalibrate`."""

    batch = _BATCH
    unknown = staticmethod(unknown)
    numbers = staticmethod(numbers)
    without_gradients = staticmethod(without_gradients)

    def kept(self, layer: Any, inputs: Any, mask: Any) -> Any:
        """By the mask, whose axes are those that x has without the channels."""
        if mask is None:
            return None
        return np.broadcast_to(ops.convert_to_numpy(layers.along(mask, inputs)), inputs.shape)
