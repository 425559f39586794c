"""Demonstrations of axes, shapes, names, arguments and files."""

from __future__ import annotations

import numpy as np

import normkit as nk
from normkit.conformance.divergences import frameworks as f
from normkit.conformance.divergences.demonstration import Columns, shows

SQUARE = np.array([[0.0, 2.0], [4.0, 8.0]], np.float32)
#: Lengths that tell the axes apart.
LENGTHS = (2, 3, 4)


def _x(*shape) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def _shape(a) -> str:
    return str(tuple(a.shape))


def _keras(kind, shape, **options):
    import keras

    layer = getattr(keras.layers, kind)(**options)
    layer.build(shape)
    return layer


def _torch(kind, *args, **options):
    import torch

    return getattr(torch.nn, kind)(*args, **options)


def _flax(kind, features, **options):
    from flax import nnx

    return getattr(nnx, kind)(features, rngs=nnx.Rngs(0), **options)


def _haiku(kind, x, *args, **options):
    import haiku as hk
    import jax

    net = hk.transform_with_state(lambda x: getattr(hk, kind)(*args, **options)(x, **_training(kind)))
    params, _ = net.init(jax.random.key(0), x)
    (found,) = params.values()
    return found


def _taken(call) -> int:
    """How many parameters a call takes: the first number that is not refused."""
    for n in LENGTHS:
        try:
            call(np.ones(n, np.float32))
        except Exception:
            continue
        return n
    raise ValueError(f"none of {LENGTHS} parameters are taken")


def _training(kind):
    return {"is_training": True} if kind == "BatchNorm" else {}


@shows("axis-layout", "x of shape (2, 3, 4), batch norm", "the number of channels")
def axis_layout() -> Columns:
    x = _x(*LENGTHS)

    def torch(ones):
        import torch

        return torch.nn.functional.batch_norm(torch.tensor(x), *[torch.tensor(ones)] * 4)

    yield "torch", lambda: _taken(torch)
    yield "Keras", lambda: _keras("BatchNormalization", LENGTHS).gamma.shape[0]
    yield "Flax", lambda: f.flax_layer("BatchNorm", x, 4, use_running_average=False).shape[-1]
    yield "Haiku", lambda: _haiku("BatchNorm", x, True, True, 0.9)["scale"].shape[-1]
    yield "ONNX", lambda: _taken(lambda ones: f.onnx("BatchNormalization", x, ones, ones, ones, ones))
    yield "normkit axis=1", lambda: nk.batch_norm_train(x, axis=1)[1].mean.shape[0]
    yield "normkit axis=-1", lambda: nk.batch_norm_train(x, axis=-1)[1].mean.shape[0]


@shows("axis-param-shape", "x of shape (2, 3, 4), layer norm over axes 1 and 2", "the weight's shape")
def axis_param_shape() -> Columns:
    x = _x(*LENGTHS)

    yield "torch", lambda: _shape(_torch("LayerNorm", (3, 4)).weight)
    yield "Keras", lambda: _shape(_keras("LayerNormalization", LENGTHS, axis=[1, 2]).gamma)
    yield "Flax", lambda: _shape(_flax("LayerNorm", 4, reduction_axes=(1, 2)).scale)
    yield "Haiku", lambda: _shape(_haiku("LayerNorm", x, (1, 2), True, True)["scale"])
    yield "normkit layer_norm", lambda: _shape(nk.LayerNorm((3, 4)).weight)


@shows("axis-general", "x of shape (2, 3, 4), RMS norm over axis 1", "sum of y²")
def axis_general() -> Columns:
    x = _x(*LENGTHS) + 1

    def squares(y):
        return np.sum(f.numbers(y) ** 2)

    def keras():
        layer = _keras("RMSNormalization", LENGTHS, axis=1)
        return layer(x)

    yield "torch", lambda: squares(f.torch_layer("RMSNorm", x, 3))
    yield "Keras", lambda: squares(f.numbers(keras()))
    yield "Flax", lambda: squares(f.flax_layer("RMSNorm", x, 3, reduction_axes=1, feature_axes=1))
    yield "Haiku", lambda: squares(f.haiku_layer("RMSNorm", x, 1, create_scale=False))
    yield "normkit axis=1", lambda: squares(nk.rms_norm(x, axis=1))


