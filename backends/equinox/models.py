"""The batch norms of an equinox module, which are met when it is mapped over the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from normkit.backends.jax.functions import Average, Function, FunctionRecalibrates, described, undebiased

_BATCH: Any = eqx.nn.BatchNorm


class _Watched(eqx.nn.StatefulLayer):
    """In the place of a batch norm."""

    layer: Any
    between: Callable = eqx.field(static=True)

    def __call__(self, x: Any, state: Any, *, key: Any = None, inference: Any = None) -> tuple[Any, Any]:
        return self.between(self.layer, x), state


class _Mapped(Function):
    """A module with its state."""

    def __init__(self, module: eqx.Module, state: eqx.nn.State) -> None:
        averages: dict[str, Average] = {}
        self.given, self.found = state, dict[Any, Average]()
        leaves, structure = jax.tree_util.tree_flatten_with_path(eqx.nn.inference_mode(module), is_leaf=_is_norm)
        for path, layer in leaves:
            if not _is_norm(layer):
                continue
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            own = type(layer).__call__ is not _BATCH.__call__
            # A shared one has one place in the state.
            marker = _place(layer).marker
            average = self.found.get(marker) or Average(
                type(layer), *_pair(layer, state), "it is a subclass with a __call__ of its own" if own else ""
            )
            averages[name] = self.found[marker] = average
        super().__init__(type(module).__name__, averages)
        self.layers = [layer for _, layer in leaves if _is_norm(layer)]
        shown = [
            _Watched(layer, self._between) if _is_norm(layer) and not self.found[_place(layer).marker].reason else layer
            for _, layer in leaves
        ]
        self.module = jax.tree_util.tree_unflatten(structure, shown)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Map the module over the samples, in inference."""
        axes = {layer.axis_name for layer in self.layers}
        if len(axes) > 1:
            raise ValueError(f"Batch norms over one axis are mapped; these have {len(axes)}: {sorted(map(str, axes))}.")
        args, kwargs = jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, (args, kwargs))
        call = eqx.filter_vmap(lambda args, kwargs: self.module(*args, self.given, **kwargs)[0], axis_name=axes.pop())
        return call(args, kwargs)

    def _between(self, layer: Any, x: Any) -> Any:
        average = self.found[_place(layer).marker]
        average.called(jax.lax.all_gather(x, layer.axis_name), 1, layer.eps)
        return layer(x, filled(_copy(self.given), layer, *average.stored()), inference=True)[0]


class EquinoxModels(FunctionRecalibrates):
    """``(model, state)`` of equinox, for :func:`normkit.recalibrate`."""

    def opened(self, model: Any) -> _Mapped:
        """Both, which are there."""
        if len(model) != 2 or not isinstance(model[1], eqx.nn.State):
            raise TypeError(f"A model of equinox comes as (model, state); received {described(model)}.")
        return _Mapped(*model)

    def state(self, model: _Mapped) -> eqx.nn.State:
        """With new averages of which nothing is left to debias, as :func:`normkit.convert` writes them."""
        state = _copy(model.given)
        for layer in model.layers:
            state = filled(state, layer, *model.found[_place(layer).marker].stored())
        return state


def filled(state: Any, layer: Any, mean: Any, var: Any) -> Any:
    """A state in which a batch norm has these running statistics; the one that is given is used up."""
    if layer.mode == "ema":
        return state.set(layer.ema_first_time_index, jnp.array(False)).set(layer.ema_state_index, (mean, var))
    count = undebiased(layer.momentum, mean.dtype)
    state = state.set(layer.batch_counter, state.get(layer.batch_counter) * 0 + count)  # of the same, weak type
    return state.set(layer.batch_state_index, (mean, var))


def _copy(state: Any) -> Any:
    """To be used up."""
    return jax.tree.map(lambda leaf: leaf, state)


def _is_norm(layer: Any) -> bool:
    return isinstance(layer, _BATCH)


def _place(layer: Any) -> Any:
    return layer.ema_state_index if layer.mode == "ema" else layer.batch_state_index


def _pair(layer: Any, state: Any) -> tuple[Any, Any]:
    """What the layer takes for mean and variance in inference."""
    mean, var = state.get(_place(layer))
    count = 0 if layer.mode == "ema" else int(state.get(layer.batch_counter))
    scale = 1 - layer.momentum**count if count else 1
    return mean / scale, var / scale
