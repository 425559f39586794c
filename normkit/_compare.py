"""`normkit check --compare` without its looks: what moved between two files of --json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normkit._check import SCHEMA

#: A row has moved where its error is so many times as large or as small.
FACTOR = 2.0
#: Units below which errors are alike: a result rounded once is up to half a unit off.
LEAST = 0.5

#: library, dtype, layer, quantity, and the native layer or "normkit".
Key = tuple[str, str, str, str, str]

#: What may happen to a row, the worst first.
LOST, NEW_LOST, REGAINED, WORSE, BETTER, CAME, WENT = (
    "out of tolerance",
    "new, out of tolerance",
    "within tolerance again",
    "worse",
    "better",
    "new",
    "gone",
)
BAD = (LOST, NEW_LOST)
KINDS = (LOST, NEW_LOST, REGAINED, WORSE, BETTER, CAME, WENT)


@dataclass(frozen=True)
class Change:
    """A row that moved: errors in units before and after, ``nan`` where there was none."""

    key: Key
    kind: str
    old: float
    new: float


@dataclass
class Changes:
    """All that moved, and between what."""

    factor: float
    passed: tuple[bool, bool]
    #: How many rows both have.
    common: int
    changes: list[Change] = field(default_factory=list)
    #: Libraries that could be measured before and cannot now, and what is said of them.
    broken: dict[str, str] = field(default_factory=dict)
    #: What else is different: versions, the processor, which inputs.
    context: list[str] = field(default_factory=list)

    @property
    def lost(self) -> bool:
        """Whether something of normkit's got out of tolerance."""
        return bool(self.broken) or any(c.kind in BAD for c in self.changes)


def loaded(path: str) -> dict[str, Any]:
    """What ``normkit check --json`` has written."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"Cannot read {path!r}: {error.strerror}.") from None
    except ValueError:
        raise ValueError(f"{path!r} is not JSON.") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(schema, dict) or schema.get("name") != SCHEMA["name"]:
        raise ValueError(f"{path!r} was not written by `normkit check --json`.")
    if schema != SCHEMA:
        raise ValueError(
            f"{path!r} has version {schema.get('version')!r} of the format; this normkit compares version "
            f"{SCHEMA['version']}."
        )
    try:
        _rows(found)
        _context(found, found)
        _ = found["passed"], found["broken"].items()
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path!r} is not whole: it lacks what `normkit check --json` writes.") from None
    return found


def compare(old: dict[str, Any], new: dict[str, Any], factor: float = FACTOR) -> Changes:
    """What moved from one run to another: rows that came, went, crossed a tolerance, or moved by more than a factor."""
    before, after = _rows(old), _rows(new)
    found = Changes(factor, (old["passed"], new["passed"]), len(before.keys() & after.keys()))
    found.broken = {name: why for name, why in new["broken"].items() if name not in old["broken"]}
    found.context = _context(old, new)
    for key in dict.fromkeys([*before, *after]):
        (was, passed_before), (now, passes) = (rows.get(key, (math.nan, True)) for rows in (before, after))
        if kind := _kind(key in before, key in after, was, now, passed_before, passes, factor):
            found.changes.append(Change(key, kind, was, now))
    found.changes.sort(key=lambda c: KINDS.index(c.kind))
    return found


def _kind(had: bool, has: bool, was: float, now: float, passed: bool, passes: bool, factor: float) -> str:
    if not has:
        return WENT
    if not had:
        return CAME if passes else NEW_LOST
    if passed != passes:
        return REGAINED if passes else LOST
    if math.isinf(was) and math.isinf(now):
        return ""
    ratio = max(now, LEAST) / max(was, LEAST)
    return WORSE if ratio > factor else BETTER if ratio < 1 / factor else ""


def _rows(found: dict[str, Any]) -> dict[Key, tuple[float, bool]]:
    """Errors by row, and whether they are within tolerance: normkit's; the native layers' have no verdict."""
    rows: dict[Key, tuple[float, bool]] = {}
    for row in found["rows"]:
        place = row["library"], row["dtype"], row["layer"], row["quantity"]
        rows.setdefault((*place, "normkit"), (float(row["error"]), bool(row["passed"])))
        if row["native_error"] is not None:
            rows[*place, row["native"]] = float(row["native_error"]), True
    return rows


def _context(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    words = []
    if old["quick"] != new["quick"]:
        which = "the first" if old["quick"] else "the second"
        words.append(f"{which} is of --quick, with fewer inputs")
    about, now = old["machine"], new["machine"]
    versions, newer = about["versions"], now["versions"]
    for name in dict.fromkeys([*versions, *newer]):
        if versions.get(name) != newer.get(name):
            words.append(f"{name} {versions.get(name, 'absent')} → {newer.get(name, 'absent')}")
    if about["processor"] != now["processor"]:
        words.append(f"{about['processor']} → {now['processor']}")
    return words
