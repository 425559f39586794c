"""Whole PyTorch models: replaced, compared, trained, restored, folded, recalibrated."""

from __future__ import annotations

import collections
import contextlib
import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import normkit as nk
from normkit.backends.models import original_of
from normkit.conformance.models.zoo import MODELS
from normkit.conformance.tolerances import tolerance, units

models = pytest.mark.parametrize("model", MODELS, ids=str)
batch_norms = pytest.mark.parametrize("model", [m for m in MODELS if m.folds], ids=str)


@pytest.fixture(autouse=True)
def _theirs():
    """What other libraries warn of is their affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def computing(dtype):
    """With tensors that a model makes by itself in the same dtype."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def types(net):
    return {name: type(module) for name, module in net.named_modules()}


def result(model, net, seed=0):
    """Output, gradients of a loss, and running statistics after one step, in float64."""
    dtype = next(net.parameters()).dtype
    with computing(dtype):
        y = model.call(net, model.x(seed, dtype))
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
        net.zero_grad()
        y.backward(dy)
    gradients = [p.grad.double() for p in net.parameters() if p.grad is not None]
    statistics = [b.double() for b in net.buffers() if b.is_floating_point()]
    return y.detach().double(), gradients, statistics


def apart(found, reference):
    """The distance of two lists of tensors, as a share of the second."""
    squares = sum(float((a - b).square().sum()) for a, b in zip(found, reference, strict=True))
    return (squares / max(sum(float(b.square().sum()) for b in reference), 1e-300)) ** 0.5


@models
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_near_to_float64_as_before(model, training):
    """Output, gradients and statistics of the whole model, whose depth amplifies what each layer rounds."""
    net = model.make().train(training)
    reference = result(model, copy.deepcopy(net).double())
    before = result(model, copy.deepcopy(net))
    report = nk.replace(net)
    assert collections.Counter(layer.kind for layer in report.changed) == model.norms and not report.left
    after = result(model, net)
    for name, a, b, exact in zip(("y", "gradient", "statistics"), after, before, reference, strict=True):
        a, b, exact = ([value] if name == "y" else value for value in (a, b, exact))
        # Two ways of rounding: one may be luckier by the factor, or by some units where both are good.
        limit = 4 * apart(b, exact) + tolerance("native", "float32").units * 2.0**-23
        assert apart(a, exact) <= limit, name


@models
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_layer_within_the_table(model, training):
    """On what it gets in the model: forward and gradients as before, running statistics as in float64."""
    net = model.make().train(training)
    nk.replace(net)
    calls = []

    def hook(layer, args):
        calls.append((copy.deepcopy(layer), args[0].detach().clone()))

    hooks = [m.register_forward_pre_hook(hook) for m in net.modules() if original_of(m) is not None]
    model.call(net, model.x())
    assert len(calls) >= sum(model.norms.values())
    for handle in hooks:
        handle.remove()
    native, running = tolerance("native", "float32"), tolerance("running", "float32")
    for layer, x in calls:
        results = []
        for kind in (type(layer), original_of(layer)):
            twin, value = copy.deepcopy(layer), x.clone().requires_grad_()
            twin._forward_pre_hooks.clear()
            twin.__class__ = kind
            y = twin(value)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
            arrays = [y, value.grad, *(p.grad for p in twin.parameters())]
            results.append(([a.detach().double().numpy() for a in arrays], dict(twin.named_buffers())))
        wide = copy.deepcopy(layer).double()
        wide.__class__ = original_of(layer)
        wide._forward_pre_hooks.clear()
        wide(x.double())
        (ours, buffers), (theirs, _) = results
        for found, reference in zip(ours, theirs, strict=True):
            assert units(found, reference, "float32") <= native.units, native.reason
        for name, found in buffers.items():
            scale = np.asarray(float(x.abs().max())) if "mean" in name else None
            error = units(found.double().numpy(), wide.get_buffer(name).double().numpy(), "float32", scale)
            assert error <= running.units, running.reason


@models
def test_ten_steps_and_back(model):
    """In float64, where rounding does not hide a difference: replaced under its optimizer, trained, restored."""
    nets = [model.make(torch.float64).train() for _ in range(2)]
    kinds = types(nets[0])
    optimizers = [torch.optim.SGD(net.parameters(), lr=model.rate, momentum=0.9) for net in nets]
    start = [p.detach().clone() for p in nets[0].parameters()]
    nk.replace(nets[0])
    losses = []
    with computing(torch.float64):
        for net, optimizer in zip(nets, optimizers, strict=True):
            for k in range(10):
                optimizer.zero_grad()
                loss = (model.call(net, model.x(k % 2, torch.float64)) - 1).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(float(loss))
    assert losses[9] < losses[1]
    moved = [p - q for p, q in zip(nets[1].parameters(), start, strict=True)]
    difference = [p - q for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True)]
    assert apart([d + m for d, m in zip(difference, moved, strict=True)], moved) <= model.exact
    undone = nk.restore(nets[0])
    assert len(undone.changed) == sum(model.norms.values()) and types(nets[0]) == kinds
    nets[1].load_state_dict(nets[0].state_dict())
    with computing(torch.float64), torch.no_grad():
        x = model.x(0, torch.float64)
        assert torch.equal(model.call(nets[0].eval(), x), model.call(nets[1].eval(), x))


@batch_norms
def test_fold(model):
    net = model.make().train()
    with torch.no_grad():
        model.call(net, model.x(1))
        x = model.x()
        reference = model.call(net.eval(), x)
        report = nk.fold(net, x, call=model.call)
        assert len(report.changed) == model.folds == sum(model.norms.values()) and not report.left
        y = model.call(net, x)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    # Half of float32's digits, as fold itself asks for.
    assert float((y - reference).abs().max() / reference.abs().max()) <= 2.0**-11.5
    assert 0 < report.error <= 2.0**-11.5


@batch_norms
def test_recalibrate(model):
    """The statistics of what each batch norm gets, in float64, to 1e-6; the last batch is short."""
    net = model.make().train()
    seen = {m: [] for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen[m].append(args[0].double())) for m in seen]
    batches = [model.x(0), 2 * model.x(1) + 1, model.x(2)[:2]]
    gap = nk.statistics_gap(net, batches, call=model.call)
    for inputs in seen.values():
        inputs.clear()
    report = nk.recalibrate(net, batches, call=model.call)
    for handle in hooks:
        handle.remove()
    assert report.layers == gap.layers and len(report.layers) == model.folds and net.training
    for layer, inputs in seen.items():
        x = torch.cat([a.transpose(0, 1).flatten(1) for a in inputs], 1)
        mean, var = x.mean(1), x.var(1)
        assert ((layer.running_mean - mean).abs() <= 1e-6 * (mean.abs() + var.sqrt())).all()
        assert ((layer.running_var - var).abs() <= 1e-6 * var).all()
    assert (
        max(layer.size for layer in nk.statistics_gap(net, batches, call=model.call).layers)
        < 1e-2
        < max(layer.size for layer in gap.layers)
    )
