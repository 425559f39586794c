"""Experiments on internal covariate shift: by gradients (E4, E18) and by distributions (E12)."""

from __future__ import annotations

import numpy as np

from normkit import diagnostics
from normkit.study import data, engine
from normkit.study.lab import Lab
from normkit.study.record import DOCUMENT, Check, Experiment, Found

PAIR = (("none", None), ("batch norm", "batch"))
#: Away from the plain net's edge, which is at 0.1.
RATE = 0.05


def by_gradients(lab: Lab) -> Found:
    """Definition 2.1 of Santurkar et al. every ten steps: layer by layer, the layers before it updated."""
    rate = lab.array(RATE)
    numbers: dict[str, float] = {}
    series: dict[str, np.ndarray] = {}
    for name, kind in PAIR:
        net, trace = engine.mlp(kind), diagnostics.Trace(every=10)

        def watch(k, params, x, t, net=net, trace=trace):
            if not trace.due(k):
                return
            objective = lab.objective(net, x, t)
            _, grads = objective(params)
            updated = {n: a - rate * grads[n] for n, a in params.items()}
            layers = [[n for n in params if n.split(".")[0] == str(layer)] for layer in range(1, 10)]
            found = diagnostics.covariate_shift(objective, params, layers, updated)
            trace.add(k, l2=found.l2, cosine=found.cosine, relative=found.relative)

        history = lab.train(net, RATE, 150, watch=watch)
        arrays = trace.arrays()
        early = arrays["step"] <= 50
        numbers[f"cosine, first 50 steps, {name}"] = float(np.median(arrays["cosine"][early]))
        numbers[f"l2, first 50 steps, {name}"] = float(np.median(arrays["l2"][early]))
        numbers[f"relative l2, first 50 steps, {name}"] = float(np.median(arrays["relative"][early]))
        numbers[f"loss after 50 steps, {name}"] = float(np.mean(history.loss[45:55]))
        series |= {f"{name}/{key}": a for key, a in arrays.items()}
    return numbers, series


def deep_linear(lab: Lab) -> Found:
    """25 linear layers on whitened components of the digits, full batch, each at its best stable rate."""
    numbers, series = {}, {}
    x = data.components()[:512]
    x = x / x.std(0)
    target = x @ lab.rng(18).normal(size=(10, 10))
    arrays = lab.array(x), lab.array(target)
    for name, kind in PAIR:
        net = engine.mlp(kind, sizes=(10,) * 26, act="linear", loss="squares")
        objective, best = lab.objective(net, *arrays), None
        for rate in 10.0 ** np.arange(-6, 0.01, 0.5):
            losses, shifts, params = [], [], lab.init(net)
            lr = lab.array(rate)
            with np.errstate(all="ignore"):
                for _ in range(150):
                    loss, grads = objective(params)
                    losses.append(loss)
                    if not np.isfinite(loss) or loss > 1e3 * losses[0]:
                        break
                    params = {n: a - lr * grads[n] for n, a in params.items()}
            if len(losses) == 150 and (best is None or losses[-1] < best[0]):
                best = losses[-1], rate, losses
        assert best is not None
        params, lr = lab.init(net), lab.array(best[1])
        layers = [[n for n in params if n.split(".")[0] == str(layer)] for layer in range(1, 26)]
        for k in range(60):
            _, grads = objective(params)
            updated = {n: a - lr * grads[n] for n, a in params.items()}
            if k % 10 == 0:
                found = diagnostics.covariate_shift(objective, params, layers, updated)
                shifts.append((found.cosine, found.l2))
            params = updated
        cosine, l2 = np.array(shifts).transpose(1, 0, 2)
        numbers[f"best stable rate, {name}"] = float(best[1])
        numbers[f"cosine, {name}"] = float(np.median(cosine))
        numbers[f"loss after 150 steps over the first, {name}"] = float(best[0] / np.mean((target**2).sum(1)))
        series[f"{name}/cosine"], series[f"{name}/l2"] = cosine, l2
        series[f"{name}/loss"] = np.array(best[2])
    return numbers, series


