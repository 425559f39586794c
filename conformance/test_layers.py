"""The layers: the functions with parameters, running statistics in every convention, modes, state and copies."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

import normkit as nk
from normkit.backends import NAMES
from normkit.conformance import cases, inputs, measure, oracle
from normkit.conformance.checks import assert_close, unchanged

CLASSES = {
    "layer_norm": nk.LayerNorm,
    "rms_norm": nk.RMSNorm,
    "group_norm": nk.GroupNorm,
    "instance_norm": nk.InstanceNorm,
    "batch_norm": nk.BatchNorm,
    "batch_norm_train": nk.BatchNorm,
}

#: How a layer is told its convention, and the same in the words of RunningStats.update.
CONVENTIONS = {
    "default": ({}, {"momentum": 0.9, "unbiased": True}),
    "torch": ({"update_rate": 0.1}, {"momentum": 0.9, "unbiased": True}),
    "torch, slower": ({"update_rate": 0.01}, {"momentum": 0.99, "unbiased": True}),
    "torch, all batches alike": ({"momentum": None}, {"momentum": None, "unbiased": True}),
    "Keras, Flax": ({"momentum": 0.99, "unbiased": False}, {"momentum": 0.99, "unbiased": False}),
    "ONNX": ({"momentum": 0.9, "unbiased": False}, {"momentum": 0.9, "unbiased": False}),
    "biased, all alike": ({"momentum": None, "unbiased": False}, {"momentum": None, "unbiased": False}),
    "only the newest": ({"update_rate": 1.0}, {"momentum": 0.0, "unbiased": True}),
}

SITES = tuple(case for axis in (1, -1) for layer, case in cases.SITES[axis].items() if layer != "batch_norm")
THRIFTY = tuple({case.layer: case for case in SITES}.values())


def _home(library):
    """Where parameters live: a registered library by name, another by its namespace."""
    return library.name if library.name in NAMES else library.xp


def _layer(library, case, dtype="float32", **options):
    """The layer for a case, its parameters in the library."""
    options = {**case.options, "dtype": dtype, "backend": _home(library), **options}
    groups = [options.pop("num_groups")] if "num_groups" in options else []
    return CLASSES[case.layer](*groups, *case.param_shape, **options)


def _batch_norm(library, channels=4, **options):
    return _layer(library, cases.Case("", "batch_norm_train", (2, channels)), **options)


def _trained(library, steps=3, **options):
    """A batch norm layer with parameters and statistics of its own, and an array to try it on."""
    rng = np.random.default_rng(4)
    layer = _batch_norm(library, **options)
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            setattr(layer, name, library.array(rng.normal(size=4), layer.dtype))
    for _ in range(steps):
        layer(library.array(rng.normal(1, 2, (6, 4)), "float32"))
    return layer, library.array(rng.normal(1, 2, (5, 4)), "float32")


def _same_running(library, a, b):
    pairs = zip(a.running[:2], b.running[:2], strict=True)
    equal = all(np.array_equal(library.numpy(x), library.numpy(y)) for x, y in pairs)
    return equal and int(a.running.num_batches) == int(b.running.num_batches)


def _same(library, a, b, x):
    """Whether two layers are equal in what they know and what they compute."""
    state, other = a.state_dict(), b.state_dict()
    arrays = [name for name in state if name != "num_batches_tracked"]
    return (
        (repr(a), a.training, list(state)) == (repr(b), b.training, list(other))
        and all(library.kind(state[n]) == library.kind(other[n]) for n in arrays)
        and all(np.array_equal(library.numpy(state[n]), library.numpy(other[n])) for n in arrays)
        and int(state.get("num_batches_tracked", 0)) == int(other.get("num_batches_tracked", 0))
        and np.array_equal(library.numpy(a(x)), library.numpy(b(x)))
    )


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.grid(cases=SITES, thrifty=THRIFTY, dtypes=["float32"])
def test_a_layer_is_its_function_with_parameters(library, dtype, case, affine):
    """In value and gradients, by the parameters' names."""
    case = dataclasses.replace(case, affine=affine)
    values = inputs.operands(case, inputs.BY_NAME["normal"], dtype)
    given = measure.arrays(library, case, values, dtype)
    names = cases.AFFINE[affine]
    layer = _layer(library, case, affine=affine != "none", bias=affine == "both")
    assert tuple(n for n in ("weight", "bias") if getattr(layer, n) is not None) == names
    for name in names:
        assert library.kind(getattr(layer, name)) == library.kind(given[name])
        setattr(layer, name, given[name])
    with unchanged(library, given):
        y, pullback = layer.vjp(given["x"])
        dx, found = pullback(given["dy"])
        again = layer(given["x"])
    assert tuple(found) == names
    reference, scales = oracle.vjp_and_scales(case.layer, values, values["dy"], case.options)
    for out in (y, again):
        assert_close(
            library, out, oracle.forward(case.layer, values, case.options), library.kind(given["x"]), "forward"
        )
    for name, gradient in {"x": dx, **found}.items():
        assert_close(library, gradient, reference[name], library.kind(given[name]), "gradient", scales[name])


