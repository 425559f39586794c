"""How `normkit check`, its comparisons and `normkit info` look."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normkit import _compare, _info
from normkit._check import Report, Row
from normkit._compare import Changes
from normkit._info import Facts
from normkit.bench import machine
from normkit.conformance import differences
from normkit.conformance.cases import LAYERS

TITLES = {
    "numpy": "NumPy",
    "strict": "array-api-strict",
    "torch": "PyTorch",
    "tensorflow": "TensorFlow",
    "jax": "JAX",
    "cupy": "CuPy",
}
NATIVES = {"textbook": "the textbook formulas", "torch": "torch.nn", "keras": "Keras", "flax": "flax.nnx"}
UNITS = {"float64": "2⁻⁵²", "float32": "2⁻²³", "float16": "2⁻¹⁰", "bfloat16": "2⁻⁷"}
LABELS = {"batch_norm": "batch_norm eval", "batch_norm_train": "batch_norm train"}
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

ABSENT = ("not installed", "no device")
LEGEND = (
    "The largest errors against float64 over all inputs, in units of the dtype, relative to the largest |y| (of "
    "running means: |x|); 8.4e6 units of 2⁻²³ leave no digit. on real: on photographs, digits, tabular columns. apart: "
    "normkit from native."
)

#: Before a layer's name: what served it, in all that stands in the line.
PATHS = {"kernel": "•", "mixed": "◦", "plain": " "}
PATHS_LEGEND = "•: a fused kernel served normkit, ◦: in part; elsewhere the library's own operations did."

#: Footnotes: a difference's id and reason, and its mark.
Marks = dict[tuple[str, str], str]

#: From these widths on, there is room for more columns.
WIDE, WIDER = 100, 124


def titled(name: str) -> str:
    """A library as it is called, with what may stand behind a comma."""
    library, comma, rest = name.partition(",")
    return TITLES.get(library, library) + comma + rest


def figure(units: float) -> str:
    """Three digits, in at most six characters."""
    if math.isnan(units):
        return "–"
    if math.isinf(units):
        return "inf"
    if units < 99.95:
        return "0" if units < 0.005 else f"{units:.2f}" if units < 9.995 else f"{units:.1f}"
    return f"{units:.0f}" if units < 9999.5 else f"{units:.1e}".replace("e+0", "e").replace("e+", "e")


def show(console: Console, report: Report) -> None:
    """Print all: a heading and lines for each library, footnotes, what is missing, and the verdict."""
    marks: Marks = {}
    rows = report.rows
    for name in dict.fromkeys(row.library for row in rows):
        found = [row for row in rows if row.library == name]
        console.print(_heading(name, found, report))
        console.print(_table(found, marks, console.width))
        console.print()
    _print_notes(console, report, marks)
    console.print(verdict(report, rows))


def verdict(report: Report, rows: list[Row]) -> Text:
    """One line that says whether normkit is right, and how often native layers are not."""
    main, rest = words(report, rows)
    if not report.passed:
        return Text(f"✗ {main}.", "bold red")
    return Text.assemble(("✓ ", "green"), (main, "bold green"), f" {rest}.")


def words(report: Report, rows: list[Row]) -> tuple[str, str]:
    """The verdict, and what is to be said beside it."""
    compared = [row for row in rows if not math.isnan(row.native_error)]
    off = sum(row.native_off for row in compared)
    rest = f"({len(report.measurements)} measurements)"
    if compared:
        rest += f"; native layers are not, in {off} of {len(compared)} rows" if off else "; so are native layers"
    if report.passed:
        return "normkit is within tolerance everywhere", rest
    failed = _kinds(row for row in rows if not row.passed)
    main = [f"out of tolerance in {failed} of {_kinds(rows)} rows"] if failed else []
    main += [f"{', '.join(report.broken)} could not be measured"] if report.broken else []
    return f"normkit: {'; '.join(main)}", ""


def _kinds(rows: Iterable[Row]) -> int:
    return len({(r.library, r.dtype, r.layer, r.quantity) for r in rows})


def _heading(name: str, rows: list[Row], report: Report) -> Text:
    versions, devices = report.machine.get("versions", {}), report.machine.get("devices", {})
    text = Text.assemble((TITLES.get(name, name), "bold cyan"), (f" {versions.get(name, '')}".rstrip(), "cyan"))
    text.append(f" on {devices[name]}" if name in devices else "")
    natives = [n for n in dict.fromkeys(row.native for row in rows) if n]
    against = ", ".join(NATIVES.get(n, n) + (f" {versions[n]}" if n in versions and n != name else "") for n in natives)
    return text.append(f"; native: {against}" if natives else f"; {rows[0].native_reason}", "dim")


def _table(rows: list[Row], marks: Marks, width: int) -> Table:
    wide, wider = width >= WIDE, width >= WIDER
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0), header_style="dim")
    table.add_column("", width=17, no_wrap=True)
    headings = ["forward\nnormkit", "\nnative", "\non real", "\napart", "gradient\nnormkit", "\nnative"]
    for heading in headings + ["\napart"] * wide:
        room = max(6, *map(len, heading.split("\n"))) + wider
        table.add_column(Text(heading, justify="right"), justify="right", no_wrap=True, width=room)
    table.add_column("\n  native’s worst", no_wrap=True, width=25 if wide else 16)
    if wider:
        table.add_column("\n normkit’s worst", no_wrap=True)
    for dtype in dict.fromkeys(row.dtype for row in rows):
        found = [row for row in rows if row.dtype == dtype]
        table.add_row(*_limits(dtype, found, wide))
        for forward, gradient, again in _lines(found):
            table.add_row(*_cells(forward, gradient, again, marks, wide, wider))
    return table


def _limits(dtype: str, rows: list[Row], wide: bool) -> list[Text]:
    """The line above a dtype's: the tolerances."""
    limits = {row.quantity: row.tolerance for row in rows}
    native = max(row.native_tolerance for row in rows if row.quantity != "running")

    def limit(units: float | None) -> Text:
        return Text("" if units is None else f"≤ {units:g}", "dim")

    compared = any(row.native for row in rows)
    theirs = limit(native if compared else None)
    cells = [Text.assemble((dtype, "bold"), (f"  {UNITS[dtype]}", "dim")), limit(limits.get("forward")), theirs]
    return [*cells, Text(), Text(), limit(limits.get("gradient")), theirs]


