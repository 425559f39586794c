"""What was measured during training, step by step, and the same at equal loss."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from normkit._dispatch import describe
from normkit._validate import positive_int

from ._record import Record, number
from .objective import steps_of


class Trace:
    """A recorder of numbers, arrays and results over the steps of training.

    ::

        trace = Trace(every=10)
        for step in range(300):
            ...
            trace.add(step, loss=float(loss), landscape=lambda: landscape(objective, objective.params, steps))

    Parameters
    ----------
    every : record at every so many-th step; :meth:`add` leaves out the others, and calls no function for them
    """

    def __init__(self, every: int = 1) -> None:
        self.every = positive_int("every", every)
        self._rows: list[dict[str, np.ndarray]] = []

    def due(self, step: int) -> bool:
        """Whether this step is one to record."""
        return step % self.every == 0

    def add(self, step: int, **values: Any) -> bool:
        """Record values at a step that is due: numbers, arrays, results, or functions that return one when called.

        Returns whether it was recorded. Every step has the same names, with the same shapes.
        """
        if not self.due(step):
            return False
        row = {"step": np.asarray(step)}
        for name, value in values.items():
            value = value() if callable(value) else value
            if isinstance(value, Record):
                row.update({f"{name}.{key}": a for key, a in value.arrays().items()})
                continue
            row[name] = a = np.asarray(value)
            if a.dtype.kind not in "biuf":
                raise TypeError(f"Trace takes numbers, NumPy arrays and results; {name} is {describe(value)}.")
        if self._rows:
            _same(self._rows[0], row)
        self._rows.append(row)
        return True

    def __len__(self) -> int:
        """How many steps are recorded."""
        return len(self._rows)

    def __repr__(self) -> str:
        if not self._rows:
            return f"Trace(every={self.every}): nothing recorded"
        first, last = (int(row["step"]) for row in (self._rows[0], self._rows[-1]))
        names = ", ".join(name for name in self._rows[0] if name != "step")
        return f"Trace(every={self.every}): {number(self, 'step')}, {first} to {last}: {names}"

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was recorded, by name, with the steps along the first axis; of a result ``name.field``."""
        names = self._rows[0] if self._rows else {"step": None}
        return {name: np.array([row[name] for row in self._rows]) for name in names}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`arrays` to an .npz file, which ``numpy.load`` reads."""
        with open(path, "wb") as file:
            np.savez(file, **self.arrays())  # type: ignore[arg-type]

    def at_equal(self, name: str, edges: Any) -> dict[str, np.ndarray]:
        """Medians of all that was recorded, over the steps at which one number was between two edges.

        To compare two runs at equal loss, ``at_equal("loss", edges)`` of both: a run that is ahead is elsewhere.

        Parameters
        ----------
        name : of a number that was recorded, such as "loss"
        edges : B + 1 increasing numbers; a step is in bin b where ``edges[b] <= value < edges[b + 1]``

        Returns
        -------
        dict
            An array by each name with bins along the first axis, NaN where no step was in one, and "count", how many.

        Raises
        ------
        ValueError
            Nothing was recorded by this name, or more than a number; edges do not increase.
        """
        found = self.arrays()
        if name not in found:
            raise ValueError(f"This trace has no {name!r}; it has: {', '.join(found)}.")
        if found[name].ndim != 1:
            raise ValueError(f"at_equal goes by one number a step; {name} has the shape {found[name].shape[1:]}.")
        edges = steps_of("at_equal", "edges", edges)
        if len(edges) < 2 or (np.diff(edges) <= 0).any():
            raise ValueError(f"edges of at_equal must be two or more increasing numbers; received {edges.tolist()}.")
        where = np.digitize(found[name], edges) - 1
        bins = range(len(edges) - 1)
        medians = {
            key: np.array([np.median(a[where == b], axis=0) if (where == b).any() else _none(a) for b in bins])
            for key, a in found.items()
        }
        return {**medians, "count": np.array([int((where == b).sum()) for b in bins])}


def _none(a: np.ndarray) -> np.ndarray:
    return np.full(a.shape[1:], np.nan)


def _same(first: dict[str, np.ndarray], row: dict[str, np.ndarray]) -> None:
    for name in [*first, *row]:
        if name not in first or name not in row:
            raise ValueError(f"Trace takes the same names at every step; {name!r} is only in some.")
        if first[name].shape != row[name].shape:
            raise ValueError(
                f"Trace takes the same shapes at every step; {name} was {first[name].shape} and is {row[name].shape}."
            )
