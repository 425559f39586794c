"""normkit.replace and normkit.restore on PyTorch's models: what is swapped, what is left and why, what stays."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import normkit as nk
import normkit.torch as nt
from normkit.backends.models import MODELS, Models, models_of
from normkit.backends.torch import known
from normkit.conformance.tolerances import tolerance, units


class Net(nn.Module):
    """One of each of torch.nn's norms."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.group = nn.GroupNorm(2, 8)
        self.instance = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.volume = nn.Sequential(nn.BatchNorm3d(8), nn.InstanceNorm3d(8))
        self.row = nn.Sequential(nn.BatchNorm1d(8), nn.InstanceNorm1d(8))
        self.layer = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.instance(self.group(self.stem(x)))
        x = self.row(self.volume(x.unsqueeze(2)).flatten(2))
        x = self.rms(self.layer(x.transpose(1, 2)).tanh())
        return self.head(x).mean(1)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def x(seed=0):
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def types(model):
    return {name: type(module) for name, module in model.named_modules()}


def near(found, reference, quantity="native", scale=None):
    limit = tolerance(quantity, "float32")
    error = units(found.detach().double().numpy(), reference.detach().double().numpy(), "float32", scale)
    assert error <= limit.units, f"{error:.3g} units apart: {limit.reason}"


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        F.mse_loss(model(x(seed)), torch.ones(4, 2)).backward()
        optimizer.step()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_and_gradients_before_and_after(training):
    before, after = net().train(training), net().train(training)
    assert len(nk.replace(after).changed) == 9
    a, b = x().requires_grad_(), x().requires_grad_()
    near(after(a), before(b))
    dy = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    after(a).backward(dy), before(b).backward(dy)
    near(a.grad, b.grad)
    for (name, p), q in zip(after.named_parameters(), before.parameters(), strict=True):
        # A shift before a centred layer has no gradient, but for roundings.
        if q.grad.abs().max() > 1e-5:
            near(p.grad, q.grad), name
    for p, q in zip(after.buffers(), before.buffers(), strict=True):
        near(p, q, scale=np.asarray(1.0))


def test_layers_stay_the_objects_that_they_are():
    model = net()
    model.group.weight.requires_grad_(False)
    model.stem.eval()
    calls = []
    model.layer.register_forward_hook(lambda *_: calls.append("hook"))
    held = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    settings = {name: dict(vars(m)) for name, m in held.items()}
    nk.replace(model)
    model(x())
    assert calls == ["hook"]
    assert all(module is held[name] for name, module in model.named_modules())
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(now) == list(tensors) and all(now[name] is tensors[name] for name in now)
    assert {name: vars(m) for name, m in model.named_modules()} == settings
    assert not model.group.weight.requires_grad and not model.stem[1].training and model.group.training


def test_the_optimizer_goes_on():
    """Three steps, replaced, three steps, restored, three steps: as nine steps."""
    model, reference = net(), net()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (model, reference)]
    train(reference, optimizers[1], range(9))
    train(model, optimizers[0], range(3))
    nk.replace(model)
    train(model, optimizers[0], range(3, 6))
    nk.restore(model)
    train(model, optimizers[0], range(6, 9))
    start = net()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        # Each step is a gradient within 32 units (4e-6); the steps after it amplify that.
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)
    assert any(
        not torch.allclose(p, p0, rtol=1e-2) for p, p0 in zip(model.parameters(), start.parameters(), strict=True)
    )


def test_restore_undoes_it_exactly():
    model, twin = net(), net()
    before = types(model)
    state = [dict(vars(m)) for m in model.modules()]
    done = nk.replace(model)
    assert types(model) != before
    model.stem[1].nonfinite, model.stem[1].train_affine = "skip", False
    undone = nk.restore(model)
    assert types(model) == before
    assert [dict(vars(m)) for m in model.modules()] == state
    assert [layer[:2] for layer in undone.changed] == [layer[:2] for layer in done.changed]
    assert torch.equal(model(x()), twin(x()))
    with pytest.raises(ValueError, match="restore found no layer in Net"):
        nk.restore(model)


