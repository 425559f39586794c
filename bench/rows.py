"""One comparison: normkit, native layers and a copy take turns, then normkit and the plain path, and become a row."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import normkit as nk
from normkit._vjp import BINDERS
from normkit.backends import kernels
from normkit.bench import engines, goals, timing
from normkit.bench.engines import EAGER, Engine
from normkit.bench.timing import Spread, Thunk
from normkit.bench.workloads import CALLS, DIRECTIONS, MOVED, QUICK, WORKLOADS, Workload
from normkit.conformance import libraries, natives

LIBRARIES = ("numpy", "torch", "tensorflow", "jax", "cupy")
#: Seconds for one comparison.
SECONDS, QUICK_SECONDS = 0.7, 0.2

#: The contenders that are no native layers.
OWN, PLAIN, COPY, BARE = "normkit", "plain", "copy", "bare"
#: The calls that a pass consists of.
PARTS = {"forward": {"forward": 1}, "backward": {"backward": 1}, "both": {"forward": 1, "backward": 1}}


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
    #: What served normkit's call: "kernel", "plain" or "mixed" (see :meth:`kernels.Served.path`).
    path: str = ""
    #: normkit's time where no kernel may serve; nothing where none does anyway.
    plain_time: Spread | None = None
    native_time: Spread | None = None
    #: Native's time over normkit's: 2 is twice as fast.
    speedup: Spread | None = None
    #: The plain path's time over normkit's.
    gain: Spread | None = None
    #: Time over the time of moving x, y (and dy, dx) once, each half a copy.
    to_floor: Spread | None = None
    plain_to_floor: Spread | None = None
    native_to_floor: Spread | None = None
    #: What :meth:`Engine.bare` takes, which reads and writes as much and returns new arrays; of rows with a goal.
    bare_to_floor: Spread | None = None
    rounds: int = 0
    #: So small that the floor says nothing.
    small: bool = False
    threads: int | None = None
    #: Why there is no native figure.
    reason: str = ""
    #: Why there is no figure of normkit's: it is broken.
    error: str = ""

    @property
    def bytes(self) -> int:
        """The size of x."""
        return math.prod(self.shape) * {"float64": 8, "float32": 4}.get(self.dtype, 2)

    def over_copy(self, ratio: Spread | None) -> Spread | None:
        """A ratio to the floor as one to a copy of x."""
        units = MOVED[self.direction] / 2
        return ratio and Spread(ratio.median * units, ratio.low * units, ratio.high * units)

    @property
    def goal(self) -> goals.Goal | None:
        """What the row is to reach, where that is written down for so many threads."""
        if self.threads not in (None, goals.THREADS):
            return None
        return goals.goal(self.library, self.workload, self.direction, self.dtype, self.mode, self.native)

    @property
    def met(self) -> bool | None:
        """Whether it does; ``None`` where there is no goal or no figure."""
        return self._met("goal")

    @property
    def within(self) -> bool | None:
        """Whether it is at least within the limit."""
        return self._met("limit")

    def _met(self, bound: str) -> bool | None:
        goal = self.goal
        if goal is None:
            return None
        spread = {"floor": self.to_floor, "native": self.speedup, "seconds": self.time}[goal.over]
        return None if spread is None else goal.met(spread.median, getattr(goal, bound))


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

    @property
    def directions(self) -> tuple[str, ...]:
        """The passes that have a goal."""
        return goals.directions(self.engine.library.name, self.workload.name, self.dtype, self.mode)

    def __str__(self) -> str:
        return f"{self.engine.library.name} {self.workload} {self.dtype} {self.mode}"


def names(backends: Sequence[str] | None = None) -> list[str]:
    """The libraries that are asked for, or that are installed; PyTorch comes before TensorFlow."""
    for name in backends or ():
        if name not in LIBRARIES:
            raise ValueError(f"There is no benchmark of {name!r}; there are: {', '.join(LIBRARIES)}.")
        libraries.library(name)
    return [name for name in LIBRARIES if (name in backends if backends else libraries.installed(name))]


def chosen(backends: Sequence[str] | None = None, device: str | None = None) -> list[Engine]:
    """The engines of the libraries that are asked for, or that are installed; these are imported."""
    found = [engines.engine(name) for name in names(backends)]
    with natives.quiet():
        for engine in found:
            assert engine.library.xp
            if device is not None:
                engine.use(device)
            natives.of(engine.library.name)
    return found


def selected(workloads: Iterable[Workload] | None, quick: bool) -> tuple[Workload, ...]:
    """The workloads that are asked for, by default the table."""
    return tuple(workloads) if workloads is not None else QUICK if quick else WORKLOADS


def jobs(
    found: Iterable[Engine],
    *,
    quick: bool = False,
    workloads: Iterable[Workload] | None = None,
    dtypes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    sweep: bool = False,
) -> Iterator[Job]:
    """What there is to time; compiled modes where the workload says so, in a sweep where the library lives by them."""
    for engine in found:
        for workload in selected(workloads, quick):
            for dtype in workload.dtypes[:1] if quick else workload.dtypes:
                for mode in engine.modes:
                    wanted = modes is None or mode in modes or (mode != EAGER and "compiled" in modes)
                    if sweep and modes is None:
                        wanted = (mode != EAGER) is engine.compiles
                    known = dtype in engine.library.dtypes and (dtypes is None or dtype in dtypes)
                    if wanted and known and (mode == EAGER or workload.compiled or sweep):
                        yield Job(engine, workload, dtype, mode)


def measure(
    job: Job, directions: Iterable[str] = DIRECTIONS, seconds: float = SECONDS, *, rounds: int = timing.ROUNDS
) -> list[Row]:
    """Rows for each pass and each native layer."""
    engine, case = job.engine, job.workload.case(job.engine.library)
    given = engine.arrays(case, job.dtype)
    return [row for direction in directions for row in _compared(job, case, given, direction, seconds, rounds)]


class Contenders:
    """Thunks by name, ready to take turns; those that cannot have a reason, or what they raised."""

    def __init__(self, job: Job, case, given: Mapping[str, Any], direction: str) -> None:
        self.job, self.case, self.given, self.direction = job, case, given, direction
        self.thunks: dict[str, Thunk] = {}
        self.within: dict[str, timing.Within] = {}
        self.reasons: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self.path = ""
        self.natives = natives.of(job.engine.library.name)

    def enter_all(self) -> None:
        """normkit, the plain path where it is another, the native layers, the copy, and beside a goal the bare."""
        engine = self.job.engine
        engine.forget()
        self.enter(OWN, nk)
        if OWN in self.thunks:
            self.path = path(self.thunks[OWN], self.direction)
        if self.path in ("kernel", "mixed"):
            self.enter(PLAIN, nk, kernels.off)
        for module in self.natives:
            self.enter(module.NAME, module)
        self.thunks[COPY] = engine.copy(self.given["x"])
        if self.direction in self.job.directions:
            self.thunks[BARE] = engine.bare(self.given["x"], self.given["dy"], self.direction)

    def enter(self, name: str, module: ModuleType, within: timing.Within = contextlib.nullcontext) -> None:
        """Make a contender's thunk, and call it once."""
        try:
            with within():
                thunk = self.job.engine.thunk(self.case, module, self.given, self.direction, self.job.mode)
                thunk()
        except natives.Unsupported as unsupported:
            self.reasons[name] = last_line(unsupported)
        except Exception as error:
            self.broken[name] = f"{type(error).__name__}: {last_line(error)}"
        else:
            self.thunks[name], self.within[name] = thunk, within

    def times(
        self, seconds: float, rounds: int = timing.ROUNDS, *, names: Iterable[str] | None = None
    ) -> dict[str, list[float]]:
        """Seconds a call, round by round, of these contenders or of all."""
        thunks = self.thunks if names is None else {name: self.thunks[name] for name in names}
        return timing.interleaved(thunks, self.job.engine.wait, within=self.within, seconds=seconds, rounds=rounds)


