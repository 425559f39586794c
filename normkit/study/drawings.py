"""What is in each picture."""

from __future__ import annotations

import numpy as np

from normkit.study.figures import axes, band, figure
from normkit.study.record import CRITERION, NOT, PARTLY, REPRODUCED

#: The colours of verdicts; what does not hold is hollow too.
VERDICTS = {REPRODUCED: "C3", PARTLY: "C2", NOT: "C0"}


@figure(
    "verdicts",
    caption="All verdicts. Left: what each criterion asks, full where it holds, hollow where it does not, in the "
    "verdict's colour. Right: the documents' claims that the experiment has a part in, by their own verdicts.",
)
def verdicts(records):
    made, (left, right) = axes(2, 0.9 + 0.27 * len(records), sharey=True, gridspec_kw={"width_ratios": [1.6, 1]})
    rows = list(records.values())
    for y, record in enumerate(rows):
        color = VERDICTS[record["verdict"]]
        for x, check in enumerate(c for c in record["checks"] if c["kind"] == CRITERION):
            face = color if check["holds"] else "none"
            left.plot(x + 1, y, marker="o", markersize=7, color=color, markerfacecolor=face)
        start = 0
        for verdict, shade in VERDICTS.items():
            n = sum(claim["verdict"] == verdict for claim in record["claims"])
            right.barh(y, n, left=start, height=0.62, color=shade, label=verdict if y == 0 else "")
            start += n
    names = [f"{r['title']}  {r['experiment']}" for r in rows]
    left.set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.4, -0.6), title="criterion")
    left.tick_params(axis="y", labelsize=8.5, length=0)
    left.set(xticks=[], xlim=(0.3, None))
    left.grid(visible=False, axis="x")
    right.set(title="claims")
    made.legend(fontsize=8.5, loc="outside lower right", ncols=3)
    return made


