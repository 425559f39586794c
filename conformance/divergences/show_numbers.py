"""Demonstrations of numbers: eps, how statistics are computed, dtypes."""

from __future__ import annotations

import numpy as np

import normkit as nk
from normkit.conformance.divergences import frameworks as f
from normkit.conformance.divergences.demonstration import Columns, shows

#: One row whose mean is zero.
ROW = np.array([[-1.0, 1.0]], np.float32)
#: Errors of y below it are rounding: y is near 1, and what is wrong here is wrong by more than a part in a hundred.
LIMIT = 0.01


def _error(y, reference) -> float:
    """The largest; infinite where y is not finite."""
    error = np.abs(f.numbers(y) - reference).max()
    return float(error) if np.isfinite(error) else np.inf


@shows("eps-default", "x = [-0.01, 0.01], layer norm as it comes", "the second y")
def eps_default() -> Columns:
    x = np.float32(0.01) * ROW
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)

    def second(y):
        return f.numbers(y).ravel()[1]

    yield "torch", lambda: second(f.torch_layer("LayerNorm", x, 2))
    yield "Keras", lambda: second(f.keras_layer("LayerNormalization", x))
    yield "Flax", lambda: second(f.flax_layer("LayerNorm", x, 2))
    yield "Haiku", lambda: second(f.haiku_layer("LayerNorm", x, -1, True, True))
    yield "Equinox", lambda: second(f.equinox_layer("LayerNorm", x[0], 2))
    yield "ONNX", lambda: second(f.onnx("LayerNormalization", x, ones, zeros)[0])
    yield "normkit eps=1e-3", lambda: second(nk.layer_norm(x, eps=1e-3))
    yield "normkit eps=1e-5", lambda: second(nk.layer_norm(x, eps=1e-5))
    yield "normkit eps=1e-6", lambda: second(nk.layer_norm(x, eps=1e-6))


@shows("eps-none", "x = [0.001], RMS norm with eps=None", "y", tolerance=4e-3)  # half a unit of bfloat16
def eps_none() -> Columns:
    x = np.array([[1e-3]])

    def torch(dtype):
        import torch

        return torch.nn.RMSNorm(1, dtype=getattr(torch, dtype))(torch.tensor(x, dtype=getattr(torch, dtype)))

    yield "torch float32", lambda: torch("float32")
    yield "torch bfloat16", lambda: torch("bfloat16")
    yield "torch float64", lambda: torch("float64")
    yield "normkit eps=2**-23", lambda: nk.rms_norm(x, eps=2**-23)
    yield "normkit eps=2**-52", lambda: nk.rms_norm(x, eps=2**-52)


@shows("eps-place", "x = [1e-7, 0], divided by its Euclidean norm", "the first y")
def eps_place() -> Columns:
    x = np.array([[1e-7, 0]], np.float32)

    def first(y):
        return f.numbers(y).ravel()[0]

    def torch():
        import torch

        return torch.nn.functional.normalize(torch.tensor(x))

    def tf():
        import tensorflow as tf

        return tf.math.l2_normalize(x, -1)

    yield "torch", lambda: first(torch())
    yield "Keras", lambda: first(f.keras_layer("UnitNormalization", x))
    yield "tf.nn", lambda: first(tf())
    yield "ONNX", lambda: first(f.onnx("LpNormalization", x)[0])
    yield "normkit normalize(eps=1e-6)", lambda: first(nk.normalize(x, eps=1e-6))
    yield "normkit normalize(eps=1e-12)", lambda: first(nk.normalize(x, eps=1e-12))


