"""The same numbers everywhere: each library against NumPy, on the same input."""

import pytest

import normkit as nk
from normkit.conformance import across, inputs, measure, oracle
from normkit.conformance.libraries import first
from normkit.conformance.libraries import library as library_named
from normkit.conformance.tolerances import tolerance, units

NAMES = ["normal", "offset 1e4", "mixed offsets", "scale 1e25", "constant", "tabular columns"]
LAYERS = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_train"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.grid(dtypes=["float32", "float64"])
def test_the_same_in_numpy(library, dtype, layer, name):
    numpy = library_named("numpy")
    for case in measure.sites(library, ["contiguous"]):
        values = inputs.operands(case, inputs.BY_NAME[name], dtype)
        if case.layer != layer or not inputs.holds(dtype, values):
            continue
        here, there = (measure.arrays(a, case, values, dtype) for a in (library, numpy))
        reference, scales = oracle.vjp_and_scales(layer, values, values["dy"], case.options)
        y, other = library.numpy(first(measure.call(case, nk, here))), numpy.numpy(first(measure.call(case, nk, there)))
        limit = tolerance("cross", dtype).units
        assert units(y, other, dtype) <= limit, case.affine
        ours, theirs = measure.gradients(library, case, nk, here)[1], measure.gradients(numpy, case, nk, there)[1]
        for key in reference:
            kind = inputs.stats_dtype(dtype) if key in ("mean", "var") else dtype
            apart = units(library.numpy(ours[key]), numpy.numpy(theirs[key]), kind, scales[key])
            assert apart <= 2 * tolerance("gradient", kind).units, (case.affine, key)


def test_what_the_page_compares(library):
    """The same numbers, whichever axis has the channels: normkit agrees, native layers on plain input."""
    found = across.pairs({"numpy": across.outputs(library_named("numpy")), "other": across.outputs(library)})
    assert {p.input for p in found if not p.native_a} == {*across.INPUTS}
    for pair in found:
        if not pair.native_a:
            assert pair.distance <= tolerance("cross", across.DTYPE).units, pair
        elif pair.input == "normal":
            assert pair.distance <= 2 * tolerance("native", across.DTYPE).units, pair


def test_the_ladder_has_every_rung(library):
    found = list(across.ladder(library))
    assert {(r.layer, r.offset) for r in found} == {(layer, offset) for layer in LAYERS for offset in across.OFFSETS}
    assert max(r.error for r in found) <= tolerance("forward", across.DTYPE).units
