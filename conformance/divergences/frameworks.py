"""Small calls of each framework's own layers, on NumPy arrays, for the demonstrations; each is imported when called."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import numpy as np

Array = Any

#: The module without which a framework is not installed, by the first word of its label.
MODULES = {
    "torch": "torch",
    "Keras": "keras",
    "tf_keras": "tf_keras",
    "tf.nn": "tensorflow",
    "Flax": "flax",
    "Linen": "flax",
    "jax.nn.standardize": "jax",
    "Haiku": "haiku",
    "Equinox": "equinox",
    "ONNX": "onnx",
    "onnxruntime": "onnxruntime",
    "transformers": "transformers",
    "normkit": "normkit",
}


#: Modules, and what they are distributed as.
DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "keras": ("keras",),
    "tf_keras": ("tf_keras",),
    "jax": ("jax",),
    "flax": ("flax",),
    "haiku": ("dm-haiku",),
    "equinox": ("equinox",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime",),
    "transformers": ("transformers",),
}


class Trained(NamedTuple):
    """What a batch norm gave in training, and its statistics afterwards."""

    y: Array
    mean: Array
    var: Array


def absent(label: str) -> str:
    """Why a framework cannot be shown here; "" where it can."""
    name, _, setting = label.partition(" ")
    module = MODULES.get(name)
    if module is None or importlib.util.find_spec(module) is None:
        return "not installed"
    backend = setting.rpartition("on ")[2]
    if module == "keras" and backend in ("jax", "tensorflow", "torch"):
        import keras

        running = keras.config.backend()
        return "" if running == backend else f"Keras runs on {running} here"
    if module == "transformers":
        try:
            gemma()
        except Exception as error:  # it imports torchvision, where that is installed
            return f"cannot be imported: {error}"
    return ""


def numbers(value: Any) -> Any:
    """An array of any framework as float64; text as it is."""
    if isinstance(value, str):
        return value
    if hasattr(value, "detach"):
        value = value.detach().double().numpy()
    elif type(value).__module__.startswith("keras."):
        value = value.numpy()
        value = numbers(value) if hasattr(value, "detach") else value
    return np.asarray(value).astype(np.float64)


def torch_batch_norm(x, kind="BatchNorm1d", **options) -> Trained:
    """A torch.nn.BatchNorm1d in training."""
    import torch

    layer = getattr(torch.nn, kind)(x.shape[1], **options)
    y = layer(torch.tensor(x))
    return Trained(y, layer.running_mean, layer.running_var)


def tf_batch_norm(x, momentum=0.1, eps=1e-5) -> Trained:
    """TensorFlow's fused kernel in training, on (n, channels); statistics from (0, 1)."""
    import tensorflow as tf

    ones, zeros = tf.ones(x.shape[1]), tf.zeros(x.shape[1])
    y, mean, var = tf.compat.v1.nn.fused_batch_norm(
        x[:, None, None, :], ones, zeros, zeros, ones, eps, is_training=True, exponential_avg_factor=momentum
    )
    return Trained(y[:, 0, 0], mean, var)


def keras_batch_norm(x, package="keras", steps=1, **options) -> Trained:
    """A BatchNormalization of Keras 3 or of tf_keras in training."""
    keras = importlib.import_module(package)
    layer = keras.layers.BatchNormalization(**options)
    for _ in range(steps):
        y = layer(x, training=True)
    return Trained(y, layer.moving_mean, layer.moving_variance)


def flax_batch_norm(x, mask=None, **options) -> Trained:
    """A flax.nnx.BatchNorm in training."""
    import jax.numpy as jnp
    from flax import nnx

    layer = nnx.BatchNorm(x.shape[-1], rngs=nnx.Rngs(0), use_running_average=False, **options)
    y = layer(jnp.asarray(x), mask=None if mask is None else jnp.asarray(mask))
    return Trained(y, layer.mean[...], layer.var[...])


