"""ResNet-18 in torchvision and the same one in Keras: norm layers moved by normkit.convert, the rest by hand."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from torch import nn

import normkit as nk
from normkit.conformance.keras_calls import array, computing
from normkit.conformance.models.zoo import RESNET
from normkit.conformance.tolerances import units

L = keras.layers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])

#: Units of the dtype, relative to the largest output. Sums of as many as 4608 products, which each library adds up in
#: an order of its own, in 20 convolutions one behind the other; in training, norms of as few as 32 values amplify what
#: these round (32 units were seen).
LIMIT, TRAINED = 32, 256


@pytest.fixture(autouse=True)
def _floatx(dtype):
    with computing(dtype):
        yield


def torch_resnet(dtype, seed):
    """With statistics of a few batches."""
    net = RESNET.make(getattr(torch, dtype))
    with torch.no_grad():
        for k in range(3):
            RESNET.call(net.train(), RESNET.x(seed + k, getattr(torch, dtype)))
    return net.eval()


def keras_resnet():
    """Channels last, with torchvision's names, and Keras's own eps and momentum."""

    def conv(x, name, filters, kernel, stride=1):
        # On both sides alike, as PyTorch pads; Keras's "same" pads the end alone where it strides over an even length.
        x = L.ZeroPadding2D(kernel // 2)(x) if kernel > 1 else x
        return L.Conv2D(filters, kernel, stride, use_bias=False, name=name)(x)

    def norm(x, name):
        return L.BatchNormalization(name=name)(x)

    def block(x, name, filters, stride):
        y = L.ReLU()(norm(conv(x, f"{name}.conv1", filters, 3, stride), f"{name}.bn1"))
        y = norm(conv(y, f"{name}.conv2", filters, 3), f"{name}.bn2")
        if stride > 1:
            x = norm(conv(x, f"{name}.downsample.0", filters, 1, stride), f"{name}.downsample.1")
        return L.ReLU()(L.Add()([x, y]))

    inputs = keras.Input((64, 64, 3))
    x = L.ReLU()(norm(conv(inputs, "conv1", 64, 7, 2), "bn1"))
    # Zeros are as good as nothing: a ReLU leaves nothing below.
    x = L.MaxPooling2D(3, 2)(L.ZeroPadding2D(1)(x))
    for k, filters in enumerate((64, 128, 256, 512), 1):
        x = block(x, f"layer{k}.0", filters, 1 if k == 1 else 2)
        x = block(x, f"layer{k}.1", filters, 1)
    return keras.Model(inputs, L.Dense(10, name="fc")(L.GlobalAveragePooling2D()(x)))


def others(net):
    """The layers that are no norms."""
    return [(name, m) for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def to_keras(net, model):
    """Weights of convolutions and the linear layer."""
    for name, layer in others(net):
        weight, *bias = (p.detach().numpy() for p in layer.parameters())
        model.get_layer(name).set_weights([weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T, *bias])


@torch.no_grad()
def to_torch(model, net):
    """The same, back."""
    for name, layer in others(net):
        kernel, *bias = (np.array(keras.ops.convert_to_numpy(v)) for v in model.get_layer(name).weights)
        weight = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        for p, value in zip(layer.parameters(), [weight, *bias], strict=True):
            p.copy_(torch.from_numpy(value))


@torch.no_grad()
def outputs(net, model, dtype, training=False):
    """Of both, for the same pictures."""
    x = RESNET.x(9, getattr(torch, dtype))
    return net(x).double().numpy(), array(model(x.permute(0, 2, 3, 1).numpy(), training=training))


def settings(net):
    return {name: (m.eps, m.momentum) for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}


@dtypes
def test_from_torch_and_back(dtype):
    net, model = torch_resnet(dtype, 0), keras_resnet()
    to_keras(net, model)
    there = nk.convert(net, model)
    assert len(there.norms) == 20 and not there.left
    assert {rule.rule for rule in there.rules} == {"eps-default", "momentum-sense", "runvar-bias", "state-names"}
    y, found = outputs(net, model, dtype)
    assert units(found, y, dtype) <= LIMIT
    assert y.std(0).max() > 1e-2 * abs(y).max()  # it is the pictures that make the outputs

    twin = torch_resnet(dtype, 5)
    for m in twin.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps, m.momentum = 0.5, 0.5
    assert units(outputs(twin, model, dtype)[0], y, dtype) > 1e3 * LIMIT
    to_torch(model, twin)
    nk.convert(model, twin)
    assert settings(twin) == settings(net)
    state = twin.state_dict()
    assert all(torch.equal(a, state[name]) for name, a in net.state_dict().items() if "num_batches" not in name)
    assert np.array_equal(outputs(twin, model, dtype)[0], y)


@dtypes
def test_from_keras_and_back(dtype):
    net, model = torch_resnet(dtype, 0), keras_resnet()
    numbers = np.random.default_rng(1)
    for v in model.variables:
        if len(v.shape) == 1:
            v.assign(array(v) + abs(numbers.normal(size=v.shape)) / 4)
    before = [array(v) for v in model.variables]
    to_torch(model, net)
    assert len(nk.convert(model, net).norms) == 20
    assert set(settings(net).values()) == {(1e-3, 0.01)}
    y, found = outputs(net, model, dtype)
    assert units(y, found, dtype) <= LIMIT

    twin = keras_resnet()
    to_keras(net, twin)
    nk.convert(net, twin)
    assert all(np.array_equal(array(v), b) for v, b in zip(twin.variables, before, strict=True))
    assert all((n.epsilon, n.momentum) == (1e-3, 0.99) for n in twin.layers if isinstance(n, L.BatchNormalization))
    assert np.array_equal(outputs(net, twin, dtype)[1], found)


@dtypes
def test_trained_alike_by_normkit(dtype):
    """In training mode, of each batch's own statistics, replaced on both sides."""
    net, model = torch_resnet(dtype, 0), keras_resnet()
    to_keras(net, model)
    nk.convert(net, model)
    assert len(nk.replace(net.train()).changed) == len(nk.replace(model).changed) == 20
    y, found = outputs(net, model, dtype, training=True)
    assert units(found, y, dtype) <= TRAINED
