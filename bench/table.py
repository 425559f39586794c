"""How `normkit bench` looks: tables that fit 80 columns, with more in them where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from normkit.bench import cells, goal_table, rows
from normkit.bench.report import GOALS, SWEEP, Report
from normkit.bench.rows import Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: From this width on, there is room for every time.
WIDE = 124
LEGEND = (
    "path: what served normkit, a fused kernel or the library's operations (plain). ±: half the quartiles' distance. "
    "over floor: over the time of moving x, y (and dy, dx) once, half a copy each. plain ×, native ×: "
    "their time over normkit's."
)
SWEEP_LEGEND = "× copy: the time over that of copying x into memory that is there; forward moves 2 tensors, backward 3."
EFFECTS_LEGEND = (
    "excess: what a pair takes over the sum of its parts, the median of rounds; below 0 where each finds the other's "
    "data in the caches. × copy: over a copy into memory that is there."
)
NOTHING = "Nothing was timed: no workload fits these options in these libraries."


def show(console: Console, report: Report) -> None:
    """Print all tables, what is broken or missing, and the summary."""
    for title, table in tables(report, console.width):
        console.print(f"[bold]{escape(title)}[/]")
        console.print(table)
        console.print()
    if not report.rows:
        console.print(NOTHING)
    if not report.complete:
        console.print("The run was cut off: what it had not come to is not here.")
    for line in [*_legends(report), *_reasons(report)]:
        console.print(f"[dim]{escape(line)}[/]")
    for line in _broken(report):
        console.print(f"[red]{escape(line)}[/]")
    console.print()
    for sentence in report.summary():
        console.print(escape(sentence))


def tables(report: Report, width: int = 80) -> list[tuple[str, Table]]:
    """A table with its title for each library, mode and number of threads, and one for each effect."""
    if report.kind == GOALS:
        return [(goal_table.where(report), goal_table.drawn(report))]
    groups: dict[tuple, list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.library, row.mode, row.threads), []).append(row)
    draw = _sweep if report.kind == SWEEP else _workloads
    found = [(_title(report, *key), draw(group, width >= WIDE)) for key, group in groups.items()]
    if report.calls:
        found.append(("checks, plan and dispatch, before the first array operation", _calls(report)))
    if report.alternations:
        workload = report.alternations[0].workload
        found.append((f"{workload} in turn with the library's own x * 2", _alternations(report)))
    if report.pages:
        workload = report.pages[0].workload
        found.append((f"{workload}, 134 MB: memory that is new, and memory that is there", _pages(report)))
    return found


def _title(report: Report, library: str, mode: str, threads: int | None) -> str:
    versions, kernels = report.machine["versions"], report.machine["kernels"][library]
    parts = [f"{library} {versions.get(library, '')}".rstrip() + f", {mode}", report.machine["devices"][library]]
    parts += [f"{threads} thread{'s' * (threads != 1)}"] if threads else []
    parts.append(f"kernels {kernels['instruction_set']}" if kernels["built"] else "no kernels built")
    return ", ".join(parts)


def _workloads(group: Sequence[Row], wide: bool) -> Table:
    headings = ["workload", "", "path", ">time", ">±", ">over\nfloor", ">plain\n×", ">native\n×", ">goal"]
    if wide:
        headings = [*headings, ">copy", ">plain", ">native", ">native/\nfloor", "native layer"]
    table = cells.grid(headings)
    before = None
    for row in group:
        name = goal_table.workload(row)
        key = (name, row.direction)
        if before is not None and before[0] != name:
            table.add_section()
        again = before == key
        first = f"  than {row.native}" if again else name if before is None or before[0] != name else ""
        line = [first, cells.PASSES[row.direction], *_own(row, again), cells.speedup(row.speedup), _goal(row)]
        if wide:
            times = ["" if again else cells.time(row.copy_time), "" if again else cells.time(row.plain_time)]
            floor = "" if row.small else cells.ratio(row.native_to_floor)
            line += [*times, cells.time(row.native_time), floor, row.native if row.native_time else ""]
        table.add_row(*line)
        before = key
    return table


def _own(row: Row, again: bool) -> list[str]:
    """What does not depend on the native layer, so that it stands in the first of a pass's lines only."""
    if again:
        return [""] * 5
    if row.error:
        return ["", "[red]broken[/]", "", "", ""]
    spread = "" if row.time is None else f"{50 * (row.time.high - row.time.low) / row.time.median:.0f}%"
    return [
        cells.path(row.path),
        cells.time(row.time),
        spread,
        "" if row.small else cells.ratio(row.to_floor),
        cells.speedup(row.gain),
    ]


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: " "}[row.met]
    return f"{row.goal.text(row.goal.goal)} {mark}"


