"""normkit.recalibrate and statistics_gap on Keras's models: the population's statistics, and nothing else changed."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import normkit as nk
import normkit.keras as nkk
from normkit.conformance.keras_calls import BACKEND, array

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

L: Any = keras.layers

#: What the statistics of the whole data set in float64 are met to.
EXACT = 1e-6
#: And where they are those of what layers before computed in float32.
FLOAT32 = 2e-5
SIZES = (16, 16, 5)


def deep(norm=L.BatchNormalization):
    """Two batch norms, one of them in a model in the model, and dropout."""
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input((7, 7, 8)), L.Dropout(0.5), L.Conv2D(6, 3), norm(name="two")], name="inner")
    return keras.Sequential([keras.Input((9, 9, 3)), norm(name="one"), L.Conv2D(8, 3), L.ReLU(), inner])


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, L.BatchNormalization)]


def data():
    """Batches that differ in mean and spread; the last is short."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(n, 9, 9, 3)) * (k + 1) + 3 * k).astype("f4") for k, n in enumerate(SIZES)]


def met(layer, x, exact=EXACT, axis=-1):
    """Whether moving statistics are those of all values of x, the variance biased."""
    x = np.moveaxis(x.astype("f8"), axis, -1).reshape(-1, x.shape[axis])
    mean, var = x.mean(0), x.var(0)
    assert (abs(array(layer.moving_mean) - mean) <= exact * (np.sqrt(var) + abs(mean))).all()
    assert (abs(array(layer.moving_variance) - var) <= exact * var).all()


def weights(model):
    return [array(v) for v in model.variables]