def path(thunk: Callable[[], Any], direction: str) -> str:
    """What serves a pass."""
    before = kernels.served()
    thunk()
    return kernels.served().since(before).path(**PARTS[direction])


def _compared(job: Job, case, given, direction: str, seconds: float, rounds: int) -> Iterator[Row]:
    entered = Contenders(job, case, given, direction)
    with natives.quiet():
        entered.enter_all()
        # What the plain path gives back to the system, the others would ask for again: it takes no turns with them.
        times = entered.times(seconds * 2 / 3, rounds, names=[name for name in entered.thunks if name != PLAIN])
        beside = entered.times(seconds / 3, rounds, names=(OWN, PLAIN, COPY)) if PLAIN in entered.thunks else {}

    copy, own, plain, bare = times[COPY], times.get(OWN), beside.get(PLAIN), times.get(BARE)
    units = MOVED[direction] / 2
    reasons = entered.reasons | {"": "the library has no layers of its own"} | entered.broken
    names = [m.NAME for m in entered.natives]
    for name in [n for n in names if n in times or n in entered.broken] or names[:1] or [""]:
        theirs = times.get(name)
        yield Row(
            library=job.engine.library.name,
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
            path=entered.path,
            plain_time=plain and timing.spread(plain),
            native_time=theirs and timing.spread(theirs),
            speedup=own and theirs and timing.ratio(theirs, own),
            gain=plain and timing.ratio(plain, beside[OWN]),
            to_floor=own and timing.ratio(own, copy, units),
            plain_to_floor=plain and timing.ratio(plain, beside[COPY], units),
            native_to_floor=theirs and timing.ratio(theirs, copy, units),
            bare_to_floor=bare and timing.ratio(bare, copy, units),
            rounds=len(copy),
            small=job.workload.small,
            threads=job.engine.threads(),
            reason=reasons.get(name, ""),
            error=entered.broken.get(OWN, "") or entered.broken.get(PLAIN, ""),
        )


def last_line(error: Exception | str) -> str:
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
    binder = BINDERS[getattr(nk, case.layer)]
    return lambda: binder(*args, **options)
