"""Native layers against the definitions: in agreement, or different in a way that is known, strictly."""

import dataclasses

import pytest

import normkit as nk
from normkit.conformance import cases, differences, inputs, measure, natives, oracle
from normkit.conformance.tolerances import tolerance, units

#: Where a native layer is either right or wrong by far; offsets of 1e2 and 1e3 and scales near 1e19 lie between.
NAMES = [
    "normal", "offset 1e1", "offset 1e4", "offset 1e6", "mixed offsets", "scale 1e-30", "scale 1e-18", "scale 1e-3",
    "scale 1e3", "scale 1e9", "scale 1e25", "scale 1e30", "tabular columns", "NaN in one set",
]  # fmt: skip
LAYERS = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_train"]


def _pairs(library, layer):
    return [(m, c) for m in natives.of(library.name) for c in measure.sites(library) if c.layer == layer]


def _values(case, name):
    values = inputs.operands(case, inputs.BY_NAME[name], "float32")
    return values if name.startswith("NaN") or inputs.holds("float32", values) else None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_forward(library, layer, name):
    """Agreement within the tolerance where no difference is known, and a strictly greater error where one is."""
    tried = 0
    limit = tolerance("native", "float32").units
    for module, case in _pairs(library, layer):
        values = _values(case, name)
        hidden = case.affine in ("both", "weight") and name in ("scale 1e-30", "scale 1e-18")
        if values is None or hidden:
            continue
        try:
            with natives.quiet():
                y = measure.call(case, module, measure.arrays(library, case, values, "float32"))
        except natives.Unsupported:
            continue
        tried += 1
        error = units(library.numpy(y), oracle.forward(layer, values, case.options), "float32")
        difference = differences.find(module.NAME, layer, name, case.layout)
        place = f"{module.NAME}, {case.layout}, {case.affine}: {error:.4g} units"
        if difference is None:
            assert error <= limit, place
        else:
            assert error > limit, f"{place}, so that it agrees after all: remove {difference.id} ({difference.reason})"
    if not tried:
        pytest.skip(f"{library.name} has no layer of its own for this")


@pytest.mark.grid(cases=cases.SHORT)
def test_every_case_agrees(library, case):
    """On well-scaled input, y and gradients of native layers are the definitions' and normkit's."""
    tried = 0
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float32")
    given = measure.arrays(library, case, values, "float32")
    reference = oracle.vjp_and_scales(case.layer, values, values["dy"], case.options)
    limit = tolerance("native", "float32").units
    for module in natives.of(library.name):
        if case.count == 1 and case.layer != "batch_norm":
            continue  # nothing but rounding is left of x, and native layers divide it by the root of eps
        try:
            with natives.quiet():
                out, found = measure.gradients(library, case, module, given)
        except natives.Unsupported:
            continue
        tried += 1
        y = library.numpy(out)
        own = (
            library.numpy(nk.batch_norm_train(*case.arguments(given)[0], **case.arguments(given)[1])[0])
            if (case.layer == "batch_norm_train")
            else library.numpy(measure.call(case, nk, given))
        )
        assert units(y, oracle.forward(case.layer, values, case.options), "float32") <= limit, module.NAME
        assert units(y, own, "float32") <= limit, module.NAME
        found = {k: library.numpy(g) for k, g in found.items()}
        error, name = measure.gradient_error(reference, found, "float32")
        assert error <= limit, f"{module.NAME}, gradient of {name}: {error:.4g} units"
    if not tried:
        pytest.skip(f"{library.name} has no layer of its own for this")


@pytest.mark.grid(cases=[c for c in cases.SHORT if c.affine == "both"], dtypes=["float64", "float16", "bfloat16"])
def test_other_dtypes_agree(library, dtype, case):
    tried = 0
    values = inputs.operands(case, inputs.BY_NAME["normal"], dtype)
    given = measure.arrays(library, case, values, dtype)
    for module in natives.of(library.name):
        if module.NAME == "textbook" and dtype == "float16":
            continue  # computed in float16 throughout: no reference for anything
        try:
            with natives.quiet():
                y = measure.call(case, module, given)
        except natives.Unsupported:
            continue
        tried += 1
        error = units(library.numpy(y), oracle.forward(case.layer, values, case.options), dtype)
        assert error <= tolerance("native", dtype).units, f"{module.NAME}: {error:.4g} units"
        assert library.kind(y).dtype == dtype
    if not tried:
        pytest.skip(f"{library.name} has no layer of its own for this")


def test_layouts_that_native_layers_lose(library):
    """torch's instance norm returns a contiguous tensor for a channels_last one; normkit's keeps it (test_forward)."""
    if library.name != "torch":
        pytest.skip("only torch has memory formats")
    case = dataclasses.replace(cases.SITES[1]["instance_norm"], layout="channels_last")
    given = measure.arrays(library, case, inputs.operands(case, inputs.BY_NAME["normal"], "float32"), "float32")
    (module,) = natives.of("torch")
    assert library.kind(measure.call(case, module, given)).layout == "contiguous"
    assert library.kind(measure.call(case, nk, given)).layout == "channels_last"
