"""The rows that have a goal, in one table: on the terminal, and in Markdown for the README."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from normkit.bench import cells
from normkit.bench.report import Report
from normkit.bench.rows import Row

if TYPE_CHECKING:
    from rich.table import Table

MARKS = {True: "✓", False: "✗", None: " "}
STYLES = {True: "green", False: "red", None: "dim"}
LEGEND = (
    "over floor: over the time of moving x, y (and dy, dx) once, half a copy each. bare: x * 2, x + dy or both, "
    "which read and write as much and return new arrays, as layers do. native ×: native's time over normkit's. "
    "A goal is held against a ratio to the floor, one to native, or the time. limit: what holds at least."
)


def drawn(report: Report) -> Table:
    """A line for each row with a goal, under its library's name."""
    found = cells.grid([
        "workload", "", "path", ">time", ">over\nfloor", ">bare", ">native\n×", ">goal", ">limit",
    ])  # fmt: skip
    for library, group in _groups(report):
        found.add_row(f"[bold]{library}[/]")
        before = None
        for row in group:
            name = workload(row)
            bounds = [f"{text} [{STYLES[met]}]{MARKS[met]}[/]" for text, met in _bounds(row)]
            own, bare, _ = _floors(row)
            line = [cells.path(row.path), cells.time(row.time), own, bare, cells.speedup(row.speedup), *bounds]
            if row.error:
                line = ["", "[red]broken[/]", "", "", "", *bounds]
            found.add_row(name if name != before else "", cells.PASSES[row.direction], *line)
            before = name
        found.add_section()
    return found


def markdown(report: Report) -> str:
    """The same for a page, with where the figures come from and the summary."""
    lines = [
        "| workload | pass | normkit | over floor | bare | native | over floor | times as fast | goal | limit |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for library, group in _groups(report):
        natives = ", ".join(dict.fromkeys(row.native for row in group if row.native_time))
        lines.append(f"| **{library}** | | | | | {natives} | | | | |")
        for row in group:
            own, bare, native = _floors(row)
            speedup = "" if row.speedup is None else f"{cells.short(row.speedup.median)}×"
            bounds = [f"{text} {MARKS[met]}" for text, met in _bounds(row)]
            line = [
                workload(row),
                cells.PASSES[row.direction],
                cells.time(row.time),
                own,
                bare,
                cells.time(row.native_time),
            ]
            lines.append("| " + " | ".join([*line, native, speedup, *bounds]) + " |")
    return "\n".join([*lines, "", where(report) + ".", "", *(f"{s[0].upper()}{s[1:]}." for s in report.summary())])


def where(report: Report) -> str:
    """Processor, threads, kernels, versions and date."""
    about = report.machine
    sets = {found["instruction_set"] for found in about["kernels"].values() if found["built"]}
    threads = sorted({row.threads for row in report.rows if row.threads})
    parts = [about["processor"], *(f"{n} thread{'s' * (n != 1)}" for n in threads)]
    parts.append(f"kernels {', '.join(sorted(sets))}" if sets else "no kernels built")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{', '.join(parts)}; {versions}; {about['date'][:10]}"


def workload(row: Row) -> str:
    """Its name, with the dtype where that is not float32."""
    return row.workload + cells.DTYPES.get(row.dtype, f" {row.dtype}")


def _groups(report: Report) -> Iterator[tuple[str, list[Row]]]:
    for library in dict.fromkeys(row.library for row in report.goals):
        group = [row for row in report.goals if row.library == library]
        modes = [mode for mode in dict.fromkeys(row.mode for row in group) if mode != "eager"]
        yield ", ".join([library, *modes]), group


def _floors(row: Row) -> list[str]:
    return ["" if row.small else cells.ratio(r) for r in (row.to_floor, row.bare_to_floor, row.native_to_floor)]


def _bounds(row: Row) -> list[tuple[str, bool | None]]:
    goal = row.goal
    assert goal is not None
    return [(goal.text(goal.goal), row.met), (goal.text(goal.limit), row.within)]
