"""y of every case in every library and dtype against the definitions."""

import numpy as np
import pytest

import normkit as nk
from normkit.conformance import cases, inputs, measure, oracle
from normkit.conformance.checks import assert_close, unchanged
from normkit.conformance.libraries import first


def _check(library, case, values, dtype, params=""):
    given = measure.arrays(library, case, values, dtype, params)
    with unchanged(library, given):
        out = measure.call(case, nk, given)
    assert_close(
        library, first(out), oracle.forward(case.layer, values, case.options), library.kind(given["x"]), "forward"
    )
    if case.layer == "batch_norm_train":
        _check_statistics(library, case, values, given, out[1])


def _check_statistics(library, case, values, given, stats):
    kind = library.kind(given["x"])._replace(
        dtype=inputs.stats_dtype(library.kind(given["x"]).dtype), layout="contiguous"
    )
    expected = oracle.batch_statistics(values["x"], axis=case.options.get("axis", 1), mask=values.get("mask"))
    # A mean is a difference where x has both signs: it is held to the size of x.
    size = np.abs(values["x"]).max(initial=0)
    assert_close(library, stats.mean, expected.mean, kind, "statistics", size)
    assert_close(library, stats.var, expected.var, kind, "statistics")
    known = type(stats.count) is int
    assert known or case.masked
    assert np.array_equal(
        np.broadcast_to(stats.count if known else library.numpy(stats.count), expected.count.shape), expected.count
    )


@pytest.mark.grid(cases=cases.CASES, dtypes=["float32"])
def test_float32(library, dtype, case):
    _check(library, case, inputs.operands(case, inputs.BY_NAME["normal"], dtype), dtype)


@pytest.mark.grid(cases=cases.SHORT, thrifty=cases.SHORTEST, dtypes=["float64", "float16", "bfloat16"])
def test_other_dtypes(library, dtype, case):
    _check(library, case, inputs.operands(case, inputs.BY_NAME["normal"], dtype), dtype)


@pytest.mark.grid(cases=cases.SHORTEST, dtypes=["float16", "bfloat16"])
def test_narrow_x_with_float32_parameters(library, dtype, case):
    values = inputs.operands(case, inputs.BY_NAME["normal"], dtype, params="float32")
    _check(library, case, values, dtype, "float32")


@pytest.mark.grid(cases=cases.LARGE)
def test_a_million_elements_in_one_statistic(library, case):
    _check(library, case, inputs.operands(case, inputs.BY_NAME["offset 1e4"], "float32"), "float32")
