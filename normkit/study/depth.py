"""Experiments on depth: gradients through 90 layers (E9), and 100 layers with skips (E9b)."""

from __future__ import annotations

import numpy as np

from normkit import diagnostics
from normkit.study import engine
from normkit.study.lab import Lab
from normkit.study.record import AFTERWARDS, DOCUMENT, Check, Experiment, Found

DEPTH = 90


def gradients(lab: Lab) -> Found:
    """Norms of the gradient with respect to the inputs of 90 layers, at the start."""
    numbers, series = {}, {}
    x, t = next(lab.batches(128, 1))
    for act in ("relu", "tanh"):
        for name, kind in (("none", None), ("batch norm", "batch"), ("backward", "backward")):
            net = engine.mlp(kind, sizes=(64,) * (DEPTH + 1) + (10,), act=act)
            run = engine.Pass(lab.xp)
            with np.errstate(all="ignore"):
                net.value_and_grad(run, lab.init(net), x, t)
            # What goes into a layer's nonlinearity from behind it; the first layer first.
            norms = {f"{k}.act": run.gradients[f"{k}.act"] for k in range(1, DEPTH + 1)}
            flow = diagnostics.gradient_flow(norms)
            numbers[f"growth per layer, {act}, {name}"] = flow.growth
            series[f"{act}/{name}"] = flow.norms
    return numbers, series


def residual(lab: Lab) -> Found:
    """100 layers with and without skips, with batch norm."""
    numbers, series = {}, {}
    for name in ("skips and batch norm", "batch norm alone", "neither"):
        layers: list = [engine.Dense("0", 64, 64)]
        for k in range(1, 101):
            block: list = [engine.Dense(f"{k}", 64, 64)]
            if name != "neither":
                block.append(engine.Norm(f"{k}.norm", 64, "batch"))
            block.append(engine.Act(f"{k}.act"))
            layers += [engine.Residual(*block)] if name.startswith("skips") else block
        net = engine.Net([*layers, engine.Norm("last.norm", 64, "batch"), engine.Dense("last", 64, 10)])
        history = lab.train(net, 0.1, 100)
        numbers[f"accuracy, {name}"] = lab.accuracy(net, history.params)
        numbers[f"last loss, {name}"] = float(min(history.loss[-10:].mean(), 99.0))
        series[name] = history.loss
    return numbers, series


E9 = Experiment(
    "E9",
    "Gradients through 90 layers",
    "At the start of 90 layers, do gradients decay without norm, grow with batch norm, and stay with backward "
    "gradient normalization?",
    "90 layers at the start: without norm gradients decay, with batch norm they grow, with backward normalization they "
    "are flat.",
    (
        Check(
            "none",
            "without norm they decay on the way back, by more than e^0.1 a layer",
            "growth per layer, relu, none",
            "<",
            -0.1,
        ),
        Check(
            "batch",
            "with batch norm they grow, by more than e^0.1 a layer",
            "growth per layer, relu, batch norm",
            ">",
            0.1,
        ),
        Check("above", "backward normalization: no growth", "growth per layer, relu, backward", "<", 0.02),
        Check("below", "and no decay", "growth per layer, relu, backward", ">", -0.02),
        Check(
            "tanh",
            "with tanh too they grow with batch norm",
            "growth per layer, tanh, batch norm",
            ">",
            0.1,
            kind=DOCUMENT,
        ),
        Check(
            "flat",
            "with batch norm singular values are about 1: no growth, no decay",
            "growth per layer, relu, batch norm",
            "<",
            0.02,
            kind=DOCUMENT,
        ),
        Check(
            "prevents", "batch norm prevents the decay", "growth per layer, relu, batch norm", ">", -0.02, kind=DOCUMENT
        ),
    ),
    "90 layers of 64, Glorot's initialization (with ReLU, half of He's variance), one batch of 128 digits, before any "
    "training. ReLU's rate with batch norm is (π / (π - 1))^½ a layer in mean-field theory, e^0.19.",
    gradients,
    cost=1,
    figures=("gradients",),
)

E9B = Experiment(
    "E9b",
    "100 layers",
    "Do 100 layers train with skips and batch norm?",
    "Residual layers and batch norm at 100 layers train.",
    (
        Check("trains", "to 90 % in 100 steps", "accuracy, skips and batch norm", ">=", 0.9),
        Check(
            "alone",
            "batch norm alone does not suffice (below 90 %)",
            "accuracy, batch norm alone",
            "<",
            0.9,
            kind=AFTERWARDS,
        ),
        Check("neither", "nor neither", "accuracy, neither", "<", 0.9, kind=AFTERWARDS),
        Check("bn", "batch norm alone enables it", "accuracy, batch norm alone", ">=", 0.9, kind=DOCUMENT),
    ),
    "100 residual layers of 64, x + relu(BN(Wx)), a last batch norm, batches of 128 digits, SGD at 0.1, 100 steps.",
    residual,
    cost=8,
)