@figure(
    "least_squares",
    "E7",
    caption="Least squares, wine and diabetes. Left: what is left of the excess loss, batch norm on the output, four "
    "of the steps tried (first seed). Right: iterations to 0.01 % of it against the step; gradient descent ends at "
    "2 / λmax.",
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
    right[0].legend(fontsize=8.5, loc="lower left")
    return made


@figure(
    "halfspaces",
    "E10",
    caption="Left: the Rayleigh gap of least squares under the theorem's bound (dashed). Right: the squared gradient "
    "of a halfspace's loss by gradient descent, by GDNP, and the line (1 - μ/L)^2t.",
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


NAMES = {"none": "no norm", "batch": "batch norm", "layer": "layer norm", "linf": "L∞", "l1": "L1", "l2": "L2"}


def _by_rate(ax, curves, names, key="accuracy"):
    for name in names:
        band(ax, curves[0]["rates"], [c[f"{name}/{key}"] for c in curves], NAMES[name], marker="o", markersize=3)
    ax.set(xscale="log", xlabel="learning rate")


def _counted(ax):
    ticks = (20, 50, 100, 200, 300)
    ax.set(ylabel="steps to loss 0.3", yscale="log", yticks=ticks, yticklabels=ticks)
    ax.minorticks_off()


@figure(
    "learning_rates",
    "E1",
    caption="Test accuracy after 300 steps, and steps to a loss of 0.3 (301: not reached), against the learning rate.",
)
def learning_rates(e1):
    made, (left, right) = axes(2)
    _by_rate(left, e1, ("none", "batch", "layer"))
    left.set(ylabel="test accuracy", ylim=(0, 1.02))
    left.legend(fontsize=8.5)
    _by_rate(right, e1, ("none", "batch", "layer"), "steps")
    _counted(right)
    return made


@figure(
    "p_norms",
    "E5",
    caption="Left and middle: test accuracy and steps to a loss of 0.3 (301: not reached) against the learning rate. "
    "Right: what a hidden layer's nonlinearities are given after a norm by the largest value (first seed): less spread "
    "than a standard deviation of 1.",
)
def p_norms(e5):
    made, (left, middle, right) = axes(3)
    for ax, key in ((left, "accuracy"), (middle, "steps")):
        _by_rate(ax, e5, ("none", "batch", "l1", "l2", "linf"), key)
    left.set(ylabel="test accuracy", ylim=(0, 1.02))
    left.legend(fontsize=8.5)
    _counted(middle)
    right.hist(e5[0]["inputs"].ravel(), bins=60, density=True, label="L∞")
    x = np.linspace(-3, 3, 200)
    right.plot(x, np.exp(-x * x / 2) / np.sqrt(2 * np.pi), color="C1", label="Gaussian")
    right.set(xlabel="input of the nonlinearity", ylabel="density", xlim=(-3, 3))
    right.legend(fontsize=8.5)
    return made


@figure(
    "noise",
    "E2",
    caption="Left: training loss (mean of 15 steps). Right: one unit's input over 512 digits every 50 steps (first "
    "seed): noise behind batch norm moves it more than leaving batch norm out does.",
)
def noise(e2):
    made, (left, *right) = axes(4, gridspec_kw={"width_ratios": [2.2, 1, 1, 1]})
    kernel = np.ones(15) / 15
    for name in ("none", "batch norm", "noisy", "none with noise"):
        rows = [np.convolve(c[f"{name}/loss"], kernel, "valid") for c in e2]
        n = min(map(len, rows))
        band(left, np.arange(n), [r[:n] for r in rows], "noise behind batch norm" if name == "noisy" else name)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.legend(fontsize=8)
    for k, (ax, name) in enumerate(zip(right, ("none", "batch norm", "noisy"), strict=True)):
        parts = ax.violinplot(e2[0][f"{name}/seen"].T, showextrema=False, widths=0.9, orientation="horizontal")
        for body in parts["bodies"]:
            body.set(facecolor=f"C{k}", alpha=0.6)
        ax.set(title={"noisy": "noisy BN"}.get(name, name), xlabel="input", yticks=[])
    right[0].set_ylabel("training →")
    return made


@figure(
    "landscape",
    "E3",
    caption="Along the gradient, 1/2 to 4 learning rates: range of the loss and of the change of the gradient, and β, "
    "during training (first seed); and the change of the gradient at equal loss, medians over seeds.",
)
def landscape(e3):
    made, (loss, change, beta, bars) = axes(4, gridspec_kw={"width_ratios": [1, 1, 1, 1.3]})
    for k, name in enumerate(("none", "batch norm")):
        s = e3[0]
        step = s[f"{name}/step"]
        loss.fill_between(step, s[f"{name}/low"], s[f"{name}/high"], color=f"C{k}", alpha=0.5, linewidth=0, label=name)
        change.fill_between(step, s[f"{name}/least_change"], s[f"{name}/change"], color=f"C{k}", alpha=0.5, linewidth=0)
        beta.plot(step, s[f"{name}/beta"], color=f"C{k}")
        edges = ("0.1", "0.2", "0.4", "0.8")
        medians = np.nanmedian([c[f"{name}/equal/change"] for c in e3], 0)
        bars.bar(np.arange(len(edges)) + 0.4 * k - 0.2, medians, 0.38, color=f"C{k}")
        bars.set(xticks=range(len(edges)), xticklabels=edges, xlabel="loss, from", title="gradient, equal loss")
    loss.set(title="loss", xlabel="step", yscale="log")
    change.set(title="change of gradient", xlabel="step", yscale="log")
    beta.set(title="effective β", xlabel="step", yscale="log", yticks=(5, 10, 20, 50), yticklabels=(5, 10, 20, 50))
    bars.set(yscale="log")
    beta.minorticks_off()
    loss.legend(fontsize=8.5, loc="lower left")
    return made


@figure(
    "shift",
    "E4",
    "E18",
    caption="Definition 2.1: cosine (1: no shift) and distance (0: none) between a layer's gradients before and after "
    "the layers in front of it are updated. Left and middle: "
    "layers 3 (dotted), 6 (dashed) and 9 of a ReLU net; right: 25 linear layers.",
)
def shift(e4, e18):
    made, (cosine, l2, linear) = axes(3)
    for k, name in enumerate(("none", "batch norm")):
        for layer, style in ((1, ":"), (4, "--"), (7, "-")):
            step = e4[0][f"{name}/step"]
            options = {"color": f"C{k}", "linestyle": style, "linewidth": 1.4}
            label = name if layer == 7 else ""
            cosine.plot(step, np.median([c[f"{name}/cosine"][:, layer] for c in e4], 0), label=label, **options)
            l2.plot(step, np.median([c[f"{name}/l2"][:, layer] for c in e4], 0), **options)
        rows = [np.median(c[f"{name}/cosine"], 0) for c in e18]
        band(linear, np.arange(2, 26), rows, name)
    cosine.set(title="cosine", xlabel="step", ylim=(-0.2, 1.05))
    l2.set(title="distance", xlabel="step", yscale="log")
    linear.set(title="cosine, 25 linear layers", xlabel="layer", ylim=(-0.2, 1.05))
    cosine.legend(fontsize=7.5)
    linear.legend(fontsize=8.5)
    return made


@figure(
    "percentiles",
    "E12",
    caption="Left and middle: 15th, 50th and 85th percentiles of one input of the last hidden layer (first seed), as "
    "the first paper shows them. Right: divergence of the last from the first distribution, by layer.",
)
def percentiles(e12):
    made, (left, middle, right) = axes(3)
    for k, (ax, name) in enumerate(((left, "none"), (middle, "batch norm"))):
        low, half, high = e12[0][f"{name}/percentiles"]
        steps = e12[0]["steps"]
        ax.fill_between(steps, low, high, color=f"C{k}", alpha=0.25, linewidth=0)
        ax.plot(steps, half, color=f"C{k}")
        ax.set(title=name, xlabel="step", ylabel="input" if k == 0 else "")
        rows = np.array([c[f"{name}/kl"] for c in e12])
        at = np.arange(3) + 0.4 * k - 0.2
        right.bar(at, np.median(rows, 0), 0.38, color=f"C{k}", label=name)
        right.vlines(at, rows.min(0), rows.max(0), color="C5", linewidth=1)
    low = min(left.get_ylim()[0], middle.get_ylim()[0])
    high = max(left.get_ylim()[1], middle.get_ylim()[1])
    for ax in (left, middle):
        ax.set_ylim(low, high)
    right.set(xticks=range(3), xticklabels=["layer 1", "2", "3"], ylabel="KL, nats")
    right.legend(fontsize=8.5)
    return made


@figure(
    "batch_sizes",
    "E6",
    caption="Test error against the batch, with the same number of digits seen: batch norm and group norm, in a net of "
    "three hidden layers and in one of six convolutions.",
)
def batch_sizes(e6):
    made, found = axes(2, sharey=True)
    ticks = [int(b) for b in e6[0]["batches"]]
    for ax, (net, title) in zip(found, (("MLP", "hidden layers"), ("conv", "convolutions")), strict=True):
        for k, name in enumerate(("batch norm", "group norm"), 1):
            errors = [np.maximum(c[f"{net}/{name}"], 1 / 900) for c in e6]  # none of 450 is wrong: half of one
            band(ax, ticks, errors, name, marker="o", color=f"C{k}")
        ax.set(xscale="log", yscale="log", xlabel="batch", title=title, xticks=ticks, xticklabels=ticks)
        ax.minorticks_off()
    found[0].set_ylabel("test error")
    found[0].legend(fontsize=8.5)
    return made


@figure(
    "running",
    "E8",
    caption="Test error during training, by the statistics of all training data and by moving averages of two decays.",
)
def running(e8):
    made, (ax,) = axes()
    for k, name in enumerate(("decay 0.99", "precise", "decay 0.9")):
        label = "all training data" if name == "precise" else f"moving average, {name}"
        band(ax, e8[0]["steps"], [c[name] for c in e8], label, color=f"C{k}")
    ax.set(xlabel="step", ylabel="test error", yscale="log")
    ax.legend(fontsize=8.5)
    return made


@figure(
    "gradients",
    "E9",
    caption="Norm of the gradient at each of 90 layers, at the start, relative to the last layer's. Upwards to the "
    "left is an explosion on the way back, downwards a decay.",
)
def gradients(e9):
    made, found = axes(2, sharey=True)
    for ax, act in zip(found, ("relu", "tanh"), strict=True):
        for name in ("none", "batch norm", "backward"):
            rows = [c[f"{act}/{name}"] / c[f"{act}/{name}"][-1] for c in e9]
            label = "backward normalization" if name == "backward" else name
            band(ax, np.arange(1, len(rows[0]) + 1), rows, label)
        ax.set(yscale="log", xlabel="layer", title=act)
    found[0].set_ylabel("norm of the gradient, relative")
    found[0].legend(fontsize=8.5)
    return made


@figure(
    "initialization",
    "E11",
    caption="Test accuracy after 300 steps at a rate of 0.05, against the size of the initial weights (1: Glorot's).",
)
def initialization(e11):
    made, (ax,) = axes()
    for name in ("none", "batch norm", "layer norm"):
        band(ax, e11[0]["gains"], [c[name] for c in e11], name, marker="o", markersize=4)
    ax.set(xscale="log", xlabel="size of the initial weights", ylabel="test accuracy", ylim=(0, 1.02))
    ax.legend(fontsize=8.5)
    return made


@figure(
    "first_steps",
    "E16",
    caption="Loss after one step along the gradient, relative to before, against the step: medians of the first eight "
    "batches; by Glorot's initialization, where the plain net starts on a plateau, and by He's.",
)
def first_steps(e16):
    made, found = axes(2, sharey=True)
    for ax, start in zip(found, ("Glorot", "He"), strict=True):
        for name in ("none", "batch norm"):
            band(ax, e16[0]["steps"], [c[f"{start}/{name}"] for c in e16], name)
        ax.axhline(1.5, color="C5", linewidth=1, linestyle="--")
        ax.set(xscale="log", yscale="log", ylim=(0.3, 100), xlabel="step", title=f"{start}'s initialization")
    found[0].set_ylabel("loss, relative")
    found[0].legend(fontsize=8.5)
    return made


@figure(
    "kernel",
    "E15",
    caption="Eigenvalues of the tangent kernel of 24 digits at the start, relative to their mean, largest first.",
)
def kernel(e15):
    made, (ax,) = axes()
    for name in ("none", "batch norm"):
        rows = [c[f"{name}/kernel"] / c[f"{name}/kernel"].mean() for c in e15]
        band(ax, np.arange(1, len(rows[0]) + 1), [np.maximum(r, 1e-8) for r in rows], name)
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue over the mean")
    ax.legend(fontsize=8.5)
    return made


@figure(
    "pinned",
    "E17",
    caption="The same forward pass, with the gradient of the statistics and without. Left: loss at a rate of 0.1. "
    "Middle: accuracy against the rate. Right: the norm of a layer's weights, relative to the start.",
)
def pinned(e17):
    made, (left, middle, right) = axes(3)
    labels = {"batch": "batch norm", "stop_gradient": "pinned", "none": "no norm"}
    colors = {"none": "C0", "batch": "C1", "stop_gradient": "C2"}
    for name in ("batch", "stop_gradient"):
        rows = [c[f"{name}/loss"] for c in e17]
        band(left, np.arange(len(rows[0])), rows, labels[name], color=colors[name])
        sizes = [c[f"{name}/size"] / c[f"{name}/size"][0] for c in e17]
        band(right, np.arange(len(sizes[0])), sizes, labels[name], color=colors[name])
    for name, color in colors.items():
        rows = [c[f"{name}/accuracy"] for c in e17]
        band(middle, e17[0]["rates"], rows, labels[name], color=color, marker="o", markersize=3)
    left.set(yscale="log", xlabel="step", ylabel="loss", ylim=(1e-3, 10))
    middle.set(xscale="log", xlabel="learning rate", ylabel="test accuracy", ylim=(0, 1.02))
    right.set(xlabel="step", ylabel="norm of weights, relative")
    middle.legend(fontsize=8.5)
    return made
