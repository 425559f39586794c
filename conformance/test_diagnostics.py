"""Diagnostics on functions whose answers are known, what they say of bad input, and what follows exactly."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

import normkit as nk
from normkit import diagnostics
from normkit.diagnostics import _vectors as vectors

#: float64: a few sums of a dozen numbers.
EXACT = 1e-13
rng = np.random.default_rng(0)
#: A quadratic form with these eigenvalues.
VALUES = np.array([7.0, 3.0, 1.0, 0.5, -2.0])
Q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
H = Q * VALUES @ Q.T
PARAMS = {"a": rng.normal(size=(3,)), "b": rng.normal(size=(2, 1))}


def joined(params):
    return np.concatenate([params["a"], params["b"][:, 0]])


def quadratic(params):
    """½ θᵀHθ + 5."""
    g = H @ joined(params)
    return float(joined(params) @ g / 2 + 5), {"a": g[:3], "b": g[3:, None]}


def invariant(params):
    """A function of the direction of w alone, times that of v."""
    w, v = params["w"], params["v"]
    n = np.linalg.norm(w)
    t = np.arange(1.0, 5.0)
    s = w @ t / n
    return float(s * v.sum()), {"w": v.sum() * (t / n - s * w / n**2), "v": np.full_like(v, s)}


def test_landscape_of_a_quadratic_form():
    found = diagnostics.landscape(quadratic, PARAMS, [0.1, 0.2, -0.3])
    x, g = joined(PARAMS), H @ joined(PARAMS)
    assert found.loss0 == quadratic(PARAMS)[0]
    assert found.grad_norm == pytest.approx(np.linalg.norm(g), rel=EXACT)
    for k, step in enumerate([0.1, 0.2, -0.3]):
        there = x - step * g
        assert found.loss[k] == pytest.approx(there @ H @ there / 2 + 5, rel=EXACT)
        assert found.distance[k] == pytest.approx(abs(step) * np.linalg.norm(g), rel=EXACT)
        assert found.change[k] == pytest.approx(abs(step) * np.linalg.norm(H @ g), rel=EXACT)
    assert np.allclose(found.smoothness, np.linalg.norm(H @ g) / np.linalg.norm(g), rtol=EXACT)
    assert found.beta == found.smoothness.max() and found.variation == np.ptp(found.loss)
    assert found.predictiveness == np.ptp(found.change)
    assert np.allclose(found.relative_change, found.change / found.grad_norm, rtol=EXACT)


def test_landscape_along_other_directions():
    along = diagnostics.landscape(quadratic, PARAMS, [1.0], {"a": np.array([1.0, 0, 0])})
    there = joined(PARAMS) - np.eye(5)[0]
    assert along.loss[0] == pytest.approx(there @ H @ there / 2 + 5, rel=EXACT) and along.distance[0] == 1
    one, two, other = (diagnostics.landscape(quadratic, PARAMS, [0.5], "random", seed=s) for s in (0, 0, 1))
    assert one.loss == two.loss != other.loss
    assert one.distance[0] == pytest.approx(0.5 * one.grad_norm, rel=EXACT)


def test_landscape_beyond_the_finite():
    def steep(params):
        with np.errstate(over="ignore"):
            e = np.exp(params["w"] ** 2)
        return float(e.sum()), {"w": 2 * params["w"] * e}

    found = diagnostics.landscape(steep, {"w": np.ones(2)}, [0.1, 100])
    assert np.isfinite(found.loss[0]) and found.loss[1] == found.change[1] == found.variation == np.inf
    assert "inf" in repr(found)


def test_covariate_shift_of_a_product():
    """L = (u·v·w)² / 2: the gradient of v is u²vw², with the old v."""

    def product(params):
        u, v, w = (float(params[k]) for k in "uvw")
        p = u * v * w
        return p * p / 2, {"u": np.array(p * v * w), "v": np.array(p * u * w), "w": np.array(p * u * v)}

    params = {k: np.array(x) for k, x in zip("uvw", (2.0, 3.0, 5.0), strict=True)}
    updated = {k: np.array(x) for k, x in zip("uvw", (-1.0, 4.0, 100.0), strict=True)}
    found = diagnostics.covariate_shift(product, params, ["u", "v", "w"], updated)
    assert found.layers == ("v", "w")
    before, after = [2 * 2 * 3 * 5 * 5, 2 * 2 * 3 * 3 * 5], [1 * 1 * 3 * 5 * 5, 1 * 1 * 4 * 4 * 5]
    assert found.l2.tolist() == [before[0] - after[0], before[1] - after[1]]
    assert found.cosine.tolist() == [1, 1]
    assert found.relative.tolist() == [1 - after[0] / before[0], 1 - after[1] / before[1]]
    turned = diagnostics.covariate_shift(
        lambda p: (0.5, {k: a * 0 + p["u"] for k, a in p.items()}), params, "uvw", updated
    )
    assert turned.cosine.tolist() == [-1, -1]
    same = diagnostics.covariate_shift(product, params, ["u", "v", "w"], params)
    assert same.l2.tolist() == [0, 0] and same.cosine.tolist() == [1, 1]


def test_gradient_flow_of_a_power():
    gradients = {f"layers.{k}.weight": np.full((4, 4), np.exp(-0.19 * k)) for k in range(30)}
    found = diagnostics.gradient_flow(gradients)
    assert found.growth == pytest.approx(0.19, rel=EXACT) and found.r2 == pytest.approx(1, abs=EXACT)
    assert found.norms[0] == pytest.approx(4, rel=EXACT)
    pairs = diagnostics.gradient_flow(gradients, [[f"layers.{k}.weight", f"layers.{k + 1}.weight"] for k in (0, 2)])
    assert pairs.norms[0] == pytest.approx(np.hypot(4, 4 * np.exp(-0.19)), rel=EXACT)
    assert "vanishes" in repr(diagnostics.gradient_flow(dict(reversed(gradients.items()))))


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-44])
def test_norms_of_numbers_whose_squares_leave_float32(scale):
    a = np.array([3 * scale, 4 * scale], "f4")
    assert vectors.norm({"a": a}) == pytest.approx(np.hypot(*a.astype("f8")), rel=1e-6)
    assert vectors.cosine({"a": a}, {"a": 2 * a}) == pytest.approx(1, rel=1e-6)


def test_layers_of():
    names = ["stem.weight", "stem.bias", "blocks.0.w", "alpha", "dense/kernel", "dense/bias", "blocks.0.b"]
    assert diagnostics.layers_of(dict.fromkeys(names)) == [
        ["stem.weight", "stem.bias"], ["blocks.0.w", "blocks.0.b"], ["alpha"], ["dense/kernel", "dense/bias"],
    ]  # fmt: skip


def test_trace(tmp_path):
    trace, calls = diagnostics.Trace(every=10), []

    def look():
        calls.append(1)
        return diagnostics.landscape(quadratic, PARAMS, [0.1, 0.2])

    assert "nothing" in repr(trace)
    for step in range(35):
        assert trace.add(step, loss=4 - step / 10, landscape=look) is (step % 10 == 0)
    assert len(trace) == len(calls) == 4 and "0 to 30" in repr(trace)
    found = trace.arrays()
    assert found["step"].tolist() == [0, 10, 20, 30] and found["landscape.loss"].shape == (4, 2)
    assert found["landscape.variation"].shape == (4,)
    trace.save(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz") as loaded:
        assert {k: v.tolist() for k, v in loaded.items()} == {k: v.tolist() for k, v in found.items()}
    equal = trace.at_equal("loss", [0, 1, 2, 3.5])
    assert equal["count"].tolist() == [0, 1, 2] and equal["landscape.loss"].shape == (3, 2)
    assert equal["loss"][1:].tolist() == [1, 2.5] and np.isnan(equal["loss"][0])
    assert equal["step"][2] == 15


def test_trace_refuses():
    trace = diagnostics.Trace()
    trace.add(0, loss=1.0, a=np.ones(2))
    with pytest.raises(ValueError, match="'b' is only in some"):
        trace.add(1, loss=1.0, a=np.ones(2), b=1)
    with pytest.raises(ValueError, match=r"a was \(2,\) and is \(3,\)"):
        trace.add(1, loss=1.0, a=np.ones(3))
    with pytest.raises(TypeError, match="loss is str 'low'"):
        trace.add(1, loss="low", a=np.ones(2))
    with pytest.raises(ValueError, match="no 'lost'; it has: step, loss, a"):
        trace.at_equal("lost", [0, 1])
    with pytest.raises(ValueError, match="one number a step"):
        trace.at_equal("a", [0, 1])
    with pytest.raises(ValueError, match="increasing"):
        trace.at_equal("loss", [1, 0])
    with pytest.raises(ValueError, match="every must be a positive integer"):
        diagnostics.Trace(every=0)


def bad(change):
    """The quadratic form, with something wrong about what it returns."""

    def objective(params):
        loss, gradients = quadratic(params)
        return change(loss, gradients)

    return objective


def impure(of_loss, of_gradients):
    count = iter(range(99))

    def change(loss, g):
        k = next(count)
        return loss + of_loss * k, vectors.scaled(g, 1 + of_gradients * k)

    return bad(change)


#: Objectives, and what is said of each.
BAD = {
    "not pure": (impure(0.1, 0.0), ValueError, "pure objective: two calls .* gave the losses"),
    "gradients not pure": (impure(0.0, 0.1), ValueError, "pure objective: two calls .* apart"),
    "not finite": (bad(lambda loss, g: (math.nan, g)), ValueError, "needs a finite loss; .* returned nan"),
    "gradient not finite": (bad(lambda loss, g: (loss, {**g, "a": g["a"] * np.inf})), ValueError, "finite gradients"),
    "key missing": (bad(lambda loss, g: (loss, {"a": g["a"]})), ValueError, "b missing"),
    "key extra": (bad(lambda loss, g: (loss, {**g, "c": g["a"]})), ValueError, "c unknown"),
    "shape": (bad(lambda loss, g: (loss, {**g, "b": g["a"]})), ValueError, r"b has \(3,\) in place of \(2, 1\)"),
    "loss alone": (bad(lambda loss, g: loss), TypeError, r"returns \(loss, gradients by name\); it returned float"),
    "zero gradient": (bad(lambda loss, g: (loss, vectors.scaled(g, 0.0))), ValueError, "gradient .*is zero"),
    "no function": (3, TypeError, "received int 3"),
}
#: The diagnostics that take an objective.
TAKE = {
    "landscape": lambda objective, params: diagnostics.landscape(objective, params, [0.1]),
    "covariate_shift": lambda objective, params: diagnostics.covariate_shift(objective, params, ["a", "b"], PARAMS),
}


@pytest.mark.parametrize("taker", TAKE)
@pytest.mark.parametrize("case", BAD)
def test_bad_objectives(case, taker):
    objective, kind, text = BAD[case]
    with pytest.raises(kind, match=text) as raised:
        TAKE[taker](objective, PARAMS)
    assert taker in str(raised.value) or "gradients of the objective" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("taker", TAKE)
def test_bad_params(taker):
    with pytest.raises(TypeError, match="params as a dict"):
        TAKE[taker](quadratic, [1.0])
    with pytest.raises(TypeError, match="floating-point parameters; a is int64"):
        TAKE[taker](quadratic, {"a": np.arange(3), "b": np.ones((2, 1))})


def test_bad_arguments():
    shift = diagnostics.covariate_shift
    with pytest.raises(ValueError, match="steps of landscape must not be zero"):
        diagnostics.landscape(quadratic, PARAMS, [0.0, 1.0])
    with pytest.raises(ValueError, match="steps of landscape must be finite numbers along one axis"):
        diagnostics.landscape(quadratic, PARAMS, [math.inf])
    with pytest.raises(TypeError, match="steps of landscape must be numbers; received str 'far'"):
        diagnostics.landscape(quadratic, PARAMS, "far")
    with pytest.raises(TypeError, match="direction of landscape must be a dict, \"random\" or None; received str 'up'"):
        diagnostics.landscape(quadratic, PARAMS, [1.0], "up")
    with pytest.raises(ValueError, match="landscape knows no parameter 'c'; there are: a, b"):
        diagnostics.landscape(quadratic, PARAMS, [1.0], {"c": np.ones(1)})
    with pytest.raises(ValueError, match="direction of landscape must have a finite norm above zero"):
        diagnostics.landscape(quadratic, PARAMS, [1.0], {"a": np.zeros(3)})
    with pytest.raises(ValueError, match="covariate_shift knows no parameter 'conv9'; there are: a, b"):
        shift(quadratic, PARAMS, ["a", "conv9"], PARAMS)
    with pytest.raises(ValueError, match="'a' is in two"):
        shift(quadratic, PARAMS, ["a", ["b", "a"]], PARAMS)
    with pytest.raises(ValueError, match="two layers or more, each with parameters; received 1"):
        shift(quadratic, PARAMS, [["a", "b"]], PARAMS)
    with pytest.raises(ValueError, match="updated of covariate_shift lacks 'b'"):
        shift(quadratic, PARAMS, ["a", "b"], {"a": PARAMS["a"]})
    with pytest.raises(ValueError, match=r"updated\['b'\] must have shape \(2, 1\); received shape \(2,\)"):
        shift(quadratic, PARAMS, ["a", "b"], {**PARAMS, "b": np.ones(2)})
    with pytest.raises(ValueError, match="that of b is zero"):
        diagnostics.gradient_flow({"a": np.ones(2), "b": np.zeros(2)})
    with pytest.raises(ValueError, match="two layers or more; received 1"):
        diagnostics.gradient_flow({"a": np.ones(2)})
    with pytest.raises(TypeError, match="takes a dict"):
        diagnostics.gradient_flow([np.ones(2)])


def test_bad_models():
    loss = diagnostics.cross_entropy
    with pytest.raises(TypeError, match=r"torch.nn.Module, a keras.Layer, .* received int 3"):
        diagnostics.objective(3, loss, None)
    with pytest.raises(TypeError, match=r"loss must be a function .* received None"):
        diagnostics.objective([diagnostics.Dense(np.ones((1, 1)))], None, None)
    with pytest.raises(TypeError, match="have a method vjp; layer 1 is int 3"):
        diagnostics.objective([diagnostics.Dense(np.ones((1, 1))), 3], loss, None)
    with pytest.raises(ValueError, match="no parameters in the chain"):
        diagnostics.objective([diagnostics.Flatten()], loss, None)
    with pytest.raises(ValueError, match="kind must be 'relu', 'sigmoid' or 'tanh'; received 'gelu'"):
        diagnostics.Activation("gelu")
    found = diagnostics.objective([diagnostics.Dense(np.ones((2, 2)))], loss, np.ones((3, 2)), np.zeros(3, int))
    assert repr(found) == "objective of chain: 1 parameters, 4 numbers"
    with pytest.raises(ValueError, match=r"0.weight missing and 1.weight unknown"):
        found({"1.weight": np.ones((2, 2))})


@pytest.mark.parametrize("name", ["torch", "keras", "flax"])
def test_a_framework_that_is_not_installed(name, monkeypatch):
    monkeypatch.delitem(vars(nk), name, raising=False)
    for module in [m for m in sys.modules if m.startswith((f"normkit.{name}", f"normkit.backends.{name}."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    needed = "(flax|jax)" if name == "flax" else name
    words = rf"^normkit\.{name} needs {needed}, which is not installed: pip install .*\.$"
    with pytest.raises(ImportError, match=words):
        getattr(nk, name)


@pytest.mark.parametrize("kind", ["relu", "sigmoid", "tanh"])
def test_chain_against_differences(kind):
    """Every layer of the chain, in float64."""
    nd = diagnostics
    layers = [
        nd.Conv(rng.normal(size=(3, 2, 2, 3)), rng.normal(size=3)), nd.Activation(kind), nd.Flatten(),
        nd.Dense(rng.normal(size=(4, 36)), rng.normal(size=4)),
    ]  # fmt: skip
    for loss, y in ((nd.cross_entropy, rng.integers(0, 4, 5)), (nd.mean_squared_error, rng.normal(size=(5, 4)))):
        objective = nd.objective(layers, loss, rng.normal(size=(5, 2, 4, 6)), y)
        params = objective.params
        _, gradients = objective(params)
        along = vectors.random(params, 1e-5, 0)
        ahead, behind = (objective(vectors.moved(params, sign, along))[0] for sign in (1, -1))
        # Central differences: 1e-5² of the third derivative, and 1e-16 / 1e-5 of the loss.
        assert (ahead - behind) / 2 == pytest.approx(vectors.dot(gradients, along), rel=1e-7)


def test_progress():
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        diagnostics.landscape(quadratic, PARAMS, [0.1, 0.2], progress=True)
    assert "landscape" in shown.getvalue() and "100%" in shown.getvalue()
    with contextlib.redirect_stderr(silent := io.StringIO()):
        diagnostics.landscape(quadratic, PARAMS, [0.1, 0.2])
    assert silent.getvalue() == ""