@shows("affine-pair", "instance norm of 2 channels, or group norm of 2, with a weight of threes alone", "largest y")
def affine_pair() -> Columns:
    x = np.array([[[-1, 1], [-1, 1]]], np.float32)
    threes = np.full(2, 3, np.float32)

    def torch():
        import torch

        return torch.nn.functional.group_norm(torch.tensor(x), 2, torch.tensor(threes)).max()

    def keras():
        layer = _keras("GroupNormalization", x.shape, groups=2, axis=1, center=False)
        layer.gamma.assign(threes)
        return f.numbers(layer(x)).max()

    def flax():
        from flax import nnx

        y = f.flax_layer(
            "InstanceNorm", x.transpose(0, 2, 1), 2, use_bias=False, scale_init=nnx.initializers.constant(3)
        )
        return y.max()

    yield "torch", torch
    yield "Keras", keras
    yield "Flax", flax
    yield "ONNX", lambda: f.onnx("InstanceNormalization", x, threes)[0].max()
    yield "normkit weight, bias", lambda: nk.instance_norm(x, threes).max()


@shows("gn-order", "x of 2 channels, group norm with -1 groups", "y")
def gn_order() -> Columns:
    x = SQUARE[None]

    yield "torch", lambda: f.torch_layer("GroupNorm", x, -1, 2)
    yield "Keras", lambda: f.keras_layer("GroupNormalization", x, groups=-1, axis=1, epsilon=1e-5)
    yield "Flax", lambda: f.flax_layer("GroupNorm", x, 2, num_groups=-1)
    yield "normkit group_norm", lambda: nk.group_norm(x, -1)
    yield "normkit instance_norm", lambda: nk.instance_norm(x)


@shows("gn-instance", "the layers that are there", "the layer for instance norm")
def gn_instance() -> Columns:
    def named(module, *names):
        import importlib

        found = importlib.import_module(module)
        return "its own" if any(hasattr(found, name) for name in names) else "none"

    def onnx():
        from onnx import defs

        return "its own" if defs.has("InstanceNormalization") else "none"

    yield "torch", lambda: named("torch.nn", "InstanceNorm2d")
    yield "Keras", lambda: named("keras.layers", "InstanceNormalization", "InstanceNorm")
    yield "Flax", lambda: named("flax.nnx", "InstanceNorm")
    yield "Haiku", lambda: named("haiku", "InstanceNorm")
    yield "Equinox", lambda: named("equinox.nn", "InstanceNorm")
    yield "ONNX", onnx
    yield "normkit InstanceNorm", lambda: named("normkit", "InstanceNorm")


@shows("gn1-vs-ln", "x of shape (2, 3, 4): 3 channels, 4 places", "the weight's shape")
def gn1_vs_ln() -> Columns:
    yield "torch GroupNorm", lambda: _shape(_torch("GroupNorm", 1, 3).weight)
    yield "torch LayerNorm", lambda: _shape(_torch("LayerNorm", (3, 4)).weight)
    yield "Keras GroupNormalization", lambda: _shape(_keras("GroupNormalization", LENGTHS, groups=1, axis=1).gamma)
    yield "Keras LayerNormalization", lambda: _shape(_keras("LayerNormalization", LENGTHS, axis=[1, 2]).gamma)
    yield "normkit GroupNorm", lambda: _shape(nk.GroupNorm(1, 3).weight)
    yield "normkit LayerNorm", lambda: _shape(nk.LayerNorm((3, 4)).weight)


