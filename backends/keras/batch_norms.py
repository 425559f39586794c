"""Which of a Keras model's layers are batch norms, and their moving statistics: measured, written, put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from normkit.backends.keras import layers
from normkit.backends.models import COMPILED, through
from normkit.core.population import Population, of_channels

_BATCH: Any = keras.layers.BatchNormalization


def unknown(layer: Any) -> str | None:
    """Why nobody knows by what formula a batch norm computes, if so."""
    if getattr(layer, "renorm", False):
        return "renorm=True: normkit has no batch renormalization"
    if "call" in vars(layer):
        return "its call was set on the instance"
    ours = isinstance(layer, layers.BatchNormalizationCall)
    if not ours and any(getattr(type(layer), name) is not getattr(_BATCH, name) for name in ("__call__", "call")):
        return "it is a subclass with a call of its own"
    return None


def numbers(a: Any) -> Any:
    """A tensor or variable as a NumPy array in float64."""
    return None if a is None else np.array(ops.convert_to_numpy(a), "f8")


def population(layer: Any, inputs: Any, mask: Any) -> Population:
    """Of the channels of a batch norm's inputs, where they are not masked."""
    try:
        x = numbers(inputs)
    except (TypeError, NotImplementedError, AttributeError, RuntimeError):
        raise ValueError(COMPILED.format(layer.name)) from None
    if mask is not None:
        mask = np.broadcast_to(ops.convert_to_numpy(layers.along(mask, inputs)), x.shape)
    return of_channels(np, x, layer.axis, mask)


def without_gradients() -> contextlib.AbstractContextManager:
    """What keeps the backend from recording for gradients."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


class KerasRecalibrates:
    """Keras's moving statistics, for :func:`normkit.recalibrate`."""

    #: Whether stored variances are n / (n - 1) times those of the values.
    unbiased = False

    def recorded(self, layer: Any) -> tuple[Any, Any, float, float] | str | None:
        """Moving statistics, epsilon, and what the variables can hold."""
        if not isinstance(layer, _BATCH):
            return None
        reason = unknown(layer)
        if reason:
            return reason
        if not layer.trainable:
            return "it is frozen: its trainable is False"
        mean, var = layer.moving_mean, layer.moving_variance
        return numbers(mean), numbers(var), layer.epsilon, float(ml_dtypes.finfo(var.dtype).max)

    def record(self, layer: Any, mean: Any, var: Any, batches: int) -> None:
        """Written in place."""
        # Infinity where the variable cannot hold it.
        with np.errstate(over="ignore"):
            layer.moving_mean.assign(mean)
            layer.moving_variance.assign(var)

    @contextlib.contextmanager
    def inference(self, model: keras.Layer) -> Iterator[None]:
        """Keras's layers are in it wherever ``training`` is not said."""
        norms = [layer for layer in model._flatten_layers() if isinstance(layer, _BATCH)]
        held = [(variable, numbers(variable)) for layer in norms for variable in layer.non_trainable_variables]
        with without_gradients():
            try:
                yield
            finally:
                for variable, before in held:
                    variable.assign(before)

    @contextlib.contextmanager
    def watch(self, norms: Iterable[Any], see: Callable[[Any, Population], bool]) -> Iterator[None]:
        """By what stands between; a batch's statistics stand in for the moving ones while the layer is called."""
        raised: list[BaseException] = []

        def between(layer: Any) -> Callable:
            def call(own: Callable, inputs: Any, training: Any = None, mask: Any = None) -> Any:
                try:
                    found = population(layer, inputs, mask)
                    if see(layer, found) and found.count:
                        self.record(layer, found.mean, found.var(unbiased=False), 0)
                except ValueError as error:
                    raised.append(error)
                    raise
                return own(inputs, training=False)

            return call

        with contextlib.ExitStack() as stack:
            for layer in norms:
                stack.enter_context(through(layer, "call", between(layer)))
            try:
                yield
            except ValueError:
                # Not as Keras has it, with the arguments of every call around.
                if raised:
                    raise raised[0] from None
                raise
