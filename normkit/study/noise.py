"""Experiments on noise: behind batch norm (E2), and in its statistics (E14)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from normkit.study import data, engine
from normkit.study.lab import Lab
from normkit.study.record import AFTERWARDS, Check, Experiment, Found
from normkit.study.training import NET, STEPS

RATE, OTHER_RATES = 0.03, (0.01, 0.1, 0.3, 1.0)


def noise_of(lab: Lab, names: list[str], units: int) -> Callable[[int, int], Mapping[str, tuple]]:
    """Noise whose distribution is drawn anew each step: scale about 1.1 and shift about 0, other for each unit."""

    def draw(step, batch):
        rng = lab.rng(2, step)
        found = {}
        for name in names:
            mean, scale = rng.uniform(-0.5, 0.5, units), rng.uniform(1, 1.25, units)
            found[name] = rng.normal(scale, 0.1, (batch, units)), rng.uniform(mean - 0.1, mean + 0.1, (batch, units))
        return found

    return draw


def noisy(lab: Lab) -> Found:
    """Batch norm with and without noise behind it, and nets without it, at one learning rate."""
    numbers, series = {}, {}
    noise = noise_of(lab, [f"{k}.norm" for k in range(1, 9)], 64)
    probe = data.digits()
    for name, kind in (("none", None), ("batch norm", "batch"), ("noisy", "noisy"), ("none with noise", "noise")):
        net = engine.mlp(kind)
        means: list[tuple] = []
        seen: list[np.ndarray] = []
        with_noise = noise if kind in ("noisy", "noise") else None

        def watch(k, params, x, t, net=net, means=means, seen=seen, with_noise=with_noise):
            if k % 5 < 2 and k >= 20:
                drawn = (
                    {} if with_noise is None else {n: tuple(map(lab.array, p)) for n, p in with_noise(k, 512).items()}
                )
                run = engine.Pass(lab.xp, noise=drawn)
                net.forward(run, params, lab.array(probe.x[:512]))
                inputs = lab.numpy(run.inputs["6.act"])
                means.append((inputs.mean(0), inputs.std(0)))
                if k % 50 == 20 or k == 20:
                    seen.append(inputs[:, 0])

        run = lab.train(net, RATE, STEPS, noise=with_noise, watch=watch)
        mean, std = map(np.array, zip(*means, strict=True))
        # Between a step and the next, in spreads of the unit.
        moved = np.abs(mean[1::2] - mean[0::2]) / np.maximum(std[0::2], 1e-12)
        numbers[f"accuracy, {name}"] = lab.accuracy(net, run.params)
        numbers[f"inputs move by, {name}"] = float(np.median(moved.mean(1)))
        numbers[f"last loss, {name}"] = float(run.loss[-20:].mean())
        series[f"{name}/loss"], series[f"{name}/seen"] = run.loss, np.array(seen)
        if kind != "noise":
            others = [lab.accuracy(net, lab.train(net, r, STEPS, noise=with_noise).params) for r in OTHER_RATES]
            series[f"{name}/accuracy"] = np.array([numbers[f"accuracy, {name}"], *others])
    plain, batch, noised = (series[f"{name}/accuracy"] for name in ("none", "batch norm", "noisy"))
    numbers["rates of five with noise within 3 points"] = float((noised >= batch - 0.03).sum())
    numbers["rates of five with noise better than none"] = float((noised > plain).sum())
    return numbers, series


def statistics_noise(lab: Lab) -> Found:
    """Full batches of 128 digits, normalized together or by 8, and otherwise the same."""
    split = data.digits()
    rows = lab.rng(14).permutation(len(split.x))[:128]
    x, t = lab.array(split.x[rows]), lab.array(split.t[rows])
    rate = lab.array(0.3)
    numbers, series = {}, {}
    for name, kind in (("whole batch", "batch"), ("by 8", "ghost 8")):
        net = engine.mlp(kind, sizes=(64, 128, 128, 10))
        objective = lab.value_and_grad(net)
        params, losses, rng = lab.init(net), [], lab.rng(15)
        for _ in range(200):
            order = rng.permutation(128)
            x, t = lab.array(split.x[rows[order]]), lab.array(split.t[rows[order]])
            loss, grads = objective(params, x, t, {})
            params = {n: a - rate * grads[n] for n, a in params.items()}
            losses.append(float(loss))
        known = lab.statistics(net, params, rows) if kind == "batch" else None
        whole = engine.mlp("batch", sizes=(64, 128, 128, 10))
        known = lab.statistics(whole, params, rows)
        numbers[f"test error, {name}"] = 1 - lab.accuracy(net, params, known)
        numbers[f"training loss, {name}"] = losses[-1]
        series[f"{name}/loss"] = np.array(losses)
    return numbers, series


E2 = Experiment(
    "E2",
    "Noise behind batch norm",
    "Does batch norm train as well when noise makes its outputs less stable than those of a net without it?",
    "Noisy batch norm loses ≤ 3 points against batch norm and beats no norm, though its activations move more; the "
    "same noise kills the net without norm.",
    (
        Check(
            "close",
            "with noise at most 3 points below batch norm",
            "accuracy, noisy",
            ">=",
            "accuracy, batch norm",
            offset=-0.03,
        ),
        Check("better", "and better than without batch norm", "accuracy, noisy", ">", "accuracy, none"),
        Check("moves", "although its activations move more", "inputs move by, noisy", ">", "inputs move by, none"),
        Check(
            "kills",
            "the same noise stops the net without batch norm (below 50 %)",
            "accuracy, none with noise",
            "<",
            0.5,
        ),
        *(
            Check(
                f"rates_{name}",
                f"{says}, at all five rates that were tried",
                f"rates of five {number}",
                ">=",
                5.0,
                kind=AFTERWARDS,
            )
            for name, says, number in (
                ("close", "at most 3 points below batch norm", "with noise within 3 points"),
                ("better", "better than without batch norm", "with noise better than none"),
            )
        ),
    ),
    f"{NET} at a rate of {RATE}. The rate is a condition, chosen of five (0.01, 0.03, 0.1, 0.3, 1) when their "
    "accuracies had been seen, as one at which the net without norm is away from its edge, 0.1; the others stand "
    "beside it. The noise alone does not stop this net, which is shallower than a VGG.",
    noisy,
    cost=8,
    figures=("noise",),
)

E14 = Experiment(
    "E14",
    "Noise of batch statistics",
    "Does the noise in batch statistics lower the test error?",
    "Batch-statistic noise lowers the test error.",
    (
        Check(
            "error",
            "statistics of 8 samples give a lower test error than those of 128",
            "test error, by 8",
            "<",
            "test error, whole batch",
        ),
    ),
    "128 digits, two hidden layers of 128, 200 full-batch steps: the gradient is over the same samples, only the "
    "statistics are of fewer.",
    statistics_noise,
    cost=3,
)
