"""Experiments on problems with known optima: least squares (E7), Rayleigh quotient and halfspace (E10)."""

from __future__ import annotations

import math

import numpy as np

from normkit.study import data
from normkit.study.lab import Lab
from normkit.study.record import AFTERWARDS, DOCUMENT, Check, Experiment, Found

TABLES = ("wine", "diabetes", "breast_cancer")
#: Steps for w on an exponential grid, times 1 / largest eigenvalue.
RATES = 10.0 ** np.arange(-3, 6.01, 0.5)
LIMIT = 10000
#: What is to be left of the first excess loss; and what was asked afterwards.
TOLERANCE, LOOSE = 1e-4, 1e-3
#: The sets on which 10000 steps are enough for gradient descent with its best step.
SHORT = ("wine", "diabetes")


def _conditioned(x: np.ndarray) -> float:
    values = np.linalg.eigvalsh(x.T @ x / len(x))
    return float(values[-1] / values[0])


def _gd_iterations(h: np.ndarray, start: np.ndarray, rate: float, tolerance: float) -> float:
    """Steps of gradient descent until the excess loss is ``tolerance`` of the first, in the eigenbasis, exactly."""
    values, vectors = np.linalg.eigh(h)
    energy = values * (vectors.T @ start) ** 2
    log_shrink = np.log(np.maximum(np.abs(1 - rate * values), 1e-300)) * 2

    def excess(t):
        return float((energy * np.exp(t * log_shrink)).sum())

    if rate * values[-1] >= 2:
        return math.inf
    low, high = 0.0, 1.0
    while excess(high) > tolerance * excess(0):
        low, high = high, high * 2
        if high > 1e12:
            return math.inf
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > tolerance * excess(0) else (low, middle)
    return math.ceil(high)


def _bngd(lab: Lab, h: np.ndarray, g: np.ndarray, w0: np.ndarray, rates: np.ndarray, steps: int) -> np.ndarray:
    """Excess loss of gradient descent with batch norm on the output, a row a step and a column a rate."""
    best = g @ np.linalg.solve(h, g)
    arrays = [lab.array(a) for a in (h, g[:, None], rates[None])]
    w = lab.array(np.repeat(w0[:, None], len(rates), 1))
    a = lab.array(np.full((1, len(rates)), (w0 @ g) / math.sqrt(w0 @ h @ w0)))
    xp = lab.xp

    def step(h, g, rates, w, a):
        hw = h @ w
        square = xp.sum(w * hw, axis=0, keepdims=True)
        sigma = xp.sqrt(square)
        along = xp.sum(w * g, axis=0, keepdims=True)
        new = w + rates * (a / sigma) * (g - (along / square) * hw)
        return new, a + (along / sigma - a), along / sigma, a

    step = lab.compiled(step)
    excess = np.empty((steps, len(rates)))
    for k in range(steps):
        w, a, along, before = step(*arrays, w, a)
        along, before = lab.numpy(along)[0], lab.numpy(before)[0]
        excess[k] = best - 2 * before * along + before**2
    return excess / 2