def _sweep(group: Sequence[Row], wide: bool) -> Table:
    headings = [
        "size of x",
        "layer",
        "pass",
        "path",
        ">copy",
        ">normkit",
        ">× copy",
        ">plain\n× copy",
        ">native\n× copy",
    ]
    table = cells.grid(headings + ["native layer"] * wide)
    before = None
    order = {"layer_norm": 0, "batch_norm_train": 1}
    for row in sorted(group, key=lambda r: (order[r.layer], r.direction != "forward")):
        key = (row.layer, row.direction)
        if before not in (None, key):
            table.add_section()
        label = "LN" if row.layer == "layer_norm" else "BN train"
        line = [
            _size(row),
            label,
            cells.PASSES[row.direction],
            cells.path(row.path),
            cells.time(row.copy_time),
            cells.time(row.time),
        ]
        line += [cells.ratio(row.over_copy(r)) for r in (row.to_floor, row.plain_to_floor, row.native_to_floor)]
        line += [row.native if row.native_time else ""] * wide
        table.add_row(*line)
        before = key
    return table


def _size(row: Row) -> str:
    return f"{row.bytes >> 20} MB" if row.bytes >= 1 << 20 else f"{row.bytes / 1024:g} KB"


def _calls(report: Report) -> Table:
    libraries = list(dict.fromkeys(call.library for call in report.calls))
    table = cells.grid(["layer", *(f">{name}" for name in libraries)])
    times = {(call.layer, call.library): call.time for call in report.calls}
    for layer in dict.fromkeys(call.layer for call in report.calls):
        table.add_row(layer, *(cells.time(times.get((layer, name))) for name in libraries))
    return table


def _alternations(report: Report) -> Table:
    headings = ["library", "", "path", ">threads", ">alone", ">x * 2", ">pair", ">excess", ">±"]
    table = cells.grid(headings)
    for found in report.alternations:
        excess = found.excess
        table.add_row(
            found.library if found.contender == rows.OWN else "",
            found.contender,
            cells.path(found.path),
            str(found.threads or ""),
            *map(cells.time, (found.time, found.double_time, found.pair_time)),
            f"{excess.median * 1e6:.1f} µs",
            f"{50 * (excess.high - excess.low) / found.pair_time.median:.0f}%",
        )
    return table


def _pages(report: Report) -> Table:
    headings = ["library", "output", "huge pages", ">copy", ">normkit", ">× copy", ">native", ">× copy"]
    table = cells.grid(headings)
    before = None
    for found in report.pages:
        line = [cells.time(found.copy_time), cells.time(found.time), cells.ratio(found.to_copy)]
        line += [cells.time(found.native_time), cells.ratio(found.native_to_copy)]
        name = "" if before == found.library else found.library
        table.add_row(name, found.output, "on" if found.hugepages else "off", *line)
        before = found.library
    return table


def _legends(report: Report) -> list[str]:
    legend = {SWEEP: SWEEP_LEGEND, GOALS: goal_table.LEGEND}.get(report.kind, LEGEND)
    return [legend] * bool(report.rows) + ([EFFECTS_LEGEND] if report.alternations or report.pages else [])


def _broken(report: Report) -> list[str]:
    """What normkit raised and where, each error once, and the processes that died."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in report.broken:
        place = f"{goal_table.workload(row)} {cells.PASSES[row.direction]}"
        found.setdefault((row.library, row.mode, row.error), []).append(place)
    said = [
        f"broken: {library} {mode}: {error} ({', '.join(dict.fromkeys(places))})"
        for (library, mode, error), places in found.items()
    ]
    return said + [f"broken: {what}: {how}" for what, how in report.died.items()]


def _reasons(report: Report) -> list[str]:
    """Why figures are not there, each reason once."""
    missing: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row.reason and row.native_time is None:
            missing.setdefault((row.library, row.reason), []).append(row.workload)
    said = [
        f"no native figure: {library}: {reason} ({', '.join(dict.fromkeys(names))})"
        for (library, reason), names in missing.items()
    ]
    return said + [f"left out: {what}: {why}" for what, why in report.left_out.items()]
