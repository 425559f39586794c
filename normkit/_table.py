"""How `normkit check` and `normkit info` look."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normkit._check import Report, Row
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
LABELS = {"batch_norm": "batch_norm, given", "batch_norm_train": "batch_norm, train"}
MARKS = "¹²³⁴⁵⁶⁷⁸⁹"

#: From these widths on, there is room for more columns.
WIDE, WIDER = 100, 124


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
    marks: dict[tuple[str, str], str] = {}
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
    failed = [row for row in rows if not row.passed]
    if not report.passed:
        kinds = len({(r.library, r.dtype, r.layer, r.quantity) for r in failed})
        words = [f"out of tolerance in {kinds} of {_kinds(rows)} rows"] if failed else []
        words += [f"{', '.join(report.broken)} could not be measured"] if report.broken else []
        return Text(f"✗ normkit: {'; '.join(words)}.", "bold red")
    compared = [row for row in rows if not math.isnan(row.native_error)]
    off = sum(row.native_off for row in compared)
    text = Text.assemble(("✓ ", "green"), ("normkit is within tolerance everywhere", "bold green"))
    text.append(f" ({len(report.measurements)} measurements)")
    if compared:
        text.append(f"; native layers are not in {off} of {len(compared)} rows" if off else "; so are native layers")
    return text.append(".")


def _kinds(rows: Iterable[Row]) -> int:
    return len({(r.library, r.dtype, r.layer, r.quantity) for r in rows})


def _heading(name: str, rows: list[Row], report: Report) -> Text:
    versions, devices = report.machine.get("versions", {}), report.machine.get("devices", {})
    text = Text.assemble((TITLES.get(name, name), "bold cyan"), (f" {versions.get(name, '')}".rstrip(), "cyan"))
    text.append(f" on {devices[name]}" if name in devices else "")
    natives = [n for n in dict.fromkeys(row.native for row in rows) if n]
    against = ", ".join(NATIVES.get(n, n) + (f" {versions[n]}" if n in versions and n != name else "") for n in natives)
    return text.append(f"; native: {against}" if natives else f"; {rows[0].native_reason}", "dim")


def _table(rows: list[Row], marks: dict[tuple[str, str], str], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0), header_style="dim")
    table.add_column("", width=19, no_wrap=True)
    wide = width >= WIDE
    headings = ["forward\nnormkit", "\nnative", "\non real", "\napart"]
    headings += ["gradient\nnormkit", "\nnative"] + ["\napart"] * wide
    for heading in headings:
        table.add_column(Text(heading, justify="right"), justify="right", no_wrap=True, min_width=6)
    table.add_column(" native is worst on", no_wrap=True, ratio=1)
    if width >= WIDER:
        table.add_column(" normkit is worst on", no_wrap=True, ratio=1)
    for dtype in dict.fromkeys(row.dtype for row in rows):
        found = [row for row in rows if row.dtype == dtype]
        table.add_row(*_limits(dtype, found, wide))
        for forward, gradient in _lines(found):
            table.add_row(*_cells(forward, gradient, marks, wide, width >= WIDER))
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


def _lines(rows: list[Row]) -> Iterable[tuple[Row, Row | None]]:
    """Forward and gradient of a layer and a native layer; running statistics stand for themselves."""
    by_key = {(row.layer, row.native, row.quantity): row for row in rows}
    order = sorted(by_key, key=lambda key: (LAYERS.index(key[0]), key[2] == "running"))
    for layer, native, quantity in order:
        if quantity != "gradient":
            other = by_key.get((layer, native, "gradient")) if quantity == "forward" else None
            yield by_key[layer, native, quantity], other


def _cells(row: Row, gradient: Row | None, marks: dict, wide: bool, wider: bool) -> list[Text]:
    label = "running mean, var" if row.quantity == "running" else LABELS.get(row.layer, row.layer)
    cells = [Text(f" {label}"), _own(row), _native(row), _native(row, row.native_real), Text(figure(row.distance))]
    if gradient:
        cells += [_own(gradient), _native(gradient)] + [Text(figure(gradient.distance))] * wide
    else:
        cells += [Text()] * (2 + wide)
    cells.append(_worst(row, marks))
    if wider:
        cells.append(Text(f" {row.input}" + (f" / {gradient.input}" if gradient else "")))
    return cells


def _own(row: Row) -> Text:
    return Text(figure(row.error), "green" if row.passed else "bold red")


def _native(row: Row, units: float | None = None) -> Text:
    units = row.native_error if units is None else units
    return Text(figure(units), "yellow" if units > row.native_tolerance else "")


def _worst(row: Row, marks: dict[tuple[str, str], str]) -> Text:
    """The input, and a footnote where the difference is known; or why there is none."""
    if not row.native_input:
        return Text(f" {row.native_reason}", "dim italic")
    text = Text(f" {row.native_input}")
    if row.difference:
        key = row.difference, row.native
        text.append(marks.setdefault(key, str(len(marks) + 1)).translate(str.maketrans("123456789", MARKS)), "yellow")
    return text


def _print_notes(console: Console, report: Report, marks: dict[tuple[str, str], str]) -> None:
    for (id, native), mark in marks.items():
        known = next(differences.named(id, native))
        text = Text(f"{mark} ", "yellow").append(f"{known.native}, {id}: ", "bold").append(f"{known.reason}. ")
        console.print(Padding(text.append(known.link, "dim"), (0, 0, 0, 1)))
    for name, error in report.broken.items():
        console.print(Text(f"{TITLES.get(name, name)} could not be measured: {error}", "red"))
    for row in report.rows:
        if not row.passed:
            place = f"{row.library} {row.dtype} {row.layer} {row.quantity}, {row.input}"
            console.print(Text(f"{place}: {figure(row.error)} units, {row.tolerance:g} tolerated", "red"))
    if report.missing:
        console.print(Text("Not measured: " + ", ".join(f"{k} ({v})" for k, v in report.missing.items()) + ".", "dim"))
