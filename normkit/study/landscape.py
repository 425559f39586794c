"""Experiments on the loss around a point: landscape (E3), eigenvalues (E15), first steps (E16), clusters (E16c)."""

from __future__ import annotations

import itertools

import numpy as np

from normkit import diagnostics
from normkit.study import data, engine
from normkit.study.lab import Lab
from normkit.study.record import AFTERWARDS, CRITERION, DOCUMENT, Check, Experiment, Found

RATE = 0.05
#: Steps along the gradient, in learning rates.
ALONG = np.array([0.5, 1.0, 2.0, 3.0, 4.0])
#: Losses at which nets are compared: past the plateau at the start, and before the loss is all but zero.
EDGES = (0.1, 0.2, 0.4, 0.8, 1.6)
PAIR = (("none", None), ("batch norm", "batch"))


def smoothness(lab: Lab) -> Found:
    """The landscape along the gradient every 6 steps, compared at equal loss."""
    numbers: dict[str, float] = {}
    series: dict[str, np.ndarray] = {}
    medians = {}
    for name, kind in PAIR:
        net, trace = engine.mlp(kind), diagnostics.Trace(every=6)

        def watch(k, params, x, t, net=net, trace=trace):
            if not trace.due(k):
                return
            found = diagnostics.landscape(lab.objective(net, x, t), params, RATE * ALONG)
            if not (np.isfinite(found.loss).all() and np.isfinite(found.change).all()):
                return
            trace.add(
                k,
                loss=found.loss0,
                variation=found.variation,
                low=found.loss.min(),
                high=found.loss.max(),
                change=found.change.max(),
                least_change=found.change.min(),
                relative=np.median(found.relative_change),
                beta=found.beta,
                gradient=found.grad_norm,
            )

        lab.train(net, RATE, 300, watch=watch)
        medians[name] = trace.at_equal("loss", EDGES)
        series |= {f"{name}/{key}": a for key, a in trace.arrays().items()}
        series |= {f"{name}/equal/{key}": a for key, a in medians[name].items()}
    for key in ("variation", "change", "beta", "relative", "gradient"):
        ratio = medians["none"][key] / medians["batch norm"][key]
        told = np.isfinite(ratio)
        numbers[f"{key}, none / batch norm, at equal loss"] = float(np.median(ratio[told]))
        numbers[f"{key}, none / batch norm, most over losses"] = float(ratio[told].max())
    return numbers, series


def _tangent_kernel(lab: Lab, net: engine.Net, params: dict, n: int) -> np.ndarray:
    """J Jᵀ, of the logits' Jacobian on n digits as one batch."""
    xp = lab.xp
    _, back = net.forward(engine.Pass(xp), params, lab.array(data.digits().x[:n]))
    rows = []
    for k in range(n * 10):
        dy = np.zeros((n, 10))
        dy.flat[k] = 1.0
        grads: dict = {}
        back(lab.array(dy), grads)
        rows.append(np.concatenate([lab.numpy(grads[name]).ravel() for name in params]))
    j = np.array(rows)
    return j @ j.T


def eigenvalues(lab: Lab) -> Found:
    """The Hessian's largest eigenvalue, at the start and at equal loss, and the tangent kernel's eigenvalues."""
    numbers, series = {}, {}
    for name, kind in PAIR:
        net = engine.mlp(kind)
        x, t = next(lab.batches(512, 1))
        params = lab.init(net)
        objective = lab.objective(net, x, t)
        numbers[f"largest eigenvalue at the start, {name}"] = diagnostics.curvature(objective, params, 12).largest
        reached: dict = {}

        def watch(k, p, x_, t_, reached=reached, objective=objective):
            if not reached and k % 5 == 0 and objective(p)[0] < 0.5:
                reached["params"] = dict(p)

        lab.train(net, RATE, 300, watch=watch)
        found = diagnostics.curvature(objective, reached["params"], 12) if reached else None
        numbers[f"largest eigenvalue at loss 0.5, {name}"] = found.largest if found else np.nan
        kernel = _tangent_kernel(lab, net, params, 24)
        values = np.maximum(np.linalg.eigvalsh(kernel)[::-1], 0)
        # Of one logit, between digits: 1 in the frozen regime, 0 in the chaotic one.
        between = np.abs(np.einsum("icjc->ijc", kernel.reshape(24, 10, 24, 10)))
        diagonal = np.einsum("iic->ic", between).mean()
        numbers[f"tangent kernel between digits over that of one, {name}"] = float(
            (between.sum() / diagonal - 240) / (24 * 23 * 10)
        )
        numbers[f"largest eigenvalue of the tangent kernel, {name}"] = float(values[0])
        # In float32 a singular value of J is known to 1e-7 of the largest, an eigenvalue to the square of that.
        smallest = max(values[-1], 1e-14 * values[0])
        numbers[f"condition number of the tangent kernel, {name}"] = float(values[0] / smallest)
        numbers[f"largest over mean, tangent kernel, {name}"] = float(values[0] / values.mean())
        numbers[f"variance of its eigenvalues, {name}"] = float(values.var())
        series[f"{name}/kernel"] = values
    return numbers, series


