"""normkit.torch's layers where they are moved: to other dtypes, to the device that is tested, through meta and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.conformance.test_torch_layers import close, sites
from normkit.conformance.tolerances import tolerance, units


@pytest.fixture
def device(request):
    """The one of ``--device``."""
    return torch.device(request.config.getoption("device") or "cpu")


@pytest.fixture(autouse=True)
def _made_on_the_processor():
    """Where the numbers come from, and what results are compared with."""
    with torch.device("cpu"):
        yield


def ran(layer, x):
    """Output, gradients of x and the parameters for one cotangent, as they are."""
    x = x.clone().requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y))]


def near(found, reference, name, quantity):
    limit = tolerance(quantity, name)
    error = units(found.double().cpu().numpy(), reference.double().cpu().numpy(), name)
    assert error <= limit.units, f"{error:.3g} units off: {limit.reason}"


@sites
@pytest.mark.parametrize("name", ["float16", "float64"])
def test_other_dtypes(site, name, device):
    """half() and double(), in training: everything but the count is in the dtype, and as near as it can be."""
    ours, theirs = site.pair()
    moved = ours.to(device).half() if name == "float16" else ours.to(device).to(torch.float64)
    assert moved is ours
    theirs = getattr(theirs, {"float16": "half", "float64": "double"}[name])()
    assert [(n, t.dtype) for n, t in ours.state_dict().items()] == [
        (n, t.dtype) for n, t in theirs.state_dict().items()
    ]
    x = site.x(dtype=getattr(torch, name), offset=0.5)
    found, reference = ran(ours, x.to(device)), ran(theirs.double(), x.double())
    for k, (a, b) in enumerate(zip(found, reference, strict=True)):
        assert a.dtype == getattr(torch, name) and a.device.type == device.type
        near(a, b, name, "gradient" if k else "forward")
    for n, buffer in ours.named_buffers():
        # In float16 what counts is their rounding to it.
        near(buffer, theirs.get_buffer(n), name, "running" if name == "float64" else "forward")
    assert {p.dtype for p in ours.float().parameters()} <= {torch.float32}
    assert ours(site.x().to(device)).dtype == torch.float32


@sites
def test_through_meta_and_back(site, device):
    """Where there are no numbers the layer still knows its shapes; where it comes back it takes its state."""
    ours = site.pair()[0]
    ours(site.x())
    state, parameters = copy.deepcopy(ours.state_dict()), dict(ours.named_parameters())
    y = ours.eval()(site.x())
    meta = ours.to("meta")
    assert meta is ours and all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    assert meta(site.x().to("meta")).shape == site.shape and meta.train()(site.x().to("meta")).is_meta
    if state:
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            meta.to(device)
    back = meta.to_empty(device=device)
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in parameters.items()}
    back.load_state_dict(state)
    close(back.eval()(site.x().to(device)).cpu(), y.double(), "cross")
    assert all(torch.equal(t.cpu(), state[n]) for n, t in back.state_dict().items())


@sites
def test_the_device_and_back(site, device):
    """The same numbers there as on the processor, which has the state again afterwards."""
    ours = site.pair()[0]
    twin = copy.deepcopy(ours).to(device)
    assert {t.device.type for t in [*twin.parameters(), *twin.buffers()]} <= {device.type}
    for a, b in zip(ran(twin, site.x().to(device)), ran(ours, site.x()), strict=True):
        assert a.device.type == device.type
        close(a.cpu(), b.double(), "gradient")
    for n, buffer in twin.cpu().named_buffers():
        close(buffer, ours.get_buffer(n).double(), "running")
    twin(site.x())


def test_a_replaced_model_moves_as_it_did(device):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    nk.replace(model)
    reference = copy.deepcopy(model).double()(x.double())
    model = model.to(device).half()
    assert {p.dtype for p in model.parameters()} == {torch.float16} == {model[1].running_mean.dtype}
    y = model(x.to(device).half())
    # The convolution's own rounding, of 2^-11, twice normalized.
    assert float((y.double().cpu() - reference).detach().abs().max()) < 2**-7
    state = model.cpu().float().state_dict()
    model.to("meta").to_empty(device=device).load_state_dict(state)
    assert all(torch.equal(t.cpu(), state[n]) for n, t in model.state_dict().items())
    nk.restore(model)
    assert type(model[1]) is nn.BatchNorm2d and model[1].weight.device.type == device.type
