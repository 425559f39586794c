"""Experiments on statistics: small batches (E6), and what inference is given (E8)."""

from __future__ import annotations

import numpy as np

from normkit import functional
from normkit.stats import RunningStats
from normkit.study import engine
from normkit.study.lab import Lab
from normkit.study.norms import Statistics
from normkit.study.record import AFTERWARDS, DOCUMENT, Check, Experiment, Found

SIZES = (64, 64, 64, 64, 10)
BATCHES = (2, 4, 8, 16, 32, 64)
DECAYS = (0.9, 0.99)
NETS = {"MLP": lambda kind: engine.mlp(kind, sizes=SIZES), "conv": engine.conv}


def batch_sizes(lab: Lab) -> Found:
    """The same number of digits in batches of 2 to 64, the rate in proportion."""
    numbers: dict[str, float] = {}
    series: dict[str, np.ndarray] = {"batches": np.array(BATCHES)}
    for kind, make in NETS.items():
        for name in ("batch norm", "group norm"):
            net, errors = make(name.split()[0]), []
            for size in BATCHES:
                run = lab.train(net, 0.3 * size / 64, 9600 // size, batch=size)
                errors.append(1 - lab.accuracy(net, run.params))
            numbers |= {f"error at batch {n}, {kind}, {name}": e for n, e in zip(BATCHES, errors, strict=True)}
            numbers[f"error rises by, {kind}, {name}"] = errors[0] - float(np.median(errors[2:]))
            series[f"{kind}/{name}"] = np.array(errors)
        # The spread that 450 test digits have by themselves, at the error of large batches.
        error = numbers[f"error at batch 64, {kind}, group norm"]
        numbers[f"2 sigma of the test, {kind}"] = 2 * float(np.sqrt(max(error, 0.01) * (1 - error) / 450))
    for name in ("batch norm", "layer norm", "instance norm"):
        net = engine.conv(name.split()[0])
        run = lab.train(net, 0.3, 9600 // 64, batch=64)
        numbers[f"error at batch 64, conv, {name}"] = 1 - lab.accuracy(net, run.params)
        numbers[f"steps to loss 0.3 at batch 64, conv, {name}"] = lab.steps_to(run.loss)
    return numbers, series


def running_statistics(lab: Lab) -> Found:
    """Errors during training by moving averages and by the statistics of all training data."""
    net, numbers, series = engine.mlp("batch", sizes=SIZES), {}, {}
    running: dict[float, dict[str, RunningStats]] = {decay: {} for decay in DECAYS}
    errors: dict[str, list[float]] = {"precise": [], **{f"decay {d}": [] for d in DECAYS}}
    at = []

    def watch(k, params, x, t):
        run = engine.Pass(lab.xp)
        net.forward(run, params, x)
        for decay, kept in running.items():
            for name, found in run.statistics.items():
                old = kept.get(name) or RunningStats(lab.array(np.zeros(64)), lab.array(np.ones(64)))
                batch = functional.BatchStats(found.mean, found.var, x.shape[0])
                kept[name] = old.update(batch, momentum=decay)
        if k % 5 == 4:
            at.append(k + 1)
            errors["precise"].append(1 - lab.accuracy(net, params))
            for decay, kept in running.items():
                known = {name: Statistics(s.mean, s.var) for name, s in kept.items()}
                errors[f"decay {decay}"].append(1 - lab.accuracy(net, params, known))

    lab.train(net, 0.5, 200, batch=32, watch=watch)
    for name, values in errors.items():
        numbers[f"mean error, {name}"] = float(np.mean(values))
        numbers[f"spread of error, {name}"] = float(np.std(values))
        numbers[f"error moves by, {name}"] = float(np.std(np.diff(values)))
        series[name] = np.array(values)
    return numbers, {"steps": np.array(at), **series}


def _small_batches(kind: str) -> tuple[Check, ...]:
    """What is asked of one net."""
    two_sigma, at = f"2 sigma of the test, {kind}", f"error at batch {{}}, {kind}, {{}} norm"
    return (
        Check(
            f"batch_{kind}",
            f"{kind}: batch norm's error at batch 2 is above that of large batches, by 2 sigma",
            f"error rises by, {kind}, batch norm",
            ">",
            two_sigma,
        ),
        Check(f"group_{kind}", f"{kind}: group norm's is not", f"error rises by, {kind}, group norm", "<=", two_sigma),
        Check(
            f"better_{kind}",
            f"{kind}: at batch 2, group norm's error is lower",
            at.format(2, "group"),
            "<",
            at.format(2, "batch"),
            kind=DOCUMENT,
        ),
        Check(
            f"large_{kind}",
            f"{kind}: at batch 64, group norm's error is no more than 2 points higher",
            at.format(64, "group"),
            "<=",
            at.format(64, "batch"),
            offset=0.02,
            kind=DOCUMENT,
        ),
    )


E6 = Experiment(
    "E6",
    "Small batches",
    "Does the error with batch norm rise as the batch falls to 2, and that with group norm not?",
    "Batch norm's error rises as the batch falls to 2, group norm's is flat (within 2σ).",
    (
        *(check for kind in NETS for check in _small_batches(kind)),
        Check(
            "layer",
            "conv: layer norm is slower than batch norm, in steps to a loss of 0.3",
            "steps to loss 0.3 at batch 64, conv, layer norm",
            ">",
            "steps to loss 0.3 at batch 64, conv, batch norm",
            kind=DOCUMENT,
        ),
        Check(
            "instance",
            "conv: instance norm's error is higher than batch norm's, at batch 64",
            "error at batch 64, conv, instance norm",
            ">",
            "error at batch 64, conv, batch norm",
            kind=DOCUMENT,
        ),
    ),
    "Two nets: three hidden layers of 64, and six convolutions (16, 16, pool, 32, 32, pool, 64, 64) on the digits as "
    "images. 9600 digits whatever the batch, the rate in proportion to it (0.3 at 64); inference by the statistics of "
    "all training data. 2 sigma is the binomial spread of 450 test digits. What the criterion asks is asked of both: "
    "two images bring a channel of the convolutions 128, 32 or 8 values, and batch norm does well there.",
    batch_sizes,
    cost=14,
    figures=("batch_sizes",),
)

E8 = Experiment(
    "E8",
    "What inference is given",
    "During training, are errors by precise statistics lower and steadier than by moving averages?",
    "Mean and spread of the evaluation error over training: precise below moving averages.",
    (
        *(
            Check(
                f"{name}_{decay}",
                f"the {name} of the error over training is lower than by a decay of {decay}",
                f"{number}, precise",
                "<",
                f"{number}, decay {decay}",
            )
            for decay in DECAYS
            for name, number in (("mean", "mean error"), ("spread", "spread of error"))
        ),
        Check(
            "moves",
            "it moves less from one evaluation to the next than by a decay of 0.9",
            "error moves by, precise",
            "<",
            "error moves by, decay 0.9",
            kind=AFTERWARDS,
        ),
    ),
    "Three hidden layers of 64, batches of 32 digits, SGD at 0.5, every fifth of the first 200 steps. A decay is the "
    "weight of the old value; a slow one has not forgotten the start yet.",
    running_statistics,
    cost=3,
    figures=("running",),
)
