"""Batch norms of a Keras model and the layers beside them, found by running it; folded, and unfolded again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from normkit.backends.keras.batch_norms import numbers, unknown, without_gradients
from normkit.backends.keras.linear import LINEAR, misfit, norm_of, padded, weight_of, written
from normkit.backends.models import Pair, through

L: Any = keras.layers


def _call(self: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
    return inputs


#: What stands where a batch norm was: called as one, and saved as Keras's Identity.
_NOTHING: Any = type("Identity", (L.Identity,), {"call": _call, "__module__": L.Identity.__module__})


class KerasFolds:
    """Keras's batch norms, for :func:`normkit.fold`."""

    def training(self, layer: Any) -> bool:
        """A layer of Keras is in training mode only where it is called so."""
        return False

    def outputs(self, model: Any, run: Callable[[], Any]) -> list[tuple[Any, float]]:
        """Tensors anywhere in what the model returns."""
        with without_gradients():
            found = [a for a in keras.tree.flatten(run()) if keras.backend.is_float_dtype(_dtype(a))]
        return [(numbers(a), _eps(a)) for a in found]

    def pairs(self, model: Any, run: Callable[[], Any]) -> list[tuple[Any, Pair | str]]:
        """By which layer gets the very array that another returned; that nobody else does is tried."""
        names = {id(layer): name for name, layer in self.layers(model)}  # type: ignore[attr-defined]
        layers = list({id(layer): layer for layer in model._flatten_layers()}.values())
        norms = [layer for layer in layers if isinstance(layer, L.BatchNormalization)]
        linears = [layer for layer in layers if isinstance(layer, LINEAR)]
        with _recorded([*norms, *linears]) as calls:
            reference = self.outputs(model, run)
        found = [(norm, _pair(norm, calls, layers, names)) for norm in norms]
        between = [pair for _, pair in found if isinstance(pair, Pair)]
        if between and not self._apart(model, run, reference, between, calls):
            for k, (norm, pair) in enumerate(found):
                if isinstance(pair, Pair) and not self._apart(model, run, reference, [pair], calls):
                    name = names[id(pair.linear)]
                    found[k] = norm, f"what is between it and {name} goes elsewhere as well"
        return found

    def _apart(self, model: Any, run: Callable[[], Any], reference: Any, pairs: list[Pair], calls: Any) -> bool:
        """Whether nothing changes where what is within pairs is no number, and what they return is what they did."""
        changed = []

        def between(x: Any, y: Any, first: bool, second: bool) -> Callable:
            result = ops.full_like(y, float("nan")) if first else y

            def call(own: Callable, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                # What comes from a pair before would not be seen behind this one.
                if not second and np.isnan(numbers(inputs)).sum() != np.isnan(numbers(x)).sum():
                    changed.append(inputs)
                return result

            return call

        firsts, seconds = ({id(_ordered(pair)[k]) for pair in pairs} for k in (0, 1))
        with contextlib.ExitStack() as stack:
            for layer in {id(layer): layer for pair in pairs for layer in _ordered(pair)}.values():
                ((x, y),) = calls[id(layer)]
                stack.enter_context(through(layer, "call", between(x, y, id(layer) in firsts, id(layer) in seconds)))
            found = self.outputs(model, run)
        return not changed and all(
            np.array_equal(np.isnan(a), np.isnan(b)) and np.allclose(a, b, rtol=eps**0.5, atol=0, equal_nan=True)
            for (a, eps), (b, _) in zip(reference, found, strict=True)
        )

    def norm(self, pair: Pair) -> tuple[Any, Any, Any, Any, float]:
        """Moving statistics, gamma and beta."""
        return norm_of(pair)

    def linear(self, pair: Pair) -> tuple[Any, Any]:
        """In one form for all."""
        return weight_of(pair)

    def errors(
        self, model: Any, run: Callable[[], Any], trials: list[tuple[Pair, Any, Any]]
    ) -> list[tuple[float, float]]:
        """What enters a pair goes through the linear layer with its new weight as well."""
        found = []
        with _recorded([layer for pair, _, _ in trials for layer in _ordered(pair)]) as calls, without_gradients():
            run()
        for pair, weight, bias in trials:
            first, second = _ordered(pair)
            ((x, _),), ((_, y),) = calls[id(first)], calls[id(second)]
            undo = written(pair, weight, bias)
            with without_gradients():
                apart = abs(numbers(pair.linear(x)) - numbers(y)).max()
            undo()
            found.append((float(apart / abs(numbers(y)).max()) if apart else 0.0, _eps(y)))
        return found

    def put(self, model: Any, pair: Pair, weight: Any, bias: Any) -> Callable[[], None]:
        """In place: the norm stays the object that it is, with nothing of a norm in it."""
        norm = pair.norm
        held, rest = dict(vars(norm)), _NOTHING(name=norm.name)
        rest.dtype_policy = norm.dtype_policy
        back, kind = written(pair, weight, bias), type(norm)
        kept = {name: held[name] for name in ("_inbound_nodes", "_outbound_nodes", "_path", "_parent_path")}

        # A saved graph has the arguments of each call, of which Identity takes one.
        asked = [node.arguments.kwargs for node in norm._inbound_nodes]
        options = [{name: kwargs.pop(name) for name in ("training", "mask") if name in kwargs} for kwargs in asked]

        def become(cls: type, state: dict[str, Any]) -> None:
            object.__setattr__(norm, "__class__", cls)
            vars(norm).clear()
            vars(norm).update(state)
            self.changed(model)  # type: ignore[attr-defined]

        become(_NOTHING, {**vars(rest), **kept})

        def undo() -> None:
            back()
            become(kind, held)
            for kwargs, had in zip(asked, options, strict=True):
                kwargs.update(had)

        return undo


@contextlib.contextmanager
def _recorded(layers: Iterable[Any]) -> Iterator[dict[int, list[tuple[Any, Any]]]]:
    """What layers get and return, by their ids."""
    calls: dict[int, list[tuple[Any, Any]]] = {id(layer): [] for layer in layers}

    def between(seen: list) -> Callable:
        def call(own: Callable, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            y = own(inputs, *args, **kwargs)
            seen.append((inputs, y))
            return y

        return call

    with contextlib.ExitStack() as stack:
        for layer in {id(layer): layer for layer in layers}.values():
            stack.enter_context(through(layer, "call", between(calls[id(layer)])))
        yield calls


def _ordered(pair: Pair) -> tuple[Any, Any]:
    return (pair.linear, pair.norm) if pair.after else (pair.norm, pair.linear)


def _pair(norm: Any, calls: dict[int, list[Any]], layers: list[Any], names: dict[int, str]) -> Pair | str:
    """What a batch norm can be folded into, or why it cannot; but for where else the array between them goes."""
    reason, called = unknown(norm), calls[id(norm)]
    if reason:
        return reason
    if len(called) != 1:
        return f"it is called {len(called)} times" if called else "the sample does not reach it"
    ((x, y),) = called
    linears = [layer for layer in layers if isinstance(layer, LINEAR)]
    why = ""
    for linear in linears:
        for got, made in calls[id(linear)]:
            after = made is x
            if after or got is y:
                found = _beside(norm, linear, names[id(linear)], x if after else y, after, calls, layers)
                if not found:
                    return Pair(norm, linear, after)
                why = why or found
    return why or "no convolution or dense layer stands right before or behind it"


def _beside(
    norm: Any, linear: Any, name: str, between: Any, after: bool, calls: dict[int, list[Any]], layers: list[Any]
) -> str:
    """Why a norm cannot be folded into a layer beside it."""
    kind, times = type(linear), len(calls[id(linear)])
    if times != 1:
        return f"{name}, beside it, is called {times} times"
    base = next(c for c in kind.__mro__ if c in LINEAR)
    if any(getattr(kind, m, None) is not getattr(base, m, None) for m in ("__call__", "call", "convolution_op")):
        return f"{name}, beside it, is a subclass with a call of its own"
    if "call" in vars(linear):
        return f"the call of {name}, beside it, was set on the instance"
    if getattr(linear, "lora_enabled", False):
        return f"{name}, beside it, has a LoRA adapter"
    if any(sum(v is w for layer in layers for w in _own(layer)) != 1 for v in _own(linear)):
        return f"the weights of {name}, beside it, are used elsewhere as well"
    reason = misfit(Pair(norm, linear, after), between)
    if reason:
        return f"{name}, beside it, {reason}"
    if after:
        plain = linear.activation in (None, keras.activations.linear)
        return "" if plain else f"the activation of {name} stands between them"
    return padded(linear)


def _own(layer: Any) -> list[Any]:
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _dtype(a: Any) -> str:
    return keras.backend.standardize_dtype(a.dtype)


def _eps(a: Any) -> float:
    return float(ml_dtypes.finfo(_dtype(a)).eps)
