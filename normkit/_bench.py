"""`normkit bench` without its looks: one number of threads in this process, several in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normkit.bench import machine, report
from normkit.bench.report import Report

if TYPE_CHECKING:
    from rich.console import Console


def run(
    names: Sequence[str],
    *,
    threads: Sequence[int],
    dtypes: Sequence[str],
    modes: Sequence[str],
    save: Callable[[Any], None],
    console: Console | None,
    **options: Any,
) -> Report:
    """Measure; ``save`` is given all there is so far, ready for JSON, each time there is more.

    Libraries learn how many threads to use when they are imported, so that each number wants a process.
    """
    if len(threads) > 1:
        return _each(names, threads, dtypes, modes, save, options)
    if threads:
        machine.limit_threads(threads[0])
    return report.run(
        names, dtypes=dtypes or None, modes=modes or None, save=lambda r: save(r.json()), console=console, **options
    )


def _each(names, threads, dtypes, modes, save, options) -> Report:
    """The same call for each number of threads, and its reports in one."""
    total: Report | None = None
    for count in threads:
        command = [sys.executable, "-P", "-m", "normkit", "bench", "--threads", str(count)]
        for option, values in {"--backend": names, "--dtype": dtypes, "--mode": modes}.items():
            command += [word for value in values for word in (option, value)]
        for option, value in options.items():
            if value is True:
                command.append(f"--{option}")
            elif isinstance(value, (list, tuple)):
                command += [word for v in value for word in ("--workload", v)]
            elif value not in (None, False):
                command += [f"--{option}", str(value)]
        with tempfile.TemporaryDirectory(prefix="normkit-") as folder:
            path = Path(folder, "bench.json")
            done = subprocess.run([*command, "--json", str(path)], stdout=subprocess.DEVNULL, env=os.environ)
            if done.returncode not in (0, 1) or not path.exists():
                raise ValueError(f"The process for --threads {count} ended with status {done.returncode}.")
            found = Report.loaded(json.loads(path.read_text("utf-8")))
        if total is None:
            total = found
        else:
            total.add(found)
        total.complete = count == threads[-1]
        save(total.json())
    assert total is not None
    return total


def check_plot(path: str, *, sweep: bool) -> None:
    """Refuse what cannot be drawn before anything is measured."""
    from normkit.bench import plot

    if not sweep:
        raise ValueError("--plot draws a sweep: it wants --sweep.")
    plot.check(path)


def draw(report: Report, path: str) -> None:
    """Draw a sweep."""
    from normkit.bench import plot

    plot.draw(report, path)
