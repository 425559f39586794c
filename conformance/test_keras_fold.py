"""normkit.fold on Keras's models: every layer that a batch norm goes into, what is left and why, what is refused."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import normkit as nk
from normkit.conformance.keras_calls import array

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # The last axis may be of a length that no one tuned for.
    pytest.mark.filterwarnings("ignore:.*padding='same' with even kernel lengths:UserWarning"),
]

L: Any = keras.layers

#: Half of float32's digits, as fold itself asks for, is 3.5e-4; roundings of a few layers are some units of 2^-23.
NEAR = 1e-5


def filled(model, seed=0):
    """The model with other numbers, variances and scales positive."""
    rng = np.random.default_rng(seed)
    for v in model.variables:
        if v.name in ("moving_variance", "gamma"):
            v.assign(rng.uniform(0.3, 2, v.shape))
        elif keras.backend.is_float_dtype(v.dtype):
            v.assign(rng.normal(0, 0.5, v.shape))
    return model


def x(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("f4")


def net(*layers, shape=(9, 9, 4)):
    return filled(keras.Sequential([keras.Input(shape), *layers]))


def near(found, expected):
    found, expected = array(found), array(expected)
    assert abs(found - expected).max() <= NEAR * abs(expected).max()


def state(model):
    return [(v.name, array(v)) for v in model.weights], [type(layer) for layer in model._flatten_layers()]


def same(a, b):
    return a[1] == b[1] and all(m == n and (p == q).all() for (m, p), (n, q) in zip(a[0], b[0], strict=True))


LINEAR = {
    "dense": (lambda **o: L.Dense(5, **o), (6,)),
    "dense of three axes": (lambda **o: L.Dense(5, **o), (3, 6)),
    "conv 1d": (lambda **o: L.Conv1D(5, 3, **o), (9, 4)),
    "conv 1d causal": (lambda **o: L.Conv1D(5, 3, padding="causal", **o), (9, 4)),
    "conv 2d": (lambda **o: L.Conv2D(5, (3, 2), strides=2, **o), (9, 9, 4)),
    "conv 2d same": (lambda **o: L.Conv2D(5, 3, padding="same", **o), (9, 9, 4)),
    "conv 2d grouped": (lambda **o: L.Conv2D(6, 3, groups=2, **o), (9, 9, 4)),
    "conv 3d": (lambda **o: L.Conv3D(5, 2, **o), (4, 4, 4, 3)),
    "depthwise 1d": (lambda **o: L.DepthwiseConv1D(3, depth_multiplier=2, **o), (9, 4)),
    "depthwise 2d": (lambda **o: L.DepthwiseConv2D(3, depth_multiplier=2, **o), (9, 9, 4)),
    "separable 1d": (lambda **o: L.SeparableConv1D(5, 3, depth_multiplier=2, **o), (9, 4)),
    "separable 2d": (lambda **o: L.SeparableConv2D(5, (3, 2), depth_multiplier=3, **o), (9, 9, 4)),
    "separable 2d same": (lambda **o: L.SeparableConv2D(5, 3, strides=2, padding="same", **o), (9, 9, 4)),
    "transposed 1d": (lambda **o: L.Conv1DTranspose(5, 3, strides=2, **o), (5, 4)),
    "transposed 2d": (lambda **o: L.Conv2DTranspose(5, 3, strides=2, padding="same", **o), (5, 5, 4)),
    "transposed 3d": (lambda **o: L.Conv3DTranspose(3, 2, **o), (3, 3, 3, 2)),
}
PARTS = {"all": {}, "no scale": {"scale": False}, "no center": {"center": False}}
BEHIND = [kind for kind in LINEAR if not kind.startswith("transposed") and "same" not in kind and "causal" not in kind]


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", LINEAR)
def test_into_the_layer_before(kind, parts, use_bias):
    build, shape = LINEAR[kind]
    model = net(build(use_bias=use_bias, name="linear"), L.BatchNormalization(name="norm", **PARTS[parts]), shape=shape)
    inputs = x(3, *shape)
    before = model(inputs)
    report = nk.fold(model, inputs)
    assert [(n.name, n.kind, n.into) for n in report.changed] == [("norm", "keras.layers.BatchNormalization", "linear")]
    assert not report.left and report.error <= NEAR
    near(model(inputs), before)
    assert [v.name for v in model.weights if not v.name.endswith("kernel")] == ["bias"]


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", BEHIND)
def test_into_the_layer_behind(kind, use_bias):
    build, shape = LINEAR[kind]
    model = net(L.BatchNormalization(), build(use_bias=use_bias, activation="tanh"), shape=shape)
    inputs = x(3, *shape)
    before = model(inputs)
    report = nk.fold(model, inputs)
    assert len(report.changed) == 1 and not report.left
    near(model(inputs), before)


#: Equation, shape of what comes out, axes of the bias, of the norm before or behind, and shape of what goes in.
EINSUMS = {
    "behind": (("abc,cd->abd", (3, 5), "d"), -1, True, (3, 6)),
    "behind, of any rank": (("...c,cd->...d", 5, "d"), -1, True, (2, 3, 6)),
    "behind, the first axis": (("ab...,bc->ac...", 5, "c"), 1, True, (6, 3, 2)),
    "behind, moved": (("abc,cd->adb", (5, 3), "d"), 1, True, (3, 6)),
    "behind heads": (("abc,cde->abde", (3, 2, 5), "de"), -1, True, (3, 6)),
    "behind heads, one of two": (("abc,cde->abde", (3, 2, 5), "de"), 2, True, (3, 6)),
    "behind, one kernel a row": (("abc,bcd->abd", (3, 5), "d"), -1, True, (3, 6)),
    "behind, one bias a row": (("abc,cd->abd", (3, 5), "bd"), -1, True, (3, 6)),
    "before": (("abc,cd->abd", (3, 5), "d"), -1, False, (3, 6)),
    "before, of any rank": (("...c,cd->...d", 5, "d"), -1, False, (2, 3, 6)),
    "before, the first axis": (("ab...,bc->ac...", 5, "c"), 1, False, (6, 3, 2)),
    "before heads, turned": (("abc,cde->aedb", (5, 2, 3), "ed"), -1, False, (3, 6)),
    "before, one kernel a row": (("abc,bcd->abd", (3, 5), "bd"), -1, False, (3, 6)),
}


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", EINSUMS)
def test_einsum(case, biased, tmp_path):
    (equation, made, axes), axis, after, shape = EINSUMS[case]
    norm = L.BatchNormalization(axis=axis, name="norm")
    linear = L.EinsumDense(equation, made, bias_axes=axes if biased else None, name="linear")
    model = net(*((linear, norm) if after else (norm, linear)), shape=shape)
    inputs = x(3, *shape)
    before, held = model(inputs), state(model)
    report = nk.fold(model, inputs, tolerance=0.0)
    assert "linear would be off by" in report.left[0].reason and same(state(model), held)
    assert linear.bias_axes == (axes if biased else None)
    report = nk.fold(model, inputs)
    assert [(n.name, n.into) for n in report.changed] == [("norm", "linear")] and not report.left
    near(model(inputs), before)
    model.save(tmp_path / "model.keras")
    near(keras.saving.load_model(tmp_path / "model.keras")(inputs), before)


def test_from_both_sides_into_one():
    model = net(L.BatchNormalization(), L.Conv2D(5, 3), L.BatchNormalization(), L.ReLU())
    before = model(x(2, 9, 9, 4))
    report = nk.fold(model, x(2, 9, 9, 4))
    assert len(report.changed) == 2
    near(model(x(2, 9, 9, 4)), before)


def test_channels_first():
    model = net(L.Dense(4), L.BatchNormalization(axis=1), shape=(4, 4))
    report = nk.fold(model, x(3, 4, 4))
    assert report.left[0].reason.endswith("has its channels on another axis")


def branching(twice):
    """What a convolution makes is normalized and added to itself, or to what a norm makes of it."""
    inputs = keras.Input((9, 9, 4))
    y = L.Conv2D(5, 3, name="conv")(inputs)
    z = L.BatchNormalization(name="norm")(y)
    z = L.Add()([z, L.ReLU()(y)]) if twice else z
    # Another pair behind it must not hide this.
    z = L.BatchNormalization(name="behind")(L.Conv2D(3, 1, name="other")(z))
    return filled(keras.Model(inputs, z))


@pytest.mark.parametrize("twice", [True, False])
def test_what_goes_elsewhere_as_well(twice):
    model = branching(twice)
    before = model(x(2, 9, 9, 4))
    report = nk.fold(model, x(2, 9, 9, 4))
    assert {n.name: n.reason for n in report.left} == (
        {"norm": "what is between it and conv goes elsewhere as well"} if twice else {}
    )
    near(model(x(2, 9, 9, 4)), before)


class OwnDense(L.Dense):
    """A dense layer that doubles."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


