"""The stated bound: float32 within 2 units of 2**-23 of max |y| at any offset and scale; constants; NaN contained."""

import dataclasses

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.conformance import inputs, measure, oracle
from normkit.conformance.libraries import first
from normkit.conformance.tolerances import SHORTFALLS, tolerance

FINITE = [x for x in inputs.INPUTS if x.finite]
LAYERS = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_train"]


def _sites(library, layer):
    return [case for case in measure.sites(library) if case.layer == layer]


@pytest.mark.parametrize("x", FINITE, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.grid(dtypes=["float32", "float64", "float16", "bfloat16"])
def test_forward(library, dtype, layer, x):
    for case in _sites(library, layer):
        if inputs.holds(dtype, inputs.operands(case, x, dtype)):
            m = measure.forward(library, case, x, dtype, natives_too=False)[0]
            assert m.passed, f"{case.layout}, {case.affine}: {m.error:.4g} units"


@pytest.mark.parametrize("x", FINITE, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_gradient(library, layer, x):
    for case in _sites(library, layer):
        if inputs.holds("float32", inputs.operands(case, x, "float32")):
            m = measure.gradient(library, case, x, "float32", natives_too=False)[0]
            assert m.passed, f"{case.layout}, {case.affine}: {m.error:.4g} units"


def test_shortfalls_are_those_of_the_table(library):
    """Where no kernel serves, the errors are as large as a row says; a row that nothing needs any more must go."""
    rows = [(name, row) for (owner, name), found in SHORTFALLS.items() if owner == library.name for row in found]
    if not rows or "cpu" not in library.kind(library.array(np.ones(1), "float32")).device.lower():
        pytest.skip(f"{library.name} falls short of nothing here")
    for name, row in rows:
        with kernels.off():
            found = [
                getattr(measure, row.quantity)(library, case, inputs.BY_NAME[name], row.dtype, natives_too=False)[0]
                for layer in LAYERS
                for case in _sites(library, layer)
            ]
        assert tolerance(row.quantity, row.dtype).units < max(m.error for m in found) <= row.units, (name, row.quantity)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.grid(dtypes=["float32", "float16"])
def test_real_input(library, dtype, layer):
    found = [row for row in inputs.real_cases(library.channel_axis) if row[1].layer == layer]
    if not found and layer != "instance_norm":
        pytest.skip("scikit-learn is not installed")
    for label, case, x in found:
        m = measure.forward(library, case, x, dtype, label, natives_too=False)[0]
        assert m.passed, f"{label}: {m.error:.4g} units"


@pytest.mark.parametrize("eps", [1e-5, 1e-12, 0.0])
@pytest.mark.parametrize("value", [0.0, 3.3, -1234.567, 1e5, 3e-39, 7e18, -1e30])
@pytest.mark.parametrize("layer", ["layer_norm", "group_norm", "instance_norm", "batch_norm_train"])
def test_a_constant_gives_exactly_the_bias(library, layer, value, eps):
    for site in _sites(library, layer):
        case = dataclasses.replace(site, options={**site.options, "eps": eps})
        values = inputs.operands(case, np.full(case.shape, value), "float32")
        y = library.numpy(first(measure.call(case, nk, measure.arrays(library, case, values, "float32"))))
        expected = (
            np.zeros(case.shape)
            if "bias" not in values
            else oracle._expand(values["bias"], case.shape, case.sets.params)
        )
        assert np.array_equal(y, np.broadcast_to(expected.astype(np.float64), case.shape)), (
            f"{case.layout}, {case.affine}"
        )


@pytest.mark.parametrize("layer", LAYERS)
def test_a_nan_stays_in_its_set(library, layer):
    for case in _sites(library, layer):
        if layer == "batch_norm":
            continue  # statistics that are NaN are the caller's
        values = inputs.operands(case, inputs.BY_NAME["NaN in one set"], "float32")
        given = measure.arrays(library, case, values, "float32")
        with np.errstate(invalid="ignore"):
            y = library.numpy(first(measure.call(case, nk, given)))
        reference = oracle.forward(layer, values, case.options)
        assert 0 < np.isnan(y).sum() == np.isnan(reference).sum() < y.size
        assert measure.units(y, reference, "float32") <= measure.tolerance("forward", "float32").units


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("eps", [1e-12, 1e-30, 0.0])
def test_small_spreads_with_small_eps(library, layer, eps):
    """Squares that vanish in float32 must not: down to spreads of 1e-18, eps decides little or nothing."""
    for x in ("normal", "scale 1e-9", "scale 1e-18"):
        for site in _sites(library, layer):
            case = dataclasses.replace(site, options={**site.options, "eps": eps})
            values = inputs.operands(case, inputs.BY_NAME[x], "float32")
            if layer == "batch_norm" and values["var"].min() < 1e-37:
                continue  # float32 does not hold the given variance
            m = measure.forward(library, case, inputs.BY_NAME[x], "float32", natives_too=False)[0]
            assert m.passed, f"{x}, {case.layout}, {case.affine}: {m.error:.4g} units"
