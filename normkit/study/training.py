"""Experiments that train: learning rates (E1, E5), initialization (E11), pinned statistics (E17)."""

from __future__ import annotations

import numpy as np

from normkit.study import data, engine
from normkit.study.lab import Lab
from normkit.study.record import AFTERWARDS, DOCUMENT, Check, Experiment, Found

#: Half a decade apart; ten times one of them is another.
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
STEPS = 300
P_NORMS = ("l1", "l2", "linf")


def _swept(lab: Lab, norm: str | None, rates: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Accuracy, steps to a loss of 0.3 and last losses by learning rate."""
    net, found = engine.mlp(norm), []
    for lr in rates:
        run = lab.train(net, lr, STEPS)
        steps = lab.steps_to(run.loss) if not run.diverged else STEPS + 1.0
        last = float(run.loss[-20:].mean()) if not run.diverged else np.inf
        found.append((lab.accuracy(net, run.params), steps, last))
    accuracy, steps, last = np.array(found).T
    return {"accuracy": accuracy, "steps": steps, "last": last}


def learning_rates(lab: Lab) -> Found:
    """Plain, batch norm and layer norm over nine learning rates."""
    rates = RATES
    swept = {norm or "none": _swept(lab, norm, rates) for norm in (None, "batch", "layer")}
    plain, batch = swept["none"], swept["batch"]
    best = int(np.lexsort((plain["steps"], -plain["accuracy"]))[0])
    tenfold = min(best + 3, len(rates) - 1)
    quickest = int(plain["steps"].argmin())
    trained = {name: [r for r, a in zip(rates, s["accuracy"], strict=True) if a >= 0.9] for name, s in swept.items()}
    numbers = {
        "best rate, none": rates[best],
        "accuracy at it, none": plain["accuracy"][best],
        "ten times it": rates[tenfold],
        "accuracy at ten times, batch norm": batch["accuracy"][tenfold],
        "steps to loss 0.3 at best rate, none": plain["steps"][best],
        "steps to loss 0.3 at ten times, batch norm": batch["steps"][tenfold],
        "fewest steps to loss 0.3, none": plain["steps"][quickest],
        "fewest steps to loss 0.3, batch norm": batch["steps"].min(),
        "best accuracy, none": plain["accuracy"].max(),
        "best accuracy, batch norm": batch["accuracy"].max(),
        "largest rate that trains, none": max(trained["none"], default=0.0),
        "largest rate that trains, batch norm": max(trained["batch"], default=0.0),
        "largest rate that trains, layer norm": max(trained["layer"], default=0.0),
        "accuracy at 0.01, none": plain["accuracy"][0],
        "accuracy at 0.01, batch norm": batch["accuracy"][0],
    }
    numbers["times fewer steps"] = numbers["fewest steps to loss 0.3, none"] / batch["steps"].min()
    numbers["times larger rate"] = numbers["largest rate that trains, batch norm"] / max(
        numbers["largest rate that trains, none"], rates[0]
    )
    series = {f"{name}/{key}": a for name, s in swept.items() for key, a in s.items()}
    return {k: float(v) for k, v in numbers.items()}, {"rates": np.array(rates), **series}


def p_norms(lab: Lab) -> Found:
    """Norms by p-norms over learning rates, each at its best."""
    rates = (0.03, 0.1, 0.3, 1.0)
    swept = {norm or "none": _swept(lab, norm, rates) for norm in (None, "batch", "l1", "l2", "linf")}
    numbers = {f"best accuracy, {name}": float(s["accuracy"].max()) for name, s in swept.items()}
    numbers |= {f"fewest steps to loss 0.3, {name}": float(s["steps"].min()) for name, s in swept.items()}
    numbers |= {f"accuracy at 1, {name}": float(s["accuracy"][-1]) for name, s in swept.items()}
    slowest = max(numbers[f"fewest steps to loss 0.3, {norm}"] for norm in P_NORMS)
    numbers["fewest steps to loss 0.3, worst p-norm"] = slowest
    numbers["best accuracy, worst p-norm"] = min(numbers[f"best accuracy, {norm}"] for norm in P_NORMS)

    # What the norms' outputs look like: a Gaussian has a kurtosis of 3 and a spread of 1.
    net, lr = engine.mlp("linf"), 0.1
    run = engine.Pass(lab.xp)
    net.forward(run, lab.train(net, lr, 50).params, lab.array(data.digits().x[:512]))
    spread = lab.numpy(run.inputs["4.act"]).std(0)
    numbers["spread of inputs after L-infinity"] = float(np.median(spread))
    series = {f"{name}/{key}": a for name, s in swept.items() for key, a in s.items()}
    return numbers, {"rates": np.array(rates), "inputs": lab.numpy(run.inputs["4.act"])[:, :16], **series}


def initialization(lab: Lab) -> Found:
    """Initial weights of five sizes."""
    gains, numbers, series = (0.1, 0.3, 1.0, 3.0, 10.0), {}, {}
    for name, kind in (("none", None), ("batch norm", "batch"), ("layer norm", "layer")):
        accuracy = []
        for gain in gains:
            net = engine.mlp(kind, gain=gain)
            accuracy.append(lab.accuracy(net, lab.train(net, 0.05, STEPS).params))
        numbers[f"spread of accuracy, {name}"] = max(accuracy) - min(accuracy)
        numbers[f"least accuracy, {name}"] = min(accuracy)
        series[name] = np.array(accuracy)
    return numbers, {"gains": np.array(gains), **series}


def pinned(lab: Lab) -> Found:
    """The same forward pass with and without the gradient of the statistics."""
    rates = (0.01, 0.03, 0.1, 0.3, 1.0)
    swept = {norm or "none": _swept(lab, norm, rates) for norm in (None, "batch", "stop_gradient")}
    numbers = {}
    for name, s in swept.items():
        for k in (1, 2, 3):
            numbers[f"last loss at {rates[k]}, {name}"] = float(min(s["last"][k], 99.0))
            numbers[f"accuracy at {rates[k]}, {name}"] = float(s["accuracy"][k])
        numbers[f"best accuracy, {name}"] = float(s["accuracy"].max())
        numbers[f"fewest steps to loss 0.3, {name}"] = float(s["steps"].min())
    both = [(b, p) for b, p in zip(swept["batch"]["accuracy"], swept["stop_gradient"]["accuracy"], strict=True)]
    numbers["rates at which pinned is 5 points worse"] = float(sum(b - p > 0.05 for b, p in both))
    series = {f"{name}/{key}": a for name, s in swept.items() for key, a in s.items()}
    for name in ("batch", "stop_gradient"):
        net = engine.mlp(name)
        sizes: list[float] = []

        def watch(k, params, x, t, sizes=sizes):
            sizes.append(float(np.linalg.norm(lab.numpy(params["4.weight"]))))

        run = lab.train(net, 0.1, STEPS, watch=watch)
        numbers[f"norm of W grows by, {name}"] = float(sizes[-1] / sizes[0])
        series[f"{name}/loss"], series[f"{name}/size"] = run.loss, np.array(sizes)
    return numbers, {"rates": np.array(rates), **series}


NET = "Eight hidden layers of 64 with ReLU, batches of 128 digits, SGD, 300 steps"

E1 = Experiment(
    "E1",
    "Larger learning rates",
    "Does batch norm at ten times the best learning rate without it train at least as well, in fewer steps?",
    "Batch norm at 10 times the best rate without norm: accuracy ≥ the best without norm; steps to a loss of 0.3 fall.",
    (
        Check(
            "accuracy",
            "at ten times the best plain rate, at least as accurate",
            "accuracy at ten times, batch norm",
            ">=",
            "accuracy at it, none",
        ),
        Check(
            "steps",
            "and in fewer steps to a loss of 0.3",
            "steps to loss 0.3 at ten times, batch norm",
            "<",
            "steps to loss 0.3 at best rate, none",
        ),
        Check(
            "rates",
            "the largest rate that trains (to 90 %) is larger",
            "largest rate that trains, batch norm",
            ">",
            "largest rate that trains, none",
            kind=DOCUMENT,
        ),
        Check("tenfold", "by ten times", "times larger rate", ">=", 10.0, kind=DOCUMENT),
        Check("14", "14 times fewer steps, each at its best rate", "times fewer steps", ">=", 14.0, kind=DOCUMENT),
        Check(
            "fewer",
            "fewer steps, each at its best rate",
            "fewest steps to loss 0.3, batch norm",
            "<",
            "fewest steps to loss 0.3, none",
            kind=DOCUMENT,
        ),
        Check(
            "low",
            "at the lowest rate both come to the same accuracy, within 2 points",
            "accuracy at 0.01, batch norm",
            "<=",
            "accuracy at 0.01, none",
            offset=0.02,
            kind=DOCUMENT,
        ),
        Check(
            "best",
            "each at its best rate, batch norm is more accurate",
            "best accuracy, batch norm",
            ">",
            "best accuracy, none",
            kind=DOCUMENT,
        ),
        Check(
            "slack",
            "at ten times the best plain rate as accurate, to the point that 450 test digits tell",
            "accuracy at ten times, batch norm",
            ">=",
            "accuracy at it, none",
            offset=-0.01,
            kind=AFTERWARDS,
        ),
    ),
    f"{NET}. The best plain rate is chosen by test accuracy, which favours the plain net. At its best rate the plain "
    "net is as accurate as batch norm, to a point: the gain is in steps and in rates.",
    learning_rates,
    cost=12,
    dtype="float64",
    frameworks=True,
    figures=("learning_rates",),
)

E5 = Experiment(
    "E5",
    "p-norms in place of the standard deviation",
    "Do norms by L1, L2 and L-infinity train as well as batch norm, and far better than no norm?",
    "L1, L2, L∞ within 1 point of batch norm, all far above no norm.",
    (
        Check(
            "accuracy",
            "the worst within a point of batch norm, each at its best rate",
            "best accuracy, worst p-norm",
            ">=",
            "best accuracy, batch",
            offset=-0.01,
        ),
        Check(
            "none",
            "the worst far above no norm (10 points), each at its best rate",
            "best accuracy, worst p-norm",
            ">",
            "best accuracy, none",
            offset=0.1,
        ),
        *(
            Check(
                f"accuracy_{norm}",
                f"{norm}: within a point of batch norm, each at its best rate",
                f"best accuracy, {norm}",
                ">=",
                "best accuracy, batch",
                offset=-0.01,
                kind=AFTERWARDS,
            )
            for norm in P_NORMS
        ),
        *(
            Check(
                f"none_{norm}",
                f"{norm}: far above no norm, at a rate of 1",
                f"accuracy at 1, {norm}",
                ">",
                "accuracy at 1, none",
                offset=0.1,
                kind=AFTERWARDS,
            )
            for norm in P_NORMS
        ),
        Check(
            "steps",
            "the slowest needs fewer steps than no norm, each at its best rate",
            "fewest steps to loss 0.3, worst p-norm",
            "<",
            "fewest steps to loss 0.3, none",
            kind=AFTERWARDS,
        ),
        Check(
            "spread",
            "their outputs have another spread than a standard deviation of 1",
            "spread of inputs after L-infinity",
            "<",
            0.7,
            kind=DOCUMENT,
        ),
    ),
    f"{NET}; four rates. Both halves are read on the same figure, each net's accuracy at its best rate, where no norm "
    "is about as accurate too: the gain is in steps, and at rates at which nothing trains without a norm.",
    p_norms,
    cost=10,
    dtype="float64",
    frameworks=True,
    figures=("p_norms",),
)

E11 = Experiment(
    "E11",
    "Initial weights of other sizes",
    "Does batch norm make the accuracy depend less on the size of the initial weights?",
    "The spread of accuracy over initial gains of 0.1 to 10 shrinks.",
    (
        Check(
            "spread",
            "the spread of accuracy over a hundredfold range of sizes shrinks",
            "spread of accuracy, batch norm",
            "<",
            "spread of accuracy, none",
        ),
        Check(
            "half",
            "to less than half",
            "spread of accuracy, batch norm",
            "<",
            "spread of accuracy, none",
            0.5,
            kind=AFTERWARDS,
        ),
        Check("least", "the worst is still accurate to 90 %", "least accuracy, batch norm", ">=", 0.9, kind=DOCUMENT),
    ),
    f"{NET} at a rate of 0.05, away from the plain net's edge at 0.1. A batch-normalized net computes the same "
    "whatever the size, but its effective step is the rate over the squared size: too large a start is as slow as too "
    "small a rate.",
    initialization,
    cost=8,
    figures=("initialization",),
)

E17 = Experiment(
    "E17",
    "Distributions pinned without the gradient",
    "Is pinning the distributions, by batch statistics that are constants in the gradient, not enough to train well?",
    "Distributions pinned by batch statistics that are constants in the gradient do not train like batch norm.",
    (
        Check(
            "loss",
            "at a rate of 0.1 its loss stays ten times that of batch norm",
            "last loss at 0.1, stop_gradient",
            ">=",
            "last loss at 0.1, batch",
            10.0,
        ),
        Check(
            "accuracy",
            "and its accuracy is 10 points lower",
            "accuracy at 0.1, stop_gradient",
            "<=",
            "accuracy at 0.1, batch",
            offset=-0.1,
        ),
        Check(
            "best",
            "at its best rate too it is less accurate",
            "best accuracy, stop_gradient",
            "<",
            "best accuracy, batch",
        ),
        Check(
            "most",
            "5 points worse at three of five rates or more",
            "rates at which pinned is 5 points worse",
            ">=",
            3.0,
            kind=AFTERWARDS,
        ),
        Check(
            "none",
            "nor better than without any norm, each at its best",
            "best accuracy, stop_gradient",
            "<=",
            "best accuracy, none",
            kind=DOCUMENT,
        ),
        Check(
            "sufficient",
            "pinning alone is as good as batch norm, to a point, each at its best",
            "best accuracy, stop_gradient",
            ">=",
            "best accuracy, batch",
            offset=-0.01,
            kind=DOCUMENT,
        ),
        Check(
            "slow",
            "nor faster than without any norm, each at its best",
            "fewest steps to loss 0.3, stop_gradient",
            ">=",
            "fewest steps to loss 0.3, none",
            kind=DOCUMENT,
        ),
    ),
    f"{NET}. At large rates (1) the pinned net reaches a low loss quickly and does not stay there: its weights grow, "
    "which makes the steps smaller.",
    pinned,
    cost=8,
    figures=("pinned",),
)
