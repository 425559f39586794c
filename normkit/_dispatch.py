"""Which backend serves an array: found by the array's type, remembered per type; no library is imported."""

from __future__ import annotations

from typing import Any

from .backends import NAMES, Backend, UnknownBackendError, backend_for_type

#: NumPy's subclasses that mean something else by the same operations, and what to do with them.
MISLEADING = {
    "numpy.ma.MaskedArray": "pass its data, and what is valid as mask",
    "numpy.ma.core.MaskedArray": "pass its data, and what is valid as mask",
    "numpy.matrix": "numpy.asarray makes it one",
}

#: So much of a value stands in a message.
LONGEST = 60

_by_type: dict[type, Backend] = {}


def backend_of(name: str, x: Any) -> Backend:
    """The backend of one array, or a TypeError that names the argument and what was received."""
    backend = _by_type.get(type(x))
    return backend if backend is not None else _find(name, x)


def _find(name: str, x: Any) -> Backend:
    found = backend_for_type(type(x))
    for parent in type(x).__mro__:
        instead = MISLEADING.get(f"{parent.__module__}.{parent.__qualname__}")
        if instead is not None:
            raise TypeError(f"{name} must be a plain array; received {describe(x)}: {instead}.")
    if found is None:
        raise TypeError(
            f"{name} must be an array of a supported library ({', '.join(NAMES)}, or any with __array_namespace__); "
            f"received {describe(x)}."
        )
    # Two threads may both get here; they store the same value.
    _by_type[type(x)] = found
    return found


def describe(x: Any) -> str:
    """What an unsuitable argument is, short enough for a message."""
    if x is None or isinstance(x, bool):
        return repr(x)
    kind = type(x)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    text = f"{where}{kind.__qualname__}"
    if not isinstance(x, (int, float, complex, str)):
        return text
    shown = repr(x)
    return f"{text} {shown}" if len(shown) <= LONGEST else f"{text} {shown[:LONGEST]}…"


__all__ = ["UnknownBackendError", "backend_of", "describe"]
