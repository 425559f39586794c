"""What is in each picture."""

from __future__ import annotations

import numpy as np

from normkit.study.figures import axes, band, figure


@figure(
    "least_squares",
    "E7",
    caption="Least squares, wine and diabetes. Left: what is left of the excess loss, batch norm on the output, four of "
    "the steps tried. Right: iterations to 0.1 % of it against the step; gradient descent ends at 2 / λmax.",
)
def least_squares(e7):
    made, (left, *right) = axes(3)
    s = e7[0]
    rates = s["rates"]
    for k in (4, 6, 8, 12):
        column = s["wine/excess"][:, k]
        x = np.arange(len(column)) * 25 + 1
        left.plot(x, np.where(column > 1e-15, column, np.nan), label=f"{rates[k]:.0e} / λmax".replace("e+0", "e"))
    left.set(xscale="log", yscale="log", xlabel="iteration", ylabel="excess loss, relative", title="BNGD on wine")
    left.legend(fontsize=8.5)
    for ax, name in zip(right, ("wine", "diabetes"), strict=True):
        for key, label in (("gd", "gradient descent"), ("bngd", "with batch norm")):
            rows = np.array([c[f"{name}/{key}"] for c in e7])
            rows = np.where(np.isfinite(rows), rows, np.nan)
            (line,) = ax.plot(rates, np.median(rows, 0), marker="o", markersize=3, label=label)
            ax.fill_between(rates, rows.min(0), rows.max(0), color=line.get_color(), alpha=0.18, linewidth=0)
        ax.set(xscale="log", yscale="log", xlabel="step × λmax", ylabel="iterations", title=name)
    right[0].legend(fontsize=8.5)
    return made


@figure(
    "halfspaces",
    "E10",
    caption="Left: the Rayleigh gap of least squares under the theorem's bound (dashed). Right: the squared gradient of "
    "a halfspace's loss by gradient descent, by GDNP, and the line (1 - μ/L)^2t.",
)
def halfspaces(e10):
    made, (left, right) = axes(2)
    for name in ("wine", "diabetes", "breast_cancer"):
        curves = [np.maximum(c[f"{name}/gap"], 1e-12) for c in e10]
        line = band(left, np.arange(len(curves[0])), curves, name.replace("_", " "))
        left.plot(e10[0][f"{name}/bound"], color=line.get_color(), linestyle="--", linewidth=1)
    left.set(yscale="log", ylim=(1e-10, 2), xlabel="iteration", ylabel="gap, relative", title="least squares")
    left.legend(fontsize=8.5)
    s = e10[0]
    right.plot(s["gd"] / s["gd"][0], label="gradient descent")
    right.plot(s["gdnp"] / s["gdnp"][0], label="GDNP")
    right.plot(s["line"] / s["line"][0], linestyle="--", linewidth=1, label="(1 - μ/L)^2t")
    right.set(xscale="symlog", yscale="log", xlabel="iteration", ylabel="squared gradient, relative", title="halfspace")
    right.set_ylim(1e-21, 10)
    right.legend(fontsize=8.5)
    return made
