"""Every check of what a layer is made of, called with and loaded from, and every message that refuses it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from . import backends
from ._dispatch import backend_of, describe
from ._validate import DTYPES, array, fraction, positive_int, several_axes
from .backends import Backend
from .backends.protocol import FLOATING, ArrayBackend
from .core.plan import Shape
from .styles import STYLES, Style


def momentum(value: Any, update_rate: Any, default: float) -> float | None:
    """The weight of the old statistics, whichever of old and new was given one; None for equal weights."""
    if update_rate is None:
        return None if value is None else fraction("momentum", value)
    if value is not default:
        raise ValueError(
            f"momentum (the weight of the old statistics) and update_rate (that of the new) exclude each other; "
            f"received momentum={value} and update_rate={update_rate}."
        )
    return 1 - fraction("update_rate", update_rate)


def style(name: str | None, cast: str | None, weight_offset: float | None) -> Style:
    """Cast point and weight offset by whose they are; what is given as well must say the same."""
    if name is not None and (not isinstance(name, str) or name not in STYLES):
        raise ValueError(f"style must be one of {', '.join(STYLES)}; received {name!r}.")
    usual = Style() if name is None else STYLES[name]
    given: dict[str, Any] = {k: v for k, v in (("cast", cast), ("weight_offset", weight_offset)) if v is not None}
    found = usual._replace(**given)
    if name is not None and found != usual:
        received = " and ".join(f"{k}={v!r}" for k, v in given.items())
        raise ValueError(
            f"style {name!r} has cast={usual.cast!r} and weight_offset={usual.weight_offset}; received {received}."
        )
    return found


def lengths(name: str, value: Any) -> tuple[int, ...]:
    """One length or several, none of them zero."""
    given = value if isinstance(value, (tuple, list)) else (value,)
    if not given:
        raise ValueError(f"{name} must hold at least one length; received {value!r}.")
    try:
        return tuple(positive_int(name, n) for n in given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be a positive integer or a tuple of them; received {value!r}.") from None


def layer_axes(axis: Any, count: int, trailing: bool) -> tuple[int, ...]:
    """As many axes as a layer has lengths; whether x has them shows when x is there."""
    if axis is None and trailing:
        return tuple(range(-count, 0))
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    for a in axes:
        if isinstance(a, bool) or not hasattr(a, "__index__"):
            raise TypeError(f"axis must be an integer or a tuple of them; received {describe(a)}.")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must not name an axis twice; received {axis}.")
    if len(axes) != count:
        lengths = "the layer's length" if count == 1 else f"each of the layer's {count} lengths"
        raise ValueError(f"axis must name one axis for {lengths}; received {axis}.")
    return tuple(operator.index(a) for a in axes)


def fits(layer: str, x: Any, axes: tuple[int, ...], expected: tuple[int, ...], held: Any | None) -> None:
    """``x`` is of the library that the layer holds an array of, if any, with the lengths that it was made for."""
    backend, shape = array("x", x)
    shape = tuple(shape)
    if held is not None and backend_of("weight", held) is not backend:
        there = repr(backend.name) if backend.namespace() is not None else "x's namespace"
        raise TypeError(
            f"{layer} holds parameters of type {describe(held)}; received x of type {describe(x)}: "
            f"make the layer with backend={there}."
        )
    lengths_along = _lengths_along.__wrapped__ if backend.tracing() else _lengths_along
    if lengths_along(axes, shape) != expected:
        along = f"length {expected[0]} along axis {axes[0]}" if len(axes) == 1 else f"lengths {expected} along {axes}"
        raise ValueError(f"{layer} needs x of {along}; received x of shape {shape}.")


@functools.lru_cache(maxsize=4096)
def _lengths_along(axes: tuple[int, ...], shape: Shape) -> Shape:
    return tuple(shape[a] for a in several_axes(axes if len(axes) > 1 else axes[0], shape))


def no_negative(xp: Any, name: str, var: Any) -> None:
    """No negative value in an array of one axis, wherever it is."""
    smallest = -float(xp.max(-var, axis=0))
    if smallest < 0:
        raise ValueError(f"{name} must not be negative; received a smallest value of {smallest}.")


def dtype(value: Any) -> str:
    """The name of a floating-point dtype, given as a name or as a library's own object."""
    name = getattr(value, "name", None) or getattr(value, "__name__", None) or str(value).rpartition(".")[2]
    if name not in FLOATING:
        raise ValueError(f"dtype must be one of {DTYPES}; received {value!r}.")
    return name


def library(value: Any) -> tuple[str, Backend]:
    """The name and the backend of the library that a layer's parameters live in."""
    if isinstance(value, ModuleType):
        known = value.__name__ in (entry.name for entry in backends.entries())
        return value.__name__, backends.get(value.__name__) if known else ArrayBackend(value)
    if not isinstance(value, str):
        raise TypeError(f"backend must be a library's name or its array namespace; received {describe(value)}.")
    return value, backends.get(value)


def keys(layer: str, state: Any, expected: Collection[str]) -> None:
    """A mapping with exactly these keys."""
    if not isinstance(state, Mapping):
        raise TypeError(f"The state of {layer} must be a mapping of names to arrays; received {describe(state)}.")
    missing = [name for name in expected if name not in state]
    unknown = [str(name) for name in state if name not in expected]
    if missing or unknown:
        wrong = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(unknown)} unknown"] * bool(unknown)
        raise ValueError(
            f"The state of {layer} must have exactly the keys {', '.join(expected) or '(none)'}; "
            f"received one with {' and '.join(wrong)}."
        )


def count(name: str, value: Any) -> int:
    """An integer, zero or more, perhaps in an array of shape ()."""
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer >= 0; received {describe(value)}.") from None
    if result < 0:
        raise ValueError(f"{name} must be an integer >= 0; received {result}.")
    return result
