"""What a time by itself does not show: taking turns with a framework's own operation, and the price of new memory."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from normkit.bench import engines, rows, timing
from normkit.bench.engines import Engine
from normkit.bench.timing import Spread
from normkit.bench.workloads import ALTERNATING, LARGE
from normkit.conformance import natives

#: For malloc to keep what is freed, so that the next output lies in memory that was written before.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
OUTPUTS = {"fresh": {}, "existing": KEPT}
HUGEPAGES = {True: {"NORMKIT_HUGEPAGES": "1"}, False: {"NORMKIT_HUGEPAGES": "0"}}


class NotHere(RuntimeError):
    """Something cannot be measured on this system."""


@dataclass(frozen=True)
class Alternation:
    """A layer alone, the library's x * 2 alone, and both in turn; seconds."""

    library: str
    workload: str
    contender: str
    path: str
    time: Spread
    double_time: Spread
    pair_time: Spread
    #: What the pair takes over the sum of its parts.
    excess: Spread
    threads: int | None = None


@dataclass(frozen=True)
class Pages:
    """A forward pass into memory that is new to the process or not, with huge pages asked for by normkit or not."""

    library: str
    workload: str
    output: str
    hugepages: bool
    native: str
    copy_time: Spread
    time: Spread | None
    native_time: Spread | None
    #: Over a copy into memory that is there.
    to_copy: Spread | None
    native_to_copy: Spread | None


def alternation(engine: Engine, seconds: float) -> list[Alternation]:
    """normkit and the native layers, each in turn with the library's own operation on another array."""
    job = rows.Job(engine, ALTERNATING, "float32", engines.EAGER)
    case = job.workload.case(engine.library)
    given = engine.arrays(case, job.dtype)
    entered = rows.Contenders(job, case, given, "forward")
    double = engine.double(given["dy"])
    with natives.quiet():
        entered.enter_all()
        del entered.thunks[rows.COPY]
        names = list(entered.thunks)
        for name in names:
            entered.thunks[f"{name} pair"] = _pair(entered.thunks[name], double)
            entered.within[f"{name} pair"] = entered.within[name]
        entered.thunks["double"] = double
        times = entered.times(seconds)

    def found(name: str) -> Alternation:
        alone, both, other = times[name], times[f"{name} pair"], times["double"]
        excess = timing.spread([p - a - o for p, a, o in zip(both, alone, other, strict=True)])
        path = {rows.OWN: entered.path, rows.PLAIN: "plain"}.get(name, "native")
        time, double_time, pair_time = map(timing.spread, (alone, other, both))
        place = (engine.library.name, str(ALTERNATING), name, path)
        return Alternation(*place, time, double_time, pair_time, excess, engine.threads())

    return [found(name) for name in names]


def _pair(thunk: timing.Thunk, double: timing.Thunk) -> timing.Thunk:
    def pair() -> Any:
        thunk()
        return double()

    return pair


def pages(library: str, seconds: float) -> list[Pages]:
    """Fresh and existing outputs, huge pages on and off, each in a process of its own."""
    if platform.libc_ver()[0] != "glibc" or library == "cupy":
        raise NotHere("only glibc's malloc can be told to keep memory, and only host memory is meant")
    found = []
    for output, kept in OUTPUTS.items():
        for hugepages, asked in HUGEPAGES.items():
            command = [sys.executable, "-P", "-m", __name__, library, str(seconds)]
            done = subprocess.run(command, env=os.environ | kept | asked, capture_output=True, encoding="utf-8")
            if done.returncode:
                raise NotHere(f"its process ended with status {done.returncode}: {rows.last_line(done.stderr)}")
            for row in json.loads(done.stdout.splitlines()[-1]):
                spreads = {k: Spread(**v) if isinstance(v, dict) else v for k, v in row.items()}
                found.append(Pages(library, str(LARGE), output, hugepages, **spreads))
    return found


def _main(library: str, seconds: str) -> None:
    """Print the figures of this process as JSON."""
    (engine,) = rows.chosen([library])
    mode = engine.modes[-1] if engine.compiles else engines.EAGER
    kept = ("native", "copy_time", "time", "native_time", "to_floor", "native_to_floor")
    found = [
        {name: dataclasses.asdict(row)[name] for name in kept}
        for row in rows.measure(rows.Job(engine, LARGE, "float32", mode), ["forward"], float(seconds))
    ]
    for row in found:  # x and y are two tensors, so that the floor is one copy
        row["to_copy"], row["native_to_copy"] = row.pop("to_floor"), row.pop("native_to_floor")
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