@shows(
    "var-fast",
    "x = 10000 + [-1, 1], layer norm, and batch norm of its transpose",
    "error of y, which is [-1, 1]",
    limit=LIMIT,
)
def var_fast() -> Columns:
    x = np.float32(1e4) + ROW
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)

    def linen():
        import jax
        from flax import linen

        layer = linen.LayerNorm()
        return layer.apply(layer.init(jax.random.key(0), x), x)

    def standardize():
        import jax

        return jax.nn.standardize(x)

    yield "torch", lambda: _error(f.torch_layer("LayerNorm", x, 2), ROW)
    yield "Keras", lambda: _error(f.keras_layer("LayerNormalization", x, epsilon=1e-5), ROW)
    yield "Flax", lambda: _error(f.flax_layer("LayerNorm", x, 2), ROW)
    yield "Linen", lambda: _error(linen(), ROW)
    yield "jax.nn.standardize", lambda: _error(standardize(), ROW)
    yield "Haiku", lambda: _error(f.haiku_layer("LayerNorm", x, -1, True, True), ROW)
    yield "Equinox", lambda: _error(f.equinox_layer("LayerNorm", x[0], 2), ROW)
    yield "ONNX", lambda: _error(f.onnx("LayerNormalization", x, ones, zeros)[0], ROW)
    yield "Haiku BatchNorm", lambda: _error(f.haiku_batch_norm(x.T).y, ROW.T)
    yield "Keras BatchNormalization on torch", lambda: _error(f.keras_batch_norm(x.T, epsilon=1e-5).y, ROW.T)
    yield "normkit", lambda: max(_error(nk.layer_norm(x), ROW), _error(nk.batch_norm_train(x.T)[0], ROW.T))


@shows(
    "affine-folded",
    "x = 1e6 + [-1, 0, 1], batch norm in training",
    "error of y, which is [-1.2, 0, 1.2]",
    limit=1e-3,  # half a unit of what is folded is 0.03, by luck less; of what is centred 1e-7
)
def affine_folded() -> Columns:
    x = (1e6 + np.array([[-1], [0], [1]])).astype(np.float32)
    y = nk.batch_norm_train(x.astype(np.float64))[0]

    def tf():
        import tensorflow as tf

        mean, var = tf.constant([1e6]), tf.constant([2 / 3])
        return tf.nn.batch_normalization(x, mean, var, tf.zeros(1), tf.ones(1), 1e-5)

    yield "torch", lambda: _error(f.torch_batch_norm(x).y, y)
    yield "tf.nn", lambda: _error(tf(), y)
    for backend in ("tensorflow", "jax"):
        yield f"Keras on {backend}", lambda: _error(f.keras_batch_norm(x, epsilon=1e-5).y, y)
    yield "Flax", lambda: _error(f.flax_batch_norm(x, use_fast_variance=False).y, y)
    yield "Equinox", lambda: _error(f.equinox_batch_norm(x, mode="batch").y, y)
    yield "normkit", lambda: _error(nk.batch_norm_train(x)[0], y)


@shows(
    "const-mean-rounding",
    "x = 1e6 + [0, 0, 0.0625], layer norm with eps=1e-8",
    "error of y, which is [-0.7, -0.7, 1.4]",
    limit=LIMIT,
)
def const_mean_rounding() -> Columns:
    x = (1e6 + np.array([[0, 0, 0.0625]])).astype(np.float32)
    y = nk.layer_norm(x.astype(np.float64), eps=1e-8)

    yield "torch", lambda: _error(f.torch_layer("LayerNorm", x, 3, eps=1e-8), y)
    yield "Keras", lambda: _error(f.keras_layer("LayerNormalization", x, epsilon=1e-8), y)
    yield "Flax", lambda: _error(f.flax_layer("LayerNorm", x, 3, epsilon=1e-8, use_fast_variance=False), y)
    yield "normkit", lambda: _error(nk.layer_norm(x, eps=1e-8), y)


@shows("square-overflow", "x = [-1e20, 1e20], RMS norm", "error of y, which is [-1, 1]", limit=LIMIT)
def square_overflow() -> Columns:
    x = np.float32(1e20) * ROW

    yield "torch", lambda: _error(f.torch_layer("RMSNorm", x, 2), ROW)
    yield "Keras", lambda: _error(f.keras_layer("RMSNormalization", x), ROW)
    yield "Flax", lambda: _error(f.flax_layer("RMSNorm", x, 2), ROW)
    yield "ONNX", lambda: _error(f.onnx("RMSNormalization", x, np.ones(2, np.float32))[0], ROW)
    yield "normkit", lambda: _error(nk.rms_norm(x), ROW)


