"""One small network with batch norms in every framework, with the same weights, as an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from normkit import diagnostics
from normkit.diagnostics import _vectors as vectors
from normkit.layers import BatchNorm

SAMPLES, SIDE, CHANNELS, HIDDEN, CLASSES = 24, 6, 5, 7, 4
EPS = 1e-3
#: In the chain, whose names are these: a layer's place and its parameter.
LAYERS = ("conv.weight", "conv.bias"), ("bn1.weight", "bn1.bias"), ("dense.weight",), ("bn2.weight", "bn2.bias")
LAYERS += (("out.weight", "out.bias"),)  # type: ignore[assignment]


class Model(NamedTuple):
    """A framework's network: what diagnostics take, and how its parameters are called and laid out."""

    model: Any
    loss: Callable
    x: Any
    y: Any
    #: Where its images have their channels.
    axis: int
    #: From the chain's names to the framework's.
    names: dict[str, str]
    #: From the chain's name and an array of the chain to the framework's.
    array: Callable[[str, np.ndarray], Any]
    #: All that the model holds, as NumPy arrays: parameters, statistics, generators, modes.
    state: Callable[[], list]

    def objective(self, loss: Callable | None = None, **options: Any) -> diagnostics.ModelObjective:
        """What diagnostics take."""
        return diagnostics.objective(self.model, loss or self.loss, self.x, self.y, **options)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Images (samples, 1, side, side) and labels."""
    rng = np.random.default_rng(0)
    return rng.normal(0.5, 1.0, (SAMPLES, 1, SIDE, SIDE)), rng.integers(0, CLASSES, SAMPLES)


def weights(seed: int = 1) -> dict[str, np.ndarray]:
    """By the chain's names, in its shapes."""
    rng = np.random.default_rng(seed)
    flat = CHANNELS * (SIDE - 2) ** 2
    shapes = {
        "conv.weight": (CHANNELS, 1, 3, 3), "conv.bias": (CHANNELS,), "bn1.weight": (CHANNELS,),
        "bn1.bias": (CHANNELS,), "dense.weight": (HIDDEN, flat), "bn2.weight": (HIDDEN,), "bn2.bias": (HIDDEN,),
        "out.weight": (CLASSES, HIDDEN), "out.bias": (CLASSES,),
    }  # fmt: skip
    made = {name: rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape) for name, shape in shapes.items()}
    return {name: a + 1 if name in ("bn1.weight", "bn2.weight") else a for name, a in made.items()}


def numpy(dtype: str = "float64", namespace: Any = np) -> Model:
    """A chain of normkit's layers on NumPy, or on another library of the array API."""

    def array(name: str, a: np.ndarray) -> Any:
        return namespace.asarray(np.array(a, dtype))

    w = {name: array(name, a) for name, a in weights().items()}
    norms = {}
    for name in ("bn1", "bn2"):
        norms[name] = BatchNorm(w[f"{name}.weight"].shape[0], eps=EPS, dtype=dtype, backend=namespace)
        norms[name].weight, norms[name].bias = w[f"{name}.weight"], w[f"{name}.bias"]
    layers = {
        "conv": diagnostics.Conv(w["conv.weight"], w["conv.bias"]), "bn1": norms["bn1"],
        "relu1": diagnostics.Activation("relu"), "flat": diagnostics.Flatten(),
        "dense": diagnostics.Dense(w["dense.weight"]), "bn2": norms["bn2"],
        "relu2": diagnostics.Activation("relu"), "out": diagnostics.Dense(w["out.weight"], w["out.bias"]),
    }  # fmt: skip
    x, y = data()

    def state() -> list:
        held = [a for layer in norms.values() for a in (*layer.state_dict().values(), layer.training)]
        return [np.array(a) for a in (*held, *w.values())]

    x, y = array("x", x), namespace.asarray(y)
    return Model(layers, diagnostics.cross_entropy, x, y, 1, {name: name for name in w}, array, state)


def torch() -> Model:
    """A torch.nn.Sequential."""
    import torch
    from torch import nn

    flat = CHANNELS * (SIDE - 2) ** 2
    modules = {
        "conv": nn.Conv2d(1, CHANNELS, 3), "bn1": nn.BatchNorm2d(CHANNELS, eps=EPS), "relu1": nn.ReLU(),
        "flat": nn.Flatten(), "dense": nn.Linear(flat, HIDDEN, bias=False), "bn2": nn.BatchNorm1d(HIDDEN, eps=EPS),
        "relu2": nn.ReLU(), "out": nn.Linear(HIDDEN, CLASSES),
    }  # fmt: skip
    model = nn.Sequential()
    for name, module in modules.items():
        model.add_module(name, module)

    def array(name: str, a: np.ndarray) -> Any:
        return torch.tensor(np.array(a, "f4"))

    model.load_state_dict({name: array(name, a) for name, a in weights().items()}, strict=False)
    model.eval()
    x, y = data()
    x, y = array("x", x), torch.tensor(y)

    def state() -> list:
        modes = [module.training for module in model.modules()]
        held = [a.numpy().copy() for a in model.state_dict().values()]
        grads = [p.grad is None for p in model.parameters()]
        return [*held, *modes, *grads, torch.get_rng_state().numpy().copy()]

    return Model(model, nn.functional.cross_entropy, x, y, 1, {name: name for name in weights()}, array, state)


