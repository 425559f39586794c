"""Diagnostics on functions whose answers are known: curvature, scale, distributions, statistics, convergence; plots."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import normkit as nk
from normkit import diagnostics
from normkit.conformance.test_diagnostics import BAD, EXACT, PARAMS, VALUES, invariant, quadratic, rng

#: Differences of gradients in float64: a cube root of a unit each way, of a quadratic form only rounding is left.
DIFFERENCES = 1e-9


def test_curvature_of_a_quadratic_form():
    found = diagnostics.curvature(quadratic, PARAMS, k=5)
    assert np.allclose(found.ritz, np.sort(VALUES), rtol=DIFFERENCES, atol=DIFFERENCES)
    assert (found.largest, found.smallest) == (found.ritz[-1], found.ritz[0])
    assert (found.residual < 1e-8).all() and "-2 to 7" in repr(found)
    again = diagnostics.curvature(quadratic, PARAMS, k=50, seed=3, radius=0.1)
    assert len(again.ritz) == 5 and np.allclose(again.ritz, np.sort(VALUES), rtol=1e-12)


def test_curvature_before_it_has_converged():
    """Every Ritz value is within its residual of an eigenvalue, and between the extreme ones."""
    found = diagnostics.curvature(quadratic, PARAMS, k=2)
    assert len(found.ritz) == 2 and found.residual.min() > 0.01
    for value, residual in zip(found.ritz, found.residual, strict=True):
        assert np.abs(VALUES - value).min() <= residual and VALUES.min() < value < VALUES.max()


def test_curvature_where_the_start_reaches_little():
    """From an eigenvector, one product says all."""
    params = {"w": np.array([2.0, 0.0, 0.0])}
    found = diagnostics.curvature(lambda p: (p["w"] @ p["w"], {"w": 2 * p["w"]}), params)
    assert np.allclose(found.ritz, [2.0], rtol=DIFFERENCES) and found.residual[0] < 1e-8


def test_curvature_refuses():
    with pytest.raises(ValueError, match="gradient is zero: pass a seed"):
        diagnostics.curvature(quadratic, {k: a * 0 for k, a in PARAMS.items()})
    at_rest = diagnostics.curvature(quadratic, {k: a * 0 for k, a in PARAMS.items()}, k=5, seed=0)
    assert at_rest.largest == pytest.approx(7, rel=DIFFERENCES)
    with pytest.raises(ValueError, match="k must be a positive integer; received 0"):
        diagnostics.curvature(quadratic, PARAMS, k=0)
    with pytest.raises(ValueError, match=r"radius of curvature .* received -1"):
        diagnostics.curvature(quadratic, PARAMS, radius=-1)


def test_scale_response_of_an_invariant_function():
    params = {"w": rng.normal(size=4), "v": rng.normal(size=3)}
    found = diagnostics.scale_response(invariant, params, ["w"], [0.01, 1, -3, 1e6])
    assert found.spread == pytest.approx(2 * abs(found.loss0), rel=EXACT)
    kept = found.factor > 0
    assert np.allclose(found.loss[kept], found.loss0, rtol=EXACT)
    assert np.allclose(found.grad_norm * np.abs(found.factor), found.grad_norm0, rtol=1e-12)
    assert abs(found.radial[0]) < EXACT and found.effective_step[0] == pytest.approx(1 / (params["w"] @ params["w"]))
    both = diagnostics.scale_response(invariant, params, ["v", "w"], [2.0])
    assert both.loss[0] == pytest.approx(2 * both.loss0, rel=EXACT) and both.names == ("v", "w")
    v = params["v"]
    assert both.radial[0] == pytest.approx(v.sum() * np.sign(both.loss0 / v.sum()) / np.linalg.norm(v) / 3**0.5)


def test_scale_response_refuses():
    scale = diagnostics.scale_response
    with pytest.raises(ValueError, match="scale_response knows no parameter 'w'; there are: a, b"):
        scale(quadratic, PARAMS, ["w"], [2.0])
    with pytest.raises(ValueError, match="factors of scale_response must not be zero"):
        scale(quadratic, PARAMS, ["a"], [0.0])
    with pytest.raises(ValueError, match="names of scale_response must be those of one parameter or more"):
        scale(quadratic, PARAMS, [], [2.0])
    with pytest.raises(ValueError, match="directions, and a is zero"):
        scale(quadratic, {**PARAMS, "a": np.zeros(3)}, ["a"], [2.0])


@pytest.mark.parametrize("case", [case for case in BAD if case != "zero gradient"])
def test_bad_objectives(case):
    objective, kind, text = BAD[case]
    for call in (
        lambda: diagnostics.curvature(objective, PARAMS),
        lambda: diagnostics.scale_response(objective, PARAMS, ["a"], [2.0]),
    ):
        with pytest.raises(kind, match=text):
            call()


def test_activation_shift():
    before = rng.normal(0, 1, (2000, 3))
    after = before * [1, 2, 1] + [0, 0, 5]
    found = diagnostics.activation_shift(before, after, bins=10)
    std = before.std(0)
    assert np.allclose(found.std, [1, 2, 1], rtol=EXACT)
    assert np.allclose(found.mean, (after.mean(0) - before.mean(0)) / std, rtol=1e-12) and found.mean[0] == 0
    for unit in range(3):
        edges = np.linspace(*np.percentile([before[:, unit], after[:, unit]], [0, 100]), 11)
        p, q = (np.histogram(x[:, unit], edges)[0] + 1 for x in (before, after))
        p, q = p / p.sum(), q / q.sum()
        assert found.kl[unit] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-12)
    assert found.kl[0] == 0 < found.kl[1] < found.kl[2]
    assert found.percentiles.shape == (2, 3, 3)
    assert np.array_equal(found.percentiles[1], np.percentile(after, [15, 50, 85], axis=0))


def test_activation_shift_of_images():
    """(samples, channels, *spatial): every position is a sample."""
    before, after = rng.normal(size=(2, 5, 3, 4, 2))
    found = diagnostics.activation_shift(before, after)
    flat = diagnostics.activation_shift(*(np.moveaxis(x, 1, -1).reshape(-1, 3) for x in (before, after)))
    assert np.array_equal(found.kl, flat.kl) and np.array_equal(found.mean, flat.mean)


def test_activation_shift_of_constants():
    found = diagnostics.activation_shift(np.ones((4, 3)), np.array([[1, 2, 1]] * 3 + [[1, 2, 5.0]]))
    assert found.mean.tolist() == [0, np.inf, np.inf] and found.std.tolist() == [1, 1, np.inf]
    assert found.kl[0] == 0


def test_activation_shift_refuses():
    shift = diagnostics.activation_shift
    with pytest.raises(ValueError, match="before has 3 and after 2"):
        shift(np.ones((4, 3)), np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"takes before as \(samples, units\) .* received \(4,\)"):
        shift(np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match="finite numbers; after has others"):
        shift(np.ones((4, 3)), np.full((4, 3), np.nan))


def test_statistics_gap_of_statistics():
    running = nk.RunningStats(np.array([0.0, 1.0]), np.array([1.0, 4.0]), 7)
    precise = nk.RunningStats(np.array([0.0, 3.0]), np.array([1.0, 1.0]))
    found = nk.statistics_gap(running, precise)
    assert found.mean.tolist() == [0, -2] and found.var.tolist() == [1, 4]
    # ½ (log 4 + (1 + 2²) / 4 - 1)
    assert found.kl.tolist() == pytest.approx([0, (np.log(4) + 1.25 - 1) / 2], rel=EXACT)
    eased = nk.statistics_gap(running, precise, eps=1.0)
    assert eased.var.tolist() == [1, 2.5] and eased.mean[1] == pytest.approx(-2 / 2**0.5)
    assert diagnostics.statistics_gap is nk.statistics_gap
    with pytest.raises(
        TypeError, match=r"precise statistics as \(mean, var\), RunningStats or BatchStats; received None"
    ):
        nk.statistics_gap(running, None)
    with pytest.raises(ValueError, match="running has 2 and precise 1"):
        nk.statistics_gap(running, (np.ones(1), np.ones(1)))
    with pytest.raises(ValueError, match=r"var \+ eps > 0; precise has others"):
        nk.statistics_gap(running, (np.ones(2), np.zeros(2)))
    with pytest.raises(ValueError, match="eps with statistics"):
        nk.statistics_gap(object(), [1], eps=1.0)
    with pytest.raises(ValueError, match="with a model, not with statistics"):
        nk.statistics_gap(running, precise, sequential=True)


def test_precise_statistics_are_those_of_all_data_in_float64():
    """Batches of float32, far from zero, of different lengths: the bound is float64's."""
    batches = [(rng.normal(1e4 + 10 * n, 1 + n, (n, 3, 5))).astype("f4") for n in (1, 7, 64, 30)]
    mean, var, count = diagnostics.precise_statistics(batches)
    x = np.concatenate(batches).astype("f8").transpose(1, 0, 2).reshape(3, -1)
    assert count == x.shape[1] == 102 * 5
    assert np.allclose(mean, x.mean(1), rtol=1e-15) and np.allclose(var, x.var(1), rtol=1e-12)
    last = diagnostics.precise_statistics([b.transpose(0, 2, 1) for b in batches], axis=-1)
    assert np.array_equal(last.mean, mean)
    with pytest.raises(ValueError, match="the same channels; received 3, then 2"):
        diagnostics.precise_statistics([np.ones((4, 3)), np.ones((4, 2))])
    with pytest.raises(ValueError, match="received no batches"):
        diagnostics.precise_statistics([])
    with pytest.raises(ValueError, match="all are empty"):
        diagnostics.precise_statistics([np.ones((0, 3))])