@shows(
    "layout-dependence", "noise around 1000, group norm, in both layouts", "error of y, which is near 1", limit=LIMIT
)
def layout_dependence() -> Columns:
    x = (1000 + np.random.default_rng(0).normal(size=(2, 8, 16, 16))).astype(np.float32)
    reference = nk.group_norm(x.astype(np.float64), 2)

    def torch(layout):
        import torch

        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        return torch.nn.GroupNorm(2, 8)(torch.tensor(x).to(memory_format=formats[layout]))

    def ours():
        last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        return max(_error(nk.group_norm(a, 2), reference) for a in (x, last))

    yield "torch contiguous", lambda: _error(torch("contiguous"), reference)
    yield "torch channels_last", lambda: _error(torch("channels_last"), reference)
    yield "normkit", ours


@shows("accum-dtype", "x = [-300, 300] in float16, batch norm in training", "error of y, which is [-1, 1]", limit=LIMIT)
def accum_dtype() -> Columns:
    x, y = np.float16(300) * ROW.T.astype(np.float16), ROW.T

    def torch():
        import torch

        return torch.nn.BatchNorm1d(1)(torch.tensor(x))

    yield "torch", lambda: _error(torch(), y)
    yield "Keras", lambda: _error(f.keras_batch_norm(x, dtype="mixed_float16").y, y)
    yield "Flax", lambda: _error(f.flax_batch_norm(x).y, y)
    yield "Haiku", lambda: _error(f.haiku_batch_norm(x).y, y)
    yield "normkit", lambda: _error(nk.batch_norm_train(x)[0], y)


@shows("out-dtype", "x in float16, layer norm with parameters in float32", "the dtype of y")
def out_dtype() -> Columns:
    x = ROW.astype(np.float16)

    def torch():
        import torch

        return str(torch.nn.LayerNorm(2).to(torch.float32)(torch.tensor(x)).dtype).removeprefix("torch.")

    def linen():
        import jax
        from flax import linen

        layer = linen.LayerNorm()
        return layer.apply(layer.init(jax.random.key(0), x), x)

    def in_inference():
        import torch

        return torch.nn.BatchNorm1d(2).eval()(torch.tensor(x))

    yield "torch", lambda: str(in_inference().dtype).removeprefix("torch.")
    yield "Keras", lambda: str(f.keras_layer("LayerNormalization", x, dtype="mixed_float16").dtype)
    yield "Flax", lambda: str(f.flax_layer("LayerNorm", x, 2).dtype)
    yield "Linen", lambda: str(linen().dtype)
    yield "normkit", lambda: str(nk.layer_norm(x, np.ones(2, np.float32)).dtype)


@shows(
    "cast-point",
    "256 numbers in float16, RMS norm with weights from 0.5 to 2",
    "how many y are not as rounded once, after the weight",
    limit=8,  # one in a float32 that is a half between two float16, and some more
)
def cast_point() -> Columns:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 256)).astype(np.float16)
    weight = rng.uniform(0.5, 2, 256).astype(np.float16)
    exact = nk.rms_norm(x.astype(np.float64), weight.astype(np.float64)).astype(np.float16)

    def others(y):
        return float((f.numbers(y) != exact).sum())

    def torch(layer):
        import torch

        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weight))
            return layer.half()(torch.tensor(x))

    def native():
        import torch

        return torch.nn.RMSNorm(256, eps=1e-6)

    def keras():
        import keras

        layer = keras.layers.RMSNormalization(dtype="mixed_float16")
        layer.build(x.shape)
        layer.scale.assign(weight.astype(np.float32))
        return keras.ops.convert_to_numpy(layer(x))

    def flax():
        import jax.numpy as jnp
        from flax import nnx

        layer = nnx.RMSNorm(256, dtype=jnp.float16, rngs=nnx.Rngs(0))
        layer.scale.set_value(jnp.asarray(weight, jnp.float32))
        return layer(jnp.asarray(x))

    yield "torch", lambda: others(torch(native()))
    yield "Keras", lambda: others(keras())
    yield "Flax", lambda: others(flax())
    yield "onnxruntime", lambda: others(f.onnx("RMSNormalization", x, weight, epsilon=1e-6, runtime=True)[0])
    yield "transformers Llama", lambda: others(torch(f.gemma()[0](256, eps=1e-6)))
    yield 'normkit cast="input"', lambda: others(nk.rms_norm(x, weight, cast="input"))
    yield 'normkit cast="output"', lambda: others(nk.rms_norm(x, weight, cast="output"))


