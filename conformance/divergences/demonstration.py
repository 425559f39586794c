"""A divergence shown: what each framework and normkit do on one small input, and the verdict that the numbers give."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normkit.conformance import natives
from normkit.conformance.divergences import DIVERGENCES
from normkit.conformance.divergences.frameworks import absent, numbers
from normkit.conformance.divergences.record import Divergence, Side

#: The frameworks that are named where they are not shown.
MAIN = ("torch", "Keras", "Flax", "ONNX")
OWN = "normkit"

#: Labels, and what each gives: a framework's as the table has it, or "normkit", or "normkit ARGUMENT".
Columns = Iterator[tuple[str, Callable[[], Any]]]


@dataclass(frozen=True)
class Outcome:
    """What one column shows: numbers, or text; or why there are none."""

    label: str
    value: Any = None
    absent: str = ""
    message: str = ""

    @property
    def own(self) -> bool:
        """Whether it is normkit's."""
        return self.label.partition(" ")[0] == OWN

    @property
    def argument(self) -> str:
        """The argument that makes normkit do it."""
        return self.label.partition(" ")[2] or "always"

    @property
    def raised(self) -> bool:
        """Whether it was refused."""
        return bool(self.message)

    def text(self) -> str:
        """The numbers as they are shown."""
        if self.absent or isinstance(self.value, str):
            return self.absent or self.value
        figures = [f"{v:.4g}" for v in np.atleast_1d(self.value).ravel()]
        return figures[0] if len(figures) == 1 else f"[{', '.join(figures)}]"

    def json(self) -> dict:
        """For a file, in which there is no NaN."""
        value = self.value
        if value is not None and not isinstance(value, str):
            value = [v if np.isfinite(v) else str(v) for v in np.atleast_1d(value).ravel().tolist()]
        return {"column": self.label, "value": value, "absent": self.absent, "message": self.message}