def test_types_before_and_after():
    model = net()
    nk.replace(model)
    for layer in (model.stem[1], model.group, model.volume[1], model.row[0], model.layer, model.rms):
        kind = type(layer).__name__
        assert isinstance(layer, getattr(nn, kind)) and isinstance(layer, getattr(nt, kind))
    assert repr(model) == repr(net())


def test_report():
    model = net()
    model.extra = model.layer
    report = nk.replace(model)
    assert (report.model, report.done, report.left) == ("Net", "replaced", ())
    assert report.changed[0] == ("stem.1", "torch.nn.BatchNorm2d", "", (), "")
    assert [(layer.name, layer.shared) for layer in report.changed if layer.shared] == [("layer", ("extra",))]
    text = repr(report).splitlines()
    assert text[0] == "Net: 9 norm layers replaced, 0 left"
    assert text[1:3] == ["    1 torch.nn.BatchNorm2d, replaced", "        stem.1"]
    assert "        layer = extra" in text
    again = nk.replace(model)
    assert not again.changed and {layer.reason for layer in again.left} == {"it was replaced before"}


def test_a_long_report_is_short():
    model = nn.Sequential(*(nn.LayerNorm(2) for _ in range(200)))
    text = repr(nk.replace(model)).splitlines()
    assert len(text) == 4 and text[-1].endswith("more") and max(map(len, text)) <= 120
    shown = sum(part.strip(" ,").split(" ")[0].isdigit() for line in text[2:] for part in line.split(","))
    assert f"and {200 - shown} more" in text[-1]


class OwnForward(nn.BatchNorm2d):
    """A batch norm that doubles."""

    def forward(self, input):
        return 2 * super().forward(input)


class OwnSamples(nn.InstanceNorm2d):
    """An instance norm with another computation inside."""

    def _apply_instance_norm(self, input):
        return input


class Renamed(nn.LayerNorm):
    """A layer norm by another name."""

    def extra(self):
        return "kept"


class MyNorm(nn.Module):
    """Nobody knows this one."""

    def forward(self, x):
        return x


