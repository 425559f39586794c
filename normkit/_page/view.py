"""What stands on the page: figures, words and shades; how it looks is in page.html and page.css."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from normkit import _table
from normkit._check import REAL, Report, Row, known_difference, native_limit
from normkit._page import plots
from normkit._table import LABELS, NATIVES, TITLES, UNITS
from normkit.bench import brief, cells
from normkit.bench.report import geometric
from normkit.conformance import across
from normkit.conformance.cases import LAYERS
from normkit.conformance.divergences import GROUPS
from normkit.conformance.inputs import stats_dtype
from normkit.conformance.tolerances import UNIT, tolerance

QUANTITIES = {"forward": "Forward", "gradient": "Gradients", "running": "Running statistics"}
#: What shades mean, from the first to the last.
SHADES = (
    "within tolerance",
    "out of it: up to a third of the digits lost",
    "up to two thirds",
    "more",
    "no digit left",
)
#: Bars end here, in times the floor; the figure beside them does not.
LONGEST = 10.0


@dataclass(frozen=True)
class Cell:
    """A figure: how it reads, what it sorts by, its shade, and what is said of it."""

    text: str
    value: float | None
    shade: str = ""
    title: str = ""


def of(report: Report) -> dict[str, Any]:
    """All that the template names."""
    rows = report.rows
    verdict, beside = _table.words(report, rows)
    return {
        "passed": report.passed,
        "verdict": verdict,
        "beside": beside.strip("()").replace(" measurements)", " measurements"),
        "quick": report.quick,
        "machine": report.machine,
        "broken": {_table.titled(name): error for name, error in report.broken.items()},
        "missing": {TITLES[name]: why for name, why in report.missing.items()},
        "no_samples": report.no_samples,
        "tiles": _tiles(report, rows),
        "shades": SHADES,
        "columns": _columns(rows),
        "heat": _heats(rows, dict.fromkeys(m.input for m in report.measurements if m.input in REAL)),
        "ladder": plots.ladder(report.ladder, LABELS),
        "lines": _lines(report),
        "steps": _steps(report.ladder),
        "agreement": _agreement(report.agreement),
        "speed": report.speed and _speed(report.speed),
        "divergences": _divergences(report),
        "libraries": _libraries(report, rows),
        "rows": [_line(row) for row in rows],
        "units": UNITS,
    }


def figure(units: float, shade: str = "", title: str = "") -> Cell:
    """A cell with three digits."""
    text = _table.figure(units).replace("inf", "∞")
    return Cell(text, None if math.isnan(units) else units, shade, title)


def shade(units: float, limit: float, dtype: str) -> str:
    """Which of the shades: by the share of the dtype's digits that are lost."""
    if math.isnan(units):
        return "none"
    if units <= limit:
        return "h0"
    share = math.log(max(units, 1)) / -math.log(UNIT[dtype])
    return f"h{1 + int(3 * min(share, 1))}"


def _own(units: float, limit: float) -> str:
    """The shade of normkit's figures."""
    return "none" if math.isnan(units) else "h0" if units <= limit else "failed"