def _lines(rows: list[Row]) -> Iterator[tuple[Row, Row | None, bool]]:
    """Forward and gradient of a layer, running statistics by themselves, and whether the line before has the same.

    A second native layer gets a line where it has figures.
    """
    by_key = {(row.layer, row.native, row.quantity): row for row in rows}
    before = None
    for layer, native, quantity in sorted(by_key, key=lambda key: (LAYERS.index(key[0]), key[2] == "running")):
        row, again = by_key[layer, native, quantity], before == (layer, quantity)
        if quantity == "gradient" or (again and row.native_reason):
            continue
        before = layer, quantity
        yield row, by_key.get((layer, native, "gradient")) if quantity == "forward" else None, again


def _cells(row: Row, gradient: Row | None, again: bool, marks: Marks, wide: bool, wider: bool) -> list[Text]:
    mark = _mark(row, gradient)
    label = Text(f"  {NATIVES.get(row.native, row.native)}" if again else f"{mark}{LABELS.get(row.layer, row.layer)}")
    if row.quantity == "running" and not again:
        label = Text.assemble(f"{mark}running ", (f"≤ {row.tolerance:g}", "dim"))
    cells = [label, _own(row, again), _native(row), _native(row, row.native_real), Text(figure(row.distance))]
    if gradient:
        cells += [_own(gradient, again), _native(gradient)] + [Text(figure(gradient.distance))] * wide
    else:
        cells += [Text()] * (2 + wide)
    cells.append(_worst(row, marks))
    if wider:
        cells.append(Text(f" {row.input}" + (f" / {gradient.input}" if gradient else "")))
    return cells


def _mark(row: Row, gradient: Row | None) -> str:
    return PATHS[row.path if gradient is None or gradient.path == row.path else "mixed"]


def _own(row: Row, again: bool) -> Text:
    return Text() if again else Text(figure(row.error), "green" if row.passed else "bold red")


def _native(row: Row, units: float | None = None) -> Text:
    units = row.native_error if units is None else units
    return Text(figure(units), "yellow" if units > row.native_tolerance else "")


def _worst(row: Row, marks: Marks) -> Text:
    """The input, with a footnote where the difference is known; or why there is none."""
    if not row.native_input:
        return Text(f" {row.native_reason}" if row.native else "", "dim italic")
    mark = " "
    if row.difference:
        mark = marks.setdefault(row.difference, str(len(marks) + 1).translate(SUPERSCRIPT))
    return Text.assemble((f"{mark:>2}", "yellow"), row.native_input)