def haiku_batch_norm(x, decay_rate=0.9, only_init=False, eps=1e-5) -> Trained:
    """A haiku.BatchNorm in training: after init, which is given the batch too, or after one step from init's state."""
    import haiku as hk
    import jax
    import jax.numpy as jnp

    net = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, decay_rate, eps=eps)(x, is_training=True))
    key, x = jax.random.key(0), jnp.asarray(x)
    state: Any
    params, state = net.init(key, x)
    if not only_init:
        state = jax.tree.map(jnp.zeros_like, state)
        y, state = net.apply(params, state, key, x)
    else:
        y = x
    return Trained(y, *(state[f"batch_norm/~/{name}_ema"]["average"].reshape(-1) for name in ("mean", "var")))


def equinox_batch_norm(*batches, **options) -> Trained:
    """An equinox.nn.BatchNorm in training: y of the last batch; the first one's statistics are where it starts."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(batches[0].shape[1], "batch", **options)
    step = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    for x in batches:
        y, state = step(jnp.asarray(x), state)
    names = ("ema_state_index", "batch_state_index")
    index = next(i for i in (getattr(layer, n, None) for n in names) if i is not None)
    found = state.get(index)
    return Trained(y, *found[-2:])


def onnx_batch_norm(x, momentum=0.9, eps=1e-5) -> Trained:
    """BatchNormalization in training, from statistics (0, 1), by ONNX's reference."""
    ones, zeros = np.ones(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)
    found = onnx("BatchNormalization", x, ones, zeros, zeros, ones, training_mode=1, momentum=momentum, epsilon=eps)
    return Trained(*found)


def onnx(op: str, *inputs: Array, version: int = 23, runtime: bool = False, **attributes: Any) -> list[Array]:
    """One operator, by ONNX's reference or by onnxruntime."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    names = [f"in{k}" for k in range(len(inputs))]
    outputs = ["out", "mean", "var"] if attributes.get("training_mode") else ["out"]
    node = helper.make_node(op, names, outputs, **attributes)
    element = helper.np_dtype_to_tensor_dtype(inputs[0].dtype)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in zip(names, inputs, strict=True)
    ]
    ranks = (inputs[0].ndim, 1, 1)
    gives = [
        helper.make_tensor_value_info(name, element, [f"{name}{k}" for k in range(rank)])
        for name, rank in zip(outputs, ranks, strict=False)
    ]
    graph = helper.make_graph([node], "shown", given, gives)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10)
    if runtime:
        import onnxruntime

        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, dict(zip(names, inputs, strict=True)))
    return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))


def torch_layer(kind: str, x: Array, *args: Any, **options: Any) -> Array:
    """What a layer of torch.nn gives, just made."""
    import torch

    return getattr(torch.nn, kind)(*args, **options)(torch.tensor(x))


def keras_layer(kind: str, x: Array, **options: Any) -> Array:
    """What a layer of Keras gives, just made."""
    import keras

    return keras.ops.convert_to_numpy(getattr(keras.layers, kind)(**options)(x))


def flax_layer(kind: str, x: Array, features: int, **options: Any) -> Array:
    """What a layer of flax.nnx gives, just made."""
    import jax.numpy as jnp
    from flax import nnx

    return getattr(nnx, kind)(features, rngs=nnx.Rngs(0), **options)(jnp.asarray(x))


def haiku_layer(kind: str, x: Array, *args: Any, **options: Any) -> Array:
    """What a layer of haiku gives, just made."""
    import haiku as hk
    import jax
    import jax.numpy as jnp

    net = hk.transform(lambda x: getattr(hk, kind)(*args, **options)(x))
    x = jnp.asarray(x)
    return net.apply(net.init(jax.random.key(0), x), None, x)


def equinox_layer(kind: str, x: Array, *args: Any, **options: Any) -> Array:
    """What a layer of equinox gives one sample, just made."""
    import equinox as eqx
    import jax.numpy as jnp

    return getattr(eqx.nn, kind)(*args, **options)(jnp.asarray(x))


@functools.cache
def gemma():
    """transformers' RMS norms of Llama and Gemma."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm, GemmaRMSNorm
