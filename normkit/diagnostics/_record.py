"""What the results of diagnostics share: a frozen record of NumPy arrays that can be read, stacked and drawn."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import fields
from typing import Any

import numpy as np


class Record:
    """The base of the results; each says in its docstring what its arrays are and in which units."""

    #: Names of properties that :meth:`arrays` has beside the fields.
    _derived: tuple[str, ...] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """The numbers by name, of fields and what follows from them; text is left out."""
        names = [field.name for field in fields(self)] + [*self._derived]  # type: ignore[arg-type]
        found = {name: np.asarray(getattr(self, name)) for name in names}
        return {name: a for name, a in found.items() if a.dtype.kind in "biuf"}

    def plot(self, ax: Any = None) -> Any:
        """Draw it with matplotlib, into the given axes or new ones, which are returned."""
        from . import plots

        return plots.draw(self, ax)


def frozen(a: Any) -> np.ndarray:
    """As a NumPy array in float64 that cannot be written to."""
    a = np.array(a, "f8")
    a.setflags(write=False)
    return a


def number(of: Sized, what: str) -> str:
    """How many there are."""
    return f"{len(of)} {what}{'s' * (len(of) != 1)}"


def between(values: np.ndarray) -> str:
    """The range of some numbers."""
    low, high = (f"{float(v):.3g}" for v in (np.min(values), np.max(values)))
    return low if low == high else f"{low} to {high}"
