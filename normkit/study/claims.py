"""What the documents say, row by row, what is right about it, and by which checks it is judged."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from normkit.study.record import CRITERION, UNTESTABLE, verdict

#: The four documents, by the letter that their claims' names begin with.
DOCUMENTS = {
    "A": "Document A, an article on the theory",
    "B": "Document B, notes on a paper",
    "C": "Document C, a report from a conference",
    "D": "Document D, an encyclopedia's entry",
}


@dataclass(frozen=True)
class Claim:
    """The document's words, what is right, and checks: "E3.change" is one, "E3" all of that experiment's criterion."""

    name: str
    words: str
    right: str
    by: tuple[str, ...]
    #: Background, an opinion or out of reach of this data: said, and not judged.
    kind: str = ""

    @property
    def experiments(self) -> tuple[str, ...]:
        """The names of those that judge it, each once."""
        return tuple(dict.fromkeys(check.partition(".")[0] for check in self.by))

    def judge(self, records: Mapping[str, Mapping[str, Any]]) -> str | None:
        """The verdict by these records; ``None`` where one of them is missing."""
        if not self.by:
            return UNTESTABLE
        held = []
        for reference in self.by:
            experiment, _, check = reference.partition(".")
            if experiment not in records:
                return None
            checks = records[experiment]["checks"]
            held += [c["holds"] for c in checks if (c["check"] == check if check else c["kind"] == CRITERION)]
        return verdict(held)


@functools.cache
def claims() -> dict[str, Claim]:
    """All of them, in the documents' order."""
    found = tomllib.loads(resources.files(__package__).joinpath("claims.toml").read_text("utf-8"))
    return {name: _claim(name, *row) for name, row in found.items()}


def _claim(name: str, words: str, right: str, by: str) -> Claim:
    if by.startswith("E"):
        return Claim(name, words, right, tuple(by.split()))
    return Claim(name, words, right, (), by)