def first_steps(lab: Lab) -> Found:
    """How far one may step along the gradient in the first eight batches before the loss is half as much again."""
    steps = 10.0 ** np.arange(-2, 2.01, 0.125)
    numbers: dict[str, float] = {}
    series: dict[str, np.ndarray] = {"steps": steps}
    for (name, kind), start in itertools.product(PAIR, ("Glorot", "He")):
        net = engine.mlp(kind, he=start == "He")
        largest: list[float] = []
        curves: list[np.ndarray] = []

        def watch(k, params, x, t, net=net, largest=largest, curves=curves):
            with np.errstate(all="ignore"):
                found = diagnostics.landscape(lab.objective(net, x, t), params, steps)
            relative = np.minimum(np.nan_to_num(found.loss / found.loss0, nan=1e3, posinf=1e3), 1e3)
            above = np.flatnonzero(relative >= 1.5)
            largest.append(steps[max(above[0] - 1, 0)] if len(above) else steps[-1])
            curves.append(relative)

        lab.train(net, RATE, 8, watch=watch)
        numbers[f"largest step below 1.5 times the loss, {start}, {name}"] = float(np.median(largest))
        series[f"{start}/{name}"] = np.median(curves, 0)
    return numbers, series


def clusters(lab: Lab) -> Found:
    """Silhouettes and sparsity of the last hidden layer, of nets that are about as accurate."""
    from sklearn.metrics import silhouette_score

    numbers, split = {}, data.digits()
    for name, kind in PAIR:
        net = engine.mlp(kind)
        params = lab.train(net, RATE, 300).params
        run = engine.Pass(lab.xp, known=lab.statistics(net, params))
        net.forward(run, params, lab.array(split.x_test))
        hidden = np.maximum(lab.numpy(run.inputs["8.act"]), 0)
        numbers[f"silhouette, {name}"] = float(silhouette_score(hidden, split.labels_test))
        numbers[f"share of zeros, {name}"] = float((hidden == 0).mean())
        numbers[f"accuracy, {name}"] = lab.accuracy(net, params)
    numbers["difference in sparsity"] = abs(numbers["share of zeros, batch norm"] - numbers["share of zeros, none"])
    return numbers, {}


_NET = "Eight hidden layers of 64 with ReLU, batches of 128 digits, SGD at 0.05"

E3 = Experiment(
    "E3",
    "The landscape along the gradient",
    "At equal loss, does batch norm make the loss and its gradient change less along a step?",
    "At equal loss, after the plateau, loss variation and gradient change ≥ 5 times smaller, β smaller.",
    (
        Check("variation", "the loss varies five times less", "variation, none / batch norm, at equal loss", ">=", 5.0),
        Check("change", "the gradient changes five times less", "change, none / batch norm, at equal loss", ">=", 5.0),
        Check("beta", "the effective smoothness β is smaller", "beta, none / batch norm, at equal loss", ">", 1.0),
        Check("less", "the loss varies less", "variation, none / batch norm, at equal loss", ">", 1.0, kind=DOCUMENT),
        Check(
            "predictive",
            "the gradient changes less",
            "change, none / batch norm, at equal loss",
            ">",
            1.0,
            kind=DOCUMENT,
        ),
        Check(
            "gradient", "the gradient is smaller", "gradient, none / batch norm, at equal loss", ">", 1.0, kind=DOCUMENT
        ),
        Check(
            "relative",
            "the gradient changes less relative to its norm",
            "relative, none / batch norm, at equal loss",
            ">",
            1.0,
            kind=DOCUMENT,
        ),
        Check(
            "hundred",
            "the gradient changes a hundred times less, at some loss",
            "change, none / batch norm, most over losses",
            ">=",
            100.0,
            kind=DOCUMENT,
        ),
    ),
    f"{_NET}, steps of 1/2 to 4 rates along the gradient, in training mode on the batch; medians of all points at "
    "which the loss is in the same interval between 0.1 and 1.6. Much of the difference is the gradient's own size, "
    "and β goes by the scale of the weights, which batch norm leaves free: the relative change is fairest.",
    smoothness,
    cost=8,
    dtype="float64",
    frameworks=True,
    figures=("landscape",),
)

