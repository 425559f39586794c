"""The command ``normkit study``."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from normkit._terminal import color_option, console
from normkit.study.record import AFTERWARDS, DOCUMENT

NEEDED = ("jinja2", "matplotlib", "sklearn")
STYLES = {"reproduced": "green", "partly": "yellow", "not reproduced": "red"}


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--out", default="study", show_default=True, metavar="DIR", help="Where everything is written.")
@click.option("--quick", is_flag=True, help="One seed.")
@click.option("--seeds", type=click.IntRange(1), help="So many; 3, or 1 with --quick.")
@click.option(
    "--framework", default="numpy", show_default=True, metavar="NAME", help="numpy, torch, jax or tensorflow."
)
@click.option("--again", is_flag=True, help="Run also what is finished in DIR.")
@color_option
def study(
    names: tuple[str, ...], out: str, quick: bool, seeds: int | None, framework: str, again: bool, color: str
) -> int:
    """Try every claim of four documents about why batch norm works.

    Experiments (E0 to E18, all by default) run on scikit-learn's data. DIR gets results.json, figures, report.html
    and report.md; what is finished there, with the same options, is not run again. Exit status: 0, or 2 for a wrong
    call; claims that fail are results.
    """
    from normkit.conformance.libraries import Missing
    from normkit.study import report, runner

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        install = 'python -m pip install "normkit[study]"'
        raise click.UsageError(f"the study needs {' and '.join(missing)}: {install}")
    try:
        asked = runner.chosen(names, framework)
        folder = runner.writable(Path(out))
    except (Missing, ValueError) as error:
        raise click.UsageError(str(error)) from None
    seeds = seeds or (1 if quick else 3)
    columns = TextColumn("{task.description:5}"), BarColumn(32), TaskProgressColumn(), TimeRemainingColumn()
    bar = Console(stderr=True, highlight=False)
    with Progress(*columns, console=bar, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=1.0)

        def step(name: str, seed: int, share: float) -> None:
            progress.update(task, completed=share, description=name)

        records = runner.run(
            asked,
            folder,
            framework=framework,
            seeds=seeds,
            quick=quick,
            again=again,
            processes=min(2, os.cpu_count() or 1),  # of one thread each
            step=step,
        )
        progress.update(task, description="draw")
        path = report.write(folder, records)
    screen = console(color)
    chosen = [records[e.name] for e in asked]
    table = Table(box=None, pad_edge=False, show_header=False)
    for record in chosen:
        verdict = record["verdict"]
        mark = f"[{STYLES[verdict]}]{report.MARKS[verdict]} {verdict}[/]"
        table.add_row(record["experiment"], record["title"], mark)
    screen.print(table)
    if names:
        for record in chosen:
            screen.print(_checks(record, report.figure))
    screen.print(f"\nClaims: {_counts(records)}.")
    screen.print(str(path), soft_wrap=True)
    return 0


def _checks(record: dict[str, Any], figure: Callable[[float | None], str]) -> Table:
    """What had to hold, medians and bounds; in brackets what has no part in the verdict."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=None)
    for title in (record["experiment"], "", "measured", "bound"):
        table.add_column(title, justify="right" if title in ("measured", "bound") else "left")
    for check in record["checks"]:
        says = {DOCUMENT: "({})", AFTERWARDS: "[seen afterwards: {}]"}.get(check["kind"], "{}").format(check["says"])
        bound = f"{check['relation']} {figure(check['right'])}"
        table.add_row("✓" if check["holds"] else "✗", escape(says), figure(check["left"]), bound)
    return table


def _counts(records: Mapping[str, Any]) -> str:
    from normkit.study.claims import claims

    found = [claim.judge(records) for claim in claims().values() if claim.by]
    told = [f"{found.count(verdict)} {verdict}" for verdict in STYLES if verdict in found]
    return ", ".join([*told, f"{found.count(None)} wait for other experiments"][: None if None in found else -1])