@pytest.mark.grid(cases=SITES, thrifty=THRIFTY)
def test_parameters_start_as_identity(library, case):
    plain = dataclasses.replace(case, affine="none")
    values = inputs.operands(plain, inputs.BY_NAME["normal"], "float32")
    x = library.array(values["x"], "float32")
    assert_close(
        library, _layer(library, case)(x), oracle.forward(case.layer, values, case.options), library.kind(x), "forward"
    )


def test_a_weight_that_is_a_deviation_starts_at_zero(library):
    layer = _layer(library, cases.Case("", "rms_norm", (3, 5)), weight_offset=1.0)
    assert not library.numpy(layer.weight).any()
    x = library.array(np.arange(1.0, 16).reshape(3, 5), "float32")
    assert np.array_equal(library.numpy(layer(x)), library.numpy(nk.rms_norm(x)))


def test_several_axes(library):
    case = cases.Case("", "layer_norm", (3, 7, 5), {"axis": (2, 1)})
    layer = nk.LayerNorm((7, 5), axis=(2, 1), backend=_home(library))
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float32")
    given = measure.arrays(library, case, values, "float32")
    layer.weight, layer.bias = given["weight"], given["bias"]
    reference = oracle.forward("layer_norm", values, case.options)
    assert_close(library, layer(given["x"]), reference, library.kind(given["x"]), "forward")


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.grid(dtypes=["float32", "float64"])
def test_ten_steps(library, dtype, convention):
    """Running statistics are those of RunningStats by hand, and of the definition."""
    told, meant = CONVENTIONS[convention]
    case = cases.SITES[library.channel_axis]["batch_norm_train"]
    axis, channels = case.options["axis"], case.param_shape
    layer = _layer(library, case, dtype, **told)
    by_hand, values = layer.running, []
    for k in range(measure.STEPS):
        values.append(inputs.operands(dataclasses.replace(case, id=f"step {k}"), inputs.BY_NAME["normal"], dtype)["x"])
        x = library.array(values[-1], dtype)
        by_hand = by_hand.update(nk.batch_norm_train(x, axis=axis)[1], **meant)
        _ = layer.vjp(x) if k % 2 else layer(x)
    mean, var, n = oracle.running_statistics(values, np.zeros(channels), np.ones(channels), axis=axis, **meant)
    kind = library.kind(layer.weight)
    for found in (layer.running, by_hand):
        assert_close(library, found.mean, mean, kind, "running", np.abs(values).max())
        assert_close(library, found.var, var, kind, "running")
        assert int(found.num_batches) == n == measure.STEPS


@pytest.mark.grid(dtypes=["float16", "bfloat16"])
def test_statistics_of_narrow_layers_are_float32(library, dtype):
    layer = _batch_norm(library, dtype=dtype)
    x = library.array(np.arange(12.0).reshape(3, 4), dtype)
    assert library.kind(layer(x)) == library.kind(x)
    assert library.kind(layer.weight).dtype == dtype
    assert {library.kind(a).dtype for a in layer.running[:2]} == {"float32"}