def _shown(difference: differences.Difference, report: Report) -> bool:
    return any(row.native == difference.native for row in report.rows)


def _print_notes(console: Console, report: Report, marks: Marks) -> None:
    dim = "dim"
    console.print(Text(LEGEND, dim))
    if any(row.path != "plain" for row in report.rows):
        console.print(Text(PATHS_LEGEND, dim))
    for known, mark in marks.items():
        same = [d for d in differences.DIFFERENCES if (d.id, d.reason) == known and _shown(d, report)]
        text = Text.assemble(
            (f"{mark} ", "yellow"), f"{known[0]} ({', '.join(dict.fromkeys(d.native for d in same))}): "
        )
        text.append(f"{known[1]}. ").append(" ".join(dict.fromkeys(d.link for d in same)), dim)
        console.print(Padding(text, (0, 0, 0, 1)))
    console.print()
    for name, error in report.broken.items():
        console.print(Text(f"{titled(name)} could not be measured: {error}", "red"))
    for row in {(r.library, r.dtype, r.layer, r.quantity): r for r in report.rows if not r.passed}.values():
        place = f"{TITLES[row.library]} {row.dtype} {LABELS.get(row.layer, row.layer)}, {row.quantity}, {row.input}"
        console.print(Text(f"{place}: {figure(row.error)} units, {row.tolerance:g} tolerated", "red"))
    for reason in dict.fromkeys(report.missing.values()):
        names = ", ".join(TITLES[name] for name, why in report.missing.items() if why == reason)
        console.print(Text(f"{reason.capitalize()}: {names}", dim))
    if report.no_samples:
        console.print(Text("No photographs, no digits: scikit-learn or Pillow is not installed", dim))


def show_changes(console: Console, found: Changes) -> None:
    """Print what moved between two runs, and the verdict."""
    if found.context:
        console.print(Text("; ".join(found.context), "dim"))
    if found.changes:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
        for heading in ("library", "dtype", "layer", "quantity", "of"):
            table.add_column(heading, overflow="fold")
        table.add_column("old", justify="right", no_wrap=True)
        table.add_column("new", justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        for c in found.changes:
            library, dtype, layer, quantity, of = c.key
            style = "bold red" if c.kind in _compare.BAD else "green" if c.kind == _compare.REGAINED else ""
            cells = [TITLES.get(library, library), dtype, LABELS.get(layer, layer), quantity, NATIVES.get(of, of)]
            table.add_row(*map(Text, cells), figure(c.old), figure(c.new), Text(c.kind, style))
        console.print(table)
        console.print()
    for name, error in found.broken.items():
        console.print(Text(f"{titled(name)} could not be measured: {error}", "red"))
    counts = Counter(c.kind for c in found.changes)
    said = ", ".join(f"{counts[kind]} {kind}" for kind in _compare.KINDS if counts[kind]) or "nothing moved"
    was, now = ("within tolerance" if passed else "out of tolerance" for passed in found.passed)
    verdict = f"still {now}" if was == now else f"{was} before, {now} now"
    mark, style = ("✗", "bold red") if found.lost else ("✓", "bold green")
    console.print(Text.assemble(
        (f"{mark} normkit is {verdict}", style),
        f": {said}, of {found.common} rows in both (moved: by more than {found.factor:g} times).",
    ))  # fmt: skip


def info(console: Console, found: dict[str, Facts]) -> None:
    """Print versions, libraries, devices, threads, kernels and backends."""
    about = machine.describe(())
    console.print(Text.assemble((f"normkit {about['versions']['normkit']}", "bold cyan")))
    console.print(f"Python {about['python']}, {about['platform']}")
    console.print(f"{about['processor']}, {about['cores']} cores")
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for heading in ("library", "version", "device", "threads", "path", "with"):
        table.add_column(heading, justify="right" if heading == "threads" else "left")
    for name, facts in found.items():
        title = Text(TITLES.get(name, name), "dim" if facts.error else "bold")
        if facts.error:
            table.add_row(title, Text(facts.error, "dim" if facts.error in ABSENT else "red"))
        else:
            table.add_row(title, facts.version, facts.device, facts.threads, facts.path, facts.natives)
    console.print(table)
    console.print()
    console.print(Text.assemble(("kernels: ", "dim"), _info.kernels()))
    console.print(Text.assemble(("backends of other distributions: ", "dim"), _info.advertised()))
