"""normkit.fold on PyTorch's models: every kind of layer, what must not be folded, and that nothing is half done."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import normkit as nk
import normkit.torch as nt
from normkit.core import folding

#: A convolution sums a few hundred products, and folded weights are rounded once more: some ten units of 2^-23.
CLOSE = 4e-6


def trained(*layers):
    """A model for inference, whose batch norms are no identity."""
    model = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    numbers = torch.Generator().manual_seed(0)
    for name, a in model.state_dict().items():
        if a.is_floating_point():
            a.copy_(torch.rand(a.shape, generator=numbers) + 0.5 if "var" in name else torch.randn(a.shape) / 2)
    return model.eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def apart(y, reference):
    y, reference = y.detach(), reference.detach()
    return float((y - reference).abs().max() / reference.abs().max())


def state(model):
    """Everything by name, to see that nothing changed."""
    return {name: type(m) for name, m in model.named_modules()}, {n: a.clone() for n, a in model.state_dict().items()}


def unchanged(model, before):
    kinds, tensors = state(model)
    assert kinds == before[0] and list(tensors) == list(before[1])
    assert all(torch.equal(a, before[1][name]) for name, a in tensors.items())


AFTER = {
    "conv1d": (lambda: (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    "conv2d": (lambda: (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)), (2, 4, 7, 5)),
    "conv3d": (lambda: (nn.Conv3d(4, 6, 3, stride=2), nn.BatchNorm3d(6)), (2, 4, 7, 5, 6)),
    "no bias": (lambda: (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 4, 7, 5)),
    "no affine": (lambda: (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), (2, 4, 7, 5)),
    "no bias of the norm": (lambda: (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, bias=False)), (2, 4, 7, 5)),
    "grouped": (lambda: (nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.BatchNorm2d(6)), (2, 4, 7, 5)),
    "depthwise": (lambda: (nn.Conv2d(4, 12, 3, groups=4), nn.BatchNorm2d(12)), (2, 4, 7, 5)),
    "reflected": (lambda: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)), (2, 4, 7, 5)),
    "transposed": (lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6)), (2, 4, 7, 5)),
    "transposed and grouped": (lambda: (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (2, 4, 7)),
    "transposed in 3d": (lambda: (nn.ConvTranspose3d(4, 6, 2, bias=False), nn.BatchNorm3d(6)), (2, 4, 3, 5, 2)),
    "linear": (lambda: (nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "frozen": (lambda: (nn.Conv2d(4, 6, 3), nt.FrozenBatchNorm2d(6)), (2, 4, 7, 5)),
    "synchronized": (lambda: (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), (2, 4, 7, 5)),
    "normkit's": (lambda: (nn.Conv2d(4, 6, 3), nt.BatchNorm2d(6, eps=1e-2)), (2, 4, 7, 5)),
}
BEFORE = {
    "before conv": (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), (2, 4, 7, 5)),
    "before grouped": (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, (3, 1), groups=2, bias=False)), (2, 4, 7, 5)),
    "before depthwise": (lambda: (nn.BatchNorm1d(4), nn.Conv1d(4, 8, 3, groups=4)), (2, 4, 7)),
    "before reflected": (
        lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
        (2, 4, 7, 5),
    ),
    "before pointwise": (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, stride=2)), (2, 4, 7, 5)),
    "before linear": (lambda: (nn.BatchNorm1d(4, affine=False), nn.Linear(4, 6, bias=False)), (5, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", AFTER | BEFORE)
def test_every_layer_folds(case, dtype):
    build, shape = (AFTER | BEFORE)[case]
    model = trained(*build()).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    reference = model(x)
    held = [p for m in model if not isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()]
    report = nk.fold(model, x)
    assert len(report.changed) == 1 and not report.left and not list(model.buffers())
    assert (report.changed[0].name, report.changed[0].into) == (("0", "1") if case in BEFORE else ("1", "0"))
    limit = {torch.float32: CLOSE, torch.float64: CLOSE * 2.0**-29, torch.bfloat16: 2.0**-5}[dtype]
    assert apart(model(x), reference) <= limit
    assert report.error <= limit
    after = list(model.parameters())
    assert all(any(p is q for q in after) for p in held) and all(p.dtype == dtype for p in after)


def test_both_norms_of_a_layer_and_two_in_a_row():
    model = trained(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 6, 6)
    reference = model(x)
    report = nk.fold(model, x)
    assert {(layer.name, layer.into) for layer in report.changed} == {("0", "1"), ("2", "1"), ("3", "1")}
    assert apart(model(x), reference) <= CLOSE


def test_the_arithmetic_in_float64():
    """The map by its definition, one output at a time."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=6)
    mean, var, w, b = rng.normal(size=6), rng.random(6), rng.normal(size=6), rng.normal(size=6)
    x = rng.normal(size=(2, 4, 5))  # by group, input, tap

    def apply(weight, bias, x):
        return np.einsum("goik,gik->go", weight, x).reshape(-1) + (0 if bias is None else bias)

    scale, shift = folding.affine(np, mean, var, w, b, 1e-3)
    expected = (apply(weight, bias, x) - mean) / np.sqrt(var + 1e-3) * w + b
    assert np.allclose(apply(*folding.after(np, weight, bias, scale, shift), x), expected, rtol=1e-13)
    scale, shift = folding.affine(np, np.tile(mean, 2)[:8], np.tile(var, 2)[:8], None, None, 0.0)
    normalized = x * scale.reshape(2, 4, 1) + shift.reshape(2, 4, 1)
    expected = apply(weight, None, normalized)
    assert np.allclose(apply(*folding.before(np, weight, None, scale, shift), x), expected, rtol=1e-12)


