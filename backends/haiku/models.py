"""The batch norms of a haiku transform, found among its state and met when it is applied."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import haiku as hk
import jax.numpy as jnp

from normkit.backends.jax.functions import Average, Function, FunctionRecalibrates, described, undebiased

_MEAN, _VAR = "/~/mean_ema", "/~/var_ema"
_SIGNATURE = inspect.signature(hk.BatchNorm.__call__)


class _Applied(Function):
    """A transform with its parameters and its state."""

    def __init__(self, transformed: Any, params: Mapping, state: Mapping) -> None:
        names = [key.removesuffix(_MEAN) for key in state if key.endswith(_MEAN)]
        super().__init__(
            type(transformed).__name__,
            {
                name: Average(hk.BatchNorm, state[name + _MEAN]["average"], state[name + _VAR]["average"])
                for name in names
                if name + _VAR in state
            },
        )
        self.transformed, self.params, self.state = transformed, params, state
        self.rates: dict[str, float] = {}
        self.takes_rng = "rng" in inspect.signature(transformed.apply).parameters

    def __call__(self, *args: Any, rng: Any = None, **kwargs: Any) -> Any:
        """Apply the transform; its batch norms are in inference whatever they are asked."""
        given = (rng, *args) if self.takes_rng else args
        with hk.intercept_methods(self._between):
            return self.transformed.apply(self.params, self.state, *given, **kwargs)[0]

    def _between(self, own: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        met = context.method_name == "__call__" and isinstance(module, hk.BatchNorm)
        average = self.averages.get(module.module_name) if met else None
        if average is None:
            return own(*args, **kwargs)
        average.kind = type(module)
        if type(module).__call__ is not hk.BatchNorm.__call__:
            average.reason = "it is a subclass with a __call__ of its own"
            return own(*args, **kwargs)
        given = _SIGNATURE.bind(module, *args, **kwargs).arguments
        x, channel = given["inputs"], module.channel_index
        axis = channel if module.axis is None else tuple(a for a in range(x.ndim) if a not in module.axis)
        average.called(x, axis, module.eps)
        self.rates[module.module_name] = module.mean_ema.decay
        given |= {"is_training": False, "test_local_stats": False}
        del given["self"]
        with hk.custom_getter(self._read, params=False, state=True):
            return own(**given)

    def _read(self, own: Callable, value: Any, context: Any) -> Any:
        """The averages are those of the moment."""
        layer, _, array = context.full_name.rpartition("/")
        for k, end in enumerate((_MEAN, _VAR)):
            average = self.averages.get(layer.removesuffix(end)) if array == "average" and layer.endswith(end) else None
            if average is not None:
                return own(average.stored()[k])
        return own(value)


class HaikuModels(FunctionRecalibrates):
    """``(transformed, params, state)`` of haiku, for :func:`normkit.recalibrate`."""

    def opened(self, model: Any) -> _Applied:
        """All three, which are there."""
        if len(model) != 3 or not all(isinstance(part, Mapping) for part in model[1:]):
            raise TypeError(f"A model of haiku comes as (transformed, params, state); received {described(model)}.")
        return _Applied(*model)

    def state(self, model: _Applied) -> dict:
        """With averages of which nothing is left to debias, as :func:`normkit.convert` writes them."""
        new = dict(model.state)
        for name, rate in model.rates.items():
            for end, value in zip((_MEAN, _VAR), model.averages[name].stored(), strict=True):
                old = model.state[name + end]
                counter = jnp.asarray(undebiased(rate, value.dtype), old["counter"].dtype)
                new[name + end] = {**old, "average": value, "hidden": value, "counter": counter}
        return new
