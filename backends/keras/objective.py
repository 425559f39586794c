"""Keras's models as pure functions of their parameters, on each of its backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops


class KerasDifferentiates:
    """The gradients of Keras's backend, for :func:`normkit.diagnostics.objective`."""

    def parameters(self, model: keras.Layer) -> dict[str, Any]:
        """The trainable variables, by their paths."""
        return {name: ops.stop_gradient(ops.copy(v.value)) for name, v in _named(model).items()}

    def value_and_grad(
        self,
        model: keras.Layer,
        loss: Callable[[Any], Any],
        call: Callable[[Any], Any],
        training: bool | None,
        seed: int,
    ) -> Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]]:
        """In a scope in which variables have other values, and what is assigned is forgotten after."""
        variables = _named(model)

        def value(params: dict[str, Any], state: list[Any]) -> Any:
            pairs = [(variables[name], a) for name, a in params.items()]
            pairs += zip(model.non_trainable_variables, state, strict=True)
            with keras.StatelessScope(state_mapping=pairs):
                return loss(call(_InMode(model, bool(training))))

        backend = keras.backend.backend()
        if backend not in _GRADIENTS:
            raise ValueError(f"objective needs gradients, and Keras has none on its backend {backend}.")
        differentiate = _GRADIENTS[backend](value, seed)

        def run(params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            state = [ops.copy(v.value) for v in model.non_trainable_variables]
            return differentiate(params, state)

        return run


class _InMode:
    """A model that is called with ``training``."""

    def __init__(self, model: keras.Layer, training: bool) -> None:
        self._model, self._training = model, training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **{"training": self._training, **kwargs})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _named(model: keras.Layer) -> dict[str, Any]:
    """Trainable variables by path; where two have one path, with a number."""
    found: dict[str, Any] = {}
    for variable in model.trainable_variables:
        name, again = variable.path, 1
        while name in found:
            name, again = f"{variable.path}_{again}", again + 1
        found[name] = variable
    return found


def _tensorflow(value: Callable, seed: int) -> Callable:
    import tensorflow as tf

    def run(params: dict[str, Any], state: list[Any]) -> tuple[Any, dict[str, Any]]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(list(params.values()))
            found = value(params, state)
        gradients = tape.gradient(found, params, unconnected_gradients="zero")
        return found, {name: tf.convert_to_tensor(g) for name, g in gradients.items()}

    return run


def _torch(value: Callable, seed: int) -> Callable:
    import torch

    from normkit.backends.torch.objective import seeded

    def run(params: dict[str, Any], state: list[Any]) -> tuple[Any, dict[str, Any]]:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        # Dropout draws from torch's own generator here.
        with seeded(leaves, seed), torch.enable_grad():
            found = value(leaves, state)
            gradients = torch.autograd.grad(found, list(leaves.values()), allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves.values(), strict=True)]
        return found.detach(), dict(zip(leaves, filled, strict=True))

    return run


def _jax(value: Callable, seed: int) -> Callable:
    import jax

    return jax.jit(jax.value_and_grad(value))


_GRADIENTS: dict[str, Callable] = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}