class OwnNorm(L.BatchNormalization):
    """A batch norm that doubles."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


def adapted():
    model = net(L.Dense(5, name="linear"), L.BatchNormalization(), shape=(6,))
    model.layers[0].enable_lora(2)
    return model


def twice(which):
    inputs = keras.Input((6,))
    linear, norm = L.Dense(6, name="linear"), L.BatchNormalization(name="norm")
    y = norm(linear(inputs))
    y = norm(L.ReLU()(y)) if which == "norm" else linear(L.ReLU()(y))
    return filled(keras.Model(inputs, y))


LEFT = {
    "padded": (
        lambda: net(L.BatchNormalization(), L.Conv2D(5, 3, padding="same")),
        "the convolution behind it pads zeros, which its shift would have to pass by",
    ),
    "transposed": (
        lambda: net(L.BatchNormalization(), L.Conv2DTranspose(5, 3)),
        "the transposed convolution behind it does not meet its shift at every tap",
    ),
    "einsum of several axes": (
        lambda: net(L.BatchNormalization(), L.EinsumDense("abc,cd->ad", 5, name="linear"), shape=(3, 6)),
        "linear, beside it, sums over other axes as well",
    ),
    "einsum without an axis": (
        lambda: net(L.BatchNormalization(), L.EinsumDense("abc,c->ab", 3, name="linear"), shape=(3, 6)),
        "linear, beside it, has no axis for a bias",
    ),
    "einsum's other axis": (
        lambda: net(L.EinsumDense("abc,cd->abd", (3, 5), name="linear"), L.BatchNormalization(axis=1), shape=(3, 6)),
        "linear, beside it, has its channels on another axis",
    ),
    "einsum's other bias": (
        lambda: net(
            L.EinsumDense("abc,cd->abd", (3, 5), bias_axes="b", name="linear"), L.BatchNormalization(), shape=(3, 6)
        ),
        "linear, beside it, has a bias along other axes",
    ),
    "separable, padded": (
        lambda: net(L.BatchNormalization(), L.SeparableConv2D(5, 3, padding="same")),
        "the convolution behind it pads zeros, which its shift would have to pass by",
    ),
    "activation": (
        lambda: net(L.Dense(5, activation="relu", name="linear"), L.BatchNormalization(), shape=(6,)),
        "the activation of linear stands between them",
    ),
    "own dense": (
        lambda: net(OwnDense(5, name="linear"), L.BatchNormalization(), shape=(6,)),
        "linear, beside it, is a subclass with a call of its own",
    ),
    "own norm": (
        lambda: net(L.Dense(5), OwnNorm(), shape=(6,)),
        "it is a subclass with a call of its own",
    ),
    "adapter": (adapted, "linear, beside it, has a LoRA adapter"),
    "alone": (
        lambda: net(L.ReLU(), L.BatchNormalization(), L.ReLU(), shape=(6,)),
        "no convolution or dense layer stands right before or behind it",
    ),
    "norm twice": (lambda: twice("norm"), "it is called 2 times"),
    "linear twice": (lambda: twice("linear"), "linear, beside it, is called 2 times"),
    "in a model": (
        lambda: net(
            keras.Sequential([keras.Input((6,)), L.Dense(5, activation="relu", name="linear")], name="inner"),
            L.BatchNormalization(),
            shape=(6,),
        ),
        "the activation of inner/linear stands between them",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_and_why(case):
    build, reason = LEFT[case]
    model = build()
    before, kinds = [array(v) for v in model.variables], [type(layer) for layer in model._flatten_layers()]
    report = nk.fold(model, x(2, *model.input_shape[1:]))
    assert [n.reason for n in report.left] == [reason] and not report.changed
    assert all((array(v) == b).all() for v, b in zip(model.variables, before, strict=True))
    assert [type(layer) for layer in model._flatten_layers()] == kinds


def test_one_that_pads_nothing():
    model = net(L.BatchNormalization(), L.Conv2D(5, 1, padding="same", strides=2))
    before = model(x(2, 9, 9, 4))
    assert nk.fold(model, x(2, 9, 9, 4)).changed
    near(model(x(2, 9, 9, 4)), before)


def test_what_would_be_off_is_left_as_it_was():
    model = net(L.Conv2D(5, 3, use_bias=False, name="conv"), L.BatchNormalization(name="norm"))
    before = state(model)
    report = nk.fold(model, x(2, 9, 9, 4), tolerance=0.0)
    assert "conv would be off by" in report.left[0].reason and same(state(model), before)
    y = model(x(2, 9, 9, 4))

    def call(model, sample):
        # Twice as much as soon as it is folded.
        return model(sample) * (1 + (not isinstance(model.layers[1], L.BatchNormalization)))

    with pytest.raises(
        ValueError, match="fold left Sequential as it was: with 1 norms folded, its output would be off"
    ):
        nk.fold(model, x(2, 9, 9, 4), call=call)
    assert same(state(model), before) and (array(model(x(2, 9, 9, 4))) == array(y)).all()
    assert not model.layers[0].use_bias
    nk.fold(model, x(2, 9, 9, 4))
    near(model(x(2, 9, 9, 4)), y)


def test_a_graph_that_is_left_has_the_arguments_that_it_had():
    inputs = keras.Input((9, 9, 4))
    y = L.BatchNormalization()(L.Conv2D(5, 3, use_bias=False)(inputs), training=False)
    model = filled(keras.Model(inputs, y))
    before = model.get_config()

    def call(model, sample):
        return model(sample) * len(model.weights)

    with pytest.raises(ValueError, match="fold left Functional as it was"):
        nk.fold(model, x(2, 9, 9, 4), call=call)
    assert model.get_config() == before


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folded_model_is_saved_and_read(tmp_path, replaced):
    """Without normkit and without the norms, also where ``training`` was given."""
    inputs = keras.Input((9, 9, 4))
    y = L.BatchNormalization(name="norm")(L.Conv2D(5, 3, use_bias=False)(inputs), training=False)
    model = filled(keras.Model(inputs, L.ReLU()(y)))
    model.compile("sgd", "mse")
    if replaced:
        nk.replace(model)
    before = model.predict(x(2, 9, 9, 4), verbose=0)
    assert len(nk.fold(model, x(2, 9, 9, 4)).changed) == 1
    near(model.predict(x(2, 9, 9, 4), verbose=0), before)
    model.save(tmp_path / "model.keras")
    read = keras.saving.load_model(tmp_path / "model.keras")
    assert type(read.get_layer("norm")) is L.Identity and len(read.weights) == 2
    near(read(x(2, 9, 9, 4)), before)


def test_a_subclassed_model():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = L.Conv2D(5, 3, use_bias=False), L.BatchNormalization()

        def call(self, x, training=None):
            return {"y": keras.ops.relu(self.norm(self.conv(x), training=training))}

    model = Net()
    model(x(2, 9, 9, 4))
    before = filled(model)(x(2, 9, 9, 4))["y"]
    assert len(nk.fold(model, x(2, 9, 9, 4)).changed) == 1
    near(model(x(2, 9, 9, 4))["y"], before)


BAD = {
    "no norm": (lambda: net(L.Dense(2), shape=(6,)), "fold found no batch norm in Sequential"),
    "not built": (
        lambda: keras.Sequential([L.Dense(2), L.BatchNormalization(name="bn")]),
        "fold needs numbers; bn is not built yet",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    build, text = BAD[case]
    with pytest.raises(ValueError, match=text):
        nk.fold(build(), x(2, 6))