def same(model, before):
    return all((a == b).all() for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("replaced", [False, True])
def test_the_first_norm_has_the_statistics_of_all_data(replaced):
    model = deep()
    if replaced:
        nk.replace(model)
    kinds = [type(layer) for layer in norms(model)]
    report = nk.recalibrate(model, data())
    met(norms(model)[0], np.concatenate(data()))
    assert report.layers[0][:3] == ("one", "keras.layers.BatchNormalization", sum(SIZES) * 81) and report.batches == 3
    assert report.layers[1].name == "inner/two" and not report.left
    assert [type(layer) for layer in norms(model)] == kinds


@pytest.mark.parametrize("norm", [L.BatchNormalization, nkk.BatchNormalization], ids=["theirs", "ours"])
def test_sequential_is_one_pass_over_all_data_at_once(norm):
    """Dropout does nothing in it."""
    model = deep(norm)
    nk.recalibrate(model, data(), sequential=True)
    inner = model.layers[-1]
    upto = keras.Sequential([*model.layers[:-1], *inner.layers[:-1]])
    met(norms(model)[0], np.concatenate(data()))
    met(norms(model)[1], array(upto(np.concatenate(data()))), FLOAT32)
    assert max(gap.size for gap in nk.statistics_gap(model, data(), sequential=True).layers) < FLOAT32


def test_norms_normalize_by_the_batch():
    """One pass: what the second gets is what it gets in training."""
    model = keras.Sequential([keras.Input((3,)), L.BatchNormalization(), L.BatchNormalization()])
    nk.recalibrate(model, [3 * batch[:, 0, 0] + 1 for batch in data()])
    second = norms(model)[1]
    assert (abs(array(second.moving_mean)) <= EXACT).all()
    # But for epsilon, each batch has the variance one.
    assert (abs(array(second.moving_variance) - 1) <= 1e-3).all()


def test_nothing_else_changes():
    model = deep()
    model.compile("sgd", "mse")
    before = weights(model)
    gap = nk.statistics_gap(model, data())
    assert same(model, before) and not gap.closed and gap.layers[0].size > 0.5
    done = nk.recalibrate(model, data())
    assert done.layers == gap.layers and done.closed
    moved = {id(v) for layer in norms(model) for v in layer.non_trainable_variables}
    assert len(moved) == 4
    for variable, was in zip(model.variables, before, strict=True):
        assert (array(variable) == was).all() != (id(variable) in moved)


def test_gap_of_known_size():
    model = keras.Sequential([keras.Input((1,)), L.BatchNormalization(epsilon=0.0)])
    norms(model)[0].moving_mean.assign([3.0])
    norms(model)[0].moving_variance.assign([4.0])
    gap = nk.statistics_gap(model, [np.array([[0.0], [2.0]], "f4")]).layers[0]
    # Mean 1, biased variance 1.
    assert gap.mean == pytest.approx(2) and gap.var == pytest.approx((4, 4)) and gap.count == 2


def test_channels_first_and_an_axis_in_between():
    for axis in (1, 2):
        model = keras.Sequential([keras.Input((4, 5, 6)), L.BatchNormalization(axis=axis)])
        batches = [np.random.default_rng(n).normal(n, 2, (n, 4, 5, 6)).astype("f4") for n in (3, 2)]
        nk.recalibrate(model, batches)
        met(norms(model)[0], np.concatenate(batches), axis=axis)


def test_masked_elements_do_not_count():
    model = keras.Sequential([keras.Input((5, 2)), L.Masking(0.0), L.BatchNormalization()])
    x = np.random.default_rng(0).normal(3, 1, (4, 5, 2)).astype("f4")
    x[:, 3:] = 0
    report = nk.recalibrate(model, [x])
    met(norms(model)[0], x[:, :3])
    assert report.layers[0].count == 12


def test_far_from_zero():
    x = np.random.default_rng(0).normal(1e5, 1, (64, 2)).astype("f4")
    model = keras.Sequential([keras.Input((2,)), L.BatchNormalization()])
    nk.recalibrate(model, [x[:30], x[30:60], x[60:]])
    met(norms(model)[0], x)


def test_frozen_unknown_and_unreached_ones_are_left():
    class Own(L.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return inputs

    model = keras.Sequential([keras.Input((3,)), Own(name="own"), L.BatchNormalization(name="frozen")])
    model.layers[1].trainable = False
    before = weights(model)
    report = nk.recalibrate(model, [np.ones((4, 3), "f4")])
    reasons = {layer.name: layer.reason for layer in report.left}
    assert reasons == {
        "own": "it is a subclass with a call of its own",
        "frozen": "it is frozen: its trainable is False",
    }
    assert not report.layers and same(model, before)


def test_a_subclassed_model_and_how_it_is_called():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = L.BatchNormalization(), L.Dropout(0.5)

        def call(self, x, other=None, training=None):
            # Asked to train, it is measured all the same, once for each call.
            return self.norm(self.norm(self.drop(x), training=True))

    model, x = Net(), data()[0]
    model(x)
    for batches, call in (([(x, "label")], None), ([{"x": x}], None), ([x], lambda model, x: model(x, other=1))):
        report = nk.recalibrate(model, batches, call=call)
        assert report.layers[0].count == 2 * x.size // 3


def test_mixed_precision():
    """Statistics of what was cast to float16, in float32 variables."""
    model = keras.Sequential([keras.Input((2,)), L.BatchNormalization(dtype="mixed_float16")])
    x = np.random.default_rng(0).normal(0, 1, (32, 2)).astype("f4")
    nk.recalibrate(model, [x])
    met(norms(model)[0], x.astype("f2"))


class Compiled(keras.Model):
    """A model that compiles its own call."""

    def __init__(self):
        super().__init__()
        self.norm = L.BatchNormalization()
        self.norm.build((None, 3))

    def call(self, x):
        if BACKEND == "tensorflow":
            import tensorflow as tf

            return tf.function(self.norm)(x)
        import jax

        return jax.jit(lambda x: self.norm(x))(x)


def nan():
    batches = [batch[:, 0, 0] for batch in data()]
    batches[1][0] = np.nan
    return batches


def quantized():
    model = keras.Sequential([keras.Input((3,)), L.Dense(3, name="dense"), L.BatchNormalization()])
    model.layers[0].quantize("int8")
    return model


def norm():
    return keras.Sequential([keras.Input((3,)), L.BatchNormalization(name="bn")])


BAD = {
    "no batches": (norm, list, "{} received no batches: there are none in this list"),
    "not finite": (norm, nan, "batch 2 brings layer 'bn' values whose mean or variance is not finite"),
    "no norm": (lambda: keras.Sequential([keras.Input((3,)), L.ReLU()]), nan, "{} found no batch norm in Sequential"),
    "not built": (
        lambda: keras.Sequential([L.BatchNormalization(name="bn")]),
        nan,
        "{} needs numbers; bn is not built yet: run one batch through the model",
    ),
    "quantized": (quantized, nan, "{} comes before a model is quantized; dense in this Sequential is quantized"),
}
if BACKEND != "torch":
    BAD["compiled"] = (Compiled, nan, "gets what has no numbers yet: the model compiles its own call")


@pytest.mark.parametrize("function", [nk.recalibrate, nk.statistics_gap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_changes_nothing(case, function):
    build, batches, text = BAD[case]
    model = build()
    kinds, before = [type(layer) for layer in model._flatten_layers()], weights(model)
    with pytest.raises(ValueError, match=text.format(function.__name__)) as caught:
        function(model, batches())
    assert "\n" not in str(caught.value)
    assert same(model, before) and [type(layer) for layer in model._flatten_layers()] == kinds


def test_half_precision_statistics():
    """What the variable cannot hold is refused."""
    model = keras.Sequential([keras.Input((2,)), L.BatchNormalization(dtype="float16")])
    with pytest.raises(ValueError, match=r"recalibrate cannot write .* whose dtype ends at 6\.55e\+04"):
        nk.recalibrate(model, [np.array([[0, 0], [60000, 1]], "f2")])
