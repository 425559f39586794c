"""Policies and switches of ``normkit.keras.BatchNormalization``, on the backend that Keras runs."""

import itertools

import keras
import numpy as np
import pytest

import normkit
import normkit.keras as nk
from normkit.backends.keras.layers import OURS
from normkit.conformance import oracle
from normkit.conformance.keras_calls import array, numbers
from normkit.conformance.misfits import refused

# Of Keras's own conversions to NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

#: Channel 1 of 4 has one valid element, channel 3 none.
MASK = np.ones((5, 6, 4), bool)
MASK[..., (1, 3)] = False
MASK[2, 4, 1] = True
LONE = np.array([False, True, False, True])


def _layer(**settings):
    layer = nk.BatchNormalization(momentum=0.9, epsilon=1e-5, **settings)
    layer.build((None, None, 4))
    layer.set_weights(np.random.default_rng(0).uniform(0.5, 2, (4, 4)))
    return layer


def _known(layer):
    names = {"weight": layer.gamma, "bias": layer.beta, "mean": layer.moving_mean, "var": layer.moving_variance}
    return {name: array(v) for name, v in names.items()}


def _merged(known, x, present, mask=None):
    mean, var, _ = oracle.batch_statistics(x, axis=-1, mask=mask)
    return [np.where(present, 0.9 * known[n] + 0.1 * a, known[n]) for n, a in (("mean", mean), ("var", var))]


def _assert_moving(layer, mean, var):
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), var, rtol=1e-5)


def test_config_round_trip():
    told = {"single_value": "zero", "nonfinite": "skip", "update_stats": False, "train_affine": False}
    layer = _layer(**told)
    config = layer.get_config()
    assert {n: config[n] for n in told} == told and config.keys() - _layer().get_config().keys() == told.keys()
    again = nk.BatchNormalization.from_config(config)
    assert {n: getattr(again, n) for n in OURS} == {**OURS, **told}
    assert _layer().get_config().keys() == keras.layers.BatchNormalization().get_config().keys()


@pytest.mark.parametrize("policy", [None, "running", "zero", "raise"])
def test_one_value_per_channel(policy):
    layer, x = _layer(single_value=policy), np.arange(4.0).reshape(1, 1, 4)
    known = _known(layer)
    if policy == "raise":
        with pytest.raises(ValueError, match="batch_norm_train needs more than one value per channel"):
            layer(x, training=True)
        return
    y = array(layer(x, training=True))
    wanted = oracle.batch_norm(x, **known, axis=-1) if policy == "running" else known["bias"][None, None]
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    # As Keras does, where nothing else is said: the value counts, with a variance of zero.
    _assert_moving(layer, *(_merged(known, x, True) if policy is None else (known["mean"], known["var"])))


@pytest.mark.parametrize("policy", ["running", "zero"])
def test_one_valid_value_of_a_channel(policy):
    layer, x = _layer(single_value=policy), np.random.default_rng(0).normal(2, 1, MASK.shape).astype("f4")
    known = _known(layer)
    batch = oracle.batch_norm_train(x[..., ~LONE], known["weight"][~LONE], known["bias"][~LONE], axis=-1)[0]
    wanted = oracle.batch_norm(x, **known, axis=-1) if policy == "running" else np.broadcast_to(known["bias"], x.shape)
    wanted = wanted.copy()
    wanted[..., ~LONE] = batch
    y = array(layer(x, training=True, mask=keras.ops.convert_to_tensor(MASK)))
    _assert_moving(layer, *_merged(known, x, ~LONE, MASK))
    layer.set_weights(list(known.values()))

    class Model(keras.Model):
        def call(self, inputs):
            return layer(inputs[0], training=True, mask=inputs[1])

    for found in (y, Model().predict_on_batch([x, MASK])):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        if policy == "zero":
            assert np.array_equal(found[..., LONE], wanted[..., LONE].astype("f4"))


