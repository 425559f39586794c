"""normkit.replace and normkit.restore on Keras's models: what is swapped, what is left and why, what stays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import keras
import numpy as np
import pytest

import normkit as nk
import normkit.keras as nkk
from normkit.conformance.keras_calls import BACKEND, array, called, numbers
from normkit.conformance.tolerances import tolerance, units

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

L: Any = keras.layers


@keras.saving.register_keras_serializable(package="tests")
class Renamed(L.LayerNormalization):
    """A layer norm by another name."""

    def extra(self):
        return "kept"


class OwnCall(L.BatchNormalization):
    """A batch norm that doubles."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


class OwnGroups(L.GroupNormalization):
    """A group norm with another computation inside."""

    def _apply_normalization(self, reshaped_inputs, input_shape):
        return reshaped_inputs


class MyNorm(L.Layer):
    """Nobody knows this one."""

    def call(self, x):
        return x


def net(seed=0):
    """A functional model with a model in it, and a layer that is called twice."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(4, 3, name="conv")(inputs)
    x = L.BatchNormalization(momentum=0.9, name="bn")(x)
    x = keras.Sequential([L.GroupNormalization(2, name="gn"), Renamed(name="ln")], name="inner")(x)
    twice = L.LayerNormalization(name="twice")
    x = L.Add(name="add")([twice(x), twice(L.Activation("tanh", name="tanh")(x))])
    x = L.RMSNormalization(name="rms")(L.Flatten(name="flat")(x))
    return keras.Model(inputs, L.Dense(2, name="head")(x))


NAMES = ["bn", "inner/gn", "inner/ln", "twice", "rms"]


def x(seed=0):
    return numbers(8, 6, 6, 3, seed=seed, offset=0)


def types(model):
    return [type(layer) for layer in model._flatten_layers()]


def near(found, reference):
    limit = tolerance("native", "float32")
    error = units(array(found), array(reference), "float32")
    assert error <= limit.units, f"{error:.3g} units apart: {limit.reason}"


def alike(a, b):
    # A step is within 32 units (4e-6) of the other; the steps after it amplify that.
    return all(np.allclose(p, q, rtol=1e-4, atol=1e-5) for p, q in zip(a.get_weights(), b.get_weights(), strict=True))


def fit(model, epochs=1):
    model.fit(x(), numbers(8, 2, seed=1, offset=0), batch_size=4, epochs=epochs, shuffle=False, verbose=0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_outputs_and_gradients_before_and_after(training):
    before, after = net(), net()
    assert [layer.name for layer in nk.replace(after).changed] == NAMES
    dy = numbers(8, 2, seed=2, offset=0)
    (y, found), (y0, found0) = (called(model, x(), dy, training=training) for model in (after, before))
    near(y, y0)
    for gradient, reference in zip(found, found0, strict=True):
        # A shift before a centred layer has no gradient, but for roundings.
        if abs(reference).max() > 1e-5:
            near(gradient, reference)
    for a, b in zip(after.weights, before.weights, strict=True):
        near(a, b)


def test_layers_and_variables_stay_the_objects_that_they_are():
    model = net()
    model.get_layer("twice").trainable = False
    layers, weights = list(model._flatten_layers()), list(model.weights)
    nk.replace(model)
    assert all(a is b for a, b in zip(model._flatten_layers(), layers, strict=True))
    assert all(a is b for a, b in zip(model.weights, weights, strict=True))
    assert not model.get_layer("twice").trainable
    for name in ("bn", "twice", "rms"):
        layer = model.get_layer(name)
        kind = type(layer).__name__
        assert isinstance(layer, getattr(L, kind)) and isinstance(layer, getattr(nkk, kind))
    assert isinstance(model.get_layer("inner").layers[1], Renamed) and model.get_layer("inner").layers[1].extra()


def test_training_goes_on_with_the_same_optimizer():
    """Two epochs, replaced, two, restored, two: as six; what fit() had traced is traced anew each time."""
    model, reference = net(), net()
    for each in (model, reference):
        each.compile(keras.optimizers.SGD(0.02, momentum=0.9), "mse", jit_compile=BACKEND == "jax")
    fit(reference, 6)
    fit(model, 2)
    held, optimizer = model.train_function, model.optimizer
    assert held is not None
    nk.replace(model)
    with_ours = counted(model.get_layer("bn"))
    fit(model, 2)
    assert with_ours
    del with_ours[:]
    nk.restore(model)
    fit(model, 2)
    assert not with_ours and model.optimizer is optimizer
    assert int(array(optimizer.iterations)) == 12
    assert alike(model, reference) and not np.allclose(model.get_weights()[0], net().get_weights()[0], rtol=1e-2)


def counted(layer):
    """A list that grows with every call of a replaced layer's class."""
    calls, cls = [], type(layer)

    def call(self, inputs, training=None, mask=None):
        calls.append(1)
        return super(cls, self).call(inputs, training=training, mask=mask)

    cls.call = call
    return calls