def keras() -> Model:
    """A keras.Sequential on the backend that Keras has, channels last."""
    import keras
    from keras import ops

    kinds = keras.layers
    model = keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 1)), kinds.Conv2D(CHANNELS, 3), kinds.BatchNormalization(epsilon=EPS),
            kinds.ReLU(), kinds.Permute((3, 1, 2)), kinds.Flatten(), kinds.Dense(HIDDEN, use_bias=False),
            kinds.BatchNormalization(epsilon=EPS), kinds.ReLU(), kinds.Dense(CLASSES),
        ]
    )  # fmt: skip

    def array(name: str, a: np.ndarray) -> Any:
        if name.startswith("conv.w"):
            a = a.transpose(2, 3, 1, 0)
        return ops.convert_to_tensor((a.T if name in ("dense.weight", "out.weight") else a).astype("f4"))

    variables = dict(zip(weights(), model.trainable_variables, strict=True))
    for name, a in weights().items():
        variables[name].assign(array(name, a))
    x, y = data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    image = ops.convert_to_tensor(x.transpose(0, 2, 3, 1).astype("f4"))
    names = {name: v.path for name, v in variables.items()}

    def state() -> list:
        return [vectors.host(v.value).copy() for v in model.variables]

    return Model(model, lambda out, y: loss(y, out), image, ops.convert_to_tensor(y), -1, names, array, state)


def flax() -> Model:
    """A flax.nnx module, channels last."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            flat = CHANNELS * (SIDE - 2) ** 2
            self.conv = nnx.Conv(1, CHANNELS, (3, 3), padding="VALID", rngs=rngs)
            self.bn1 = nnx.BatchNorm(CHANNELS, epsilon=EPS, rngs=rngs)
            self.dense = nnx.Linear(flat, HIDDEN, use_bias=False, rngs=rngs)
            self.bn2 = nnx.BatchNorm(HIDDEN, epsilon=EPS, rngs=rngs)
            self.out = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.bn1(self.conv(x))).transpose(0, 3, 1, 2)
            return self.out(nnx.relu(self.bn2(self.dense(x.reshape(x.shape[0], -1)))))

    def array(name: str, a: np.ndarray) -> Any:
        if name.startswith("conv.w"):
            a = a.transpose(2, 3, 1, 0)
        return jnp.asarray(a.T if name in ("dense.weight", "out.weight") else a, "float32")

    model = Net(nnx.Rngs(0))
    names = {}
    for name, a in weights().items():
        layer, _, kind = name.partition(".")
        own = {"weight": "scale" if layer.startswith("bn") else "kernel"}.get(kind, kind)
        getattr(getattr(model, layer), own)[...] = array(name, a)
        names[name] = f"{layer}.{own}"

    model.eval()
    x, y = data()

    def loss(out, y):
        return -jnp.mean(jax.nn.log_softmax(out)[jnp.arange(len(y)), y])

    image = jnp.asarray(x.transpose(0, 2, 3, 1), "float32")

    def state() -> list:
        modes = [model.bn1.use_running_average, model.bn2.use_running_average]
        return [*(np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model))), *modes]

    return Model(model, loss, image, jnp.asarray(y), -1, names, array, state)


def torch_dropout() -> tuple:
    """A model, a loss, an input, and what the generators are at."""
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
    return net, lambda out, _: (out**2).mean(), torch.ones(4, 8), lambda: [torch.get_rng_state().numpy().copy()]


def keras_dropout() -> tuple:
    """As of torch."""
    import keras
    from keras import ops

    net = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dropout(0.5)])

    def state() -> list:
        return [vectors.host(v.value).copy() for v in net.non_trainable_variables]

    return net, lambda out, _: ops.mean(out**2), ops.ones((4, 8)), state


def flax_dropout() -> tuple:
    """As of torch."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    net = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))

    def state() -> list:
        return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(net, nnx.RngCount))]

    return net, lambda out, _: jnp.mean(out**2), jnp.ones((4, 8)), state
