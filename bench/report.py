"""All rows of a run, with what they were measured on; written as JSON while it grows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from normkit.bench import effects, goals, machine, rows
from normkit.bench.effects import Alternation, Pages
from normkit.bench.rows import DIRECTIONS, QUICK_SECONDS, SECONDS, Call, Row
from normkit.bench.timing import ROUNDS, Spread
from normkit.bench.workloads import Workload, swept

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = {"name": "normkit-bench", "version": 1}

#: What a run is of: the table of workloads and all that goes with it, the rows with a goal, or sizes.
WORKLOADS, GOALS, SWEEP = "workloads", "goals", "sweep"
#: Seconds for one comparison with a goal.
GOAL_SECONDS = 2.0
#: Of a sweep: seconds for one comparison, its passes, and bytes for each byte of x that must be free (NumPy's plain
#: path and the making of x are in float64), with fewer rounds from so many bytes on.
SWEEP_SECONDS, SWEEP_DIRECTIONS = 0.25, ("forward", "backward")
SWEEP_MEMORY, SWEEP_LARGE, SWEEP_ROUNDS = 24, 1 << 27, 3

Step = Callable[[str], None]


@dataclass
class Report:
    """All figures, and where they come from."""

    machine: dict[str, Any]
    kind: str = WORKLOADS
    rows: list[Row] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    alternations: list[Alternation] = field(default_factory=list)
    pages: list[Pages] = field(default_factory=list)
    #: What was not run, and why.
    left_out: dict[str, str] = field(default_factory=dict)
    #: Processes that ended early, and how.
    died: dict[str, str] = field(default_factory=dict)
    #: Whether this is the whole run: one that is cut off leaves what it had.
    complete: bool = False

    @property
    def broken(self) -> list[Row]:
        """Rows in which normkit raised."""
        return [row for row in self.rows if row.error]

    @property
    def goals(self) -> list[Row]:
        """Rows that have a goal."""
        return [row for row in self.rows if row.goal]

    def json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        found = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for row, plain in zip(self.rows, found["rows"], strict=True):
            for bound, met in {"goal": row.met, "limit": row.within}.items():
                plain[bound] = row.goal and row.goal.text(getattr(row.goal, bound))
                plain[f"{bound}_met"] = met
        return found

    @classmethod
    def loaded(cls, found: dict[str, Any]) -> Report:
        """The report that :meth:`json` was of."""
        if found.get("schema") != SCHEMA:
            raise ValueError("it is none of normkit bench --json")
        kinds = {"rows": Row, "calls": Call, "alternations": Alternation, "pages": Pages}
        made = {name: [_made(kind, item) for item in found[name]] for name, kind in kinds.items()}
        rest = {f.name: found[f.name] for f in dataclasses.fields(cls) if f.name not in kinds}
        return cls(**rest, **made)

    def add(self, other: Report) -> None:
        """Append another report's figures."""
        for name in ("rows", "calls", "alternations", "pages"):
            getattr(self, name).extend(getattr(other, name))
        self.left_out |= other.left_out
        self.died |= other.died
        self.machine = machine.merged(self.machine, other.machine)

    def summary(self) -> list[str]:
        """Sentences: the geometric mean of the speedups by library and mode, what threads bring, and the goals."""
        groups: dict[tuple, list[float]] = {}
        for row in self.rows:
            if row.speedup and self.kind == WORKLOADS:
                groups.setdefault((row.library, row.mode, row.native, row.threads), []).append(row.speedup.median)
        several = len({threads for *_, threads in groups}) > 1
        said = [
            f"{library} {mode}{f', {_threads(threads)}' if several else ''}: {geometric(found):.2f} times as fast as "
            f"{native} (geometric mean of {len(found)}, from {min(found):.2f} to {max(found):.2f})"
            for (library, mode, native, threads), found in groups.items()
        ]
        return said + self._scaling() + self._goals()

    def _scaling(self) -> list[str]:
        """How much faster each library's rows are with the most threads than with the fewest."""
        counts = sorted({row.threads for row in self.rows if row.threads})
        if len(counts) < 2:
            return []
        times = {(r.library, r.workload, r.dtype, r.direction, r.mode, r.threads): r.time for r in self.rows}
        found: dict[tuple[str, str], list[float]] = {}
        for (*key, threads), time in times.items():
            most = times.get((*key, counts[-1]))
            if threads == counts[0] and time and most:
                found.setdefault((key[0], key[4]), []).append(time.median / most.median)
        return [
            f"{library} {mode}: normkit is {geometric(ratios):.2f} times as fast with {counts[-1]} threads as with "
            f"{counts[0]} (geometric mean of {len(ratios)}, from {min(ratios):.2f} to {max(ratios):.2f})"
            for (library, mode), ratios in found.items()
        ]

    def _goals(self) -> list[str]:
        rows = [row for row in self.goals if row.met is not None]
        if not rows:
            return []
        met, within = sum(bool(row.met) for row in rows), sum(bool(row.within) for row in rows)
        said = [f"goals: {met} of {len(rows)} reached; limits: {within} of {len(rows)} kept"]
        speedups: dict[str, list[float]] = {}
        for row in rows:
            if row.speedup:
                speedups.setdefault(row.library, []).append(row.speedup.median)
        if every := [ratio for ratios in speedups.values() for ratio in ratios]:
            mean = geometric(every)
            mark = "✓" if mean >= goals.OVERALL else "✗"
            each = ", ".join(f"{library} {geometric(ratios):.2f}" for library, ratios in speedups.items())
            count = f"{len(every)} row{'s' * (len(every) != 1)}"
            said.append(
                f"geometric mean of the {count} with a goal: {mean:.2f} times as fast as native "
                f"(≥ {goals.OVERALL:g} {mark}); {each}"
            )
        return said


