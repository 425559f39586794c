"""Whole models of keras.applications: replaced, compared, trained, restored, folded, recalibrated."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import normkit as nk
from normkit.conformance.keras_calls import BACKEND, array, called, computing, numbers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

#: How many norm layers each has. TensorFlow has grouped convolutions on the processor only as programs, of which Keras
#: makes another at each call, so that a step of ConvNeXt takes ten seconds; on PyTorch half of one.
MODELS = {"ConvNeXtTiny": 23} if BACKEND == "torch" else {"ResNet50": 53, "MobileNetV2": 52}
models = pytest.mark.parametrize("name", MODELS)

#: How far two ways to compute may be apart: fifty layers of 1e-16 each, and what is amplified on the way back.
EXACT, BACK = 1e-11, 1e-9
if BACKEND == "torch":
    # Keras itself computes norms in float32 there, whatever they get. No batch norm amplifies it.
    EXACT = BACK = 1e-5
#: The length of a step: at a hundred times that, ten steps make 1e-5 of one rounding where there are batch norms.
RATES = {"ConvNeXtTiny": 1e-5, "MobileNetV2": 1e-8, "ResNet50": 1e-10}


@pytest.fixture(autouse=True)
def _float64():
    """In which two right ways to compute differ by roundings that a deep network does not amplify to anything."""
    with computing("float64"):
        yield


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
    assert apart([y], [y0]) < EXACT
    assert apart(gradients, gradients0) < BACK
    assert apart([array(w) for w in after.weights], [array(w) for w in before.weights]) < EXACT


@models
def test_ten_steps_and_back(name):
    """Two steps, replaced, eight more with the same optimizer: the way of Keras's own; restored."""
    model, reference = made(name), made(name)
    for each in (model, reference):
        each.compile(keras.optimizers.SGD(RATES[name], momentum=0.9), "categorical_crossentropy", run_eagerly=True)
    types, start = [type(layer) for layer in model.layers], [array(v) for v in model.trainable_variables]
    for k in range(10):
        if k == 2:
            nk.replace(model)
        for each in (model, reference):
            each.train_on_batch(x(k % 2), target(k % 2))
    moved, other = ([array(v) for v in each.trainable_variables] for each in (model, reference))
    way = [a - b for a, b in zip(other, start, strict=True)]
    difference = [a - b + w for a, b, w in zip(moved, other, way, strict=True)]
    assert apart(difference, way) < BACK

    report = nk.restore(model)
    assert len(report.changed) == MODELS[name] and [type(layer) for layer in model.layers] == types
    reference.set_weights(model.get_weights())
    assert np.array_equal(array(model(x(3))), array(reference(x(3))))
    assert int(array(model.optimizer.iterations)) == 10


@pytest.mark.skipif(BACKEND == "torch", reason="in float32 there")
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
