"""normkit.recalibrate on models of tf_keras: what its batch norms store, which is n / (n - 1) where they are fused."""

import numpy as np
import pytest

import normkit as nk
from normkit.conformance.norm_layers import importing

with importing():
    import tf_keras

#: What the statistics of the whole data set in float64 are met to.
EXACT = 1e-6
L = tf_keras.layers
SIZES = (16, 16, 5)


def data():
    """Batches that differ in mean and spread; the last is short."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(n, 6, 6, 3)) * (k + 1) + 3 * k).astype("f4") for k, n in enumerate(SIZES)]


def met(layer, x, axes=(0, 1, 2), unbiased=False, exact=EXACT):
    mean, var = x.mean(axes, "f8"), x.var(axes, "f8", ddof=int(unbiased))
    shape = layer.moving_mean.shape
    assert (abs(layer.moving_mean.numpy() - mean.reshape(shape)) <= exact * (var**0.5 + abs(mean)).reshape(shape)).all()
    assert (abs(layer.moving_variance.numpy() / var.reshape(shape) - 1) <= exact).all()


def test_sequential_is_one_pass_over_all_data_at_once():
    """Dropout does nothing in it; a model within the model counts as well."""
    inner = tf_keras.Sequential([tf_keras.Input((4, 4, 4)), L.Dropout(0.5), L.BatchNormalization(name="two")])
    first, conv = L.BatchNormalization(name="one"), L.Conv2D(4, 3)
    model = tf_keras.Sequential([tf_keras.Input((6, 6, 3)), first, conv, inner])
    kinds = [type(layer) for layer in model._flatten_layers()]
    report = nk.recalibrate(model, data(), sequential=True)
    whole = np.concatenate(data())
    met(first, whole, unbiased=True)
    met(inner.layers[-1], conv(first(whole, training=True)).numpy(), unbiased=True, exact=2e-5)
    assert report.layers[0][:3] == ("one", "tf_keras.layers.BatchNormalization", sum(SIZES) * 36)
    assert report.layers[1].name.endswith("/two") and report.state is None
    assert [type(layer) for layer in model._flatten_layers()] == kinds


@pytest.mark.parametrize(("axis", "axes"), [(-1, (0, 1, 2)), (1, (0, 2, 3)), ([1, 3], (0, 2))])
def test_axes_without_the_fused_operation(axis, axes):
    model = tf_keras.Sequential([tf_keras.Input((6, 6, 3)), L.BatchNormalization(axis=axis, fused=False)])
    before = [v.numpy() for v in model.variables]
    gap = nk.statistics_gap(model, data())
    assert all((v.numpy() == was).all() for v, was in zip(model.variables, before, strict=True))
    assert nk.recalibrate(model, data()).layers == gap.layers
    met(model.layers[0], np.concatenate(data()), axes)


def test_masked_elements_do_not_count():
    model = tf_keras.Sequential([tf_keras.Input((6, 3)), L.Masking(0.0), L.BatchNormalization()])
    x = data()[0][:, :, 0]
    x[:, 4:] = 0
    assert nk.recalibrate(model, [x]).layers[0].count == 16 * 4
    met(model.layers[-1], x[:, :4], (0, 1))


def test_frozen_and_unknown_ones_are_left():
    class Own(L.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return inputs

    model = tf_keras.Sequential([tf_keras.Input((3,)), Own(name="own"), L.BatchNormalization(name="frozen")])
    model.layers[1].trainable = False
    reasons = {layer.name: layer.reason for layer in nk.recalibrate(model, [np.ones((4, 3), "f4")]).left}
    assert reasons == {
        "own": "it is a subclass with a call of its own",
        "frozen": "it is frozen: its trainable is False",
    }


def norm():
    return tf_keras.Sequential([tf_keras.Input((6, 6, 3)), L.BatchNormalization(name="bn")])


def nan():
    batches = data()
    batches[1][0] = np.nan
    return batches


BAD = {
    "no batches": (norm, list, None, "recalibrate received no batches"),
    "not finite": (norm, nan, None, "batch 2 brings layer 'bn' values whose mean or variance is not finite"),
    "no norm": (L.ReLU, data, None, "recalibrate found no batch norm in ReLU"),
    "not built": (L.BatchNormalization, data, None, "the model is not built yet"),
    "compiled": (norm, data, lambda model, x: model.predict(x, verbose=0), "bn gets what has no numbers yet"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_changes_nothing(case):
    build, batches, call, text = BAD[case]
    model = build()
    before, kinds = [v.numpy() for v in model.variables], [type(layer) for layer in model._flatten_layers()]
    with pytest.raises(ValueError, match=text) as caught:
        nk.recalibrate(model, batches(), call=call)
    assert "\n" not in str(caught.value)
    assert all((v.numpy() == was).all() for v, was in zip(model.variables, before, strict=True))
    assert [type(layer) for layer in model._flatten_layers()] == kinds


def test_replace_says_what_it_takes():
    with pytest.raises(TypeError, match=r"replace takes .*; received tf_keras"):
        nk.replace(norm())
