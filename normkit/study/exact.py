"""Experiments with an exact answer: the definitions (E0), and what batch norm does to gradients and scales (E13)."""

from __future__ import annotations

from typing import Any

import numpy as np

from normkit import functional, vjp
from normkit.stats import RunningStats
from normkit.study import data, engine, norms
from normkit.study.lab import Lab
from normkit.study.record import DOCUMENT, Check, Experiment, Found

EXACT = 1e-9  # float64 with sums of some hundred terms; a wrong formula is off by more than 1e-3


def _apart(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest value of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))


def _pre_activations(lab: Lab, m: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """m digits, random weights and their product: what a first layer's norm is given."""
    rng = lab.rng(13)
    u = data.digits().x[rng.permutation(1347)[:m]]
    w = rng.normal(0, 0.2, (64, 16))
    return u, w, u @ w


def definitions(lab: Lab) -> Found:
    """Every formula of the documents, written as they write it, beside what normkit returns."""
    rng, numbers = lab.rng(0), {}
    _, _, x = _pre_activations(lab)
    gamma, beta, dy = rng.normal(1, 0.3, 16), rng.normal(0, 1, 16), rng.normal(size=x.shape)
    m, eps = len(x), 1e-5
    arrays = [lab.array(a) for a in (x, gamma, beta)]
    (y, stats), pullback = vjp(functional.batch_norm_train, *arrays, eps=eps)
    mean, var = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    hat = (x - mean) / np.sqrt(var + eps)
    numbers["forward"] = _apart(lab.numpy(y), gamma * hat + beta)
    numbers["variance, biased"] = _apart(lab.numpy(stats.var), var)

    plain = lab.numpy(functional.batch_norm_train(arrays[0], eps=0.0)[0])
    numbers["mean 0"] = float(np.abs(plain.mean(0)).max())
    numbers["variance 1"] = float(np.abs(plain.var(0) - 1).max())

    # The chain rule as the documents print it.
    dhat = dy * gamma
    dvar = (dhat * (x - mean) * -0.5 * (var + eps) ** -1.5).sum(0)
    second = dvar * (-2 * (x - mean)).sum(0) / m
    dmean = (dhat * -1 / np.sqrt(var + eps)).sum(0) + second
    dx = dhat / np.sqrt(var + eps) + dvar * 2 * (x - mean) / m + dmean / m
    found = [lab.numpy(a) for a in pullback(lab.array(dy))]
    numbers["gradient of x"] = _apart(found[0], dx)
    numbers["gradient of weight"] = _apart(found[1], (dy * hat).sum(0))
    numbers["gradient of bias"] = _apart(found[2], dy.sum(0))
    numbers["second term of the mean's gradient"] = float(np.abs(second).max() / np.abs(dmean).max())
    shard = x[: m // 2] - mean  # one device's samples, the centre that of all
    numbers["the same on one shard"] = float(np.abs((-2 * shard).sum(0) * dvar / m).max() / np.abs(dmean).max())

    identity = functional.batch_norm_train(arrays[0], lab.array(np.sqrt(var + eps)), lab.array(mean), eps=eps)[0]
    numbers["identity recovered"] = _apart(lab.numpy(identity), x)

    images = rng.normal(2, 3, (8, 5, 4, 6))
    per_channel = (images - images.mean((0, 2, 3), keepdims=True)) / np.sqrt(images.var((0, 2, 3), keepdims=True) + eps)
    numbers["convolution, per channel"] = _apart(
        lab.numpy(functional.batch_norm_train(lab.array(images))[0]), per_channel
    )
    known = [lab.array(a) for a in (mean, var)]
    one = [lab.numpy(functional.batch_norm(lab.array(x[:k]), *known, eps=eps))[0] for k in (1, m)]
    numbers["inference depends on the batch"] = _apart(*one)
    one = [lab.numpy(functional.layer_norm(lab.array(x[:k])))[0] for k in (2, m)]
    numbers["layer norm depends on the batch"] = _apart(*one)
    one = [lab.numpy(functional.batch_norm_train(lab.array(x[:k]))[0])[0] for k in (2, m)]
    numbers["batch norm depends on the batch"] = _apart(*one)

    running = RunningStats(lab.array(np.zeros(16)), lab.array(np.ones(16)))
    updated = running.update(stats, momentum=0.9, unbiased=False)
    numbers["running mean, 0.9 old + 0.1 new"] = _apart(lab.numpy(updated.mean), 0.1 * mean)

    # m / (m - 1) times the mean of variances of batches of 2, without neglecting anything.
    draws = rng.permuted(np.broadcast_to(x[:, 0], (4000, m)), axis=1)[:, : m // 2 * 2].reshape(-1, 2)
    pairs = draws.var(1).mean()
    numbers["E var(batch of 2) / var"] = float(pairs / x[:, 0].var(ddof=1))
    numbers["twice that"] = 2 * numbers["E var(batch of 2) / var"]
    numbers["off by"] = abs(numbers["twice that"] - 1)
    return numbers, {}


def invariances(lab: Lab) -> Found:
    """Theorem 4.1, scale invariance, decoupling: in float64 and without eps."""
    u, w, x = _pre_activations(lab)
    rng, numbers, m = lab.rng(14), {}, len(u)
    gamma, beta, dz = rng.normal(1, 0.3, 16), rng.normal(0, 1, 16), rng.normal(size=x.shape)
    weight, bias = lab.array(gamma), lab.array(beta)

    def passed(scale):
        y, pullback, stats = norms.batch(lab.array(u @ (scale * w)), weight, bias, eps=0.0)
        dx = lab.numpy(pullback(lab.array(dz))[0])
        return lab.numpy(y), dx, lab.numpy(stats.mean), lab.numpy(stats.var)

    y, dx, mean, var = passed(1.0)
    hat, sigma = (y - beta) / gamma, np.sqrt(var)
    bound = (gamma / sigma) ** 2 * ((dz**2).sum(0) - dz.sum(0) ** 2 / m - (dz * hat).sum(0) ** 2 / m)
    numbers["theorem 4.1, both sides apart"] = _apart((dx**2).sum(0), bound)
    dz_centred = dz - dz.mean(0) - hat * (dz * hat).mean(0)
    numbers["projector form apart"] = _apart(dx, gamma / sigma * dz_centred)
    numbers["dy / std alone apart"] = _apart(gamma / sigma * dz, dx)

    a = 7.0
    y_scaled, dx_scaled, _, _ = passed(a)
    numbers["output of a W apart"] = _apart(y_scaled, y)
    numbers["gradient of u apart"] = _apart(dx_scaled @ (a * w).T, dx @ w.T)
    numbers["a times gradient of a W apart"] = _apart(a * (u.T @ dx_scaled), u.T @ dx)
    dw = u.T @ dx
    numbers["radial part of the gradient"] = float(
        np.abs((w * dw).sum(0) / (np.linalg.norm(w, axis=0) * np.linalg.norm(dw, axis=0))).max()
    )
    eta = 0.01
    stepped = [(s * w - rate * (u.T @ passed(s)[1])) / s for s, rate in ((1.0, eta), (a, eta * a * a))]
    numbers["step eta a^2 at a W apart"] = _apart(stepped[1], stepped[0])
    numbers["slope of output on norm of W"] = float(
        np.polyfit(np.log([1.0, a]), np.log([y.std(), y_scaled.std()]), 1)[0]
    )
    numbers["bias before batch norm, gradient"] = float(np.abs(dx.sum(0)).max() / np.abs(dx).sum(0).max())

    spread = np.cov(u.T, bias=True)
    per_unit = gamma * ((u - u.mean(0)) @ w) / np.sqrt((w * (spread @ w)).sum(0)) + beta
    numbers["w(x - Ex) / norm in S apart"] = _apart(per_unit, y)
    numbers["Wx / norm of Wx apart"] = _apart(gamma * x / np.linalg.norm(x, axis=1, keepdims=True) + beta, y)
    identity = norms.batch(lab.array(x), lab.array(sigma), lab.array(mean), eps=0.0)[0]
    numbers["minima kept: identity apart"] = _apart(lab.numpy(identity), x)

    net = engine.mlp("batch", sizes=(64, 32, 32, 10))
    start = lab.init(net)
    history = lab.train(net, 0.3, 100)
    size = [np.linalg.norm(lab.numpy(p["1.weight"])) for p in (start, history.params)]
    numbers["norm of W after 100 steps"] = float(size[1] / size[0])
    return numbers, {}


E0 = Experiment(
    "E0",
    "The formulas",
    "Are the formulas of the documents those of batch norm, forward, backward and in inference?",
    "Every formula, written as the documents write it, gives what normkit returns.",
    (
        Check("forward", "y = weight x̂ + bias with the biased variance", "forward", "<", EXACT),
        Check("biased", "the batch's variance divides by m", "variance, biased", "<", EXACT),
        Check("mean", "mean 0 without eps, weight and bias", "mean 0", "<", EXACT),
        Check("variance", "variance 1 without eps, weight and bias", "variance 1", "<", EXACT),
        Check("dx", "the three terms of the gradient of x", "gradient of x", "<", EXACT),
        Check("dweight", "the gradient of weight", "gradient of weight", "<", EXACT),
        Check("dbias", "the gradient of bias", "gradient of bias", "<", EXACT),
        Check("zero", "the second term of the mean's gradient is 0", "second term of the mean's gradient", "<", EXACT),
        Check("identity", "weight = std and bias = mean give x back", "identity recovered", "<", EXACT),
        Check("convolution", "one statistic per channel of images", "convolution, per channel", "<", EXACT),
        Check("inference", "inference does not depend on the batch", "inference depends on the batch", "<", EXACT),
        Check("layer", "layer norm does not depend on the batch", "layer norm depends on the batch", "<", EXACT),
        Check("train", "batch norm in training does", "batch norm depends on the batch", ">", 1e-2),
        Check("running", "the running mean is 0.9 old + 0.1 new", "running mean, 0.9 old + 0.1 new", "<", EXACT),
        Check("bessel", "m / (m - 1) times the mean variance is the population's", "off by", "<", 0.01),
        Check("shard", "and so it is on one shard of the batch", "the same on one shard", "<", EXACT, kind=DOCUMENT),
        Check("neglect", "without m / (m - 1) little is missing", "E var(batch of 2) / var", ">", 0.95, kind=DOCUMENT),
    ),
    "Exact in float64. The second term of the mean's gradient is zero only where the centre is the plain mean of "
    "exactly these samples: not on one shard of a batch, with weights, or with a mean that is a constant.",
    definitions,
    cost=0.5,
    dtype="float64",
    frameworks=True,
)

E13 = Experiment(
    "E13",
    "What batch norm does to gradients and scales",
    "Do Theorem 4.1, scale invariance and the decoupling of length and direction hold exactly?",
    "Theorem 4.1, scale invariance, decoupling exact.",
    (
        Check("theorem", "Theorem 4.1, with equality", "theorem 4.1, both sides apart", "<", EXACT),
        Check("projector", "J = weight / std (I - 11ᵀ/m - x̂x̂ᵀ/m)", "projector form apart", "<", EXACT, kind=DOCUMENT),
        Check("scale", "BN((aW)u) = BN(Wu)", "output of a W apart", "<", EXACT),
        Check("du", "the gradient of u does not change with a", "gradient of u apart", "<", EXACT),
        Check("dw", "the gradient of aW is 1/a of that of W", "a times gradient of a W apart", "<", EXACT),
        Check("radial", "the gradient is orthogonal to the weights", "radial part of the gradient", "<", EXACT),
        Check("step", "a step of eta at W is one of a² eta at aW", "step eta a^2 at a W apart", "<", EXACT),
        Check(
            "bias",
            "a bias before batch norm has gradient 0",
            "bias before batch norm, gradient",
            "<",
            EXACT,
            kind=DOCUMENT,
        ),
        Check("s-norm", "BN(Wx) = weight wᵀ(x - Ex) / |w|_S + bias", "w(x - Ex) / norm in S apart", "<", EXACT),
        Check(
            "minima",
            "weight = std, bias = mean: the same net",
            "minima kept: identity apart",
            "<",
            EXACT,
            kind=DOCUMENT,
        ),
        Check("norm", "the output's scale grows with |W|", "slope of output on norm of W", ">", 0.5, kind=DOCUMENT),
        Check("wx", "BN(Wx) = weight Wx/|Wx| + bias", "Wx / norm of Wx apart", "<", 0.05, kind=DOCUMENT),
        Check("sigma", "the gradient is dy / std alone", "dy / std alone apart", "<", 0.05, kind=DOCUMENT),
        Check("weights", "batch norm constrains the weights", "norm of W after 100 steps", "<=", 1.0, kind=DOCUMENT),
    ),
    "Exact at eps = 0, one layer, with the activations that follow the norm matched; eps makes them approximate where "
    "the variance is of its size. The weights are not constrained: their norm grows with every step.",
    invariances,
    cost=0.7,
    dtype="float64",
    frameworks=True,
)
