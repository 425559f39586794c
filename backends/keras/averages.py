"""The moving statistics of either Keras's batch norms, for normkit.recalibrate; neither is imported here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from normkit.backends.models import COMPILED, Recorded, through
from normkit.core.population import Population, of_channels


def walk(layer: Any, name: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """A layer and those in it, named by those that they are in; a shared one by all its names."""
    yield name, layer
    above = (*above, id(layer))
    for child in layer._flatten_layers(include_self=False, recursive=False):
        if id(child) not in above:
            yield from walk(child, f"{name}/{child.name}" if name else child.name, above)


class Averages:
    """What :func:`normkit.recalibrate` needs, but for what the two Keras differ in."""

    #: The class of batch norms.
    batch: Any

    def unknown(self, layer: Any) -> str | None:
        """Why nobody knows by what formula a batch norm computes, if so."""
        raise NotImplementedError

    def numbers(self, a: Any) -> Any:
        """A tensor or variable as a NumPy array in float64."""
        raise NotImplementedError

    def kept(self, layer: Any, inputs: Any, mask: Any) -> Any:
        """What of the inputs counts, in their shape; ``None`` for all."""
        raise NotImplementedError

    def unbiased(self, layer: Any) -> bool:
        """Whether the layer stores n / (n - 1) times the variance of the values."""
        return False

    def without_gradients(self) -> contextlib.AbstractContextManager:
        """What keeps the backend from recording for gradients."""
        return contextlib.nullcontext()

    def recorded(self, layer: Any) -> Recorded | str | None:
        """Moving statistics, epsilon, and what the variables can hold."""
        if not isinstance(layer, self.batch):
            return None
        reason = self.unknown(layer)
        if reason:
            return reason
        if not layer.trainable:
            return "it is frozen: its trainable is False"
        mean, var = self.numbers(layer.moving_mean).reshape(-1), self.numbers(layer.moving_variance).reshape(-1)
        dtype: Any = layer.moving_variance.dtype
        largest = float(ml_dtypes.finfo(getattr(dtype, "as_numpy_dtype", dtype)).max)
        return Recorded(mean, var, layer.epsilon, largest, self.unbiased(layer))

    def record(self, layer: Any, mean: Any, var: Any, batches: int) -> None:
        """Written in place."""
        # Infinity where the variable cannot hold it.
        with np.errstate(over="ignore"):
            layer.moving_mean.assign(mean.reshape(layer.moving_mean.shape))
            layer.moving_variance.assign(var.reshape(layer.moving_variance.shape))

    @contextlib.contextmanager
    def inference(self, model: Any) -> Iterator[None]:
        """Keras's layers are in it wherever ``training`` is not said."""
        norms = [layer for layer in model._flatten_layers() if isinstance(layer, self.batch)]
        held = [(v, self.numbers(v)) for layer in norms for v in layer.non_trainable_variables]
        with self.without_gradients():
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
                    found = self._population(layer, inputs, mask)
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

    def _population(self, layer: Any, inputs: Any, mask: Any) -> Population:
        """Of the channels of a batch norm's inputs, where they are not masked."""
        try:
            x = self.numbers(inputs)
        except (TypeError, NotImplementedError, AttributeError, RuntimeError):
            raise ValueError(COMPILED.format(layer.name)) from None
        return of_channels(np, x, layer.axis, self.kept(layer, inputs, mask))
