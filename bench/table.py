"""`normkit bench`: normkit, native and copy side by side, as rows, as tables and as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import normkit as nk
from normkit import functional
from normkit.bench import engines, machine, timing
from normkit.bench.engines import EAGER, Engine
from normkit.bench.timing import Spread, Thunk
from normkit.bench.workloads import CALLS, DIRECTIONS, MOVED, QUICK, WORKLOADS, Workload
from normkit.conformance import libraries, natives

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LIBRARIES = ("numpy", "torch", "tensorflow", "jax", "cupy")
#: Seconds for one comparison.
SECONDS, QUICK_SECONDS = 0.7, 0.2


@dataclass(frozen=True)
class Row:
    """One comparison. Times are seconds a call; ratios are taken round by round, a floor being what memory allows."""

    library: str
    workload: str
    layer: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    direction: str
    mode: str
    native: str
    copy_time: Spread
    time: Spread | None = None
    native_time: Spread | None = None
    #: Native's time over normkit's: 2 is twice as fast.
    speedup: Spread | None = None
    #: Time over the time of moving x, y (and dy, dx) once, each half a copy.
    to_floor: Spread | None = None
    native_to_floor: Spread | None = None
    rounds: int = 0
    #: Why there is no native figure.
    reason: str = ""
    #: Why there is no figure of normkit's: it is broken.
    error: str = ""


@dataclass(frozen=True)
class Call:
    """What comes before the first array operation: checks, plan and dispatch, in seconds a call."""

    library: str
    layer: str
    time: Spread


@dataclass(frozen=True)
class Job:
    """One workload in one library, dtype and mode."""

    engine: Engine
    workload: Workload
    dtype: str
    mode: str

    def __str__(self) -> str:
        return f"{self.engine.library.name} {self.workload} {self.dtype} {self.mode}"


@dataclass(frozen=True)
class Report:
    """All figures, and where they come from."""

    machine: dict[str, Any]
    rows: list[Row]
    calls: list[Call]

    @property
    def broken(self) -> list[Row]:
        """Rows in which normkit raised."""
        return [row for row in self.rows if row.error]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")

    def tables(self) -> list[Table]:
        """A table for each library, and one of the cost of a call."""
        names = dict.fromkeys(row.library for row in self.rows)
        tables = [_table(name, [r for r in self.rows if r.library == name]) for name in names]
        return [*tables, _calls_table(self.calls)] if self.calls else tables

    def summary(self) -> list[str]:
        """A sentence for each library and mode: the geometric mean of the speedups."""
        groups: dict[tuple[str, str, str], list[float]] = {}
        for row in self.rows:
            if row.speedup:
                groups.setdefault((row.library, row.mode, row.native), []).append(row.speedup.median)
        return [
            f"{library} {mode}: {_geometric(found):.2f} times as fast as {native} "
            f"(geometric mean of {len(found)}, from {min(found):.2f} to {max(found):.2f})"
            for (library, mode, native), found in groups.items()
        ]


def run(
    backends: Sequence[str] | None = None,
    *,
    quick: bool = False,
    workloads: Iterable[Workload] | None = None,
    dtypes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    seconds: float | None = None,
    console: Console | None = None,
) -> Report:
    """Time every workload in the given libraries, by default in all that are installed.

    Parameters
    ----------
    backends : names of libraries; asking for one that is missing raises
    quick : fewer workloads and rounds, float32
    workloads, dtypes, modes : only these; a mode is "eager" or what :attr:`Library.modes` lists, or "compiled" for all
        of those
    seconds : for one comparison
    console : where progress is shown; nowhere by default

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        A backend has no benchmark.
    normkit.conformance.libraries.Missing
        A backend that was asked for is not installed.
    """
    found = chosen(backends)
    todo = list(jobs(found, quick=quick, workloads=workloads, dtypes=dtypes, modes=modes))
    seconds = (QUICK_SECONDS if quick else SECONDS) if seconds is None else seconds
    rows: list[Row] = []
    with _progress(console, len(todo)) as step:
        for job in todo:
            step(str(job))
            rows += measure(job, DIRECTIONS, seconds)
        step("cost of a call")
        calls = [cost for engine in found for cost in call_costs(engine, seconds)]
    return Report(machine.describe(found), rows, calls)


def chosen(backends: Sequence[str] | None = None) -> list[Engine]:
    """The engines of the libraries that are asked for, or that are installed; PyTorch is imported before TensorFlow."""
    names = backends or [name for name in LIBRARIES if libraries.installed(name)]
    for name in names:
        if name not in LIBRARIES:
            raise ValueError(f"There is no benchmark of {name!r}; there are: {', '.join(LIBRARIES)}.")
    found = [engines.engine(libraries.library(name).name) for name in LIBRARIES if name in names]
    with natives.quiet():
        for engine in found:
            assert engine.library.xp
            natives.of(engine.library.name)
    return found


def jobs(
    found: Iterable[Engine],
    *,
    quick: bool = False,
    workloads: Iterable[Workload] | None = None,
    dtypes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
) -> Iterator[Job]:
    """What there is to time; compiled modes where the workload says so."""
    selected = tuple(workloads) if workloads is not None else QUICK if quick else WORKLOADS
    for engine in found:
        for workload in selected:
            for dtype in workload.dtypes[:1] if quick else workload.dtypes:
                for mode in engine.modes:
                    wanted = modes is None or mode in modes or (mode != EAGER and "compiled" in modes)
                    known = dtype in engine.library.dtypes and (dtypes is None or dtype in dtypes)
                    if wanted and known and (mode == EAGER or workload.compiled):
                        yield Job(engine, workload, dtype, mode)


def measure(job: Job, directions: Iterable[str] = DIRECTIONS, seconds: float = SECONDS) -> list[Row]:
    """Rows for each pass and each native layer."""
    engine, case = job.engine, job.workload.case(job.engine.library)
    given = engine.arrays(case, job.dtype)
    return [row for direction in directions for row in _compared(job, case, given, direction, seconds)]


def _compared(job: Job, case, given, direction: str, seconds: float) -> Iterator[Row]:
    engine = job.engine
    modules = natives.of(engine.library.name)
    thunks: dict[str, Thunk] = {}
    reasons: dict[str, str] = {}
    broken: dict[str, str] = {}

    def enter(name: str, module: ModuleType) -> None:
        """A contender that raises has a reason, or what it raised, in place of a thunk."""
        try:
            thunk = engine.thunk(case, module, given, direction, job.mode)
            thunk()
        except natives.Unsupported as unsupported:
            reasons[name] = last_line(unsupported)
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {last_line(error)}"
        else:
            thunks[name] = thunk

    engine.forget()
    with natives.quiet():
        enter("normkit", nk)
        for module in modules:
            enter(module.NAME, module)
        thunks["copy"] = engine.copy(given["x"])
        times = timing.interleaved(thunks, engine.wait, seconds=seconds)

    copy, own = times["copy"], times.get("normkit")
    units = MOVED[direction] / 2
    reasons |= {"": "the library has no layers of its own"} | broken
    names = [m.NAME for m in modules]
    for name in [n for n in names if n in thunks or n in broken] or names[:1] or [""]:
        theirs = times.get(name)
        yield Row(
            library=engine.library.name,
            workload=job.workload.name,
            layer=case.layer,
            shape=case.shape,
            layout=job.workload.layout,
            dtype=job.dtype,
            direction=direction,
            mode=job.mode,
            native=name,
            copy_time=timing.spread(copy),
            time=own and timing.spread(own),
            native_time=theirs and timing.spread(theirs),
            speedup=own and theirs and timing.ratio(theirs, own),
            to_floor=own and timing.ratio(own, copy, units),
            native_to_floor=theirs and timing.ratio(theirs, copy, units),
            rounds=len(copy),
            reason=reasons.get(name, ""),
            error=broken.get("normkit", ""),
        )


def last_line(error: Exception) -> str:
    """What was raised at first: TensorFlow and PyTorch write where it was above it."""
    return str(error).strip().rpartition("\n")[2].strip().removeprefix("Unsupported: ")


def call_costs(engine: Engine, seconds: float = SECONDS) -> list[Call]:
    """What checks, plan and dispatch take of a call, the plan being known already."""
    times = timing.interleaved({w.layer: call(engine, w) for w in CALLS}, seconds=seconds)
    return [Call(engine.library.name, layer, timing.spread(sample)) for layer, sample in times.items()]


def call(engine: Engine, workload: Workload) -> Thunk:
    """A call up to where the backend would compute."""
    case = workload.case(engine.library)
    args, options = case.arguments(engine.arrays(case, "float32"))
    binder = functional._BINDERS[getattr(nk, case.layer)]
    return lambda: binder(*args, **options)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@contextlib.contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[str], None]]:
    """A bar that each call moves on and labels."""
    if console is None:
        yield lambda label: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda label: progress.update(task, advance=1, description=label)


def _table(name: str, rows: list[Row]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{name}: time of a call, and over the floor that memory sets", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("workload", "direction", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("copy", "native", "normkit", "speedup", "native\n/ floor", "normkit\n/ floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("native layer")
    before = None
    for row in rows:
        title = row.workload + (" bf16" if row.dtype == "bfloat16" else "")
        if before is not None and before != title:
            table.add_section()
        native = row.native if row.native_time else f"[dim]{escape(row.reason)}[/]"
        table.add_row(
            title if before != title else "",
            row.direction,
            row.mode.replace("(jit_compile=True)", " XLA"),
            _time(row.copy_time),
            _time(row.native_time),
            _time(row.time),
            _speedup(row.speedup),
            _ratio(row.native_to_floor),
            _ratio(row.to_floor),
            f"[red]{escape(row.error)}[/]" if row.error else native,
        )
        before = title
    return table


def _calls_table(calls: list[Call]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title="checks, plan and dispatch, before the first array operation", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("library")
    layers = list(dict.fromkeys(call.layer for call in calls))
    for layer in layers:
        table.add_column(layer, justify="right")
    for name in dict.fromkeys(call.library for call in calls):
        times = {call.layer: call.time for call in calls if call.library == name}
        table.add_row(name, *(_time(times.get(layer)) for layer in layers))
    return table


def _time(time: Spread | None) -> str:
    """Three digits and a unit."""
    if time is None:
        return "–"
    scale, unit = next((c for c in ((1.0, "s"), (1e3, "ms")) if time.median * c[0] >= 0.9995), (1e6, "µs"))
    return f"{_short(time.median * scale)} {unit}"


def _short(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _ratio(ratio: Spread | None) -> str:
    return "–" if ratio is None else _short(ratio.median)


def _speedup(speedup: Spread | None) -> str:
    """Green where normkit is faster and red where it is slower, in all but a quarter of the rounds."""
    if speedup is None:
        return "–"
    colour = "green" if speedup.low > 1 else "red" if speedup.high < 1 else "yellow"
    return f"[{colour}]{_short(speedup.median)}×[/]"
