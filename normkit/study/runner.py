"""Runs experiments, seed by seed, and keeps what they leave: a finished one is not run again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

import normkit
from normkit.backends import kernels
from normkit.conformance.libraries import LIBRARIES, library
from normkit.study.claims import claims
from normkit.study.lab import Lab
from normkit.study.record import CRITERION, REPRODUCED, Experiment, Found, number, verdict

#: Called with an experiment, a seed's number and the share of all work that is done.
Step = Callable[[str, int, float], None]

#: Where the experiments are, in the report's order.
MODULES = ("exact", "convex", "training", "noise", "landscape", "shift", "inference", "depth")
FRAMEWORKS = ("numpy", "torch", "jax", "tensorflow")


def experiments() -> dict[str, Experiment]:
    """All of them by name."""
    found: dict[str, Experiment] = {}
    for module in MODULES:
        names = vars(importlib.import_module(f"{__package__}.{module}")).values()
        found |= {e.name: e for e in names if isinstance(e, Experiment)}
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, str]:
    number = int("".join(c for c in name if c.isdigit()))
    return number or 99, name  # the formulas come last


def chosen(names: Sequence[str], framework: str) -> list[Experiment]:
    """The experiments of these names, all by default; refuses names that there are not."""
    known = experiments()
    by_upper = {name.upper(): e for name, e in known.items()}
    unknown = [name for name in names if name.upper() not in by_upper]
    if unknown:
        raise ValueError(f"There is no experiment {unknown[0]!r}; there are: {', '.join(known)}.")
    if framework not in FRAMEWORKS:
        raise ValueError(f"--framework is one of {', '.join(FRAMEWORKS)}; received {framework!r}.")
    asked = [by_upper[name.upper()] for name in dict.fromkeys(names)] or list(known.values())
    if framework != "numpy":
        served = [e.name for e in known.values() if e.frameworks]
        for e in asked:
            if names and not e.frameworks:
                raise ValueError(f"{e.name} runs with NumPy only; with {framework} there are: {', '.join(served)}.")
        asked = [e for e in asked if e.frameworks]
    library(framework)  # refused here if it is not installed
    return asked


def writable(out: Path) -> Path:
    """The folder, made if it is not there; refused in one sentence where nothing can be written."""
    try:
        (out / "records").mkdir(parents=True, exist_ok=True)
        probe = out / "records" / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out cannot be written to: {str(out)!r}: {error.strerror}.") from None
    return out


#: What numbers come from: all of the package, Python and kernels. Its data and templates change no number.
CODE = (".py", ".so")


@functools.cache
def sources(*packages: str) -> str:
    """A digest of the code in these packages' folders: what other code has found is not to be taken for this one's."""
    digest = hashlib.sha256()
    for package in packages or ("normkit", "normkit.backends", "normkit.conformance"):
        for folder in sorted(importlib.import_module(package).__path__):
            for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in CODE):
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def settings_of(framework: str, seeds: int, quick: bool) -> dict[str, Any]:
    """What a record must have been made with to be kept."""
    options = {"framework": framework, "seeds": seeds, "quick": quick}
    return {**options, "normkit": normkit.__version__, "sources": sources()}


@contextlib.contextmanager
def quiet(framework: str) -> Iterator[None]:
    """One thread, since the arrays are small, and numbers below the normal range as zeros, since they take long."""
    from threadpoolctl import threadpool_limits

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if framework == "torch":
        torch = library("torch").xp
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    kernels.limit_threads(1)
    try:
        with threadpool_limits(1), library(framework).session():
            yield
    finally:
        kernels.limit_threads(0)
        if framework == "torch":
            torch.set_num_threads(before)
            torch.set_flush_denormal(False)


#: An experiment and a seed.
Task = tuple[Experiment, int]


def one(framework: str, quick: bool, name: str, seed: int) -> tuple[Found, float]:
    """What an experiment finds with a seed, and the seconds of a processor that it took."""
    experiment, clock = experiments()[name], time.process_time()
    with quiet(framework):
        found = experiment.run(Lab(framework, seed, experiment.dtype, quick))
    return found, time.process_time() - clock


def finished(tasks: Sequence[Task], framework: str, quick: bool, processes: int) -> Iterator[tuple[Task, Found, float]]:
    """The tasks as they end: one after the other here, or the longest first in so many processes."""
    if processes == 1:
        for e, seed in tasks:
            yield (e, seed), *one(framework, quick, e.name, seed)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        longest = sorted(tasks, key=lambda task: -task[0].cost)
        waiting = {pool.submit(one, framework, quick, e.name, seed): (e, seed) for e, seed in longest}
        for future in as_completed(waiting):
            yield waiting[future], *future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def run(
    asked: Sequence[Experiment],
    out: Path,
    *,
    framework: str = "numpy",
    seeds: int = 3,
    quick: bool = False,
    again: bool = False,
    processes: int = 1,
    step: Step = lambda name, seed, share: None,
) -> dict[str, dict[str, Any]]:
    """Every record by name: those asked for, run where they are not there, and those that were there."""
    writable(out)
    settings = settings_of(framework, seeds, quick)
    waiting = [e for e in asked if again or load(out, e.name, settings) is None]
    tasks = [(e, seed) for e in waiting for seed in range(seeds)]
    total, done = sum(e.cost for e, _ in tasks) or 1.0, 0.0
    found: dict[str, dict[int, tuple[Found, float]]] = {e.name: {} for e in waiting}
    if tasks:
        step(tasks[0][0].name, 0, 0.0)
    for (experiment, seed), result, seconds in finished(tasks, framework, quick, min(processes, len(tasks) or 1)):
        done += experiment.cost
        step(experiment.name, seed, done / total)
        of_seed = found[experiment.name]
        of_seed[seed] = result, seconds
        if len(of_seed) == seeds:
            results = [of_seed[k][0] for k in range(seeds)]
            save(out, experiment, results, settings, sum(seconds for _, seconds in of_seed.values()))
    step("", seeds, 1.0)
    records = {name: load(out, name, settings) for name in experiments()}
    kept = {name: record for name, record in records.items() if record is not None}
    judged(kept)
    text = json.dumps(list(kept.values()), indent=1, ensure_ascii=False, allow_nan=False)
    replaced(out / "results.json", (text + "\n").encode())
    return kept


def save(out: Path, experiment: Experiment, found: Sequence[tuple], settings: Mapping, seconds: float) -> None:
    """Numbers as JSON, curves beside them: all of an experiment or nothing."""
    numbers = {key: [number(n.get(key, np.nan)) for n, _ in found] for key in found[0][0]}
    checks = [check.judge(numbers) for check in experiment.checks]
    curves = {f"{k}/{key}": np.asarray(a) for k, (_, series) in enumerate(found) for key, a in series.items()}
    with open(out / "records" / ".part", "wb") as file:
        np.savez_compressed(file, **curves)  # type: ignore[arg-type]
    os.replace(out / "records" / ".part", out / "records" / f"{experiment.name}.npz")
    record = {
        "experiment": experiment.name,
        "title": experiment.title,
        "question": experiment.question,
        "beforehand": experiment.beforehand,
        "criterion": experiment.criterion,
        "verdict": verdict([c["holds"] for c in checks if c["kind"] == CRITERION]),
        "condition": experiment.condition,
        "dtype": experiment.dtype,
        "checks": checks,
        "numbers": numbers,
        "settings": dict(settings),
        "seconds": round(seconds, 1),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    replaced(out / "records" / f"{experiment.name}.json", text.encode())


def load(out: Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an experiment, if it was run with these settings."""
    try:
        record = json.loads((out / "records" / f"{name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("settings") == dict(settings) else None


def curves(out: Path, name: str) -> list[dict[str, np.ndarray]]:
    """The curves of an experiment by name, a dictionary for each seed."""
    with np.load(out / "records" / f"{name}.npz") as file:
        found: dict[int, dict[str, np.ndarray]] = {}
        for key in file.files:
            seed, _, rest = key.partition("/")
            found.setdefault(int(seed), {})[rest] = file[key]
    return [found[seed] for seed in sorted(found)]


def judged(records: Mapping[str, dict[str, Any]]) -> None:
    """Give every record the claims that it has a part in, with their verdicts."""
    for name, record in records.items():
        record["claims"] = [
            {"claim": c.name, "words": c.words, "right": c.right, "by": list(c.by), "verdict": c.judge(records)}
            for c in claims().values()
            if name in c.experiments
        ]
        # First what was found to be otherwise, then what this experiment alone decides.
        record["claims"].sort(
            key=lambda c: (c["verdict"] in (REPRODUCED, None), len({b.partition(".")[0] for b in c["by"]}))
        )


def replaced(path: Path, content: bytes) -> None:
    """Write a file: all of it or nothing."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def installed() -> list[str]:
    """The frameworks that the study can run on here."""
    from normkit.conformance.libraries import available

    return [name for name in FRAMEWORKS if name in available()[0] and name in LIBRARIES]