def test_convergence():
    errors = 3.0 * 0.8 ** np.arange(40)
    found = diagnostics.convergence(errors, 1e-2)
    assert found.rate == pytest.approx(0.8, rel=EXACT) and found.r2 == pytest.approx(1, abs=EXACT)
    assert found.iterations == np.ceil(np.log(1e-2 / 3) / np.log(0.8)) and found.fitted == 40
    # What rounding leaves in the end has no part.
    floored = diagnostics.convergence(np.concatenate([3.0 * 0.1 ** np.arange(30), np.full(100, 1e-29)]), 1e-40)
    assert floored.fitted in (10, 11) and floored.rate == pytest.approx(0.1, rel=EXACT) and floored.iterations == np.inf
    with pytest.raises(ValueError, match="two numbers >= 0 or more"):
        diagnostics.convergence([1.0, -1.0], 0.1)
    with pytest.raises(ValueError, match="above zero and the floor; received 1"):
        diagnostics.convergence([1.0, 0.0], 0.1)


def test_conditioning():
    x = rng.normal(size=(50, 4)) * [1, 10, 100, 1] + [0, 3, 0, 1]
    found = diagnostics.conditioning(x)
    values = np.linalg.eigvalsh(x.T @ x / 50)
    assert found.names == ("inputs", "normalized inputs")
    assert found.condition[0] == pytest.approx(values[-1] / values[0], rel=1e-10)
    assert found.condition[1] == pytest.approx(np.linalg.cond(np.corrcoef(x.T)), rel=1e-10)
    spoilt = diagnostics.conditioning(np.concatenate([x, np.full((50, 1), 3.0), x[:, :1]], 1))
    assert spoilt.rank.tolist() == [5, 4]
    with pytest.raises(ValueError, match=r"received the shape \(3,\)"):
        diagnostics.conditioning(np.ones(3))
    with pytest.raises(ValueError, match="those of x are constant"):
        diagnostics.conditioning(np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"y of the shape \(50,\); received \(4,\)"):
        diagnostics.conditioning(x, np.ones(4))
    with pytest.raises(ValueError, match="explains nothing"):
        diagnostics.conditioning(x, np.ones(50))
    with pytest.raises(ValueError, match="two features that vary or more with y; received one"):
        diagnostics.conditioning(x[:, :1], x[:, 0])