def test_inference_takes_running_statistics_and_leaves_them(library):
    layer, x = _trained(library)
    assert layer.training and layer.eval() is layer and not layer.training
    before = layer.running
    mean, var = library.numpy(before.mean), library.numpy(before.var)
    weight, bias = library.numpy(layer.weight), library.numpy(layer.bias)
    reference = oracle.batch_norm(library.numpy(x), mean, var, weight, bias)
    y, pullback = layer.vjp(x)
    for out in (layer(x), y):
        assert_close(library, out, reference, library.kind(x), "forward")
    dx, found = pullback(y)
    operands = {"x": library.numpy(x), "mean": mean, "var": var, "weight": weight, "bias": bias}
    expected, scales = oracle.vjp_and_scales("batch_norm", operands, library.numpy(y), {})
    for name, gradient in {"x": dx, **found}.items():
        assert_close(library, gradient, expected[name], library.kind(x), "gradient", scales[name])
    assert set(found) == {"weight", "bias"} and layer.running is before
    assert layer.train() is layer and layer.training
    assert layer(x) is not None and layer.running is not before


@pytest.mark.parametrize("training", [True, False])
def test_mask(library, training):
    layer, x = _trained(library)
    layer.train(training)
    before = layer.running
    valid = np.random.default_rng(0).random((5, 4)) > 0.4
    mask, statistics = library.array(valid, "bool"), oracle.batch_statistics(library.numpy(x), mask=valid)
    if not training:
        statistics = before
    mean, var = (np.asarray(library.numpy(a) if not training else a) for a in statistics[:2])
    weight, bias = library.numpy(layer.weight), library.numpy(layer.bias)
    reference = np.where(valid, oracle.batch_norm(library.numpy(x), mean, var, weight, bias), 0)
    y, pullback = layer.vjp(x, mask=mask)
    dx, found = pullback(x)
    assert_close(library, y, reference, library.kind(x), "forward")
    assert_close(library, layer(x, mask=mask), reference, library.kind(x), "forward")
    assert not library.numpy(dx)[~valid].any() and library.numpy(dx)[valid].all()
    expected = np.where(valid, library.numpy(x), 0).sum(axis=0)
    assert_close(library, found["bias"], expected, library.kind(x), "gradient")
    assert (layer.running is before) is not training
    assert int(layer.running.num_batches) == int(before.num_batches) + 2 * training
    assert layer.state_dict().keys() == _batch_norm(library).state_dict().keys()


def test_state_round_trip(library):
    layer, x = _trained(library)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert state["num_batches_tracked"] == 3
    other = _batch_norm(library)
    other.load_state_dict(state)
    assert _same(library, other.eval(), layer.eval(), x)


def test_state_is_a_copy(library):
    state = _trained(library)[0].state_dict()
    layer = _batch_norm(library)
    layer.load_state_dict(state)
    again = layer.state_dict()
    kept = {name: library.numpy(a).copy() for name, a in state.items() if name != "num_batches_tracked"}
    layer.weight *= 2
    layer.bias += 1
    layer(library.array(np.arange(8.0).reshape(2, 4), "float32"))
    for name, values in kept.items():
        assert np.array_equal(library.numpy(state[name]), values), name
        assert np.array_equal(library.numpy(again[name]), values), name
        assert not np.array_equal(library.numpy(layer.state_dict()[name]), values), name
    assert (again["num_batches_tracked"], layer.state_dict()["num_batches_tracked"]) == (3, 4)


def test_state_from_numpy(library):
    """What files hold; numbers arrive in the layer's library and dtype."""
    layer, x = _trained(library)
    names = ("weight", "bias", "running_mean", "running_var")
    state = {name: np.asarray(library.numpy(layer.state_dict()[name])) for name in names}
    other = _batch_norm(library)
    other.load_state_dict({**state, "num_batches_tracked": np.asarray(3)})
    assert _same(library, other.eval(), layer.eval(), x)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"momentum": None}])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "pickle"])
def test_duplicates(library, duplicate, options):
    layer, x = _trained(library, **options)
    twin = duplicate(layer.eval())
    assert _same(library, twin, layer, x)
    twin.train()(x)
    assert not _same_running(library, twin, layer)


