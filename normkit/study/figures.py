"""The pictures, each drawn for a light and for a dark page; a band runs from the least to the most of the seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from normkit.study import runner

Curves = Sequence[Mapping[str, np.ndarray]]
#: name -> (experiments, caption, function of their curves)
FIGURES: dict[str, tuple[tuple[str, ...], str, Callable[..., Any]]] = {}

INK = {"light": ("#1d2125", "#dfdcd6", "#ffffff"), "dark": ("#e6e4df", "#3a4147", "#1b1f23")}
#: Told apart by lightness too, and seen on both pages.
COLORS = {
    "light": ("#c0392b", "#1f5fa8", "#b8860b", "#2e8b57", "#7d4fa8", "#5c646c"),
    "dark": ("#f08a7e", "#7db4f0", "#e8c15a", "#7fd6a0", "#c5a3e8", "#a3aab1"),
}


def figure(name: str, *experiments: str, caption: str) -> Callable[[Callable], Callable]:
    """Enter a drawing function: it is given the curves of each experiment, or all records if it names none."""

    def enter(function):
        FIGURES[name] = experiments, caption, function
        return function

    return enter


def draw(out: Path, records: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Draw what there are records for: names, captions and files."""
    import matplotlib

    from normkit.study import drawings  # noqa: F401  what enters the figures

    (out / "figures").mkdir(exist_ok=True)
    drawn = {}
    for name, (experiments, caption, function) in FIGURES.items():
        if not all(e in records for e in experiments):
            continue
        files = {}
        given: list[Any] = [runner.curves(out, e) for e in experiments] or [records]
        for theme in INK:
            with _theme(matplotlib, theme):
                made = function(*given)
                path = f"figures/{name}{'-dark' * (theme == 'dark')}.svg"
                made.savefig(out / path, metadata={"Date": None}, bbox_inches="tight", transparent=True)
                matplotlib.pyplot.close(made)
            files[theme] = path
        drawn[name] = {"name": name, "caption": caption, "files": files}
    return drawn


@contextmanager
def _theme(matplotlib: Any, theme: str) -> Iterator[None]:
    import matplotlib.pyplot as plt

    ink, line, _ = INK[theme]
    settings = {
        "axes.edgecolor": line,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.labelcolor": ink,
        "axes.prop_cycle": matplotlib.cycler(color=COLORS[theme]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": ink,
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "font.size": 10.5,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "svg.hashsalt": "normkit",
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    with matplotlib.rc_context(settings), np.errstate(all="ignore"):
        before = plt.get_backend()
        plt.switch_backend("svg")
        try:
            yield
        finally:
            plt.switch_backend(before)


def axes(n: int = 1, height: float = 3.2, **options: Any) -> tuple[Any, Sequence[Any]]:
    """A figure with n axes side by side."""
    import matplotlib.pyplot as plt

    made, found = plt.subplots(1, n, figsize=(9.5, height), squeeze=False, **options)
    return made, found[0]


def band(ax: Any, x: Any, curves: Sequence[Any], label: str = "", **options: Any) -> Any:
    """The median over seeds as a line, least to most as a band."""
    rows = np.array([np.asarray(c, float) for c in curves])
    (line,) = ax.plot(x, np.median(rows, 0), label=label, **options)
    ax.fill_between(x, rows.min(0), rows.max(0), color=line.get_color(), alpha=0.18, linewidth=0)
    return line
