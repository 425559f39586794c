"""`normkit check` without its looks: what is measured, one row for each line of the table, and the JSON of it all."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from normkit.bench import engines, machine
from normkit.conformance import differences, inputs, libraries, measure, natives
from normkit.conformance.cases import LAYERS
from normkit.conformance.measure import Measurement
from normkit.conformance.tolerances import judged, tolerance

SCHEMA = {"name": "normkit-check", "version": 1}
#: Real input: what `sweep` takes from scikit-learn at last, and columns as they stand in files.
SAMPLES = frozenset({"photographs", "digits"})
REAL = SAMPLES | {x.name for x in inputs.INPUTS if x.ladder == "real"}

#: Called with what was just measured and the share that is done.
Step = Callable[[str, float], None]


@dataclass(frozen=True)
class Row:
    """The largest errors of normkit and of one native layer over all inputs, in units of the dtype."""

    library: str
    dtype: str
    layer: str
    quantity: str
    native: str
    error: float
    #: The input on which normkit is furthest from float64.
    input: str
    tolerance: float
    reason: str
    native_error: float
    native_input: str
    #: The native layer's error on real input alone.
    native_real: float
    native_tolerance: float
    #: Why there are no native figures.
    native_reason: str
    #: Which known difference of the native layer is to be seen.
    difference: str
    #: The largest distance between normkit and the native layer.
    distance: float

    @property
    def passed(self) -> bool:
        """Whether normkit is within its tolerance."""
        return self.error <= self.tolerance

    @property
    def native_off(self) -> bool:
        """Whether the native layer is out of the tolerance that native layers have."""
        return self.native_error > self.native_tolerance


@dataclass
class Report:
    """All measurements, and what could not be measured."""

    quick: bool
    measurements: list[Measurement] = field(default_factory=list)
    #: What a library raised, where it did.
    broken: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """One row for each library, dtype, layer, quantity and native layer."""
        groups: dict[tuple[str, ...], list[Measurement]] = {}
        for m in self.measurements:
            groups.setdefault((m.library, m.dtype, m.layer, m.quantity, m.native), []).append(m)
        return [_row(group) for group in groups.values()]

    @property
    def passed(self) -> bool:
        """Whether normkit is within its tolerances everywhere."""
        return not self.broken and all(m.passed for m in self.measurements)

    def json(self) -> dict[str, Any]:
        """Everything, ready for JSON: a figure that does not exist is null, an infinite one the text "inf"."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "quick": self.quick,
            "machine": self.machine,
            "not_installed": self.missing,
            "broken": self.broken,
            "rows": [_plain(row) | {"passed": row.passed} for row in self.rows],
            "measurements": [_plain(m) | {"passed": m.passed} for m in self.measurements],
        }


def run(names: Sequence[str] = (), *, quick: bool = False, step: Step = lambda label, share: None) -> Report:
    """Measure the libraries that are asked for, or all that are installed.

    Raises
    ------
    ValueError
        There is no library of a name.
    normkit.conformance.libraries.Missing
        A library that was asked for is not installed.
    """
    installed, absent = libraries.available()
    for name in names:
        libraries.library(name)
    chosen = [name for name in libraries.LIBRARIES if name in (names or installed)]
    report = Report(quick, missing={} if names else {name: why_missing(name) for name in absent})
    with natives.quiet():
        for i, name in enumerate(chosen):
            try:
                _measure(report, name, lambda label, share, i=i: step(label, (i + share) / len(chosen)))
            except Exception as error:
                report.broken[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        report.machine = machine.describe(engines.engine(name) for name in chosen if name not in report.broken)
    return report


def why_missing(name: str) -> str:
    """What a library that cannot be used lacks."""
    found = importlib.util.find_spec(libraries.LIBRARIES[name].module) is not None
    return "finds no device" if found else "not installed"


def _measure(report: Report, name: str, step: Step) -> None:
    step(name, 0.0)
    library = libraries.library(name)
    assert library.xp
    dtypes = [d for d in ("float32", "float64", "float16", "bfloat16") if d in library.dtypes and judged(d)]
    dtypes = dtypes[:1] if report.quick else dtypes
    stages = len(dtypes) * len(LAYERS) * (1 if report.quick else 2)
    seen = set()
    for m in measure.sweep(name, dtypes, quick=report.quick):
        report.measurements.append(m)
        seen.add((m.dtype, m.layer, m.input in SAMPLES))
        step(f"{name} {m.dtype} {m.layer}: {m.input}", min(1.0, len(seen) / stages))


def _row(group: Sequence[Measurement]) -> Row:
    top = max(group, key=lambda m: m.error)
    compared = [m for m in group if not math.isnan(m.native_error)]
    off = max(compared, key=lambda m: m.native_error, default=None)
    limit = tolerance("native", inputs.stats_dtype(top.dtype) if top.quantity == "running" else top.dtype).units
    known = off and off.native_error > limit and _difference(off)
    return Row(
        library=top.library,
        dtype=top.dtype,
        layer=top.layer,
        quantity=top.quantity,
        native=top.native,
        error=top.error,
        input=top.input,
        tolerance=top.tolerance.units,
        reason=top.tolerance.reason,
        native_error=off.native_error if off else math.nan,
        native_input=off.input if off else "",
        native_real=_largest(m.native_error for m in compared if m.input in REAL),
        native_tolerance=limit,
        native_reason="" if off else group[0].reason,
        difference=known.id if known else "",
        distance=_largest(m.distance for m in compared),
    )


def _difference(m: Measurement) -> differences.Difference | None:
    """The known difference that explains a native layer's error; they are known of float32."""
    return differences.find(m.native, m.layer, m.input, m.layout) if m.dtype == "float32" else None


def _largest(figures: Iterable[float]) -> float:
    return max((f for f in figures if not math.isnan(f)), default=math.nan)


def _plain(value: Any) -> dict[str, Any]:
    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {k: plain(v) for k, v in item.items()}
        if isinstance(item, float) and not math.isfinite(item):
            return None if math.isnan(item) else "inf"
        return item

    return plain(dataclasses.asdict(value))
