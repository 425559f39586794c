"""Which modules of a flax.nnx model are batch norms, and their running statistics: measured, written, put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from normkit.backends.flax import layers
from normkit.backends.models import COMPILED, Recorded, through
from normkit.core.population import Population, of_channels

#: The attributes by which a module is in its inference mode.
MODES = ("deterministic", "use_running_average")


#: Why a batch norm cannot be called.
SEVERAL = "axis={}: it has several axes of channels, with which flax does not run it either"


def several_axes(layer: nnx.BatchNorm) -> bool:
    """Whether a batch norm was made for more than its arrays have."""
    return isinstance(layer.axis, Iterable) and len(tuple(layer.axis)) > 1


def numbers(a: Any) -> Any:
    """An array as one of NumPy's in float64."""
    return np.array(a, "f8")


def population(layer: nnx.BatchNorm, x: Any, mask: Any) -> Population:
    """Of the channels of a batch norm's inputs, where they are not masked."""
    if isinstance(x, jax.core.Tracer):
        raise ValueError(COMPILED.format(type(layer).__name__))
    kept = None if mask is None else np.broadcast_to(np.asarray(mask) != 0, x.shape)
    return of_channels(np, numbers(x), layer.axis, kept)


class FlaxRecalibrates:
    """The running statistics of flax.nnx, for :func:`normkit.recalibrate`."""

    def recorded(self, layer: Any) -> Recorded | str | None:
        """Running statistics, epsilon, and what the arrays can hold."""
        if not isinstance(layer, nnx.BatchNorm):
            return None
        ours = isinstance(layer, layers.BatchNormForward)
        if not ours and type(layer).__call__ is not nnx.BatchNorm.__call__:
            return "it is a subclass with a __call__ of its own"
        if several_axes(layer):
            return SEVERAL.format(layer.axis)
        mean, var = layer.mean[...], layer.var[...]
        return Recorded(numbers(mean), numbers(var), layer.epsilon, float(jnp.finfo(var.dtype).max))

    def record(self, layer: Any, mean: Any, var: Any, batches: int) -> None:
        """In the variables that the module has."""
        for variable, value in ((layer.mean, mean), (layer.var, var)):
            variable[...] = jnp.asarray(value, variable[...].dtype)

    @contextlib.contextmanager
    def inference(self, model: nnx.Module) -> Iterator[None]:
        """By each module's attributes, as its ``eval()`` sets them."""
        modules = [module for _, module in nnx.iter_modules(model)]
        modes = [(m, name, vars(m)[name]) for m in modules for name in MODES if name in vars(m)]
        held = [(v, v[...]) for m in modules if isinstance(m, nnx.BatchNorm) for v in (m.mean, m.var)]
        try:
            for module, name, _ in modes:
                setattr(module, name, True)
            yield
        finally:
            for module, name, mode in modes:
                setattr(module, name, mode)
            for variable, before in held:
                variable[...] = before

    @contextlib.contextmanager
    def watch(self, norms: Iterable[Any], see: Callable[[Any, Population], bool]) -> Iterator[None]:
        """By what stands between; a batch's statistics stand in for the running ones while the module is called."""

        def between(layer: Any) -> Callable:
            def call(own: Callable, x: Any, use_running_average: Any = None, *, mask: Any = None) -> Any:
                found = population(layer, x, mask)
                if see(layer, found) and found.count:
                    self.record(layer, found.mean, found.var(unbiased=False), 0)
                return own(x, use_running_average=True)

            return call

        with contextlib.ExitStack() as stack:
            for layer in norms:
                stack.enter_context(through(layer, "__call__", between(layer)))
            yield