@shows("weight-offset", "x = [-1, 1], RMS norm with a weight of zeros", "the second y")
def weight_offset() -> Columns:
    zeros = np.zeros(2, np.float32)

    def second(y):
        return f.numbers(y).ravel()[1]

    def torch():
        import torch

        layer = torch.nn.RMSNorm(2)
        torch.nn.init.zeros_(layer.weight)
        return layer(torch.tensor(ROW))

    def gemma():
        import torch

        return f.gemma()[1](2)(torch.tensor(ROW))

    def keras():
        import keras

        layer = keras.layers.RMSNormalization()
        layer.build(ROW.shape)
        layer.scale.assign(zeros)
        return keras.ops.convert_to_numpy(layer(ROW))

    def flax():
        from flax import nnx

        return f.flax_layer("RMSNorm", ROW, 2, scale_init=nnx.initializers.zeros_init())

    yield "torch", lambda: second(torch())
    yield "Keras", lambda: second(keras())
    yield "Flax", lambda: second(flax())
    yield "ONNX", lambda: second(f.onnx("RMSNormalization", ROW, zeros)[0])
    yield "transformers Gemma", lambda: second(gemma())
    yield "normkit weight_offset=1.0", lambda: second(nk.rms_norm(ROW, zeros, weight_offset=1.0))
    yield "normkit weight_offset=0.0", lambda: second(nk.rms_norm(ROW, zeros, weight_offset=0.0))


@shows("rms-scaling-legacy", "x = [1, 3], whose mean is 2", "y")
def rms_scaling_legacy() -> Columns:
    x = ROW + 2

    yield "Keras rms_scaling=True", lambda: f.keras_layer("LayerNormalization", x, rms_scaling=True, epsilon=1e-6)
    yield "Keras RMSNormalization", lambda: f.keras_layer("RMSNormalization", x)
    yield "torch", lambda: f.torch_layer("RMSNorm", x, 2)
    yield "Flax", lambda: f.flax_layer("RMSNorm", x, 2)
    yield "ONNX", lambda: f.onnx("RMSNormalization", x, np.ones(2, np.float32))[0]
    yield "normkit rms_norm", lambda: nk.rms_norm(x)


@shows("mvn-eps", "x = [0.1] * 4, a constant", "y")
def mvn_eps() -> Columns:
    x = np.full((1, 1, 1, 4), 0.1, np.float32)

    yield "ONNX", lambda: f.onnx("MeanVarianceNormalization", x)[0]
    yield "onnxruntime", lambda: f.onnx("MeanVarianceNormalization", x, runtime=True)[0]
    yield "normkit instance_norm", lambda: nk.instance_norm(x)


@shows("lrn-alpha", "x = [1, 1, 1] along the channels; size 3, alpha 1, beta 1, k 1", "the second y")
def lrn_alpha() -> Columns:
    x = np.ones((1, 3, 1, 1), np.float32)

    def second(y):
        return f.numbers(y).ravel()[1]

    def tf():
        import tensorflow as tf

        return tf.nn.local_response_normalization(x.reshape(1, 1, 1, 3), depth_radius=1, bias=1.0, alpha=1.0, beta=1.0)

    yield "torch", lambda: second(f.torch_layer("LocalResponseNorm", x, 3, alpha=1.0, beta=1.0, k=1.0))
    yield "tf.nn", lambda: second(tf())
    yield "onnxruntime", lambda: second(f.onnx("LRN", x, size=3, alpha=1.0, beta=1.0, bias=1.0, runtime=True)[0])
