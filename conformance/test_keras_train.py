"""What Keras does with a layer of normkit.keras: fit, compiled or not, narrow dtypes, files, exports."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import normkit as nk
import normkit.keras as nkk
from normkit.conformance.keras_calls import BACKEND, array, numbers
from normkit.conformance.tolerances import tolerance, units

# Of Keras's own conversions to NumPy, and of what TensorFlow's exporter and torch's compiler say of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


def network(module):
    """A little of everything."""
    keras.utils.set_random_seed(0)
    group = getattr(module, "InstanceNormalization", None) or keras.layers.GroupNormalization
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3),
            module.BatchNormalization(momentum=0.9),
            module.GroupNormalization(2),
            group() if module is nkk else group(-1),
            keras.layers.Activation("tanh"),
            module.LayerNormalization(),
            keras.layers.Flatten(),
            module.RMSNormalization(),
            keras.layers.Dense(2),
            module.BatchNormalization(),
        ]
    )


def pair(**options):
    """Ours and Keras's, with the same weights."""
    models = [network(module) for module in (nkk, keras.layers)]
    models[0].set_weights(models[1].get_weights())
    for model in models:
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", **options)
    return models


def data():
    """Thirteen samples: in batches of four, the last has one."""
    return numbers(13, 6, 6, 3), numbers(13, 2, seed=1, offset=0)


def test_fit():
    """Three epochs, twelve steps: losses and weights stay together; so do evaluate and predict."""
    models = pair(jit_compile=BACKEND == "jax")
    x, y = data()
    history = [model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0).history["loss"] for model in models]
    # Steps are within 32 units (4e-6) of each other, and what follows amplifies that.
    assert np.allclose(*history, rtol=1e-4) and history[0][-1] < history[0][0]
    for a, b in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5)
    results = [(model.predict(x, verbose=0), model.evaluate(x, y, verbose=0)) for model in models]
    assert np.allclose(results[0][0], results[1][0], rtol=1e-3, atol=1e-4)
    assert np.isclose(results[0][1], results[1][1], rtol=1e-3)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX compiles above, and torch.compile takes minutes")
def test_fit_compiled_by_xla():
    def small(module):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((6,)), module.BatchNormalization(), keras.layers.Dense(2), module.LayerNormalization()]
        return keras.Sequential(layers)

    models = [small(module) for module in (nkk, keras.layers)]
    for model in models:
        model.compile("sgd", "mse", jit_compile=True)
        model.fit(numbers(8, 6), numbers(8, 2, seed=1), batch_size=4, epochs=3, shuffle=False, verbose=0)
    for a, b in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_frozen_layers_stay():
    model = pair()[0]
    model.layers[1].trainable = False
    model.compile("sgd", "mse")
    before = model.layers[1].get_weights()
    model.fit(*data(), batch_size=4, verbose=0)
    assert all((a == b).all() for a, b in zip(model.layers[1].get_weights(), before, strict=True))
    assert not (model.layers[-1].get_weights()[2] == 0).any()


def test_mixed_precision():
    """float16 computations, float32 variables: as near to Keras as float16 is."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        ours, theirs = (network(module) for module in (nkk, keras.layers))
        ours.set_weights(theirs.get_weights())
        x, y = data()
        found = [array(model(x)) for model in (ours, theirs)]
        # Ten layers, each of which rounds to float16.
        assert units(*found, "float16") <= 10 * tolerance("native", "float16").units
        assert {w.dtype for w in ours.weights} == {"float32"}
        ours.compile("sgd", "mse")
        assert np.isfinite(ours.fit(x, y, batch_size=4, verbose=0).history["loss"]).all()
    finally:
        keras.config.set_dtype_policy("float32")


def test_keras_files(tmp_path):
    """A model comes back with normkit's layers, their settings, weights and moving statistics."""
    model = pair()[0]
    x, y = data()
    model.fit(x, y, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in twin.layers] == [type(layer) for layer in model.layers]
    assert [layer.get_config() for layer in twin.layers] == [layer.get_config() for layer in model.layers]
    assert (array(twin(x)) == array(model(x))).all()
    assert keras.saving.get_registered_name(nkk.BatchNormalization) == "normkit>BatchNormalization"


def test_weights_load_both_ways(tmp_path):
    """Under the names that Keras's layers have."""
    layers = ("BatchNormalization", "LayerNormalization", "RMSNormalization")
    models = [
        keras.Sequential([keras.Input((6,)), *(getattr(module, kind)() for kind in layers)])
        for module in (nkk, keras.layers)
    ]
    for source, target in (models, models[::-1]):
        source.set_weights([numbers(*w.shape, seed=len(w.shape)) ** 2 for w in source.weights])
        source.save_weights(tmp_path / "x.weights.h5")
        target.load_weights(tmp_path / "x.weights.h5")
        assert all((a == b).all() for a, b in zip(source.get_weights(), target.get_weights(), strict=True))


def test_weights_of_instance_norm(tmp_path):
    """Under a name of its own; those of group norm, which is the same with groups=-1, are read by what replaces it."""

    def model(norm):
        return keras.Sequential([keras.Input((4, 6)), norm])

    ours, theirs = model(nkk.InstanceNormalization()), model(keras.layers.GroupNormalization(-1))
    replaced = model(keras.layers.GroupNormalization(-1))
    nk.replace(replaced)
    for source, target in ((ours, model(nkk.InstanceNormalization())), (theirs, replaced), (replaced, theirs)):
        source.set_weights([numbers(6, seed=k) ** 2 for k in (2, 3)])
        source.save_weights(tmp_path / "x.weights.h5")
        target.load_weights(tmp_path / "x.weights.h5")
        assert all((a == b).all() for a, b in zip(source.get_weights(), target.get_weights(), strict=True))
    source.save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match="expected 2 variables"):
        ours.load_weights(tmp_path / "x.weights.h5")


def test_copies():
    model = pair()[0]
    x = data()[0]
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    assert [type(layer) for layer in twin.layers] == [type(layer) for layer in model.layers]
    assert (array(twin(x)) == array(model(x))).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras exports a SavedModel by way of TensorFlow")
def test_saved_model(tmp_path):
    """Read back by TensorFlow alone, for a batch of any length, and by Keras as a layer."""
    import tensorflow as tf

    model = pair()[0]
    x, y = data()
    model.fit(x, y, batch_size=4, verbose=0)
    model.export(str(tmp_path / "exported"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "exported"))
    for k in (13, 1):
        # Of two programs that TensorFlow optimizes each in its way.
        assert units(array(served.serve(x[:k])), array(model(x[:k])), "float32") <= tolerance("native", "float32").units
    layer = keras.layers.TFSMLayer(str(tmp_path / "exported"), call_endpoint="serve")
    assert tuple(layer(x).shape) == (13, 2)


def test_a_mask_in_fit():
    """Keras's own masks reach the layer in a traced step."""

    def sequence(module):
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((5, 2)),
                keras.layers.Masking(0.0),
                module.BatchNormalization(momentum=0.5),
                keras.layers.GRU(2),
            ]
        )

    x = numbers(8, 5, 2)
    x[:5, 3:] = 0
    models = [sequence(module) for module in (nkk, keras.layers)]
    for model in models:
        model.compile("sgd", "mse")
        model.fit(x, x[:, 0], batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5)