def run(
    backends: Sequence[str] | None = None,
    *,
    kind: str = WORKLOADS,
    quick: bool = False,
    workloads: Iterable[Workload] | None = None,
    named: Sequence[str] = (),
    dtypes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    device: str | None = None,
    seconds: float | None = None,
    console: Console | None = None,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Time every workload in the given libraries, by default in all that are installed.

    Parameters
    ----------
    backends : names of libraries; asking for one that is missing raises
    kind : "workloads", "goals" for those passes alone that have a goal, or "sweep" for sizes from 1 KB to 512 MB
    quick : fewer workloads and rounds, float32
    workloads, dtypes, modes : only these; a mode is "eager" or what :attr:`Library.modes` and ``batch_modes`` list, or
        "compiled" for all of those
    named : only workloads with one of these in their names, and nothing besides them
    device : for PyTorch and JAX
    seconds : for one comparison
    console : where progress is shown; nowhere by default
    save : called with the report each time it has grown

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        A backend has no benchmark, a library not the device, or no workload the name.
    normkit.conformance.libraries.Missing
        A backend that was asked for is not installed.
    """
    found = rows.chosen(backends, device)
    if kind == SWEEP:
        workloads = swept(quick)
        dtypes = dtypes or ("float32",)
    todo = list(rows.jobs(found, quick=quick, workloads=workloads, dtypes=dtypes, modes=modes, sweep=kind == SWEEP))
    if kind == GOALS:
        todo = [job for job in todo if job.directions]
    if named:
        fitting = [w for w in rows.selected(workloads, quick) if any(name.lower() in w.name.lower() for name in named)]
        if not fitting:
            raise ValueError(f"No workload has {' or '.join(map(repr, named))} in its name.")
        todo = [job for job in todo if job.workload in fitting]
    if seconds is None:
        seconds = QUICK_SECONDS if quick else {WORKLOADS: SECONDS, GOALS: GOAL_SECONDS, SWEEP: SWEEP_SECONDS}[kind]
    report = Report(machine.describe(found), kind)
    extras = kind == WORKLOADS and not named and workloads is None
    with _progress(console, len(todo) + extras * (2 + (not quick)) * len(found)) as step:
        for job in todo:
            step(str(job))
            _add(report, job, seconds)
            save(report)
        for engine in found if extras else ():
            name = engine.library.name
            step(f"{name}: cost of a call")
            report.calls += rows.call_costs(engine, seconds)
            step(f"{name}: alternation")
            report.alternations += effects.alternation(engine, seconds)
            save(report)
        for engine in found if extras and not quick else ():
            step(f"{engine.library.name}: pages")
            try:
                report.pages += effects.pages(engine.library.name, seconds)
            except effects.NotHere as reason:
                report.left_out[f"{engine.library.name}: pages"] = str(reason)
            save(report)
    report.complete = True
    save(report)
    return report


def _add(report: Report, job: rows.Job, seconds: float) -> None:
    if report.kind != SWEEP:
        report.rows += rows.measure(job, DIRECTIONS if report.kind == WORKLOADS else job.directions, seconds)
        return
    size = 4 * job.workload.elements
    if size * SWEEP_MEMORY > machine.free_memory():
        report.left_out[str(job)] = f"wants {size * SWEEP_MEMORY / 2**30:.0f} GB of free memory"
        return
    rounds = SWEEP_ROUNDS if size >= SWEEP_LARGE else ROUNDS
    report.rows += rows.measure(job, SWEEP_DIRECTIONS, seconds, rounds=rounds)


def geometric(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _threads(count: int | None) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _made(kind: type, item: dict[str, Any]) -> Any:
    """A dataclass of plain values and spreads, from its dictionary."""
    names = {f.name for f in dataclasses.fields(kind)}

    def value(found: Any) -> Any:
        if isinstance(found, dict):
            return Spread(**found)
        return tuple(found) if isinstance(found, list) else found

    return kind(**{name: value(found) for name, found in item.items() if name in names})


@contextlib.contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Step]:
    """A bar that each call moves on and labels."""
    if console is None:
        yield lambda label: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda label: progress.update(task, advance=1, description=label)
