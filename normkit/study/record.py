"""What an experiment says beforehand, what it leaves behind, and how a verdict follows from numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from normkit.study.lab import Lab

REPRODUCED, PARTLY, NOT, UNTESTABLE = "reproduced", "partly", "not reproduced", "not testable offline"
VERDICTS = (REPRODUCED, PARTLY, NOT, UNTESTABLE)

#: What a check is for: the experiment's verdict; a document's claim beyond that; or neither, since it was settled (a
#: slack, a stretch, another start) when first numbers had been seen.
CRITERION, DOCUMENT, AFTERWARDS = "criterion", "document", "seen afterwards"

#: Numbers by name and curves by name, of one seed.
Found = tuple[dict[str, float], dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """One inequality between the medians of two numbers, or of one number and a bound."""

    name: str
    says: str
    left: str
    relation: str
    right: str | float
    factor: float = 1.0
    offset: float = 0.0
    kind: str = CRITERION

    @property
    def criterion(self) -> str:
        """The inequality in words."""
        if not isinstance(self.right, str):
            return f"{self.left} {self.relation} {self.right * self.factor + self.offset:g}"
        factor = "" if self.factor == 1 else f"{self.factor:g} x "
        offset = "" if self.offset == 0 else f" {'+' if self.offset > 0 else '-'} {abs(self.offset):g}"
        return f"{self.left} {self.relation} {factor}{self.right}{offset}"

    def judge(self, numbers: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
        """The check with its two medians, and whether it holds."""
        left = median(numbers[self.left])
        right = median(numbers[self.right]) if isinstance(self.right, str) else self.right
        right = right * self.factor + self.offset
        holds = {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[self.relation]
        return {
            "check": self.name,
            "says": self.says,
            "criterion": self.criterion,
            "relation": self.relation,
            "left": number(left),
            "right": number(right),
            "holds": bool(holds),
            "kind": self.kind,
        }


@dataclass(frozen=True)
class Experiment:
    """A question with its criterion; ``run`` answers it for the lab's seed."""

    name: str
    title: str
    question: str
    #: The criterion as it was written down before there was a program; the verdict follows from these checks of it.
    beforehand: str
    checks: tuple[Check, ...]
    condition: str
    run: Callable[[Lab], Found]
    #: Its share of the whole study's time, for the progress bar.
    cost: float = 1.0
    #: float64 where other frameworks run it too: in float32 nets part by rounding, and an accuracy by a point.
    dtype: str = "float32"
    frameworks: bool = False
    figures: tuple[str, ...] = ()

    @property
    def criterion(self) -> list[str]:
        """What has to hold for "reproduced"; for "partly", some of it."""
        return [check.criterion for check in self.checks if check.kind == CRITERION]


def verdict(held: Sequence[bool]) -> str:
    """All, some or none of the checks hold."""
    return REPRODUCED if all(held) else PARTLY if any(held) else NOT


def median(values: Sequence[float | None]) -> float:
    """Over seeds; NaN, which no inequality holds for, where a number is missing."""
    return float(np.median([math.nan if v is None else v for v in values]))


def number(value: float) -> float | None:
    """As JSON has it."""
    return float(value) if math.isfinite(value) else None