E15 = Experiment(
    "E15",
    "Eigenvalues",
    "Does batch norm make the Hessian's largest eigenvalue smaller, and the tangent kernel better conditioned?",
    "λ_max smaller; tangent kernel better conditioned.",
    (
        Check(
            "start",
            "the Hessian's largest eigenvalue is smaller at the start",
            "largest eigenvalue at the start, batch norm",
            "<",
            "largest eigenvalue at the start, none",
        ),
        Check(
            "equal",
            "and at an equal loss of 0.5",
            "largest eigenvalue at loss 0.5, batch norm",
            "<",
            "largest eigenvalue at loss 0.5, none",
        ),
        Check(
            "kernel",
            "the tangent kernel's condition number, largest over smallest eigenvalue, is smaller",
            "condition number of the tangent kernel, batch norm",
            "<",
            "condition number of the tangent kernel, none",
        ),
        Check(
            "chaos",
            "the tangent kernel is nearer the chaotic regime: less of it is between digits",
            "tangent kernel between digits over that of one, batch norm",
            "<",
            "tangent kernel between digits over that of one, none",
            kind=DOCUMENT,
        ),
        Check(
            "kernel_mean",
            "the tangent kernel's largest eigenvalue is less above their mean",
            "largest over mean, tangent kernel, batch norm",
            "<",
            "largest over mean, tangent kernel, none",
            kind=AFTERWARDS,
        ),
        Check(
            "kernel_max",
            "the tangent kernel's largest eigenvalue is smaller",
            "largest eigenvalue of the tangent kernel, batch norm",
            "<",
            "largest eigenvalue of the tangent kernel, none",
            kind=DOCUMENT,
        ),
        Check(
            "kernel_var",
            "and the variance of its eigenvalues",
            "variance of its eigenvalues, batch norm",
            "<",
            "variance of its eigenvalues, none",
            kind=DOCUMENT,
        ),
    ),
    f"{_NET}; Lanczos with full reorthogonalization on 512 digits; the kernel of the logits of 24 digits at the start. "
    "An eigenvalue of the Hessian goes by the scale of the weights, so a comparison holds for this initialization.",
    eigenvalues,
    cost=8,
    figures=("kernel",),
)

E16 = Experiment(
    "E16",
    "The first steps",
    "In the first eight batches, can one step further along the gradient with batch norm before the loss goes up?",
    "Relative loss against the step, first 8 batches: the largest step with a relative loss < 1.5 is larger with batch "
    "norm.",
    (
        *(
            Check(
                start.lower(),
                f"the largest step with less than 1.5 times the loss is larger, {start}'s initialization",
                f"largest step below 1.5 times the loss, {start}, batch norm",
                ">",
                f"largest step below 1.5 times the loss, {start}, none",
                kind=kind,
            )
            for start, kind in (("Glorot", CRITERION), ("He", AFTERWARDS))
        ),
    ),
    f"{_NET}; the loss is of the same batch. By Glorot's initialization, which is that of all these nets, the plain "
    "net's signals fade with ReLU layer by layer: it starts on a plateau with small gradients, where a step is short "
    "however large it is called. By He's it does not, and the claim holds.",
    first_steps,
    cost=2,
    figures=("first_steps",),
)

E16C = Experiment(
    "E16c",
    "Clusters in the last hidden layer",
    "Does batch norm make the classes cluster better in the last hidden layer, without being sparser?",
    "Silhouette higher with batch norm, sparsity not decisive.",
    (
        Check(
            "silhouette", "the silhouette of the classes is higher", "silhouette, batch norm", ">", "silhouette, none"
        ),
        Check("sparsity", "sparsity is about the same (within 10 points)", "difference in sparsity", "<", 0.1),
    ),
    f"{_NET}, 300 steps, the test digits.",
    clusters,
    cost=3,
)