def by_distributions(lab: Lab) -> Found:
    """Three sigmoid layers of 100, as in the first paper: percentiles, moments and divergences of a layer's inputs."""
    numbers, series = {}, {}
    probe, steps = data.digits().x[:1024], 1000
    marks = np.unique(np.geomspace(1, steps, 40).astype(int)) - 1
    for name, kind in PAIR:
        net = engine.mlp(kind, sizes=(64, 100, 100, 100, 10), act="sigmoid")
        seen: list = []

        def watch(k, params, x, t, net=net, seen=seen):
            if k in marks:
                run = engine.Pass(lab.xp)
                net.forward(run, params, lab.array(probe))
                seen.append([lab.numpy(run.inputs[f"{layer}.act"]) for layer in (1, 2, 3)])

        history = lab.train(net, 0.5, steps, batch=60, watch=watch)
        last = [diagnostics.activation_shift(*pair) for pair in zip(seen[0], seen[-1], strict=True)]
        kl = np.array([found.kl.mean() for found in last])
        for layer in (1, 2, 3):
            numbers[f"KL of layer {layer}, {name}"] = float(kl[layer - 1])
        numbers[f"KL, mean of layers, {name}"] = float(kl.mean())
        numbers[f"mean moves by, in stds, {name}"] = float(np.mean([np.abs(f.mean).mean() for f in last]))
        numbers[f"std changes by, {name}"] = float(np.mean([np.abs(np.log(f.std)).mean() for f in last]))
        numbers[f"accuracy, {name}"] = lab.accuracy(net, history.params)
        unit = np.array([layers[2][:, 0] for layers in seen])
        series[f"{name}/percentiles"] = np.percentile(unit, (15, 50, 85), axis=1)
        series[f"{name}/kl"] = kl
    series["steps"] = marks + 1
    return numbers, series


E4 = Experiment(
    "E4",
    "Internal covariate shift, by gradients",
    "Is the shift of Definition 2.1 no smaller with batch norm, early in training, although it trains better?",
    "Batch norm's shift not below that without norm (cosine lower, l2 higher) early, yet batch norm trains better.",
    (
        Check(
            "cosine",
            "the cosine between a layer's gradients is lower",
            "cosine, first 50 steps, batch norm",
            "<",
            "cosine, first 50 steps, none",
        ),
        Check(
            "l2",
            "the distance between them is larger",
            "l2, first 50 steps, batch norm",
            ">",
            "l2, first 50 steps, none",
        ),
        Check(
            "trains",
            "yet its loss after 50 steps is lower",
            "loss after 50 steps, batch norm",
            "<",
            "loss after 50 steps, none",
        ),
        Check(
            "reduces",
            "batch norm reduces the shift (a higher cosine)",
            "cosine, first 50 steps, batch norm",
            ">",
            "cosine, first 50 steps, none",
            kind=DOCUMENT,
        ),
    ),
    "Eight hidden layers of 64 with ReLU, batches of 128 digits, SGD at 0.05, first 50 steps. It is a shift of "
    "gradients, each layer's before and after the layers in front of it take their step.",
    by_gradients,
    cost=8,
    figures=("shift",),
)

E18 = Experiment(
    "E18",
    "Internal covariate shift in a deep linear net",
    "In 25 linear layers, is the cosine about 1 without batch norm and far below with it, although its loss is lower?",
    "Deep linear net of 25 layers, best stable rate: cosine without norm ≈ 1, with batch norm far below, its "
    "loss lower.",
    (
        Check("none", "the cosine is about 1 without batch norm", "cosine, none", ">=", 0.9),
        Check("batch", "and far below with it", "cosine, batch norm", "<=", "cosine, none", offset=-0.3),
        Check(
            "loss",
            "although the loss is lower",
            "loss after 150 steps over the first, batch norm",
            "<",
            "loss after 150 steps over the first, none",
        ),
    ),
    "10 whitened components of 512 digits, y = Ax, full batch, 150 steps, each net at its best stable rate.",
    deep_linear,
    cost=10,
    figures=("shift",),
)

E12 = Experiment(
    "E12",
    "Internal covariate shift, by distributions",
    "Do the distributions of the layers' inputs move less with batch norm?",
    "KL(p_1‖p_k) and the drift of moments smaller with batch norm.",
    (
        Check(
            "kl",
            "the divergence from the first to the last is smaller",
            "KL, mean of layers, batch norm",
            "<",
            "KL, mean of layers, none",
        ),
        Check("mean", "the means move less", "mean moves by, in stds, batch norm", "<", "mean moves by, in stds, none"),
        Check("std", "the spreads change less", "std changes by, batch norm", "<", "std changes by, none"),
        Check(
            "early",
            "without batch norm the shift is worst in the first layer",
            "KL of layer 1, none",
            ">",
            "KL of layer 3, none",
            kind=DOCUMENT,
        ),
        Check(
            "depth",
            "without batch norm the shift grows with depth",
            "KL of layer 3, none",
            ">",
            "KL of layer 1, none",
            kind=DOCUMENT,
        ),
    ),
    "Three layers of 100 sigmoids, batches of 60 digits, SGD at 0.5, 1000 steps; histograms of 30 bins, 1024 digits.",
    by_distributions,
    cost=5,
    figures=("percentiles",),
)
