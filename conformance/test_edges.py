"""Where there is next to nothing: empty arrays, single values, infinities, odd strides; what native layers do there."""

import numpy as np
import pytest

import normkit as nk
from normkit.conformance import cases, differences, inputs, measure, natives, oracle
from normkit.conformance.checks import assert_close, strided, unchanged
from normkit.conformance.libraries import first


@pytest.mark.grid(cases=cases.EMPTY, dtypes=["float32", "float16"])
def test_empty(library, dtype, case):
    """An empty y like x, zero gradients for the parameters, and statistics of no elements."""
    values = inputs.operands(case, inputs.BY_NAME["normal"], dtype)
    given = measure.arrays(library, case, values, dtype)
    with unchanged(library, given):
        out = measure.call(case, nk, given)
        _, found = measure.gradients(library, case, nk, given)
    assert_close(library, first(out), np.zeros(case.shape), library.kind(given["x"]), "forward")
    for name, gradient in found.items():
        assert_close(library, gradient, np.zeros(values[name].shape), library.kind(given[name]), "gradient")
    if case.layer == "batch_norm_train":
        count = out[1].count
        assert not np.any(count if isinstance(count, int) else library.numpy(count))
        assert np.isfinite(library.numpy(out[1].mean)).all() and np.isfinite(library.numpy(out[1].var)).all()


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)])
def test_training_on_one_value_per_channel_is_refused(library, shape):
    x = library.array(np.ones(shape), "float32")
    with pytest.raises(ValueError, match=r"one value|single value|more than one"):
        nk.batch_norm_train(x)


@pytest.mark.parametrize("layer", ["layer_norm", "group_norm", "instance_norm"])
def test_a_set_of_one_value_gives_exactly_the_bias(library, layer):
    shape, options = {"layer_norm": ((3, 1), {}), "group_norm": ((2, 4, 1), {"num_groups": 4})}.get(
        layer, ((2, 4, 1), {})
    )
    case = cases.Case(layer, layer, shape, options)
    values = inputs.operands(case, inputs.BY_NAME["offset 1e4"], "float32")
    y = measure.call(case, nk, measure.arrays(library, case, values, "float32"))
    bias = values["bias"] if layer == "layer_norm" else values["bias"][:, None]
    assert np.array_equal(library.numpy(y), np.broadcast_to(bias, shape))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("layer", ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm_train"])
def test_an_infinity_stays_in_its_set(library, layer, value):
    case = cases.SITES[library.channel_axis][layer]
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float32")
    clean = oracle.forward(layer, values, case.options)
    sets = case.sets
    touched = np.zeros(sets.view, bool)
    touched[tuple(slice(None) if a in sets.over else -1 for a in range(len(sets.view)))] = True
    touched = touched.reshape(case.shape)
    values["x"] = values["x"].copy()
    values["x"][(-1,) * len(case.shape)] = value
    given = measure.arrays(library, case, values, "float32")
    with np.errstate(all="ignore"):
        y = library.numpy(first(measure.call(case, nk, given)))
    assert measure.units(y[~touched], clean[~touched], "float32") <= measure.tolerance("forward", "float32").units
    assert not np.isfinite(y[(-1,) * len(case.shape)])


def test_a_mean_whose_sum_is_out_of_range(library):
    """Where sums are in float64, they are divided before they are rounded."""
    if library.name not in ("numpy", "strict", "torch", "tensorflow"):
        pytest.skip(f"{library.name} has no float64 to sum in")
    values = (np.random.default_rng(0).standard_normal((1 << 13, 3)) * 1e34 + 1e35).astype("f4")
    y = nk.batch_norm_train(library.array(values, "float32"), axis=1)[0]
    assert_close(library, y, oracle.batch_norm_train(values, axis=1)[0], library.kind(y), "forward")


@pytest.mark.grid(cases=cases.SITES[1].values())
def test_strides_do_not_matter(library, case):
    values = inputs.operands(case, inputs.BY_NAME["offset 1e2"], "float32")
    given = measure.arrays(library, case, values, "float32")
    views = strided(library, given["x"])
    if not views:
        pytest.skip(f"{library.name} shows no strides")
    for name, x in views.items():
        assert np.array_equal(library.numpy(x), values["x"])
        y = library.numpy(first(measure.call(case, nk, {**given, "x": x})))
        error = measure.units(y, oracle.forward(case.layer, values, case.options), "float32")
        assert error <= measure.tolerance("forward", "float32").units, name


def test_a_row_repeated_by_a_stride_of_zero(library):
    if library.name != "torch":
        pytest.skip("torch's expand; NumPy's broadcast_to is the same to it as any read-only array")
    values = np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32)
    x = library.array(values, "float32").expand(5, 6).requires_grad_()
    y = nk.batch_norm_train(x, axis=0)[0]
    assert_close(library, y, oracle.batch_norm_train(np.repeat(values, 5, 0), axis=0)[0], library.kind(y), "forward")


@pytest.mark.parametrize("id", ["single-value", "empty-batch", "out-dtype"])
def test_known_differences(library, id):
    """Strict: a native layer that does as the definition says has its entry removed."""
    found = [(m, d) for m in natives.of(library.name) for d in differences.named(id, m.NAME)]
    if not found:
        pytest.skip(f"{library.name} has no layer with {id}")
    for module, difference in found:
        assert {"single-value": _single_value, "empty-batch": _empty_batch, "out-dtype": _out_dtype}[id](
            library, module, difference
        ), difference.reason


def _single_value(library, module, difference):
    (layer,) = difference.layers
    axis = library.channel_axis
    case = cases.Case(layer, layer, (2, 4, 1) if layer == "instance_norm" else (1, 4), {"axis": axis})
    given = measure.arrays(library, case, inputs.operands(case, inputs.BY_NAME["normal"], "float32"), "float32")
    try:
        y = measure.call(case, module, given)
    except natives.Unsupported as refused:
        return "refuses one value per channel" in str(refused)
    return np.allclose(library.numpy(y), library.numpy(given["bias"]), atol=1e-5)


def _empty_batch(library, module, difference):
    steps = [library.array(np.zeros((0, 3)), "float32")]
    _, var = module.running_statistics(steps, "float32", axis=-1, momentum=0.9)
    return np.isnan(library.numpy(var)).all()


def _out_dtype(library, module, difference):
    from flax import nnx

    x = library.array(np.ones((2, 3)), "float16")
    return all(
        library.kind(layer(x)).dtype == "float32"
        for layer in (
            nnx.LayerNorm(3, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
            nnx.RMSNorm(3, rngs=nnx.Rngs(0)),
        )
    )