@dataclass(frozen=True)
class Demonstration:
    """What came out, column by column, of one divergence."""

    divergence: Divergence
    input: str
    quantity: str
    tolerance: float
    limit: float | None
    outcomes: list[Outcome] = field(repr=False)

    @property
    def shown(self) -> list[Outcome]:
        """The frameworks that were there."""
        return [o for o in self.outcomes if not o.own and not o.absent]

    @property
    def without(self) -> list[str]:
        """Which of the best known have no column: they have nothing to show here."""
        labels = {o.label.partition(" ")[0] for o in self.outcomes}
        return [name for name in MAIN if name not in labels and f"{name.lower()}runtime" not in labels]

    @property
    def own(self) -> list[Outcome]:
        """What normkit did."""
        return [o for o in self.outcomes if o.own and not o.absent]

    def same(self, a: Outcome, b: Outcome) -> bool:
        """Whether two columns show the same."""
        if isinstance(a.value, str) or isinstance(b.value, str):
            return isinstance(a.value, str) and isinstance(b.value, str) and a.value == b.value
        if self.limit is not None:  # errors: large, or not
            return bool(np.all(a.value <= self.limit) == np.all(b.value <= self.limit))
        if a.value.shape != b.value.shape:
            return False
        return np.allclose(a.value, b.value, rtol=self.tolerance, atol=self.tolerance, equal_nan=True)

    def groups(self) -> list[list[Outcome]]:
        """The frameworks, those together that do the same."""
        found: list[list[Outcome]] = []
        for outcome in self.shown:
            group = next((g for g in found if self.same(g[0], outcome)), None)
            if group is None:
                found.append([outcome])
            else:
                group.append(outcome)
        return found

    def verdict(self) -> str:
        """One sentence of the numbers."""
        groups = self.groups()
        parts = [f"{_names(g)} {self._figures(g, 'give' + 's' * (len(g) == 1))}" for g in groups]
        if len(groups) == 1 and len(groups[0]) > 1:
            parts = [f"{_names(groups[0])} {self._figures(groups[0], 'agree on')}"]
        own = []
        for outcome in self.own:
            by = "" if outcome.argument == "always" else f" with {outcome.argument}"
            peers = next((g for g in groups if self.same(g[0], outcome)), None)
            like = f", like {_names(peers)}" if peers else ", like none of them" if groups else ""
            own.append(f"{self._figures([outcome], 'gives')}{by}{like}")
        if own:
            parts.append(f"normkit {', and '.join(own)}")
        return f"{'; '.join(parts)}."

    def surprises(self) -> list[str]:
        """Where the numbers are not as the table says, one sentence each."""
        found = []
        seen: dict[str, Outcome] = {}
        for outcome in (*self.shown, *self.own):
            side = self.side(outcome)
            first = seen.setdefault(side.does, outcome)
            if outcome.raised and "refused" not in side.does:
                found.append(f"{outcome.label} ({side.does}) raises {outcome.message}")
            elif not self.same(first, outcome):
                found.append(f"{outcome.label} is said to be like {first.label}, and gives {outcome.text()}.")
        sides = list(seen.items())
        for k, (does, outcome) in enumerate(sides):
            for other, second in sides[:k]:
                if self.same(outcome, second):
                    found.append(f"{outcome.label} ({does}) is like {second.label} ({other}).")
        return found

    def side(self, outcome: Outcome) -> Side:
        """What a column does, as the table says."""
        if not outcome.own:
            return self.divergence.side(outcome.label)
        return next(side for side in self.divergence.sides if side.argument == outcome.argument)

    def _figures(self, group: list[Outcome], verb: str) -> str:
        if group[0].raised:
            return "raises" if len(group) == 1 else "raise"
        texts = list(dict.fromkeys(o.text() for o in group))
        if self.limit is not None and len(texts) > 1:
            ordered = sorted(group, key=lambda o: float(o.value))
            return f"{verb} {ordered[0].text()} to {ordered[-1].text()}"
        return f"{verb} {texts[0]}"

    def json(self) -> dict:
        """Everything, for a report or a file."""
        return {
            "id": self.divergence.id,
            "input": self.input,
            "quantity": self.quantity,
            "verdict": self.verdict(),
            "surprises": self.surprises(),
            "outcomes": [o.json() for o in self.outcomes],
            "without": self.without,
        }


@dataclass(frozen=True)
class Recipe:
    """How a divergence is shown: ``columns`` are same within ``tolerance``, or, as errors, on one side of ``limit``."""

    id: str
    input: str
    quantity: str
    columns: Callable[[], Columns]
    tolerance: float = 1e-3
    limit: float | None = None

    def run(self) -> Demonstration:
        """Everything that can be shown here."""
        with natives.quiet():
            outcomes = [_outcome(label, function) for label, function in self.columns()]
        return Demonstration(DIVERGENCES[self.id], self.input, self.quantity, self.tolerance, self.limit, outcomes)


_RECIPES: dict[str, Recipe] = {}


def shows(id: str, input: str, quantity: str, **options: Any) -> Callable[[Callable[[], Columns]], Recipe]:
    """Take a function that yields columns for the demonstration of ``id``."""

    def registered(columns: Callable[[], Columns]) -> Recipe:
        _RECIPES[id] = Recipe(id, input, quantity, columns, **options)
        return _RECIPES[id]

    return registered


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All of them, by id."""
    if importlib.util.find_spec("torch"):
        importlib.import_module("torch")  # after TensorFlow, it can crash
    for name in ("show_training", "show_modes", "show_numbers", "show_shapes"):
        importlib.import_module(f"normkit.conformance.divergences.{name}")
    return _RECIPES


def _outcome(label: str, function: Callable[[], Any]) -> Outcome:
    if why := absent(label):
        return Outcome(label, absent=why)
    try:
        return Outcome(label, numbers(function()))
    except ImportError as error:
        return Outcome(label, absent=f"cannot be imported: {error}")
    except Exception as error:
        return Outcome(label, "raises", message=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def _names(group: list[Outcome]) -> str:
    names = [o.label for o in group]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