@pytest.mark.parametrize(
    ("training", "trainable", "use", "update"),
    [*itertools.product((True, False), (True, False), (None, True, False), (None, True, False))],
)
def test_switches(training, trainable, use, update):
    layer, x = _layer(use_batch_stats=use, update_stats=update), np.random.default_rng(0).normal(2, 1, (5, 6, 4))
    layer.trainable, known = trainable, _known(layer)
    by_batch = (training and trainable) if use is None else use
    counted = (training and trainable and by_batch) if update is None else update
    parameters = {n: known[n] for n in ("weight", "bias")}
    wanted = (
        oracle.batch_norm_train(x, **parameters, axis=-1)[0] if by_batch else oracle.batch_norm(x, **known, axis=-1)
    )
    np.testing.assert_allclose(array(layer(x, training=training)), wanted, rtol=1e-5, atol=1e-5)
    _assert_moving(layer, *(_merged(known, x, True) if counted else (known["mean"], known["var"])))


@pytest.mark.parametrize("jit", [False, True])
def test_fit(jit):
    """In the program that fit makes: what is not finite is left out, and gamma stays while what is before it learns."""
    keras.utils.set_random_seed(0)
    norm = nk.BatchNormalization(nonfinite="skip", train_affine=False, single_value="zero")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), norm, keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=jit and keras.backend.backend() != "torch")
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("f4")
    before = [w.copy() for w in model.get_weights()]
    assert [w.path for w in model.trainable_weights if "batch_norm" in w.path] == []
    model.fit(x, x[:, :1], batch_size=8, verbose=0)
    after = model.get_weights()
    moved = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    # kernel and bias of the first layer, gamma, beta, both moving statistics, and the last layer's.
    assert moved == [True, moved[1], False, False, True, True, True, True]
    statistics = [array(w) for w in (norm.moving_mean, norm.moving_variance)]
    x[2] = np.inf
    model.evaluate(x, x[:, :1], verbose=0)
    norm(numbers(1, 4), training=True)
    with np.errstate(all="ignore"):
        norm(np.full((4, 4), np.inf, "f4"), training=True)
    _assert_moving(norm, *statistics)


def test_an_affine_part_that_is_not_trained():
    layer = _layer()
    assert [w.name for w in layer.trainable_weights] == ["gamma", "beta"]
    layer.train_affine = False
    assert layer.trainable and layer.trainable_weights == []
    layer.trainable = False
    layer.trainable = True
    assert layer.trainable_weights == [] and len(layer.non_trainable_weights) == 4
    layer.train_affine = True
    assert [w.name for w in layer.trainable_weights] == ["gamma", "beta"]


def test_refusals():
    x = np.ones((2, 3, 4))
    x[0, 0, 1] = np.nan
    text = (
        r"BatchNormalization 'bn' has nonfinite=\"raise\"; received statistics that are not finite in 1 of 4 channels: "
        r'look for the first NaN or infinity before it, or set nonfinite="skip"\.'
    )
    with pytest.raises(ValueError, match=text):
        _layer(nonfinite="raise", name="bn")(x, training=True)
    with pytest.raises(ValueError, match=r'has empty_batch="raise"; received a batch without elements\.'):
        _layer(empty_batch="raise")(np.ones((0, 3, 4)), training=True)
    text = r"single_value must be 'raise', 'running' or 'zero'; received 'skip'\."
    refused(lambda: nk.BatchNormalization(single_value="skip"), ValueError, text)
    text = r"update_stats must be None, True or False; received 'no'\."
    refused(lambda: setattr(_layer(), "update_stats", "no"), ValueError, text)


@pytest.mark.parametrize("shape", [(5, 7), (5, 6, 3), (5, 6, 4, 1)])
def test_masks_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"mask must broadcast to x of shape \(5, 6, 4\); received shape"):
        _layer()(np.ones((5, 6, 4), "f4"), training=True, mask=keras.ops.ones(shape, "bool"))


def test_what_normalizes_by_the_batch_is_not_folded():
    norm = nk.BatchNormalization(use_batch_stats=True)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), norm])
    report = normkit.fold(model, numbers(4, 3))
    assert "it normalizes by the batch in inference too" in str(report) and model.layers[1] is norm
