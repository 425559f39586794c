"""What a divergence between frameworks is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Side:
    """One of the things that are done: by which frameworks, and with which argument normkit does it ("": it does not).

    A framework's name may be followed by a layer or a setting: "torch GroupNorm".
    """

    does: str
    by: tuple[str, ...] = ()
    argument: str = ""


@dataclass(frozen=True)
class Divergence:
    """Something that frameworks do differently: its one place, which conversion, checks and reports refer to by ``id``.

    ``conversion`` says what :func:`normkit.convert` does about it, where it is a matter of stored state; ``unseen`` why
    no demonstration shows it. ``links`` has a source for each framework that a report may name; the first is the one to
    read.
    """

    id: str
    title: str
    explanation: str
    links: Mapping[str, str]
    sides: tuple[Side, ...] = ()
    conversion: str = ""
    unseen: str = ""
    _by_label: Mapping[str, Side] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_label", {label: side for side in self.sides for label in side.by})

    @property
    def link(self) -> str:
        """Where to read more."""
        return next(iter(self.links.values()))

    @property
    def frameworks(self) -> str:
        """What is done, and by whom."""
        return "; ".join(f"{side.does}: {', '.join(side.by)}" for side in self.sides if side.by)

    @property
    def arguments(self) -> str:
        """Which argument of normkit selects which."""
        return "; ".join(f"{side.argument}: {side.does}" for side in self.sides if side.argument)

    def side(self, label: str) -> Side:
        """The side that a framework is on."""
        return self._by_label[label]

    def json(self) -> dict:
        """Everything, for a report or a file."""
        sides = [{"does": s.does, "frameworks": list(s.by), "argument": s.argument} for s in self.sides]
        text = {name: getattr(self, name) for name in ("id", "title", "explanation", "conversion", "unseen")}
        return {**text, "sides": sides, "links": dict(self.links)}
