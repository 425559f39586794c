"""Every framework's own layers, spelled like normkit's functions: same arguments, same parameters, eps always explicit.

A module here has a ``NAME``, the six functions (``batch_norm_train`` returns y alone; they have a ``mask`` where the
layer has one), a :class:`Convention` and ``running_statistics(steps, dtype, *, axis, momentum)``, with momentum as the
weight of the old value. What the framework cannot do raises :class:`Unsupported` with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np

#: Which modules here speak for which library, and what has to be installed for each.
NATIVES = {
    "numpy": {"numpy": "numpy"},
    "torch": {"torch": "torch"},
    "tensorflow": {"keras": "keras", "tensorflow": "tensorflow"},
    "jax": {"flax": "flax"},
}


class Unsupported(Exception):
    """The framework's own layer does not do this; the message says why."""


class Convention(NamedTuple):
    """How a framework keeps running statistics: what momentum weights, which variance it stores, if None averages."""

    weights: str
    unbiased: bool
    cumulative: bool = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a native layer warns of, and where it overflows, is its own affair."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def of(library: str) -> list[ModuleType]:
    """The native modules of a library, those that are installed."""
    found = NATIVES.get(library, {})
    return [
        importlib.import_module(f"{__name__}.{name}")
        for name, needs in found.items()
        if importlib.util.find_spec(needs)
    ]


def axes_of(axis, ndim: int) -> tuple[int, ...]:
    """Non-negative axes in ascending order."""
    return tuple(sorted(a % ndim for a in (axis if isinstance(axis, tuple | list) else (axis,))))


def only(condition: bool, reason: str) -> None:
    """Refuse what the framework's layer does not do."""
    if not condition:
        raise Unsupported(reason)
