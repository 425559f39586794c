"""normkit.convert between layers of every two frameworks: state bit by bit there and back, and the same outputs."""

import importlib

import numpy as np
import pytest

import normkit as nk
from normkit._convert import ConversionError
from normkit._convert.framework import framework
from normkit.conformance.norm_layers import LAST_ONLY, NEEDS, RECORDS, REFUSED, available, axis_in, compute, importing
from normkit.conformance.tolerances import tolerance, units

X = np.random.default_rng(9).normal(0.5, 2.0, (2, 6, 5, 6)).astype(np.float32)


def pytest_generate_tests(metafunc):
    names = available([library.name for library in metafunc.config.libraries])
    if "target" in metafunc.fixturenames:
        rows = [
            (a, b, r) for a in names for b in names for r in RECORDS if a != b and not {(a, r), (b, r)} & set(REFUSED)
        ]
        metafunc.parametrize(("source", "target", "record"), rows)
    elif "source" in metafunc.fixturenames:
        rows = [(a, r) for a in names for r in RECORDS if (a, r) not in REFUSED]
        metafunc.parametrize(("source", "record"), rows)


@pytest.fixture(autouse=True)
def _imported(request):
    with importing():
        for name in ("source", "target"):
            if name in request.fixturenames:
                importlib.import_module(NEEDS[request.getfixturevalue(name)][0])
        yield


def silent(rule, text):
    """Where rules go that are of no interest."""


def made(name, record):
    """A layer of the framework with the record's state."""
    norm = RECORDS[record]
    axis = axis_in(name, norm)
    norm = norm if axis is None else norm.but(axis=(axis,))
    return framework(name).make(framework(name).write(norm, silent))


def taken(name, layer):
    """The layer as its framework says it."""
    if name == "haiku":
        _, params, state = layer
        flat = {f"params/{m}/{k}": np.asarray(v) for m, group in params.items() for k, v in group.items()}
        flat |= {f"state/{m}/{k}": np.asarray(v) for m, group in state.items() for k, v in group.items()}
        ((_, arrays),) = framework("haiku").split(flat)[0].items()
        return arrays
    ((_, native),) = framework(name).layers(layer)
    return native


def converted(name, layer, record, to):
    """``normkit.convert`` of a layer, with what haiku's arrays do not say of themselves."""
    norm = RECORDS[record]
    options = {"axis": axis_in(to, norm), "ndim": 4}
    if name == "haiku":
        axis = axis_in(name, norm)
        native = framework(name).write(norm if axis is None else norm.but(axis=(axis,)), silent)
        settings = {"*": {"layer": native.layer, **native.settings}}
        return nk.convert(layer[1:], to, framework="haiku", settings=settings, **options)
    return nk.convert(layer, to, **options)


def test_round_trip_is_exact(source, target, record):
    there = made(source, record)
    result = converted(source, there, record, target)
    assert type(result.layer) is type(made(target, record))
    back = converted(target, result.layer, record, source)
    before, after = taken(source, there), taken(source, back.layer)
    arrays, again = (before, after) if source == "haiku" else (before.arrays, after.arrays)
    assert arrays.keys() == again.keys()
    for key, value in arrays.items():
        assert value.dtype == again[key].dtype
        np.testing.assert_array_equal(value, again[key], key)
    if source != "haiku":
        eps, momentum = framework(source).eps_name, framework(source).momentum_name
        assert before.settings[eps] == after.settings[eps]
        assert before.settings.get(momentum) == after.settings.get(momentum)


def test_outputs_are_the_same(source, target, record):
    norm = RECORDS[record]
    there = made(source, record)
    result = converted(source, there, record, target)
    first = compute(source, there, norm, X)
    second = compute(target, result.layer, norm, X)
    # Each is as far from the true numbers as native layers may be.
    limit = 2 * tolerance("native", "float32").units
    assert units(second, first, "float32") <= limit


def test_a_new_layer_computes_what_the_record_says(source, record):
    """Against the definition, so that two frameworks cannot be wrong alike."""
    norm = RECORDS[record]
    x = X.astype(np.float64)
    shape = [6 if a == 1 else 1 for a in range(4)]
    if norm.kind == "batch_norm":
        mean, var = norm.mean.reshape(shape), norm.var.reshape(shape)
    else:
        grouped = x.reshape(2, {"group_norm": 3, "instance_norm": 6}.get(norm.kind, 1), -1)
        if norm.kind in ("layer_norm", "rms_norm"):
            mean, var = (f(x, axis=norm.axis, keepdims=True) for f in (np.mean, np.var))
        else:
            mean, var = (
                np.repeat(f(grouped, axis=-1), 6 // grouped.shape[1], axis=1).reshape(2, 6, 1, 1)
                for f in (np.mean, np.var)
            )
        if norm.kind == "rms_norm":
            mean, var = 0.0, np.mean(x**2, axis=norm.axis, keepdims=True)
    parameters = norm.lengths if norm.kind in ("layer_norm", "rms_norm") else shape
    y = (x - mean) / np.sqrt(var + norm.eps) * norm.weight.reshape(parameters)
    y = y if norm.bias is None else y + norm.bias.reshape(parameters)
    found = compute(source, made(source, record), norm, X)
    assert units(found, y, "float32") <= tolerance("native", "float32").units


@pytest.mark.parametrize(("name", "record"), REFUSED, ids="-".join)
def test_what_has_no_equivalent_is_refused_with_the_reason(name, record):
    with pytest.raises(ConversionError, match=REFUSED[name, record]):
        framework(name).write(RECORDS[record], silent)


def test_every_framework_is_tried():
    from normkit._convert.framework import FRAMEWORKS

    assert NEEDS.keys() == FRAMEWORKS.keys()
    assert {name for name, _ in (*LAST_ONLY, *REFUSED)} <= FRAMEWORKS.keys()
