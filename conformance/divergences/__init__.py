"""What frameworks do differently, as data: one vocabulary of ids for conversion, checks, reports and demonstrations."""

from __future__ import annotations

from normkit.conformance.divergences.numbers import NUMBERS
from normkit.conformance.divergences.record import Divergence, Side
from normkit.conformance.divergences.shapes import SHAPES
from normkit.conformance.divergences.training import TRAINING

__all__ = ["DIVERGENCES", "GROUPS", "Divergence", "Side"]

#: By what they are about.
GROUPS = {"training": TRAINING, "numbers": NUMBERS, "shapes, names, files": SHAPES}

#: By id.
DIVERGENCES = {d.id: d for group in GROUPS.values() for d in group}
