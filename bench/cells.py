"""What stands in the cells of the tables: times, ratios, paths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from normkit.bench.timing import Spread

if TYPE_CHECKING:
    from rich.table import Table

PASSES = {"forward": "fwd", "backward": "bwd", "both": "f+b"}
DTYPES = {"float32": "", "bfloat16": " bf16"}


def grid(headings: Iterable[str]) -> Table:
    """An empty table; a heading that starts with > is of numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0), show_edge=False, pad_edge=False, header_style="dim")
    for heading in headings:
        number = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if number else "left", no_wrap=True)
    return table


def time(time: Spread | None) -> str:
    """Three digits and a unit."""
    if time is None:
        return "–"
    scale, unit = next((c for c in ((1.0, "s"), (1e3, "ms")) if time.median * c[0] >= 0.9995), (1e6, "µs"))
    return f"{short(time.median * scale)} {unit}"


def short(value: float) -> str:
    """Three digits, but for those before the point."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def ratio(ratio: Spread | None) -> str:
    """Three digits."""
    return "–" if ratio is None else short(ratio.median)


def speedup(speedup: Spread | None) -> str:
    """Green where normkit is faster and red where it is slower, in all but a quarter of the rounds."""
    if speedup is None:
        return "–"
    colour = "green" if speedup.low > 1 else "red" if speedup.high < 1 else "yellow"
    return f"[{colour}]{short(speedup.median)}[/]"


def path(path: str) -> str:
    """Which path served; what is not a kernel stands back."""
    return f"[dim]{path}[/]" if path == "plain" else f"[yellow]{path}[/]" if path == "mixed" else path
