"""`normkit check` without its looks: what is measured, one row for each line of the table, and the JSON of it all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from normkit.bench import brief, engines, machine, rows
from normkit.conformance import across, differences, inputs, libraries, measure, natives
from normkit.conformance.across import Outputs, Pair, Rung
from normkit.conformance.cases import LAYERS
from normkit.conformance.measure import Measurement
from normkit.conformance.tolerances import judged, tolerance

SCHEMA = {"name": "normkit-check", "version": 2}
#: Real input: what `sweep` takes from scikit-learn at last, and columns as they stand in files.
SAMPLES = frozenset({"photographs", "digits"})
REAL = SAMPLES | {x.name for x in inputs.INPUTS if x.ladder == "real"}

#: A library, and the dtypes that one process does.
Part = tuple[str, tuple[str, ...]]
#: Called with the library, what was just measured and the share that is done.
Step = Callable[[str, str, float], None]


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
    #: normkit's error on real input alone.
    real: float
    tolerance: float
    reason: str
    native_error: float
    native_input: str
    #: The native layer's error on real input alone.
    native_real: float
    native_tolerance: float
    #: Why there are no native figures.
    native_reason: str
    #: Which known difference of the native layer is to be seen: its id and the reason.
    difference: tuple[str, str] | None
    #: The largest distance between normkit and the native layer.
    distance: float
    #: What served normkit: "kernel", "plain", or "mixed" where it was not the same everywhere.
    path: str

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
    ladder: list[Rung] = field(default_factory=list)
    agreement: list[Pair] = field(default_factory=list)
    #: A few timed rows; nothing where they were not asked for.
    speed: list[rows.Row] | None = None

    @property
    def no_samples(self) -> bool:
        """Whether scikit-learn's data was not at hand, though it was wanted."""
        return not self.quick and bool(self.measurements) and not any(m.input in SAMPLES for m in self.measurements)

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
            "measurements": [
                _plain(m) | {"tolerance": m.tolerance.units, "passed": m.passed} for m in self.measurements
            ],
            "ladder": [_plain(rung) for rung in self.ladder],
            "agreement": [_plain(pair) for pair in self.agreement],
            "speed": None if self.speed is None else [_plain(row) for row in self.speed],
        }


def run(
    names: Sequence[str] = (),
    *,
    quick: bool = False,
    speed: bool = False,
    step: Step = lambda name, label, share: None,
) -> Report:
    """Measure the libraries that are asked for, or all that are installed; with ``speed``, time a few rows as well.

    Each library has processes of its own, as many at a time as there are cores: one that dies takes no other along.
    What is timed has the machine for itself.

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
    parts = [(name, dtypes) for name in chosen for dtypes in _parts(name, quick)]
    shares = dict.fromkeys(parts, 0.0)

    def finished(part: Part) -> Outcome:
        name = part[0]

        def stepped(label: str, share: float) -> None:
            shares[part] = share
            mine = [s for (n, _), s in shares.items() if n == name]
            step(name, label, sum(mine) / len(mine))

        return _apart(_measure, (part, quick), stepped)

    # The last libraries take the longest.
    with _one_thread(), ThreadPoolExecutor(min(_cores(), len(parts))) as pool:
        outcomes = dict(zip(reversed(parts), pool.map(finished, reversed(parts)), strict=True))
    missing = {} if names else {name: _why_missing(name) for name in absent}
    report = Report(quick, missing=missing, machine=machine.describe(()))
    for part in parts:
        outcome = outcomes[part]
        report.measurements += outcome.measurements
        report.machine = machine.merged(report.machine, outcome.machine)
        report.ladder += outcome.ladder
        if outcome.error:
            report.broken[part[0]] = outcome.error
    report.agreement = across.pairs({part[0]: outcomes[part].outputs for part in parts if outcomes[part].outputs})
    if speed:
        _add_speed(report, [name for name in chosen if name in rows.LIBRARIES], step)
    return report


def _add_speed(report: Report, names: Sequence[str], step: Step) -> None:
    report.speed = []
    for name in names:
        outcome = _apart(_time, (name,), functools.partial(step, f"{name}, speed"))
        report.speed += outcome.speed
        if error := outcome.error or next((row.error for row in outcome.speed if row.error), ""):
            report.broken[f"{name}, speed"] = error


@dataclass
class Outcome:
    """What one process found."""

    measurements: list[Measurement] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    ladder: list[Rung] = field(default_factory=list)
    outputs: Outputs = field(default_factory=dict)
    speed: list[rows.Row] = field(default_factory=list)
    error: str = ""


def _parts(name: str, quick: bool) -> list[tuple[str, ...]]:
    """The dtypes, divided into what one process does."""
    wide = [d for d in libraries.LIBRARIES[name].dtypes if d != "float32" and judged(d)]
    return [("float32",)] if quick else [("float32",), tuple(wide)]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The arrays are small: processes that start in here compute with one thread, as more would wait for each other."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _apart(work: Callable[..., None], args: tuple, step: Callable[[str, float], None]) -> Outcome:
    """Do ``work`` in another process, and follow it to its end."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_told, args=(work, args, sender), daemon=True)
    process.start()
    sender.close()
    outcome = Outcome(error="ended early")
    try:
        while True:
            message = receiver.recv()
            if isinstance(message, Outcome):
                outcome = message
            else:
                step(*message)
    except EOFError:
        process.join()
    if process.exitcode:
        outcome.error = f"its process ended with status {process.exitcode}"
    return outcome