class PreNorm(nn.Module):
    """No norm, but a layer that holds one."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(self.norm(x))


def patched():
    layer = nn.LayerNorm(4)
    layer.forward = lambda x: x
    return layer


def parametrized():
    layer = nn.LayerNorm(4)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


LEFT = {
    "its own forward": (lambda: OwnForward(4), "a subclass of torch.nn.BatchNorm2d with a forward pass of its own"),
    "its own inside": (lambda: OwnSamples(4), "a subclass of torch.nn.InstanceNorm2d with a forward pass of its own"),
    "unknown": (MyNorm, "normkit does not know this class"),
    "lazy": (nn.LazyBatchNorm2d, "lazy and not built yet: run one batch"),
    "synchronized": (lambda: nn.SyncBatchNorm(4), "those of all processes"),
    "local response": (lambda: nn.LocalResponseNorm(2), "no local response norm"),
    "patched": (patched, "its forward was set on the instance"),
    "parametrized": (parametrized, "remove the parametrizations"),
    "ours": (lambda: nt.BatchNorm2d(4), "it is normkit's already"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_and_why(case):
    build, reason = LEFT[case]
    model = nn.Sequential(build(), nn.GroupNorm(2, 4))
    kind = type(model[0])
    report = nk.replace(model)
    assert [layer.name for layer in report.changed] == ["1"]
    assert [layer.name for layer in report.left] == ["0"] and reason in report.left[0].reason
    assert type(model[0]) is kind
    assert reason in repr(report)
    nk.restore(model)
    assert type(model[0]) is kind


def test_a_subclass_with_torchs_forward_is_replaced():
    model = nn.Sequential(Renamed(4), PreNorm())
    report = nk.replace(model)
    assert [layer.name for layer in report.changed] == ["0", "1.norm"] and not report.left
    assert isinstance(model[0], Renamed) and model[0].extra() == "kept"
    assert type(model[0]).forward is nt.LayerNorm.forward
    nk.restore(model)
    assert type(model[0]) is Renamed


def test_a_lazy_layer_that_was_built_is_replaced():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 3, 4, 4))
    assert len(nk.replace(model).changed) == 1


def test_a_layer_itself_a_shared_one_and_one_on_the_meta_device():
    layer = nn.LayerNorm(4)
    assert nk.replace(layer).changed[0].name == "" and isinstance(layer, nt.LayerNorm)
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.GroupNorm(2, 4, device="meta")})
    report = nk.replace(model)
    assert [(layer.name, layer.shared) for layer in report.changed] == [("a", ("b",)), ("c", ())]
    assert model["a"] is model["b"] and model["c"].weight.device.type == "meta"
    assert model["c"](torch.empty(2, 4, 3, device="meta")).shape == (2, 4, 3)


def compiled_in_place():
    model = net()
    model.compile(backend="eager")
    return model


def exported():
    return torch.export.export(net().eval(), (x(),))


def quantized():
    from torch.ao.nn.quantized import BatchNorm2d

    return nn.Sequential(nn.LayerNorm(4), BatchNorm2d(4))


def scripted():
    with pytest.warns():
        return nn.Sequential(nn.LayerNorm(4), torch.jit.script(nn.ReLU()))


BAD = {
    "no norm": (lambda: nn.Linear(2, 2), ValueError, "found no norm layer in Linear, which has 1 layer, with itself"),
    "no model": (lambda: 3, TypeError, "a keras.Layer or a flax.nnx.Module; received int 3"),
    "compiled": (lambda: torch.compile(net(), backend="eager"), ValueError, "this OptimizedModule is compiled already"),
    "compiled in place": (compiled_in_place, ValueError, "this Net is compiled already"),
    "exported": (exported, ValueError, "comes before torch.export; received an ExportedProgram"),
    "exported module": (lambda: exported().module(), ValueError, "this GraphModule is exported already"),
    "scripted": (scripted, ValueError, "1 in this Sequential is scripted already"),
    "quantized": (quantized, ValueError, "1 in this Sequential is quantized already"),
}


@pytest.mark.parametrize("case", BAD)
def test_models_that_are_refused_stay_as_they_are(case):
    build, error, text = BAD[case]
    model = build()
    before = types(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=text):
        nk.replace(model)
    assert before is None or types(model) == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_replaced_model(how):
    model = net()
    model.layer = Renamed(8)
    nk.replace(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert types(twin) == types(model) and repr(twin) == repr(model)
    assert torch.equal(twin(x()), model(x()))
    nk.restore(twin)
    assert type(twin.layer) is Renamed and type(model.layer) is not Renamed
    near(twin(x()), model(x()))


def test_a_replaced_model_compiles_exports_and_is_traced():
    model = net()
    nk.replace(model)
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    near(torch.compile(twin, fullgraph=True, backend="aot_eager")(x()), model(x()), "cross")
    program = torch.export.export(copy.deepcopy(model).eval(), (x(),))
    near(program.module()(x()), model.eval()(x()), "cross")
    traced = torch.fx.symbolic_trace(model)
    assert {node.target for node in traced.graph.nodes if node.op == "call_module"} >= {"stem.1", "layer", "rms"}
    assert torch.equal(traced(x()), model(x()))


def elsewhere(name, forward, base=nn.Module, **held):
    """A layer of another library's class, as far as its name goes."""

    def __init__(self, n):
        base.__init__(self, *([] if base is nn.Module else [n]))
        if base is nn.Module:
            self.weight = nn.Parameter(torch.ones(n))
        vars(self).update(held)

    module, _, qualname = name.rpartition(".")
    return type(qualname, (base,), {"__init__": __init__, "forward": forward, "__module__": module})(8)


def llama(self, hidden):
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * wide.to(hidden.dtype)


def olmo(self, hidden):
    wide = hidden.to(torch.float32)
    return (self.weight * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(hidden.dtype)


def gemma(self, x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())).type_as(x)