def least_squares(lab: Lab) -> Found:
    """GD on raw and on standardized features; batch norm on the output, with steps over nine decades."""
    numbers: dict[str, float] = {}
    series: dict[str, np.ndarray] = {"rates": RATES}
    inputs, outputs, decades, loose_decades, plain_decades, kappas = [], [], [], [], [], []
    steps = LIMIT
    for name in TABLES:
        raw, y = data.table(name)
        centred = raw - raw.mean(0)
        x = centred / centred.std(0)
        w0 = lab.rng(7).normal(size=x.shape[1])
        its = []
        for features in (centred, x):
            h, g = features.T @ features / len(x), features.T @ y / len(x)
            # The same start as a function: weights of the standardized problem, in the units of these features.
            start = w0 * x.std(0) / features.std(0) - np.linalg.solve(h, g)
            largest = np.linalg.eigvalsh(h)[-1]
            its.append(_gd_iterations(h, start, 1 / largest, TOLERANCE))
        inputs.append(its[0] / its[1])
        spread = raw.var(0).max() / raw.var(0).min()  # 1 when they are standardized
        numbers[f"{name}: speed-up over the spread of variances"] = inputs[-1] / float(spread)
        numbers[f"{name}: κ raw"], numbers[f"{name}: κ standardized"] = _conditioned(centred), _conditioned(x)
        numbers[f"{name}: GD iterations, raw"], numbers[f"{name}: GD iterations, standardized"] = its
        kappas.append(numbers[f"{name}: κ raw"] / numbers[f"{name}: κ standardized"])

        u = np.linalg.solve(h, g)
        projected = h - np.outer(h @ u, h @ u) / (u @ h @ u)
        values = np.linalg.eigvalsh(projected)
        numbers[f"{name}: κ*(H*) / κ(H)"] = float(values[-1] / values[1] / numbers[f"{name}: κ standardized"])
        numbers[f"{name}: smallest eigenvalue of H*, relative"] = float(abs(values[0]) / values[-1])

        if name not in SHORT:
            continue
        excess = _bngd(lab, h, g, w0, RATES / largest, steps)
        first = 0.5 * (w0 - u) @ h @ (w0 - u)
        bn, loose = _iterations(excess, TOLERANCE * first), _iterations(excess, LOOSE * first)
        gd = [_gd_iterations(h, w0 - u, r / largest, TOLERANCE) for r in RATES]
        gd = [n if n <= steps else math.inf for n in gd]
        numbers[f"{name}: best BNGD iterations"], numbers[f"{name}: best GD iterations"] = min(bn), min(gd)
        outputs.append(min(gd) / min(bn))
        decades.append(_decades(bn))
        loose_decades.append(_decades(loose))
        plain_decades.append(_decades(gd))
        # Whatever the step, it goes down: what is left at the end, relative to the start.
        numbers[f"{name}: worst excess left, BNGD"] = float(max(excess[-1] / first))
        series[f"{name}/bngd"], series[f"{name}/gd"] = np.array(bn), np.array(gd)
        series[f"{name}/excess"] = excess[:: max(steps // 400, 1)] / first
    numbers["κ falls by, least over sets"] = min(kappas)
    shares = [numbers[f"{name}: speed-up over the spread of variances"] for name in TABLES]
    numbers["speed-up over the spread of variances, most over least of sets"] = max(shares) / min(shares)
    numbers["iterations fall by, least over sets"] = min(inputs)
    numbers["iterations fall by, most over sets"] = max(inputs)
    numbers["κ*(H*) / κ(H), most"] = max(numbers[f"{name}: κ*(H*) / κ(H)"] for name in TABLES)
    numbers["eigenvalue 0 of H*, most"] = max(numbers[f"{n}: smallest eigenvalue of H*, relative"] for n in TABLES)
    numbers["decades of the step, BNGD, least"] = min(decades)
    numbers["decades of the step, BNGD to 0.1 %, least"] = min(loose_decades)
    numbers["decades of the step, GD, least"] = min(plain_decades)
    numbers["worst excess left, BNGD"] = max(numbers[f"{name}: worst excess left, BNGD"] for name in SHORT)
    numbers["GD / BNGD iterations, median"] = float(np.median(outputs))
    numbers["GD / BNGD is in 2 to 5"] = float(2 <= numbers["GD / BNGD iterations, median"] <= 5)
    return numbers, series


def _iterations(excess: np.ndarray, target: float) -> list[float]:
    """Steps until the excess loss is the target, a column a rate."""
    reached = [np.flatnonzero(column <= target) for column in excess.T]
    return [float(r[0] + 1) if len(r) else math.inf for r in reached]


def _decades(iterations: list[float]) -> float:
    """Over how many decades of the step the limit is met, without a gap."""
    met = [math.isfinite(n) for n in iterations]
    longest = run = 0
    for m in met:
        run = run + 1 if m else 0
        longest = max(longest, run)
    return 0.5 * max(longest - 1, 0)


def _rayleigh(u: np.ndarray, s: np.ndarray, w: np.ndarray, steps: int) -> np.ndarray:
    """Gap of the Rayleigh quotient, by gradient descent with the step of the theorem."""
    largest, best = np.linalg.eigvalsh(s)[-1], -u @ np.linalg.solve(s, u)
    gaps = []
    for _ in range(steps):
        sw = s @ w
        square, along = w @ sw, u @ w
        rho = -(along**2) / square
        gaps.append(rho - best)
        w = w + (along * u + rho * sw) / (largest * abs(rho))
    return np.array(gaps)


def _softplus(z: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, z)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(z / 2)


def _least_curvature(z: np.ndarray, w: np.ndarray) -> float:
    """The smallest eigenvalue of the loss's second derivative in (w, g), away from the optimum, by differences."""
    s, rng = z.T @ z / len(z), np.random.default_rng(0)
    point = np.append(w + 0.5 * np.linalg.norm(w) * rng.normal(size=len(w)) / math.sqrt(len(w)), 1.0)

    def gradient(p):
        v, g = p[:-1], p[-1]
        size = math.sqrt(v @ s @ v)
        d = z.T @ _sigmoid(z @ (g * v / size)) / len(z)
        return np.append(g / size * (d - (v @ d) / size**2 * (s @ v)), v @ d / size)

    eye = 1e-5 * np.eye(len(point))
    second = np.array([gradient(point + e) - gradient(point - e) for e in eye]) / 2e-5
    return float(np.linalg.eigvalsh((second + second.T) / 2)[0])


def _line(squares: np.ndarray, high: float, low: float) -> tuple[float, float]:
    """Slope and R² of the log's line, where it is between these shares of the first."""
    at = np.flatnonzero((squares <= high * squares[0]) & (squares > low * squares[0]))
    logs = np.log(squares[at])
    fit = np.polyfit(at, logs, 1)
    return float(fit[0]), float(1 - (logs - np.polyval(fit, at)).var() / logs.var())


def halfspaces(lab: Lab) -> Found:
    """The rate of length-direction decoupling: for least squares as a Rayleigh quotient, for a halfspace by GDNP."""
    numbers: dict[str, float] = {}
    series: dict[str, np.ndarray] = {}
    worst = []
    for name in TABLES:
        raw, y = data.table(name)
        x = (raw - raw.mean(0)) / raw.std(0)
        s, u = x.T @ x / len(x), x.T @ y / len(x)
        values = np.linalg.eigvalsh(s)
        gaps = _rayleigh(u, s, lab.rng(10).normal(size=len(u)), 1000)
        bound = gaps[0] * (1 - values[0] / values[-1]) ** (2 * np.arange(len(gaps)))
        told = gaps > 1e-10 * gaps[0]  # below, rounding is what is left
        worst.append(float((gaps[told] / bound[told]).max()))
        series[f"{name}/gap"], series[f"{name}/bound"] = gaps / gaps[0], bound / gaps[0]
    numbers["gap / bound, most over sets and steps"] = max(worst)

    # Gaussian z = -y x with the moments of a real two-class problem: what the analysis assumes.
    raw, _ = data.table("wine")
    from sklearn.datasets import load_wine

    y = np.where(load_wine().target == 0, 1.0, -1.0)
    x = (raw - raw.mean(0)) / raw.std(0)
    rng = lab.rng(11)
    u = -(y[:, None] * x).mean(0)
    z = rng.multivariate_normal(u, x.T @ x / len(x) - np.outer(u, u), 4000, method="eigh")
    s, u = z.T @ z / len(z), z.mean(0)
    values = np.linalg.eigvalsh(s)
    largest, steps = values[-1], 4000

    def gradient(w):
        return z.T @ _sigmoid(z @ w) / len(z)

    w = rng.normal(size=len(u))
    w = w if u @ w < 0 else -w
    plain, plain_norms = np.zeros(len(u)), []
    for _ in range(steps):
        d = gradient(plain)
        plain_norms.append(float(d @ d))
        plain = plain - 4 / largest * d
    normed: list[float] = []
    for _ in range(steps):
        size = math.sqrt(w @ s @ w)
        t, g = z @ (w / size), 0.0
        low, high = 0.0, 50.0  # the length, by bisection on the sign of the derivative
        while high - low > 1e-12:
            g = (low + high) / 2
            low, high = (low, g) if t @ _sigmoid(g * t) > 0 else (g, high)
        p = _sigmoid(g * t)
        d = z.T @ p / len(z)
        normed.append(float(d @ d))
        if normed[-1] < 1e-21 * normed[0]:
            break
        along = u @ w / size
        slope = p.mean() - g * along * (p * (1 - p)).mean()
        across = d - (w @ d) / size**2 * (s @ w)
        w = w + size / (largest * slope * along) * across
    series["gdnp"], series["gd"] = np.array(normed), np.array(plain_norms)
    series["line"] = normed[0] * (1 - values[0] / values[-1]) ** (2 * np.arange(len(normed)))
    target = 1e-10 * normed[0]
    slope, numbers["R² of log gradient"] = _line(np.array(normed), 1.0, 1e-10)
    _, numbers["R² of log gradient, later part"] = _line(np.array(normed), 1e-3, 1e-20)
    numbers["measured rate, per iteration"] = math.exp(slope)
    numbers["norm's rate, per iteration"] = math.exp(slope / 2)
    numbers["curvature along length times direction"] = _least_curvature(z, w)
    numbers["(1 - μ/L)²"] = float((1 - values[0] / values[-1]) ** 2)
    numbers["GDNP iterations"] = float(
        np.argmax(np.array(normed) <= target) + 1 if min(normed) <= target else steps + 1
    )
    reached = np.array(plain_norms) <= target
    numbers["GD iterations"] = float(np.argmax(reached) + 1 if reached.any() else steps + 1)
    return numbers, series


E7 = Experiment(
    "E7",
    "Least squares with batch norm on the inputs and on the output",
    "Does standardizing the inputs lower the condition number and the iterations, and does batch norm on the output "
    "make gradient descent converge whatever the step?",
    "Batch norm of the inputs lowers κ and the iterations; batch norm of the output (BNGD) converges over ≥ 4 decades "
    "of the rate, κ* ≤ κ.",
    (
        Check("kappa", "standardized inputs have a lower κ, on every set", "κ falls by, least over sets", ">", 1.0),
        Check("faster", "and fewer iterations", "iterations fall by, least over sets", ">", 1.0),
        Check("decades", "BNGD converges over four decades of the step", "decades of the step, BNGD, least", ">=", 4.0),
        Check(
            "wider",
            "over two decades more than gradient descent",
            "decades of the step, BNGD, least",
            ">=",
            "decades of the step, GD, least",
            offset=2.0,
            kind=DOCUMENT,
        ),
        Check("interlacing", "κ*(H*) is at most κ(H)", "κ*(H*) / κ(H), most", "<=", 1.0),
        Check(
            "bngd",
            "BNGD with its best step is faster than GD with its own",
            "GD / BNGD iterations, median",
            ">",
            1.0,
            kind=DOCUMENT,
        ),
        Check(
            "2-5", "2 to 5 times fewer, batch norm on the output", "GD / BNGD is in 2 to 5", ">=", 1.0, kind=DOCUMENT
        ),
        Check(
            "2-5_in",
            "2 to 5 times fewer, on the inputs",
            "iterations fall by, least over sets",
            "<=",
            5.0,
            kind=DOCUMENT,
        ),
        Check(
            "proportional",
            "the speed-up is as the spread of the features' variances, to a factor of 2 from set to set",
            "speed-up over the spread of variances, most over least of sets",
            "<=",
            2.0,
            kind=DOCUMENT,
        ),
        Check("unity", "the eigenvalues of H* are closer to 1", "eigenvalue 0 of H*, most", ">", 1e-3, kind=DOCUMENT),
        Check("never", "no step makes BNGD diverge", "worst excess left, BNGD", "<", 1.0, kind=DOCUMENT),
        Check(
            "loose",
            "to 0.1 % BNGD converges over four decades of the step",
            "decades of the step, BNGD to 0.1 %, least",
            ">=",
            4.0,
            kind=AFTERWARDS,
        ),
    ),
    "Two set-ups that the documents run together: batch norm of the inputs is a change of the problem (κ falls), batch "
    "norm of the output changes the method. To converge is to come to 0.01 % of the first excess loss in 10000 "
    "steps; 0.1 % is what was asked when that had been seen. Batch norm of the output is tried on wine and diabetes, "
    "where gradient descent with its best step comes to 0.1 % in that many. BNGD's best step is not known beforehand "
    "either, and away from it the iterations grow with the step.",
    least_squares,
    cost=6,
    dtype="float64",
    frameworks=True,
    figures=("least_squares",),
)

E10 = Experiment(
    "E10",
    "Length and direction apart: least squares and a halfspace",
    "Does gradient descent on the direction converge at the rate (1 - μ/L)², and does it need fewer iterations?",
    "The Rayleigh gap obeys (1 - μ/L)^2t; GDNP log-linear (R² > 0.99), fewer iterations than gradient descent.",
    (
        Check(
            "bound",
            "the Rayleigh gap obeys (1 - μ/L)^2t",
            "gap / bound, most over sets and steps",
            "<=",
            1.0,
            1.0,
            1e-6,
        ),
        Check("linear", "log of the squared gradient falls on a line", "R² of log gradient", ">", 0.99),
        Check(
            "rate", "at least as fast as (1 - μ/L)²", "measured rate, per iteration", "<=", "(1 - μ/L)²", kind=DOCUMENT
        ),
        Check("fewer", "GDNP needs fewer iterations than GD", "GDNP iterations", "<", "GD iterations"),
        Check(
            "not_squared",
            "and so does the gradient's norm itself",
            "norm's rate, per iteration",
            "<=",
            "(1 - μ/L)²",
            kind=DOCUMENT,
        ),
        Check(
            "convex",
            "the loss in weight and length is strongly convex",
            "curvature along length times direction",
            ">",
            0.0,
            kind=DOCUMENT,
        ),
        Check(
            "later",
            "from a thousandth down to 1e-20 it falls on a line",
            "R² of log gradient, later part",
            ">",
            0.99,
            kind=AFTERWARDS,
        ),
    ),
    "Full batch, with μ and L the extreme eigenvalues of S = E[xxᵀ], not of the loss; Gaussian inputs with the moments "
    "of the wine data, which need not be separable. The line is fitted from the first squared gradient down to 1e-10 "
    "of it, where ratios are to stop; the first steps are faster than those that follow.",
    halfspaces,
    cost=4,
    dtype="float64",
    figures=("halfspaces",),
)
