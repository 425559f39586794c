"""Norm layers as neutral records, and how each framework computes what it made of one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from normkit._convert.record import Momentum, Norm
from normkit.conformance.natives import quiet

Array = Any
#: What must be installed for each framework, and the array library of the suite that it goes with.
NEEDS = {
    "normkit": ("numpy", "numpy"),
    "torch": ("torch", "torch"),
    "keras": ("keras", "tensorflow"),
    "tf_keras": ("tf_keras", "tensorflow"),
    "nnx": ("flax", "jax"),
    "linen": ("flax", "jax"),
    "haiku": ("haiku", "jax"),
    "equinox": ("equinox", "jax"),
    "onnx": ("onnxruntime", "numpy"),
}
#: Where a framework has its channels, when it has them in one place.
LAST_ONLY = {("nnx", "group_norm"), ("linen", "group_norm")}
FIRST_ONLY = {"torch", "equinox", "onnx"}
#: What a framework cannot hold, and a word of the reason.
REFUSED = {
    ("tf_keras", "rms_norm"): "has no RMSNormalization",
    ("tf_keras", "rms_norm two"): "has no RMSNormalization",
    ("nnx", "layer_norm two"): "linen has several",
    ("nnx", "rms_norm two"): "linen has several",
}


def available(libraries: list[str]) -> list[str]:
    """The frameworks that are installed and go with these array libraries."""
    return [name for name, (module, lib) in NEEDS.items() if lib in libraries and importlib.util.find_spec(module)]


def _values(seed: int, *shape: int, dtype: str = "float32") -> Array:
    return np.random.default_rng(seed).normal(1.0, 0.3, shape).astype(dtype)


_WEIGHT = {"weight": _values(1, 6), "bias": _values(2, 6)}
_STATS = {
    "mean": _values(3, 6),
    "var": np.abs(_values(4, 6)),
    "momentum": Momentum(0.97, "old"),
    "variance": "biased",
}
#: Every kind, with channels or the last axis of 6; the rank is 4.
RECORDS = {
    "batch_norm": Norm("batch_norm", (6,), (1,), 3e-4, **_WEIGHT, **_STATS, ndim=4),
    "layer_norm": Norm("layer_norm", (6,), (-1,), 2e-6, **_WEIGHT, ndim=4),
    "layer_norm two": Norm(
        "layer_norm", (5, 6), (-2, -1), 2e-6, weight=_values(5, 5, 6), bias=_values(6, 5, 6), ndim=4
    ),
    "group_norm": Norm("group_norm", (6,), (1,), 1e-5, num_groups=3, **_WEIGHT, ndim=4),
    "instance_norm": Norm("instance_norm", (6,), (1,), 1e-3, **_WEIGHT, ndim=4),
    "rms_norm": Norm("rms_norm", (6,), (-1,), 1e-7, weight=_values(7, 6), ndim=4),
    "rms_norm two": Norm("rms_norm", (5, 6), (-2, -1), 1e-7, weight=_values(8, 5, 6), ndim=4),
}


def axis_in(framework: str, norm: Norm) -> int | None:
    """The channel axis that the framework has for this kind of layer, None where it is as in the record."""
    if norm.kind in ("layer_norm", "rms_norm"):
        return None
    return -1 if (framework, norm.kind) in LAST_ONLY else 1


def compute(framework: str, layer: Any, norm: Norm, x: Array) -> Array:
    """What the layer makes of x in inference. The channels of x are at axis 1, and are moved where they must be."""
    move = axis_in(framework, norm) == -1
    with quiet():
        y = np.asarray(_COMPUTE[framework](layer, norm, np.moveaxis(x, 1, -1) if move else x))
    return np.moveaxis(y, -1, 1) if move else y


def _torch(layer, norm, x):
    import torch

    return layer.eval()(torch.from_numpy(np.ascontiguousarray(x))).detach().numpy()


def _keras(layer, norm, x):
    return _host(layer(x, training=False))


def _host(y):
    return y.detach().numpy() if hasattr(y, "detach") else np.asarray(y)


def _nnx(layer, norm, x):
    return layer(x, use_running_average=True) if norm.kind == "batch_norm" else layer(x)


def _linen(layer, norm, x):
    module, variables = layer
    options = {"use_running_average": True} if norm.kind == "batch_norm" else {}
    return module.apply(variables, x, **options)


def _haiku(layer, norm, x):
    transformed, params, state = layer
    return transformed.apply(params, state, None, x)[0]


def _equinox(layer, norm, x):
    import jax

    if norm.kind == "batch_norm":
        norm_layer, state = layer
        return jax.vmap(lambda one: norm_layer(one, state, inference=True)[0], axis_name="batch")(x)
    outer = 1 if norm.kind in ("group_norm", "instance_norm") else x.ndim - len(norm.axis)
    mapped: Callable = layer
    for _ in range(outer):
        mapped = jax.vmap(mapped)
    return mapped(x)


def _onnx(layer, norm, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(layer.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ascontiguousarray(x)})[0]


_COMPUTE: dict[str, Callable] = {
    "normkit": lambda layer, norm, x: layer.eval()(x),
    "torch": _torch,
    "keras": _keras,
    "tf_keras": _keras,
    "nnx": _nnx,
    "linen": _linen,
    "haiku": _haiku,
    "equinox": _equinox,
    "onnx": _onnx,
}


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """What a framework says on import is its own affair; Keras runs on TensorFlow unless the environment says else."""
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