class Uses(nn.Module):
    """A convolution, a norm, and something else that is done with what is between them or with the layers."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "added":
            return F.relu(self.norm(y)) + y
        if self.how == "returned":
            return F.relu(self.norm(y)), {"features": [y]}
        if self.how == "changed":
            return self.norm(y.mul_(2))
        if self.how == "conv twice":
            return self.norm(y) + self.conv(-x)
        if self.how == "norm twice":
            return self.norm(y) + self.norm(self.other(x))
        if self.how == "weight":
            return self.norm(y) + F.conv2d(x, self.conv.weight)
        if self.how == "activation":
            return self.norm(y.relu())
        if self.how == "a kernel":
            return self.norm(y) + nk.layer_norm(y)
        return x


LEFT = {
    "added": "what is between it and conv goes elsewhere as well",
    "returned": "what is between it and conv goes elsewhere as well",
    "changed": "what is between it and conv goes elsewhere as well",
    "a kernel": "what is between it and conv goes elsewhere as well",
    "conv twice": "conv, beside it, is called 2 times",
    "norm twice": "it is called 2 times",
    "weight": "the parameters of conv, beside it, are used elsewhere as well",
    "activation": "no convolution or linear layer stands right before or behind it",
    "unreached": "the sample does not reach it",
}


@pytest.mark.parametrize("how", LEFT)
def test_what_must_not_be_folded(how):
    model = trained(Uses(how))
    before = state(model)
    report = nk.fold(model, torch.randn(2, 3, 4, 4))
    assert [(layer.name, layer.reason) for layer in report.left] == [("norm", LEFT[how])] and not report.changed
    unchanged(model, before)


def test_what_a_call_of_layers_returns():
    """Without the model's own forward pass."""
    model = trained(Uses("none"))
    before = state(model)

    def both(model, x):
        y = model.conv(x)
        return y, model.norm(y)

    report = nk.fold(model, torch.randn(2, 3, 4, 4), call=both)
    assert [layer.reason for layer in report.left] == [LEFT["returned"]]
    unchanged(model, before)
    assert len(nk.fold(model, torch.randn(2, 3, 4, 4), call=lambda model, x: both(model, x)[1]).changed) == 1


class OwnNorm(nn.BatchNorm2d):
    """A batch norm that doubles."""

    def forward(self, x):
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized on its way: what scales it is lost."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0), value=2.0))


def hooked():
    conv = nn.Conv2d(3, 5, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv, nn.BatchNorm2d(5)


def watched():
    norm = nn.BatchNorm2d(5)
    norm.register_forward_pre_hook(lambda *_: None)
    return nn.Conv2d(3, 5, 3), norm


def parametrized():
    conv = nn.Conv2d(3, 5, 3)
    parametrize.register_parametrization(conv, "weight", nn.Tanh())
    return conv, nn.BatchNorm2d(5)


def tied():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    return first, nn.BatchNorm2d(3), nn.ReLU(), second


SPECIAL = {
    "its own norm": (lambda: (nn.Conv2d(3, 5, 3), OwnNorm(5)), "a subclass with a forward pass of its own"),
    "its own convolution": (lambda: (Standardized(3, 5, 3), nn.BatchNorm2d(5)), "0 would be off by"),
    "zeros padded": (lambda: (nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding=1)), "pads zeros"),
    "the same size": (lambda: (nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding="same")), "pads zeros"),
    "ones padded": (lambda: (nn.BatchNorm2d(3), Padded(3, 5, 3)), "1 would be off by"),
    "before transposed": (lambda: (nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 5, 3)), "not meet its shift at every tap"),
    "hooks": (hooked, "0, beside it, has hooks or parametrizations"),
    "hooks of the norm": (watched, "it has hooks"),
    "parametrized": (parametrized, "0, beside it, has hooks or parametrizations"),
    "tied": (tied, "the parameters of 0, beside it, are used elsewhere as well"),
    "no statistics": (
        lambda: (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)),
        "it has no running statistics",
    ),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_layers_that_are_left(case):
    build, reason = SPECIAL[case]
    model = trained(*build())
    before = state(model)
    report = nk.fold(model, torch.randn(2, 3, 6, 6))
    assert not report.changed and len(report.left) == 1 and reason in report.left[0].reason
    unchanged(model, before)