@pytest.fixture(autouse=True)
def _uncounted():
    yield
    model = L.BatchNormalization()
    nk.replace(model)
    if "call" in vars(type(model)):
        del type(model).call


def test_restore_undoes_it_exactly():
    model, twin = net(), net()
    before = types(model)
    done = nk.replace(model)
    assert types(model) != before
    undone = nk.restore(model)
    assert types(model) == before
    assert [layer[:2] for layer in undone.changed] == [layer[:2] for layer in done.changed]
    assert (array(model(x())) == array(twin(x()))).all()
    with pytest.raises(ValueError, match="restore found no layer in Functional"):
        nk.restore(model)


def test_report():
    shared = L.LayerNormalization(name="same")
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.Sequential([keras.Input((4,)), shared], name="a"),
            keras.Sequential([keras.Input((4,)), shared], name="b"),
            OwnCall(name="own"),
            L.UnitNormalization(name="unit"),
        ],
        name="top",
    )
    report = nk.replace(model)
    assert [layer[:4] for layer in report.changed] == [("a/same", "keras.layers.LayerNormalization", "", ("b/same",))]
    text = repr(report).splitlines()
    assert text[:3] == [
        "Sequential: 1 norm layer replaced, 2 left",
        "    1 keras.layers.LayerNormalization, replaced",
        "        a/same = b/same",
    ]
    again = nk.replace(model)
    assert not again.changed and again.left[0].reason == "it was replaced before"


def patched():
    layer = L.LayerNormalization()
    layer.call = lambda inputs: inputs
    return layer


LEFT = {
    "its own call": (OwnCall, "a subclass of keras.layers.BatchNormalization with a call of its own"),
    "its own inside": (lambda: OwnGroups(2), "a subclass of keras.layers.GroupNormalization with a call of its own"),
    "unknown": (MyNorm, "normkit does not know this class"),
    "unit": (L.UnitNormalization, "no unit normalization"),
    "patched": (patched, "its call was set on the instance"),
    "ours": (nkk.BatchNormalization, "it is normkit's already"),
}
if "renorm" in L.BatchNormalization().get_config():
    LEFT["renorm"] = (lambda: L.BatchNormalization(renorm=True), "normkit has no batch renormalization")
if BACKEND == "tensorflow":
    LEFT["synchronized"] = (lambda: L.BatchNormalization(synchronized=True), "those of all replicas")


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_and_why(case):
    build, reason = LEFT[case]
    model = keras.Sequential([keras.Input((4,)), build(), L.RMSNormalization(name="rms")])
    kind = type(model.layers[0])
    report = nk.replace(model)
    assert [layer.name for layer in report.changed] == ["rms"]
    assert len(report.left) == 1 and reason in report.left[0].reason and reason in repr(report)
    assert type(model.layers[0]) is kind
    nk.restore(model)
    assert type(model.layers[0]) is kind


def test_what_is_no_norm_is_not_listed():
    model = keras.Sequential([keras.Input((4,)), L.Normalization(mean=0.0, variance=1.0), L.LayerNormalization()])
    report = nk.replace(model)
    assert len(report.changed) == 1 and not report.left


def test_layers_that_are_not_built_and_a_subclassed_model():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = [L.Dense(4), L.BatchNormalization(name="bn")]
            self.wrapped = L.TimeDistributed(L.LayerNormalization(name="inside"), name="wrapper")

        def call(self, x, training=None):
            for block in self.blocks:
                x = block(x)
            return self.wrapped(x)

    model = Net()
    assert [layer.name for layer in nk.replace(model).changed] == ["bn", "wrapper/inside"]
    assert tuple(model(numbers(2, 3, 5), training=True).shape) == (2, 3, 4)
    assert array(model.blocks[1].moving_mean).any()
    layer = L.GroupNormalization(2)
    assert nk.replace(layer).changed[0].name == "" and isinstance(layer, nkk.GroupNormalization)


def test_models_that_are_refused():
    model = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    with pytest.raises(ValueError, match="replace found no norm layer in Sequential, which has 3 layers"):
        nk.replace(model)


@pytest.mark.parametrize("how", ["file", "pickle", "deepcopy"])
def test_what_keras_writes_is_keras_again(how, tmp_path):
    """A replaced model is saved as what it was before: its file needs no normkit. Keras copies by way of a file."""
    model = net()
    before = types(model)
    nk.replace(model)
    if how == "file":
        model.save(tmp_path / "model.keras")
        twin = keras.saving.load_model(tmp_path / "model.keras")
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert sorted(map(str, types(twin))) == sorted(map(str, before))
    near(twin(x()), model(x()))


def test_a_clone_has_the_classes_of_the_model():
    model = net()
    nk.replace(model)
    twin = keras.models.clone_model(model)
    assert type(twin.get_layer("bn")) is type(model.get_layer("bn"))
    nk.restore(twin)
    assert type(twin.get_layer("bn")) is L.BatchNormalization