def _told(work: Callable[..., None], args: tuple, sender: Connection) -> None:
    """What runs in the other process: steps are sent as they come, then what was found, also before an error."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    outcome = Outcome()
    try:
        with natives.quiet():
            work(outcome, lambda label, share: sender.send((label, share)), *args)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    sender.send(outcome)


def _measure(outcome: Outcome, step: Callable[[str, float], None], part: Part, quick: bool) -> None:
    name, dtypes = part
    step(name, 0.0)
    library = libraries.library(name)
    assert library.xp
    for i, dtype in enumerate(dtypes):
        seen = set()
        few = quick or (library.thrifty and dtype != "float32")
        stages = len(LAYERS) * (1 if few else 2)
        for m in measure.sweep(name, [dtype], quick=few):
            outcome.measurements.append(m)
            seen.add((m.layer, m.input in SAMPLES))
            share = (i + min(1.0, len(seen) / stages)) / len(dtypes)
            step(f"{dtype} {m.layer}: {m.input}", share)
    if across.DTYPE in dtypes:
        with library.session():
            outcome.ladder = list(across.ladder(library))
            outcome.outputs = across.outputs(library)
    outcome.machine = machine.describe([engines.engine(name)])


def _time(outcome: Outcome, step: Callable[[str, float], None], name: str) -> None:
    step(name, 0.0)
    for i, found in enumerate(brief.measure(name), 1):
        outcome.speed += found
        step(f"{found[0].workload} {found[0].direction}", i / brief.count(name))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _why_missing(name: str) -> str:
    found = importlib.util.find_spec(libraries.LIBRARIES[name].module) is not None
    return "no device" if found else "not installed"


def _row(group: Sequence[Measurement]) -> Row:
    top = max(group, key=lambda m: m.error)
    compared = [m for m in group if not math.isnan(m.native_error)]
    off = max(compared, key=lambda m: m.native_error, default=None)
    limit = native_limit(top)
    known = off and off.native_error > limit and known_difference(off)
    return Row(
        library=top.library,
        dtype=top.dtype,
        layer=top.layer,
        quantity=top.quantity,
        native=top.native,
        error=top.error,
        input=top.input,
        real=_largest(m.error for m in group if m.input in REAL),
        tolerance=top.tolerance.units,
        reason=top.tolerance.reason,
        native_error=off.native_error if off else math.nan,
        native_input=off.input if off else "",
        native_real=_largest(m.native_error for m in compared if m.input in REAL),
        native_tolerance=limit,
        native_reason="" if off else group[0].reason,
        difference=(known.id, known.reason) if known else None,
        distance=_largest(m.distance for m in compared),
        path=top.path if len({m.path for m in group}) == 1 else "mixed",
    )


def native_limit(m: Measurement) -> float:
    """How far off a native layer may be."""
    return tolerance("native", inputs.stats_dtype(m.dtype) if m.quantity == "running" else m.dtype).units


def known_difference(m: Measurement) -> differences.Difference | None:
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
