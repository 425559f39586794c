"""`normkit bench` without its looks: a library with a number of threads in this process, several in others."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normkit.bench import goals, machine, report, rows
from normkit.bench.report import GOALS, Report

if TYPE_CHECKING:
    from rich.console import Console

Save = Callable[[Any], None]


def kind(goals: bool, sweep: bool) -> str:
    """What is asked for: one of the report's kinds."""
    if goals and sweep:
        raise ValueError("--goals and --sweep are two runs: ask for one.")
    return report.GOALS if goals else report.SWEEP if sweep else report.WORKLOADS


def run(
    names: Sequence[str],
    *,
    threads: Sequence[int],
    dtypes: Sequence[str],
    modes: Sequence[str],
    kind: str,
    save: Save,
    console: Console | None,
    **options: Any,
) -> Report:
    """Measure; ``save`` is given all there is so far, ready for JSON, each time there is more.

    Libraries learn how many threads to use when they are imported, and the kernels use the threads of another library
    where there are any: each library with each number of threads has a process of its own.
    """
    if kind == GOALS:
        if set(threads) - {goals.THREADS}:
            raise ValueError(f"--goals are for {goals.THREADS} threads; received --threads {threads[0]}.")
        threads = [goals.THREADS]
    counts: Sequence[int | None] = threads or [None]
    parts = [(name, count) for count in counts for name in rows.names(names)]
    if len(parts) > 1:
        lists = {"--dtype": dtypes, "--mode": modes, "--workload": options.pop("named")}
        return _each(parts, kind, lists, options, save)
    if threads:
        machine.limit_threads(threads[0])
    options |= {"dtypes": dtypes or None, "modes": modes or None}
    return report.run(names, kind=kind, save=lambda r: save(r.json()), console=console, **options)


def _each(
    parts: Sequence[tuple[str, int | None]], kind: str, lists: dict[str, Sequence[str]], options: dict, save: Save
) -> Report:
    """The same call for each library and number of threads, and its reports in one."""
    given = [word for option, values in lists.items() for value in values for word in (option, value)]
    given += [f"--{kind}"] * (kind != report.WORKLOADS)
    for option, value in options.items():
        if value not in (None, False):
            given += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    total = Report(machine.describe(()), kind)
    for name, count in parts:
        part = [*given, "--backend", name, *(["--threads", str(count)] if count else [])]
        with tempfile.TemporaryDirectory(prefix="normkit-") as folder:
            path = Path(folder, "bench.json")
            command = [sys.executable, "-P", "-m", "normkit", "bench", *part, "--json", str(path)]
            try:
                status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
            finally:  # what was measured is kept, also where the rest is cut off
                if path.exists():
                    total.add(loaded(str(path)))
                    save(total.json())
        if status == 2:
            raise SystemExit(2)  # it has said why
        if status not in (0, 1):
            total.died[f"{name}{f', --threads {count}' if count else ''}"] = f"its process ended with status {status}"
    total.complete = not total.died
    save(total.json())
    return total


def loaded(path: str) -> Report:
    """What ``--json`` has written."""
    try:
        return Report.loaded(json.loads(Path(path).read_text("utf-8")))
    except OSError as error:
        raise ValueError(f"Cannot read {path!r}: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path!r} was not written by this version's `normkit bench --json`.") from None


def check_plot(path: str, kind: str) -> None:
    """Refuse what cannot be drawn before anything is measured."""
    from normkit.bench import plot

    if kind != report.SWEEP:
        raise ValueError("--plot draws a sweep: it wants --sweep.")
    plot.check(path)


def draw(report: Report, path: str) -> None:
    """Draw a sweep."""
    from normkit.bench import plot

    plot.draw(report, path)


def markdown(report: Report) -> str:
    """The rows with a goal, as a table in Markdown."""
    from normkit.bench import goal_table

    if not report.goals:
        raise ValueError("--markdown prints rows that have a goal, and there are none here.")
    return goal_table.markdown(report)
