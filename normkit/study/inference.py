"""Experiments on statistics: small batches (E6), and what inference is given (E8)."""

from __future__ import annotations

import numpy as np

from normkit import functional
from normkit.stats import RunningStats
from normkit.study import engine
from normkit.study.lab import Lab
from normkit.study.norms import Statistics
from normkit.study.record import Check, Experiment, Found

SIZES = (64, 64, 64, 64, 10)
BATCHES = (2, 4, 8, 16, 32, 64)


def batch_sizes(lab: Lab) -> Found:
    """The same number of digits in batches of 2 to 64, the rate in proportion."""
    numbers: dict[str, float] = {}
    series: dict[str, np.ndarray] = {"batches": np.array(BATCHES)}
    for name, kind in (("batch norm", "batch"), ("group norm", "group")):
        net, errors = engine.mlp(kind, sizes=SIZES), []
        for size in BATCHES:
            run = lab.train(net, 0.3 * size / 64, 9600 // size, batch=size)
            errors.append(1 - lab.accuracy(net, run.params))
        numbers |= {f"error at batch {size}, {name}": e for size, e in zip(BATCHES, errors, strict=True)}
        numbers[f"error rises by, {name}"] = errors[0] - float(np.median(errors[2:]))
        series[name] = np.array(errors)
    # The spread that 450 test digits have by themselves, at the error of large batches.
    error = numbers["error at batch 64, group norm"]
    numbers["2 sigma of the test"] = 2 * float(np.sqrt(max(error, 0.01) * (1 - error) / 450))
    return numbers, series


def running_statistics(lab: Lab) -> Found:
    """Errors during training by moving averages and by the statistics of all training data."""
    net, numbers, series = engine.mlp("batch", sizes=SIZES), {}, {}
    decays = (0.9, 0.99)
    running: dict[float, dict[str, RunningStats]] = {decay: {} for decay in decays}
    errors: dict[str, list[float]] = {"precise": [], **{f"decay {d}": [] for d in decays}}
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
        numbers[f"spread of error, {name}"] = float(np.std(np.diff(values)))
        series[name] = np.array(values)
    return numbers, {"steps": np.array(at), **series}


E6 = Experiment(
    "E6",
    "Small batches",
    "Does the error with batch norm rise as the batch falls to 2, and that with group norm not?",
    (
        Check(
            "batch",
            "batch norm's error at batch 2 is above that of large batches, by 2 sigma",
            "error rises by, batch norm",
            ">",
            "2 sigma of the test",
        ),
        Check("group", "group norm's is not", "error rises by, group norm", "<=", "2 sigma of the test"),
        Check(
            "better",
            "at batch 2, group norm's error is lower",
            "error at batch 2, group norm",
            "<",
            "error at batch 2, batch norm",
        ),
        Check(
            "large",
            "at batch 64, group norm's error is no more than 2 points higher",
            "error at batch 64, group norm",
            "<=",
            "error at batch 64, batch norm",
            offset=0.02,
            own=False,
        ),
    ),
    "Three hidden layers of 64, 9600 digits whatever the batch, the rate in proportion to it; inference by the "
    "statistics of all training data. 2 sigma is the binomial spread of 450 test digits.",
    batch_sizes,
    cost=14,
    figures=("batch_sizes",),
)

E8 = Experiment(
    "E8",
    "What inference is given",
    "During training, are errors by precise statistics lower and steadier than by moving averages?",
    (
        Check("mean", "the mean error is lower", "mean error, precise", "<", "mean error, decay 0.9"),
        Check(
            "spread",
            "and it moves less from one evaluation to the next",
            "spread of error, precise",
            "<",
            "spread of error, decay 0.9",
        ),
        Check("slow", "also against a decay of 0.99", "mean error, precise", "<", "mean error, decay 0.99"),
    ),
    "Three hidden layers of 64, batches of 32 digits, SGD at 0.5, every fifth of the first 200 steps. A decay is the "
    "weight of the old value; a slow one has not forgotten the start yet.",
    running_statistics,
    cost=3,
    figures=("running",),
)