@pytest.mark.grid(cases=THRIFTY)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "pickle"])
def test_duplicates_of_every_layer(library, duplicate, case):
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float32")
    given = measure.arrays(library, case, values, "float32")
    layer = _layer(library, case)
    layer.weight = given["weight"]
    assert _same(library, duplicate(layer), layer, given["x"])


def test_an_empty_batch_leaves_statistics_alone(library):
    layer, _ = _trained(library)
    twin = copy.deepcopy(layer)
    x = library.array(np.zeros((0, 4)), "float32")
    y, pullback = layer.vjp(x)
    dx, found = pullback(x)
    for a in (y, dx, layer(x), layer.eval()(x)):
        assert library.kind(a) == library.kind(x) and library.numpy(a).shape == (0, 4)
    assert not any(library.numpy(g).any() for g in found.values())
    assert _same_running(library, layer, twin)


def test_a_call_that_fails_leaves_statistics_alone(library):
    layer, x = _trained(library)
    before = layer.running
    layer.weight = library.array(np.ones(3), "float32")
    for call in (layer, layer.vjp):
        with pytest.raises(ValueError, match=r"weight must have shape \(4,\); received shape \(3,\)"):
            call(x)
    layer.weight, layer.momentum = None, 1.5
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]; received 1.5"):
        layer(x)
    assert layer.running is before


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1)])
def test_one_value_per_channel(library, shape):
    x = library.array(np.arange(4.0).reshape(shape), "float32")
    strict, lenient = (_trained(library, single_value=policy)[0] for policy in ("raise", "running"))
    before = strict.running
    with pytest.raises(ValueError, match="more than one value per channel"):
        strict(x)
    assert strict.running is before
    before = lenient.running
    known = [library.numpy(a) for a in (*before[:2], lenient.weight, lenient.bias)]
    for y in (lenient(x), lenient.vjp(x)[0]):
        assert_close(library, y, oracle.batch_norm(library.numpy(x), *known), library.kind(x), "forward")
    assert lenient.training and lenient.running is before
    lenient(library.array(np.arange(8.0).reshape(2, 4), "float32"))
    assert lenient.running is not before


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nk.BatchNorm(64), "BatchNorm(64)"),
        (nk.BatchNorm(64, momentum=None), "BatchNorm(64, momentum=None)"),
        (nk.BatchNorm(64, update_rate=0.1), "BatchNorm(64)"),
        (nk.BatchNorm(64, update_rate=0.07), "BatchNorm(64, momentum=0.93)"),
        (
            nk.BatchNorm(3, single_value="running", unbiased=False, axis=-1),
            "BatchNorm(3, axis=-1, unbiased=False, single_value='running')",
        ),
        (nk.BatchNorm(3, affine=False), "BatchNorm(3, affine=False)"),
        (nk.BatchNorm(3, bias=False, dtype=np.float64), "BatchNorm(3, bias=False, dtype='float64')"),
        (nk.LayerNorm(768), "LayerNorm(768)"),
        (nk.LayerNorm((3, 4), axis=(1, 2), eps=1e-3), "LayerNorm((3, 4), axis=(1, 2), eps=0.001)"),
        (nk.RMSNorm(768, weight_offset=1.0), "RMSNorm(768, weight_offset=1)"),
        (nk.RMSNorm(768, bias=True), "RMSNorm(768, bias=True)"),
        (nk.GroupNorm(32, 64), "GroupNorm(32, 64)"),
        (nk.InstanceNorm(64, affine=False), "InstanceNorm(64, affine=False)"),
    ],
)
def test_repr(layer, text):
    assert repr(layer) == text
    twin = eval(text, vars(nk))
    assert repr(twin) == text and list(twin.state_dict()) == list(layer.state_dict())


def test_repr_names_the_library(library):
    name = library.name if library.name in NAMES else library.module
    assert repr(_batch_norm(library)) == ("BatchNorm(4)" if name == "numpy" else f"BatchNorm(4, backend='{name}')")