@shows("onnx-gn18", "4 channels in 2 groups, group norm", "how many weights are taken")
def onnx_gn18() -> Columns:
    x = np.array([[[-1, 1]] * 4], np.float32)

    def onnx(version):
        def call(weights):
            return f.onnx("GroupNormalization", x, weights, 0 * weights, version=version, num_groups=2)

        return _taken(call)

    def torch(weights):
        import torch

        return torch.nn.functional.group_norm(torch.tensor(x), 2, torch.tensor(weights))

    yield "ONNX 18", lambda: onnx(18)
    yield "ONNX 21", lambda: onnx(21)
    yield "torch", lambda: _taken(torch)
    yield "Flax", lambda: _flax("GroupNorm", 4, num_groups=2).scale.shape[0]
    yield "normkit", lambda: _taken(lambda weights: nk.group_norm(x, 2, weights))


@shows("onnx-gn-body", "x = 10000 + [-1, 1], group norm of one channel", "error of y, which is [-1, 1]", limit=0.01)
def onnx_gn_body() -> Columns:
    x = np.array([[[9999, 10001]]], np.float32)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)

    def error(y):
        found = np.abs(f.numbers(y) - [-1, 1]).max()
        return found if np.isfinite(found) else np.inf

    def runtime(op, **options):
        return error(f.onnx(op, x, one, zero, version=21, runtime=True, **options)[0])

    yield "onnxruntime GroupNormalization", lambda: runtime("GroupNormalization", num_groups=1)
    yield "onnxruntime InstanceNormalization", lambda: runtime("InstanceNormalization")
    yield "normkit", lambda: error(nk.group_norm(x, 1))


@shows("state-names", "a batch norm of one channel", "the names in its state")
def state_names() -> Columns:
    def flax():
        from flax import nnx

        layer = _flax("BatchNorm", 1)
        return ", ".join(sorted((str(p[-1]) for p, _ in nnx.to_flat_state(nnx.state(layer))), key=_FLAX.index))

    yield "torch", lambda: ", ".join(_torch("BatchNorm1d", 1).state_dict())
    yield "Keras", lambda: ", ".join(v.name for v in _keras("BatchNormalization", (2, 1)).variables)
    yield "Flax", flax
    yield "normkit state_dict()", lambda: ", ".join(nk.BatchNorm(1).state_dict())
    yield 'normkit convert(to="keras")', lambda: ", ".join(nk.convert(nk.BatchNorm(1), to="keras").arrays())
    yield 'normkit convert(to="nnx")', lambda: ", ".join(nk.convert(nk.BatchNorm(1), to="nnx").arrays())


_FLAX = ("scale", "bias", "mean", "var")


@shows("config-legacy", "the arguments that tf_keras writes: axis=[3], momentum=0.99", "the axis that is read")
def config_legacy() -> Columns:
    def read(package):
        import importlib

        layer = importlib.import_module(package).layers.BatchNormalization.from_config({"axis": [3], "momentum": 0.99})
        return int(np.ravel(layer.axis)[0])

    def converted():
        one = np.ones(1, np.float32)
        arrays = {f"bn/{name}": one for name in ("gamma", "beta", "moving_mean", "moving_variance")}
        written = {"layer": "BatchNormalization", "axis": [3], "momentum": 0.99, "epsilon": 1e-3}
        return (
            nk.convert(arrays, "keras", framework="tf_keras", settings={"bn": written}).natives["bn"].settings["axis"]
        )

    yield "tf_keras", lambda: read("tf_keras")
    yield "Keras", lambda: read("keras")
    yield "normkit convert", converted


@shows("2d-input-meaning", "x = [[0, 2], [4, 8]]", "the first row of y")
def matrix_meaning() -> Columns:
    def first(y):
        return f.numbers(y)[0]

    yield "torch InstanceNorm1d", lambda: first(f.torch_layer("InstanceNorm1d", SQUARE, 2))
    yield "torch BatchNorm1d", lambda: first(f.torch_layer("BatchNorm1d", SQUARE, 2))
    yield "Keras", lambda: first(f.keras_batch_norm(SQUARE, epsilon=1e-5).y)
    yield "Flax", lambda: first(f.flax_batch_norm(SQUARE).y)
    yield "normkit axis=0", lambda: first(nk.batch_norm_train(SQUARE, axis=0)[0])
    yield "normkit axis=1", lambda: first(nk.batch_norm_train(SQUARE, axis=1)[0])
