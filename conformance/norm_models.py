"""Small models of PyTorch, Keras, tf_keras, nnx, equinox and ONNX that have the same norm layers."""

import warnings

import numpy as np
import torch
from torch import nn

from normkit.conformance.norm_layers import importing
from normkit.conformance.tolerances import tolerance

with importing():
    import equinox
    import jax
    import keras
    import onnx
    from flax import nnx

X = np.random.default_rng(0).normal(1.0, 2.0, (4, 3, 9, 9)).astype(np.float32)
#: Two norm layers that see what another one made, each as far off as native layers may be.
LIMIT = 2 * tolerance("native", "float32").units


class Net(nn.Module):
    """A convolutional network with a batch, a group and a layer norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.gn = nn.GroupNorm(4, 8, eps=1e-4)
        self.head = nn.Linear(8, 5)
        self.ln = nn.LayerNorm(5)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        x = self.gn(self.conv2(x)).relu()
        return self.ln(self.head(x.mean((2, 3))))


def net(steps=3):
    """The network in inference, with parameters and statistics of its own."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for _ in range(steps):
            model(torch.from_numpy(X) * 2 + 1)
    return model.eval()


def keras_net(top=keras):
    """The same network in Keras 3 or tf_keras, channels last, with all its defaults."""
    layers = top.layers
    x = inputs = top.Input((9, 9, 3))
    for name, norm in (("", layers.BatchNormalization(name="bn")), ("2", layers.GroupNormalization(4, name="gn"))):
        x = layers.ReLU()(norm(layers.Conv2D(8, 3, name=f"conv{name}")(x)))
    x = layers.Dense(5, name="head")(layers.GlobalAveragePooling2D()(x))
    return top.Model(inputs, layers.LayerNormalization(name="ln")(x))


def with_convolutions(model, source):
    """Convolutions and the linear layer, which normkit does not convert, carried over by hand."""
    for name in ("conv", "conv2"):
        weight, bias = (p.detach().numpy() for p in getattr(source, name).parameters())
        model.get_layer(name).set_weights([weight.transpose(2, 3, 1, 0), bias])
    model.get_layer("head").set_weights([source.head.weight.detach().numpy().T, source.head.bias.detach().numpy()])
    return model


def ran(model, x=X):
    """What a PyTorch model makes of x."""
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def state(model):
    """A copy of a PyTorch model's state."""
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


class Small(nnx.Module):
    """A batch norm below a name, and a layer norm, in nnx."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.block = nnx.Dict(bn=nnx.BatchNorm(3, rngs=rngs))
        self.ln = nnx.LayerNorm(9, rngs=rngs)

    def __call__(self, x):
        y = self.block.bn(x.transpose(0, 2, 3, 1), use_running_average=True)
        return self.ln(y.transpose(0, 3, 1, 2))


class SmallEquinox(equinox.Module):
    """The same in equinox."""

    block: dict
    ln: equinox.nn.LayerNorm

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.block = {"bn": equinox.nn.BatchNorm(3, "batch", mode="batch")}
        self.ln = equinox.nn.LayerNorm(9)

    def __call__(self, x, state):
        x, state = self.block["bn"](x, state, inference=True)
        return jax.vmap(jax.vmap(self.ln))(x), state


def small(seed=0):
    """The same in PyTorch, with numbers of its own."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"block": nn.ModuleDict({"bn": nn.BatchNorm2d(3, 1e-3)}), "ln": nn.LayerNorm(9, 1e-4)})
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    model.forward = lambda x: model["ln"](model["block"]["bn"](x))
    return model.eval()


def graph(*nodes, **constants):
    """An ONNX model of nodes and constants, from x to y."""
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (None, 3, 9, 9)) for name in "xy")
    made = [helper.make_node(op, inputs, outputs, name=name, **said) for op, inputs, outputs, name, said in nodes]
    arrays = [onnx.numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()]
    return helper.make_model(
        helper.make_graph(made, "g", [x], [y], arrays), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


def onnx_small():
    """The same in ONNX, as exporters of PyTorch name it: constants that were equal are one."""
    model = graph(
        ("Identity", ["zero"], ["m"], "Identity_0", {}),
        ("BatchNormalization", ["x", "one", "zero", "m", "one"], ["h"], "/block/bn/BatchNormalization", {}),
        ("LayerNormalization", ["h", "lw", "lb"], ["y"], "node_layer_norm", {"axis": -1}),
        one=np.ones(3),
        zero=np.zeros(3),
        lw=np.ones(9),
        lb=np.zeros(9),
    )
    model.graph.node[2].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'ln', 'layer_norm']")
    return model