def _columns(rows: Iterable[Row]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Libraries, and their native layers: names and titles."""
    found: dict[str, list[str]] = {}
    for row in rows:
        natives = found.setdefault(row.library, [])
        if row.native and row.native not in natives:
            natives.append(row.native)
    return [(name, TITLES[name], [(n, native_title(n)) for n in natives]) for name, natives in found.items()]


def native_title(name: str) -> str:
    """A native module as it is called in a narrow column."""
    return {"textbook": "textbook"}.get(name, NATIVES.get(name, name))


def _heats(rows: Sequence[Row], real: Iterable[str]) -> list[dict[str, Any]]:
    """The tables of errors: of each quantity, and forward on real input alone."""
    there = [quantity for quantity in QUANTITIES if any(r.quantity == quantity for r in rows)]
    tables = [_heat(rows, quantity) | {"id": quantity, "title": QUANTITIES[quantity]} for quantity in there]
    if "forward" in there and real:
        title = f"Forward, on real input: {', '.join(real)}"
        tables.insert(1, _heat(rows, "forward", real=True) | {"id": "real", "title": title})
    return tables


def _heat(rows: Sequence[Row], quantity: str, real: bool = False) -> dict[str, Any]:
    found = {(r.library, r.native, r.dtype, r.layer): r for r in rows if r.quantity == quantity}
    groups = []
    for dtype in dict.fromkeys(key[2] for key in found):
        kind = stats_dtype(dtype) if quantity == "running" else dtype
        lines = []
        for layer in (name for name in LAYERS if any(key[2:] == (dtype, name) for key in found)):
            cells_ = [
                cell
                for library, _, natives in _columns(rows)
                for cell in _heat_cells(found, library, [n for n, _ in natives], dtype, layer, kind, real)
            ]
            lines.append((LABELS.get(layer, layer), cells_))
        limits = sorted({r.tolerance for r in found.values() if r.dtype == dtype})
        native = tolerance("native", kind).units
        groups.append({"dtype": dtype, "unit": UNITS[kind], "limits": limits, "native": native, "lines": lines})
    return {"groups": groups}


def _heat_cells(
    found: dict, library: str, natives: list[str], dtype: str, layer: str, kind: str, real: bool
) -> list[Cell]:
    """normkit's, then the native layers'."""
    mine = [row for key, row in found.items() if (key[0], *key[2:]) == (library, dtype, layer)]
    if not mine:
        return [Cell("", None, "none")] * (1 + len(natives))
    row = mine[0]
    by = "" if row.path == "plain" else f", {'fused kernel' if row.path == 'kernel' else 'in part by fused kernels'}"
    worst = "" if real else f": worst on {row.input}"
    title = f"normkit, {TITLES[library]}, {row.layer}{worst}; tolerance {row.tolerance:g}{by}"
    units = row.real if real else row.error
    cells_ = [figure(units, _own(units, row.tolerance), title)]
    for native in natives:
        row = found.get((library, native, dtype, layer), mine[0])
        units = row.native_real if real else row.native_error
        if row.native != native or math.isnan(units):
            cells_.append(Cell("–", None, "none", row.native_reason if row.native == native else ""))
            continue
        worst = "" if real else f": worst on {row.native_input}"
        known = f"; {row.difference[1]}" if row.difference and not real else ""
        title = f"{native_title(native)}, {row.layer}{worst}; tolerance {row.native_tolerance:g}{known}"
        cells_.append(figure(units, shade(units, row.native_tolerance, kind), title))
    return cells_


def _tiles(report: Report, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """A few figures that say most: the figure, and what it is."""
    tiles = []
    for quantity, words in (("forward", "forward"), ("gradient", "in gradients")):
        mine = [r for r in rows if r.dtype == "float32" and r.quantity == quantity]
        if mine:
            top = max(mine, key=lambda r: r.error)
            text = f"units of 2⁻²³: normkit’s largest error {words}, float32 ({TITLES[top.library]}, {top.input})"
            tiles.append((_table.figure(top.error).replace("inf", "∞"), text))
    compared = [row for row in rows if not math.isnan(row.native_error)]
    if compared:
        off = sum(row.native_off for row in compared)
        tiles.append((f"{off} of {len(compared)}", "rows in which a native layer is out of tolerance"))
    own = [pair.distance for pair in report.agreement if not pair.native_a]
    if own:
        tiles.append((_table.figure(max(own)), "units: how far normkit in one library is from normkit in another"))
    speedups = [row.speedup.median for row in report.speed or () if row.speedup]
    if speedups:
        text = f"times as fast as native: geometric mean of {len(speedups)} timed rows, on this machine"
        tiles.append((f"{geometric(speedups):.2f}×", text))
    return tiles


def _lines(report: Report) -> list[tuple[str, str, str]]:
    """The legend of the ladder: a role, its mark and its words."""
    natives = dict.fromkeys(r.native for r in report.ladder if not math.isnan(r.native_error))
    own = ", ".join(TITLES[name] for name in dict.fromkeys(r.library for r in report.ladder))
    drawn = {"normkit": f"normkit ({own})", **{plots.role(n): NATIVES.get(n, n) for n in natives}}
    return [(role, plots.MARKERS[role][1], words) for role, words in drawn.items()]


def _steps(rungs: Sequence[across.Rung]) -> dict[str, Any]:
    """The ladder as a table: a line for normkit in each library, and for each native layer."""
    offsets = sorted({r.offset for r in rungs})
    lines: dict[tuple[str, str, bool], dict[float, Cell]] = {}
    limit, native_limit = (tolerance(quantity, across.DTYPE).units for quantity in ("forward", "native"))
    for r in rungs:
        own = lines.setdefault((r.layer, f"normkit, {TITLES[r.library]}", True), {})
        own[r.offset] = figure(r.error, _own(r.error, limit))
        if not math.isnan(r.native_error):
            native = lines.setdefault((r.layer, native_title(r.native), False), {})
            native[r.offset] = figure(r.native_error, shade(r.native_error, native_limit, across.DTYPE))
    ordered = sorted(lines, key=lambda key: (LAYERS.index(key[0]), not key[2]))
    return {
        "offsets": [f"{offset:.3g}".replace("e+0", "e") for offset in offsets],
        "lines": [
            (LABELS.get(layer, layer), of, own, [lines[layer, of, own].get(o, Cell("", None)) for o in offsets])
            for layer, of, own in ordered
        ],
    }


def _agreement(pairs: Sequence[across.Pair]) -> list[dict[str, Any]]:
    """A matrix of normkit in each two libraries, one of each two native layers; and the largest on each input."""
    limit = tolerance("cross", across.DTYPE).units
    found = []
    for own in (True, False):
        mine = [pair for pair in pairs if bool(pair.native_a) != own]
        worst = across.worst(mine)
        owners = list(dict.fromkeys(owner for key in worst for owner in key))
        table = [(_owner(a), [_pair(worst.get((a, b)) or worst.get((b, a)), limit) for b in owners]) for a in owners]
        inputs: dict[str, across.Pair] = {}
        for pair in mine:
            top = inputs.setdefault(pair.input, pair)
            inputs[pair.input] = max(top, pair, key=lambda p: p.distance)
        by_input = [(name, _pair(pair, limit)) for name, pair in inputs.items()]
        if table:
            title = "normkit in two libraries" if own else "Two libraries’ own layers"
            found.append({"title": title, "own": own, "table": table, "inputs": by_input})
    return found


def _owner(owner: tuple[str, str]) -> str:
    return native_title(owner[1]) if owner[1] else TITLES[owner[0]]


def _pair(pair: across.Pair | None, limit: float) -> Cell:
    if pair is None:
        return Cell("", None, "self")
    title = f"{_owner((pair.a, pair.native_a))}, {_owner((pair.b, pair.native_b))}: {pair.layer} on {pair.input}"
    return figure(pair.distance, shade(pair.distance, limit, across.DTYPE), title)


def _speed(rows: Sequence[Any]) -> dict[str, Any]:
    """Timed rows, with bars in times the floor, and each library's geometric mean."""

    def bar(ratio: Any) -> dict[str, Any] | None:
        if ratio is None:
            return None
        return {
            "width": 100 * min(ratio.median, LONGEST) / LONGEST,
            "text": cells.short(ratio.median),
            "cut": ratio.median > LONGEST,
        }

    def seconds(time: Any) -> Cell:
        return Cell(cells.time(time), time and time.median)

    found = []
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        title = native_title(row.native)
        if row.speedup:
            groups.setdefault((TITLES[row.library], title), []).append(row.speedup.median)
        found.append({
            "library": TITLES[row.library],
            "mode": "" if row.mode == "eager" else row.mode,
            "workload": row.workload,
            "pass": row.direction,
            "native": title,
            "own_bar": bar(row.to_floor),
            "native_bar": bar(row.native_to_floor),
            "floor": row.to_floor and row.to_floor.median,
            "own": seconds(row.time),
            "theirs": seconds(row.native_time),
            "speedup": Cell(cells.ratio(row.speedup) + "×" * bool(row.speedup), row.speedup and row.speedup.median),
            "slower": bool(row.speedup and row.speedup.high < 1),
            "reason": row.error or row.reason,
        })  # fmt: skip
    means = [(*key, f"{geometric(ratios):.2f}×", len(ratios)) for key, ratios in groups.items()]
    wanted = sum(brief.count(name) for name in {row.library for row in rows})
    left_out = wanted - len({(row.library, row.workload, row.direction) for row in rows})
    return {"rows": found, "means": means, "at": 1 / LONGEST, "threads": _threads(rows), "left_out": left_out}


def _threads(rows: Sequence[Any]) -> str:
    counts = sorted({row.threads for row in rows if row.threads})
    return f"{' and '.join(map(str, counts))} thread{'s' * (counts != [1])}" if counts else ""


def _divergences(report: Report) -> list[tuple[str, list[dict[str, Any]]]]:
    """What frameworks do differently, by what it is about, with the number of measurements that show it."""
    off = (m for m in report.measurements if m.native_error > native_limit(m))
    seen = Counter(d.id for d in map(known_difference, off) if d)
    return [(title, [{**d.json(), "seen": seen[d.id]} for d in group]) for title, group in GROUPS.items()]


def _libraries(report: Report, rows: Sequence[Row]) -> list[dict[str, str]]:
    about = report.machine
    kernels = about.get("kernels", {})
    found = []
    for name, title, natives in _columns(rows):
        told = kernels.get(name, {})
        versions = about.get("versions", {})
        theirs = [f"{t} {versions[n]}" if n in versions and n != name else t for n, t in natives]
        found.append({
            "title": title,
            "version": versions.get(name, ""),
            "native": ", ".join(theirs) or "none",
            "device": about.get("devices", {}).get(name, ""),
            "threads": str(about.get("threads", {}).get(name, "")),
            "kernels": told.get("instruction_set", "") if told.get("built") else told.get("reason", ""),
        })  # fmt: skip
    return found


def _line(row: Row) -> dict[str, Any]:
    """A row of the long table."""
    kind = stats_dtype(row.dtype) if row.quantity == "running" else row.dtype
    return {
        "library": TITLES[row.library],
        "dtype": row.dtype,
        "layer": LABELS.get(row.layer, row.layer),
        "quantity": row.quantity,
        "native": native_title(row.native),
        "error": figure(row.error, "" if row.passed else "failed", row.reason),
        "tolerance": f"{row.tolerance:g}",
        "input": row.input,
        "native_error": figure(
            row.native_error, shade(row.native_error, row.native_tolerance, kind), row.native_reason
        ),
        "native_input": row.native_input,
        "native_real": figure(row.native_real, shade(row.native_real, row.native_tolerance, kind)),
        "distance": figure(row.distance),
        "path": row.path,
    }