RESULTS = {
    "landscape": lambda: diagnostics.landscape(quadratic, PARAMS, [0.1, 0.2, 5.0]),
    "shift": lambda: diagnostics.covariate_shift(quadratic, PARAMS, ["a", "b"], {k: 2 * a for k, a in PARAMS.items()}),
    "flow": lambda: diagnostics.gradient_flow({f"layers.{k}": np.full(3, 2.0**k) for k in range(40)}),
    "curvature": lambda: diagnostics.curvature(quadratic, PARAMS),
    "scale": lambda: diagnostics.scale_response(quadratic, PARAMS, ["a"], [0.5, 2.0]),
    "activations": lambda: diagnostics.activation_shift(rng.normal(size=(50, 4)), rng.normal(size=(50, 4))),
    "channels": lambda: nk.statistics_gap(nk.RunningStats(np.zeros(3), np.ones(3)), (np.ones(3), np.ones(3))),
    "convergence": lambda: diagnostics.convergence(0.5 ** np.arange(9), 0.01),
    "conditioning": lambda: diagnostics.conditioning(rng.normal(size=(50, 4)), rng.normal(size=50)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_drawn_and_read(name, monkeypatch):
    found = RESULTS[name]()
    with pytest.raises(AttributeError):
        found.kl = None
    arrays = {k: a for k, a in vars(found).items() if isinstance(a, np.ndarray)}
    assert arrays and not any(a.flags.writeable or a.dtype != "f8" for a in arrays.values())
    assert 1 <= repr(found).count("\n") + 1 <= 20 and all(len(line) <= 120 for line in repr(found).splitlines())
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax = figure.subplots()
    assert found.plot(ax) is ax and ax.get_title() and (ax.lines or ax.patches or ax.containers)
    figure.canvas.draw()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib, which is not installed: .* \"normkit\[plot\]\""):
        found.plot()
