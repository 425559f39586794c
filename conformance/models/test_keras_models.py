"""Whole models of keras.applications: replaced, compared, trained, restored, folded, recalibrated."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import normkit as nk
from normkit.conformance.keras_calls import array, called, numbers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

#: How many norm layers each has.
MODELS = {"ResNet50": 53, "MobileNetV2": 52, "ConvNeXtTiny": 23}
models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _float64():
    """In which two right ways to compute differ by roundings that a deep network does not amplify to anything."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def made(name):
    """The model, the same each time, with norms that are no identity."""
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=10)
    values = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) == 1:
            weight.assign(array(weight) + abs(values.normal(size=weight.shape)) / 8)
    return model


def x(seed=0):
    return numbers(4, 32, 32, 3, seed=seed, offset=0).astype("f8") * 30 + 120


def target(seed=0):
    return np.eye(10)[np.random.default_rng(seed).integers(10, size=4)]


def apart(found, reference):
    """The distance of two lists of arrays, as a share of the second."""
    far = sum(((a - b) ** 2).sum() for a, b in zip(found, reference, strict=True))
    return (far / sum((b**2).sum() for b in reference)) ** 0.5


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@models
def test_outputs_gradients_and_statistics(name, training):
    before, after = made(name), made(name)
    report = nk.replace(after)
    assert len(report.changed) == MODELS[name] and not report.left
    dy = numbers(4, 10, offset=0).astype("f8")
    (y, gradients), (y0, gradients0) = (called(model, x(), dy, training=training) for model in (after, before))
    # Fifty layers of 1e-16 each.
    assert apart([y], [y0]) < 1e-11
    assert apart(gradients, gradients0) < 1e-9
    assert apart([array(w) for w in after.weights], [array(w) for w in before.weights]) < 1e-11


@models
def test_ten_steps_replaced_and_restored(name):
    """Three steps, replaced, four, restored, three, with one optimizer: the way of Keras's own."""
    model, reference = made(name), made(name)
    for each in (model, reference):
        each.compile(keras.optimizers.SGD(1e-5, momentum=0.9), "categorical_crossentropy", run_eagerly=True)
    types = [type(layer) for layer in model.layers]
    changes = {3: nk.replace, 7: nk.restore}
    for k in range(10):
        if k in changes:
            changes[k](model)
        model.train_on_batch(x(k), target(k))
        if k < 5:
            reference.train_on_batch(x(k), target(k))

        if k == 4:
            # These steps amplify a rounding some 200 times each, on either side: after two, 1e-16 is 1e-12.
            assert apart(model.get_weights(), reference.get_weights()) < 1e-9
    assert [type(layer) for layer in model.layers] == types
    assert int(array(model.optimizer.iterations)) == 10
    assert all(np.isfinite(a).all() for a in model.get_weights())


@pytest.mark.parametrize("name", ["ResNet50", "MobileNetV2"])
def test_recalibrate_and_fold(name):
    """In float64, where folding is exact but for roundings; the last batch is short."""
    model = made(name)
    batches = [x(0), 2 * x(1), x(2)[:2]]
    gap = nk.statistics_gap(model, batches)
    report = nk.recalibrate(model, batches)
    assert report.layers == gap.layers and len(report.layers) == MODELS[name] and not report.left
    after = nk.statistics_gap(model, batches)
    assert max(layer.size for layer in after.layers) < 1e-6 < 1 < max(layer.size for layer in gap.layers)
    before = array(model(x()))
    folded = nk.fold(model, x())
    assert len(folded.changed) == MODELS[name] and not folded.left
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers)
    assert abs(array(model(x())) - before).max() <= 1e-9 * abs(before).max()
