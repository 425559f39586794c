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
    if 0 < 20 * found.loss.min() < found.loss.max() < np.inf:
        ax.set_yscale("log")
    right = ax.twinx()
    right.axhline(1, color=ORANGE, linewidth=0.8, linestyle=":")
    change = np.where(np.isfinite(found.relative_change), found.relative_change, np.nan)
    right.plot(steps, change[order], "s--", color=ORANGE, markersize=3)
    right.set_yscale("log")
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


def _curvature(found: Any, ax: Any) -> None:
    places = np.arange(len(found.ritz))
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.errorbar(places, found.ritz, found.residual, fmt="o", color=BLUE, ecolor=ORANGE, markersize=4)
    ax.set_yscale("symlog", linthresh=max(1e-3 * float(np.abs(found.ritz).max()), 1e-30))
    ax.set_xlabel("Ritz value (bar: residual)")
    ax.set_ylabel("eigenvalue of the Hessian")
    ax.set_title("curvature")


def _scale(found: Any, ax: Any) -> None:
    order = np.argsort(np.abs(found.factor))
    factor = np.abs(found.factor)[order]
    ax.axhline(found.loss0, color=GREY, linewidth=0.8, linestyle=":")
    ax.plot(factor, np.where(np.isfinite(found.loss), found.loss, np.nan)[order], "o-", color=BLUE, markersize=3)
    ax.set_xscale("log")
    ax.set_xlabel("factor")
    ax.set_ylabel("loss (dotted: at 1)", color=BLUE)
    right = ax.twinx()
    right.loglog(factor, found.grad_norm[order], "s--", color=ORANGE, markersize=3)
    right.loglog(factor, found.grad_norm0 / factor, "-", color=GREY, linewidth=0.8)
    right.set_ylabel("norm of the gradient (grey: 1 / factor)", color=ORANGE)
    ax.set_title("response to the weights' scale")


def _activations(found: Any, ax: Any) -> None:
    order = np.argsort(found.percentiles[0, 1])
    places = np.arange(len(order))
    for k, (name, color) in enumerate((("before", GREY), ("after", BLUE))):
        low, middle, high = found.percentiles[k][:, order]
        ax.fill_between(places, low, high, color=color, alpha=0.25, linewidth=0)
        ax.plot(places, middle, color=color, linewidth=1.2, label=name)
    ax.set_xlabel("unit")
    ax.set_ylabel("activation: 15th, 50th, 85th percentile")
    ax.legend(fontsize="small", loc="upper left")
    ax.set_title(f"activations, KL {np.median(found.kl):.2g} nats in the median")


def _channels(found: Any, ax: Any) -> None:
    ax.semilogy(np.abs(found.mean) + 1e-9, found.kl + 1e-9, "o", color=BLUE, markersize=3)
    ax.set_xlabel("mean off by, standard deviations")
    ax.set_ylabel("KL(precise ‖ running), nats")
    ax.set_title("running statistics, channel by channel")


def _gaps(found: Any, ax: Any) -> None:
    for place, gap in enumerate(found.channels.values()):
        ax.plot(np.full(len(gap.kl), place), gap.kl + 1e-9, "_", color=BLUE, markersize=10)
        ax.plot([place], [np.median(gap.kl) + 1e-9], "D", color=ORANGE, markersize=4)
    ax.set_yscale("log")
    ax.set_ylabel("KL(precise ‖ running), nats; diamond: median")
    _named(ax, tuple(found.channels))
    ax.set_title("running statistics, channel by channel")


def _convergence(found: Any, ax: Any) -> None:
    places = np.arange(len(found.errors))
    ax.semilogy(places, found.errors, color=BLUE)
    fitted = places[: found.fitted]
    logs = np.log(found.errors[: found.fitted])
    line = np.exp(logs.mean() + np.log(found.rate) * (fitted - fitted.mean()))
    ax.semilogy(fitted, line, "--", color=ORANGE, label=f"times {found.rate:.4g} an iteration, R² {found.r2:.3f}")
    ax.axhline(found.tolerance, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_xlabel("iteration")
    ax.set_ylabel("error (dotted: tolerance)")
    ax.legend(fontsize="small")
    ax.set_title("convergence")


def _conditioning(found: Any, ax: Any) -> None:
    places = np.arange(len(found.names))
    ax.bar(places, found.condition, color=BLUE, width=0.6)
    ax.set_yscale("log")
    ax.set_ylabel("condition number")
    _named(ax, found.names)
    ax.set_title("conditioning")


def _named(ax: Any, names: tuple[str, ...]) -> None:
    """As many names as can be read."""
    every = -(-len(names) // 16)
    places = range(0, len(names), every)
    ax.set_xticks(list(places), [names[i] for i in places], rotation=45 if len(names) > 4 else 0, ha="right")


_DRAWN = {
    "ActivationShift": _activations,
    "ChannelGap": _channels,
    "Conditioning": _conditioning,
    "Convergence": _convergence,
    "Curvature": _curvature,
    "Flow": _flow,
    "Gaps": _gaps,
    "Landscape": _landscape,
    "ScaleResponse": _scale,
    "Shift": _shift,
}