def twice(self, hidden):
    return 2 * llama(self, hidden)


def outside(self, hidden):
    wide = hidden.to(torch.float32)
    return self.weight * (wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)).to(hidden.dtype)


def gated(self, hidden, gate=None):
    return llama(self, hidden if gate is None else hidden * gate)


HF = "transformers.models.some.modeling_some."
FOREIGN = {
    "llama": (HF + "SomeRMSNorm", llama, {"variance_epsilon": 1e-6}, True),
    "olmo": (HF + "SomeRMSNorm", olmo, {"eps": 1e-5}, True),
    "gemma": (HF + "SomeRMSNorm", gemma, {"eps": 1e-6}, True),
    "another formula": (HF + "SomeRMSNorm", twice, {"variance_epsilon": 1e-6}, False),
    "eps outside": (HF + "SomeRMSNorm", outside, {"variance_epsilon": 1e-5}, False),
    "two inputs": (HF + "SomeRMSNorm", gated, {"variance_epsilon": 1e-6}, False),
    "no table": ("elsewhere.SomeRMSNorm", llama, {"variance_epsilon": 1e-6}, False),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_classes_known_by_name_are_confirmed_by_their_forward(case):
    name, forward, held, replaced = FOREIGN[case]
    layer = elsewhere(name, forward, **held)
    layer.weight.data.normal_()
    report = nk.replace(layer)
    assert len(report.changed) == replaced and len(report.left) == (not replaced)
    assert replaced or any(text in report.left[0].reason for text in ("does not know", "not the formula"))
    for dtype in (torch.float32, torch.bfloat16):
        for cast in (False, True):
            twin = copy.copy(layer)
            if cast:
                twin = copy.copy(layer).to(dtype)
            value = torch.randn(3, 8).to(dtype)
            y, reference = twin(value), forward(twin, value)
            assert y.dtype == reference.dtype
            if dtype == torch.float32:
                near(y, reference)
            else:
                assert torch.allclose(y.float(), reference.float(), rtol=2.0**-6)


@pytest.mark.parametrize(
    "error", [AttributeError("module 'kernels' has no attribute 'rms'"), TypeError("no such call")]
)
def test_what_goes_wrong_in_normkit_is_not_the_layers_formula(error, monkeypatch):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(known.functional, "rms_norm", broken)
    monkeypatch.setattr(known, "_confirmed", {})
    with pytest.raises(type(error), match=str(error)):
        nk.replace(elsewhere(HF + "SomeRMSNorm", llama, variance_epsilon=1e-6))


def test_confirming_touches_nothing():
    """Neither the layer nor the seed."""
    layer = elsewhere(HF + "SomeRMSNorm", llama, variance_epsilon=1e-6)
    before, state = copy.deepcopy(layer.weight), torch.get_rng_state()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    nk.replace(layer)
    assert torch.equal(layer.weight, before) and torch.equal(torch.get_rng_state(), state) and not calls


def act(self, x):
    options = {"training": self.training, "momentum": self.momentum, "eps": self.eps}
    x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, **options)
    return self.act(self.drop(x))


def test_batch_norm_with_an_activation():
    """timm's class of this name counts batches; what does not is another formula."""

    def counting(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        return act(self, x)

    extras = {"drop": nn.Identity(), "act": nn.ReLU()}
    for forward, replaced in ((counting, True), (act, False)):
        layer = elsewhere("timm.layers.norm_act.BatchNormAct2d", forward, nn.BatchNorm2d)
        for name, module in extras.items():
            setattr(layer, name, module)
        twin = copy.deepcopy(layer)
        assert len(nk.replace(layer).changed) == replaced
        near(layer(x().repeat(1, 3, 1, 1)[:, :8]), twin(x().repeat(1, 3, 1, 1)[:, :8]))
        near(layer.running_var, twin.running_var, "running")


def test_the_registry():
    assert models_of(3) is None
    assert isinstance(models_of(nn.Linear(2, 2)), Models)
    assert [entry.name for entry in MODELS] == ["keras", "flax", "torch"]
