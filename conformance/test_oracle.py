"""The oracle against numeric derivatives and by hand, and the tables against themselves."""

import numpy as np
import pytest

from normkit.conformance import cases, differences, inputs, libraries, oracle, tolerances
from normkit.conformance.tolerances import units

SMALL = [c for c in cases.CASES if np.prod(c.shape) <= 500]


@pytest.mark.skipif(not oracle.EXTENDED, reason="central differences in float64 leave six digits only")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_closed_form_is_the_derivative(case):
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float64")
    closed = oracle.vjp(case.layer, values, values["dy"], case.options)
    numeric = oracle.numeric_vjp(case.layer, values, values["dy"], case.options)
    assert closed.keys() == numeric.keys() == set(case.names)
    for name in closed:
        # The third difference of a root bounds what Richardson leaves, relative to what was differentiated: 1 ± 1e-11.
        size = max(1, np.abs(numeric[name]).max())
        assert np.abs(closed[name] - numeric[name]).max() <= 1e-9 * size, name


def test_layers_by_hand():
    x = np.array([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 2.0, 2.0]])
    rows = (x - [[3], [1]]) / np.sqrt([[3.5 + 0.25], [1 + 0.25]])
    assert np.allclose(oracle.layer_norm(x, eps=0.25), rows.astype(float), rtol=1e-15)
    assert np.allclose(oracle.rms_norm(x, eps=0.5), (x / np.sqrt([[13.0], [2.5]])), rtol=1e-15)
    assert np.allclose(oracle.rms_norm(x, np.zeros(4), weight_offset=2.0, eps=0.5), 2 * oracle.rms_norm(x, eps=0.5))
    assert np.allclose(
        oracle.group_norm(x, 2, eps=0.25), [[-0.5, 0.5, -1.5, 1.5], [0, 0, 0, 0]] / np.sqrt([0.5, 0.5, 2.5, 2.5])
    )
    assert np.allclose(oracle.instance_norm(x[..., None], np.ones(4), np.arange(4.0))[..., 0], [np.arange(4.0)] * 2)
    y, stats = oracle.batch_norm_train(x, eps=0.0)
    assert np.array_equal(y[0], [1, 1, 1, 1]) and np.array_equal(y, -y[::-1])
    assert np.array_equal(stats.mean, [0.5, 1, 2.5, 4]) and np.array_equal(stats.var, [0.25, 1, 0.25, 4])
    assert np.array_equal(oracle.batch_norm(x, stats.mean, stats.var, eps=0.0), y)


def test_masked_elements_do_not_count():
    x, mask = np.array([[1.0], [3.0], [np.nan]]), np.array([[True], [True], [False]])
    y, stats = oracle.batch_norm_train(x, bias=np.array([5.0]), eps=0.0, mask=mask)
    assert y[:, 0].tolist() == [4, 6, 0]
    assert (stats.mean[0], stats.var[0], stats.count[0]) == (2, 1, 2)


def test_running_statistics_by_hand():
    steps = [np.array([[0.0], [2.0]]), np.zeros((0, 1)), np.array([[4.0], [8.0]])]
    mean, var, n = oracle.running_statistics(steps, [0.0], [1.0], momentum=0.5, unbiased=True)
    assert (float(mean[0]), float(var[0]), n) == (3.25, 4.75, 2)
    mean, var, n = oracle.running_statistics(steps, [0.0], [1.0], momentum=None, unbiased=False)
    assert (float(mean[0]), float(var[0]), n) == (3.5, 2.5, 2)


def test_a_large_offset_costs_the_oracle_nothing():
    small = inputs.rounded(np.random.default_rng(0).normal(size=(50, 3)), "float16")
    assert np.array_equal(oracle.batch_norm_train(small + 2.0**30)[0], oracle.batch_norm_train(small)[0])


def test_units():
    one = np.array([1.0, -2.0])
    assert units(one, one, "float32") == 0
    assert units(one + 2.0**-23, one, "float32") == 0.5
    assert units(one + 2.0**-23, one, "float32", np.array([1.0, 2.0])) == 1
    assert units(np.zeros(2), np.zeros(2), "float32") == 0
    assert units(np.array([2.0**-23, 0]), np.zeros(2), "float32") == 1
    assert units(np.zeros(0), np.zeros(0), "float32") == 0
    nan = np.array([np.nan, 1.0])
    assert units(nan, nan, "float32") == 0
    assert units(nan, np.ones(2), "float32") == units(np.ones(2), nan, "float32") == np.inf
    assert units(np.array([np.inf, 1]), np.ones(2), "float32") == np.inf
    with pytest.raises(ValueError, match="shapes differ"):
        units(np.zeros(2), np.zeros(3), "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounded_is_a_number_of_the_dtype(dtype):
    x = np.random.default_rng(0).normal(size=1000)
    once = inputs.rounded(x, dtype)
    assert np.array_equal(inputs.rounded(once, dtype), once)
    assert (
        0.4
        < units(once / np.exp2(np.floor(np.log2(np.abs(x)))), x / np.exp2(np.floor(np.log2(np.abs(x)))), dtype, 1)
        <= 0.5
    )


def test_tables_are_consistent():
    ids = [c.id for c in (*cases.CASES, *cases.LARGE, *cases.EMPTY)]
    assert len(set(ids)) == len(ids)
    rows = [(t.quantity, t.dtype) for t in tolerances.TABLE]
    assert len(set(rows)) == len(rows) and all(t.reason for t in tolerances.TABLE)
    assert all(c.count >= 2**20 for c in cases.LARGE) and all(0 in c.shape for c in cases.EMPTY)
    assert {c.layer for c in cases.CASES} == {c.layer for c in cases.SHORT} == set(cases.LAYERS)
    for difference in differences.DIFFERENCES:
        assert set(difference.inputs) <= set(inputs.BY_NAME) and difference.reason and difference.link


def test_a_library_that_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no library 'theano'; there are: numpy"):
        libraries.library("theano")
    monkeypatch.setattr(libraries, "installed", lambda name: name != "torch")
    with pytest.raises(libraries.Missing, match="torch was asked for, but torch is not installed"):
        libraries.library("torch")
    assert libraries.available()[1] == ["torch"]
