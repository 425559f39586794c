"""Models that are functions, with their state beside: their batch norms by name, as normkit.recalibrate has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normkit.backends.models import COMPILED, Recorded
from normkit.core.population import Population, of_channels
from normkit.core.running import debiased


class Average:
    """The running statistics of one batch norm, which is known by its name, and what it says when it is called."""

    def __init__(self, kind: type, mean: Any, var: Any, reason: str = "") -> None:
        #: Its class; why nobody knows by what formula it computes.
        self.kind, self.reason = kind, reason
        #: Whether there are numbers.
        self.known = not any(isinstance(a, (jax.ShapeDtypeStruct, jax.core.Tracer)) for a in (mean, var))
        #: In float64, of the shape that they are stored in; the dtype that they are stored in.
        self.mean, self.var = (np.array(a if self.known else np.nan, "f8") for a in (mean, var))
        self.dtype = var.dtype
        #: Known once it was called.
        self.eps = float("nan")
        self.see: Callable[[Any, Population], bool] | None = None

    def called(self, x: Any, axis: int | tuple[int, ...], eps: float, kept: Any = None) -> None:
        """Measure what the layer is called with; its statistics stand in for the running ones, if that is asked."""
        if isinstance(x, jax.core.Tracer):
            raise ValueError(COMPILED.format(self.kind.__name__))
        self.eps = eps
        kept = None if kept is None else np.broadcast_to(np.asarray(kept) != 0, x.shape)
        found = of_channels(np, np.array(x, "f8"), axis, kept)
        if self.see is not None and self.see(self, found) and found.count:
            self.put(found.mean, found.var(unbiased=False))

    def put(self, mean: Any, var: Any) -> None:
        """Take these for the running statistics."""
        self.mean, self.var = (np.reshape(new, old.shape) for new, old in ((mean, self.mean), (var, self.var)))

    def stored(self) -> tuple[Any, Any]:
        """Mean and variance as JAX has them."""
        return jnp.asarray(self.mean, self.dtype), jnp.asarray(self.var, self.dtype)


def undebiased(rate: float, dtype: Any) -> int:
    """The count of batches at which nothing is left to debias of an average in this dtype."""
    return debiased(rate, float(jnp.finfo(dtype).smallest_subnormal))


def described(parts: tuple) -> str:
    """What came in place of a model with its state."""
    return f"({', '.join(type(part).__name__ for part in parts)})"


class Function:
    """A model with its state: called without it, and written to by its averages alone."""

    def __init__(self, name: str, averages: dict[str, Average]) -> None:
        #: What the model is called; its batch norms.
        self.name, self.averages = name, averages


class FunctionRecalibrates:
    """What :func:`normkit.recalibrate` needs, but for how a framework's functions are taken apart."""

    def refuse(self, model: Function, function: str = "recalibrate") -> None:
        """Raise where there are no numbers."""
        for name, average in model.averages.items():
            if not average.known:
                raise ValueError(f"{function} needs numbers; the statistics of {name or 'the model'} are shapes alone.")

    def layers(self, model: Function) -> Iterator[tuple[str, Average]]:
        """The batch norms."""
        yield from model.averages.items()

    def recorded(self, layer: Average) -> Recorded | str | None:
        """What is known of it, or why it is not."""
        largest = float(jnp.finfo(layer.dtype).max)
        return layer.reason or Recorded(layer.mean.reshape(-1), layer.var.reshape(-1), layer.eps, largest)

    def record(self, layer: Average, mean: Any, var: Any, batches: int) -> None:
        """In the average."""
        layer.put(mean, var)

    @contextlib.contextmanager
    def inference(self, model: Function) -> Iterator[None]:
        """Layers are in it wherever the model is called."""
        held = [(average, average.mean, average.var) for average in model.averages.values()]
        try:
            yield
        finally:
            for average, mean, var in held:
                average.put(mean, var)

    @contextlib.contextmanager
    def watch(self, layers: Iterable[Average], see: Callable[[Any, Population], bool]) -> Iterator[None]:
        """By what stands between."""
        watched = list(layers)
        try:
            for average in watched:
                average.see = see
            yield
        finally:
            for average in watched:
                average.see = None
