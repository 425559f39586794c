"""How results are drawn: one set of axes each, in colours that stay apart for the colour-blind (Okabe and Ito)."""

from __future__ import annotations

from typing import Any

import numpy as np

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#7f7f7f"


def draw(record: Any, ax: Any = None) -> Any:
    """A result into the axes, or into new ones."""
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError:
            raise ImportError(
                'plot needs matplotlib, which is not installed: python -m pip install "normkit[plot]".'
            ) from None
        ax = pyplot.subplots(layout="constrained")[1]
    _DRAWN[type(record).__name__](record, ax)
    return ax


def _landscape(found: Any, ax: Any) -> None:
    ax.axhline(found.loss0, color=GREY, linewidth=0.8, linestyle=":")
    order = np.argsort(found.step)
    steps = found.step[order]
    ax.plot(steps, np.where(np.isfinite(found.loss), found.loss, np.nan)[order], "o-", color=BLUE, markersize=3)
    ax.set_xlabel("step")
    ax.set_ylabel("loss (dotted: here)", color=BLUE)
    if (steps > 0).all() and steps[-1] > 20 * steps[0]:
        ax.set_xscale("log")
    right = ax.twinx()
    change = np.where(np.isfinite(found.relative_change), found.relative_change, np.nan)
    right.plot(steps, change[order], "s--", color=ORANGE, markersize=3)
    right.set_ylabel("change of the gradient / its norm", color=ORANGE)
    ax.set_title("along the direction")


def _shift(found: Any, ax: Any) -> None:
    places = np.arange(len(found.layers))
    ax.bar(places, found.relative, color=BLUE, width=0.6)
    ax.set_ylabel("‖G - G'‖ / ‖G‖", color=BLUE)
    _named(ax, found.layers)
    right = ax.twinx()
    right.plot(places, found.cosine, "s", color=ORANGE)
    right.set_ylim(min(-0.05, float(found.cosine.min()) - 0.05), 1.05)
    right.set_ylabel("cosine (1: no shift)", color=ORANGE)
    ax.set_title("internal covariate shift")


def _flow(found: Any, ax: Any) -> None:
    places = np.arange(len(found.norms))
    ax.semilogy(places, found.norms, "o", color=BLUE, markersize=4)
    logs = np.log(found.norms)
    line = np.exp(logs.mean() - found.growth * (places - places.mean()))
    ax.semilogy(places, line, "-", color=ORANGE, linewidth=1, label=f"{found.growth:+.3f} nats a layer, going back")
    ax.set_ylabel("norm of the gradient")
    _named(ax, found.layers)
    ax.legend(fontsize="small")
    ax.set_title("gradient flow")


def _named(ax: Any, names: tuple[str, ...]) -> None:
    """As many names as can be read."""
    every = -(-len(names) // 16)
    places = range(0, len(names), every)
    ax.set_xticks(list(places), [names[i] for i in places], rotation=45 if len(names) > 4 else 0, ha="right")


_DRAWN = {"Landscape": _landscape, "Shift": _shift, "Flow": _flow}
