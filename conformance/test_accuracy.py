"""The stated bound: float32 within 2 units of 2**-23 of max |y| at any offset and scale; constants; NaN contained."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.conformance import inputs, measure, oracle
from normkit.conformance.libraries import first
from normkit.conformance.tolerances import ONE_FAR_OFF, SHORTFALLS, tolerance, units

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


@pytest.mark.parametrize(
    ("layer", "shape", "options"),
    [
        ("layer_norm", (8, 868), {}),
        ("layer_norm", (4, 4096), {}),
        ("rms_norm", (4, 4096), {}),
        ("batch_norm_train", (256, 64), {}),
        ("batch_norm_train", (2048, 1, 2), {}),
        ("batch_norm_train", (1024, 4, 4), {}),
        ("batch_norm_train", (64, 16, 7, 7), {}),
        ("batch_norm_train", (8, 3, 32, 32), {}),
        ("batch_norm_train", (64, 7, 7, 64), {"axis": -1}),
        ("group_norm", (4, 8, 28, 28), {"num_groups": 4}),
        ("instance_norm", (4, 8, 28, 28), {}),
    ],
)
def test_one_value_far_from_all_others(library, layer, shape, options):
    """Its square is larger than all others together, whose roundings against it all lean the same way."""
    by_layer = {"layer_norm": (1,), "rms_norm": (1,), "batch_norm_train": (0, 2, 3), "instance_norm": (2, 3)}
    over = (0, 1, 2) if options.get("axis") == -1 else by_layer.get(layer, (1, 2, 3))
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = np.full(shape, 10 ** rng.uniform(-1, 1))
        x[tuple(0 if a in over else slice(None) for a in range(len(shape)))] *= 1 + 10 ** rng.uniform(-4, 1)
        x = inputs.rounded(x, "float32")
        expected = oracle.forward(layer, {"x": x}, options)
        given = library.array(x, "float32")
        found = units(library.numpy(first(getattr(nk, layer)(given, **options))), expected, "float32")
        assert found <= tolerance("forward", "float32").units, f"seed {seed}: {found:.4g} units"
        with kernels.off():
            found = units(library.numpy(first(getattr(nk, layer)(given, **options))), expected, "float32")
        assert found <= ONE_FAR_OFF.get(library.name, tolerance("forward", "float32")).units, (
            f"seed {seed}: {found:.4g}"
        )


#: Beyond it a graph of JAX or TensorFlow has the reciprocal of a root mean square as a subnormal, taken for zero.
GRAPHS_DIVIDE_BY = 2.0**126


@pytest.mark.parametrize("served", [True, False], ids=["", "plain"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "batch_norm"])
def test_the_ends_of_the_range(library, layer, served):
    """Differences, their sums and squares are beyond the dtype, and the reciprocal of the spread is subnormal."""
    rng = np.random.default_rng(11)
    shape, options = (4, 6, 10), {"num_groups": 3} if layer == "group_norm" else {}
    signs = np.where(rng.uniform(size=shape) < 0.9, -1.0, 1.0)
    for mode in ("", *library.modes):
        graph = library.name == "jax" or mode.startswith("tf.function")
        plain = not (served and kernels.built and kernels.mode != "0")
        end = 0.9 * GRAPHS_DIVIDE_BY if layer == "rms_norm" and graph and plain else 3.4e38
        for values in (end * signs, np.full(shape, end), end * signs * rng.uniform(size=shape)):
            values = inputs.rounded(values, "float32")
            expected = oracle.forward(layer, {"x": values}, options)
            x, dy = (library.array(a, "float32") for a in (values, rng.normal(size=shape)))
            function = functools.partial(getattr(nk, layer), **options)
            with contextlib.nullcontext() if served else kernels.off():
                compiled = library.compiled(lambda x, run=function: run(x), mode) if mode else function
                out, gradients = library.vjp(compiled, [x], {}, dy)
            assert units(library.numpy(first(out)), expected, "float32") <= tolerance("forward", "float32").units, mode
            found = [*gradients.values(), *(out[1][:2] if isinstance(out, tuple) else ())]
            assert all(np.isfinite(library.numpy(a)).all() for a in found), mode


@pytest.mark.parametrize("served", [True, False], ids=["", "plain"])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("value", [0.0, 1e-20, 3.0, 4.2667753e21])
def test_the_gradient_of_a_constant(library, value, eps, served):
    """There is no spread: what is divided by is the root of eps, or 1 in place of 0."""
    x = library.array(np.full((5, 235), value), "float32")
    dy = np.random.default_rng(8).normal(size=(5, 235)).astype("f4")
    with contextlib.nullcontext() if served else kernels.off():
        _, pullback = nk.vjp(nk.layer_norm, x, eps=eps)
        (dx,) = pullback(library.array(dy, "float32"))
    expected = (dy - dy.mean(axis=1, keepdims=True, dtype="f8")) / (eps**0.5 or 1.0)
    assert units(library.numpy(dx), expected, "float32") <= tolerance("gradient", "float32").units


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