def test_a_convolution_of_its_own_that_is_linear_is_folded():
    model = trained(Padded(3, 5, 3), nn.BatchNorm2d(5))
    x = torch.randn(2, 3, 6, 6)
    reference = model(x)
    assert len(nk.fold(model, x).changed) == 1 and apart(model(x), reference) <= CLOSE


def test_channels_on_another_axis():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.linear(x))

    report = nk.fold(trained(Rows()), torch.randn(3, 4, 5))
    assert report.left[0].reason == "linear, beside it, has its channels on another axis"


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_with_an_activation_leaves_it(inplace):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        options = {"training": self.training, "momentum": self.momentum, "eps": self.eps}
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, **options)
        return self.act(self.drop(x))

    kind = type("BatchNormAct2d", (nn.BatchNorm2d,), {"forward": forward, "__module__": "timm.layers.norm_act"})

    def norm(channels):
        layer = kind(channels)
        layer.drop, layer.act = nn.Identity(), nn.SiLU(inplace)
        return layer

    model = trained(nn.Conv2d(3, 5, 3), norm(5), norm(5), nn.Conv2d(5, 4, 1))
    x = torch.randn(2, 3, 6, 6)
    reference = model(x)
    report = nk.fold(model, x)
    assert isinstance(model[1], nn.SiLU) and apart(model(x), reference) <= CLOSE
    between = "what is between it and 0 goes elsewhere as well"
    before = "its activation stands before the layer that takes its output"
    assert [layer.reason for layer in report.left] == [between if inplace else before]


def test_a_replaced_model_folds():
    model = trained(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.GroupNorm(1, 5))
    x = torch.randn(2, 3, 6, 6)
    reference = model(x)
    nk.replace(model)
    report = nk.fold(model, x)
    assert report.changed[0].kind == "torch.nn.BatchNorm2d" and apart(model(x), reference) <= CLOSE
    nk.restore(model)
    assert type(model[2]) is nn.GroupNorm


def test_report_and_samples():
    model = trained(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5))
    x = torch.randn(2, 3, 6, 6)
    twins = [copy.deepcopy(model) for _ in range(3)]
    text = repr(nk.fold(model, x)).splitlines()
    assert text[0].startswith("Sequential: 1 norm layer folded, 1 left; outputs within ")
    assert text[1:3] == ["    1 torch.nn.BatchNorm2d, folded", "        1 into 0"] and text[-1] == "        3"
    samples = [(x, "labels"), {"input": x}, "anything"]
    for twin, sample in zip(twins, samples, strict=True):
        call = (lambda model, sample: model(x)) if sample == "anything" else None
        assert len(nk.fold(twin, sample, call=call).changed) == 1


def test_what_would_be_off_is_left_or_refused():
    model = trained(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5))
    x = torch.randn(2, 3, 6, 6)
    before = state(model)
    report = nk.fold(model, x, tolerance=0.0)
    assert not report.changed and all("would be off by" in layer.reason for layer in report.left)
    unchanged(model, before)

    class Peeks(nn.Module):
        """Uses a weight by another name."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
            self.alias = self.conv.weight.detach()

        def forward(self, x):
            return self.norm(self.conv(x)) + self.alias.mean()

    model = trained(Peeks())
    before = state(model)
    with pytest.raises(ValueError, match=r"fold left Peeks as it was: with 1 norms folded, its output would be off by"):
        nk.fold(model, x)
    unchanged(model, before)


def test_within_autocast():
    """Whose cache of weights has the old ones."""
    model = trained(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    with torch.autocast("cpu", torch.bfloat16):
        assert len(nk.fold(model, torch.randn(2, 3, 6, 6)).changed) == 1


def test_models_that_are_refused():
    x = torch.randn(2, 3, 6, 6)
    model = trained(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    before = state(model)
    for bad, error, text in (
        (3, TypeError, "fold takes a torch.nn.Module or a keras.Layer; received int 3"),
        (nn.Conv2d(3, 5, 3).eval(), ValueError, "fold found no batch norm in Conv2d, which has 1 layers"),
        (copy.deepcopy(model).train(), ValueError, "fold wants a model for inference; it is in training mode"),
        (copy.deepcopy(model).to("meta"), ValueError, "fold needs numbers; 0 is on the meta device"),
        (torch.compile(copy.deepcopy(model), backend="eager"), ValueError, "fold comes before a model is compiled"),
        (torch.export.export(model, (x,)), ValueError, "fold comes before torch.export"),
        (nn.Sequential(nn.LazyBatchNorm2d()).eval(), ValueError, "fold needs numbers; 0 is lazy"),
    ):
        with pytest.raises(error, match=text):
            nk.fold(bad, x)
    for bad, error, text in (
        (-1, ValueError, "tolerance must be >= 0; received -1"),
        (float("nan"), ValueError, "tolerance must be >= 0; received nan"),
        ("a", TypeError, "tolerance must be a number; received str 'a'"),
    ):
        with pytest.raises(error, match=text):
            nk.fold(model, x, tolerance=bad)
    model[1].training = True
    with pytest.raises(ValueError, match="1 is in training mode: call eval"):
        nk.fold(model, x)
    unchanged(model, before)
