"""The rules of conversion, by the id of what differs between frameworks: what is done about it."""

from __future__ import annotations

from dataclasses import dataclass

from normkit.conformance.divergences import DIVERGENCES

RULES = {id: divergence.conversion for id, divergence in DIVERGENCES.items() if divergence.conversion}


@dataclass(frozen=True)
class Applied:
    """A rule that applied to a layer, and how."""

    layer: str
    rule: str
    text: str

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise KeyError(self.rule)
