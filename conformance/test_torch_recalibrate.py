"""normkit.recalibrate and statistics_gap on PyTorch's models: the population's statistics, and nothing else changed."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import normkit as nk
import normkit.torch as nt
from normkit.core.population import Population

#: What the statistics of the whole data set in float64 are met to.
EXACT = 1e-6
SIZES = (16, 16, 16, 5)


def deep():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(inplace=True), nn.Flatten(1), nn.Linear(6 * 25, 4), nn.BatchNorm1d(4),
    )  # fmt: skip


def data():
    """Batches that differ in mean and spread; the last is short."""
    numbers = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 9, 9, generator=numbers) * (k + 1) + 3 * k for k, n in enumerate(SIZES)]


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def whole(model, batches):
    """One pass over all data as one batch, in float64: means and unbiased variances."""
    model = copy.deepcopy(model).double()
    found = []
    for m in model.modules():
        m.training = isinstance(m, nn.modules.batchnorm._BatchNorm)
    for m in norms(model):
        m.momentum = 1.0
    model(torch.cat(batches).double())
    for m in norms(model):
        found.append((m.running_mean, m.running_var))
    return found


def met(model, expected):
    for layer, (mean, var) in zip(norms(model), expected, strict=True):
        assert ((layer.running_mean - mean).abs() <= EXACT * (var.sqrt() + mean.abs())).all()
        assert ((layer.running_var - var).abs() <= EXACT * var).all()


def test_the_first_norm_has_the_statistics_of_all_data():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    report = nk.recalibrate(model, data())
    met(model, whole(model, data()))
    assert report.layers[0].count == sum(SIZES) * 49 and report.batches == 4
    assert norms(model)[0].num_batches_tracked == 4


def test_sequential_is_one_pass_over_all_data_at_once():
    model, once = deep(), deep()
    nk.recalibrate(model, data(), sequential=True)
    met(model, whole(model, data()))
    nk.recalibrate(once, data())
    with pytest.raises(AssertionError):
        met(once, whole(once, data()))


def test_one_pass_is_what_each_norm_sees():
    """Norms go by the batch, dropout does nothing; merged, not averaged."""
    model, twin = deep(), deep()
    seen = {layer: [] for layer in norms(twin)}
    for m in twin.modules():
        m.training = m in seen
    for layer in seen:
        layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0].detach().double()))
    for batch in data():
        twin(batch)
    nk.recalibrate(model, data())
    expected = []
    for inputs in seen.values():
        x = torch.cat(inputs).transpose(0, 1).flatten(1)
        expected.append((x.mean(1), x.var(1)))
    met(model, expected)
    averaged = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in next(iter(seen.values()))]).mean(0)
    assert (averaged - expected[0][1]).abs().max() > 0.1 * expected[0][1].max()


def test_far_from_zero():
    """In float32 the mean is rounded to a hundredth of the spread; the variance is not made of that."""
    model = nn.BatchNorm1d(2)
    batches = [torch.randn(n, 2) + 1e5 * (1 + k % 2) for k, n in enumerate(SIZES)]
    nk.recalibrate(model, batches)
    met(model, whole(model, batches))
    batches = [torch.randn(n, 2) + 1e5 for n in SIZES]
    nk.recalibrate(model, batches)
    met(model, whole(model, batches))


def test_populations_merge():
    rng = np.random.default_rng(0)
    values = rng.normal(1e6, 1.0, (100, 3))
    total = Population()
    for part in np.split(values, [0, 1, 7, 60]):
        mean = part.mean(0) if len(part) else np.zeros(3)
        total = total.merge(Population(len(part), mean, ((part - mean) ** 2).sum(0)))
    assert total.count == 100
    assert np.allclose(total.mean, values.mean(0), rtol=1e-15)
    assert np.allclose(total.var(True), values.var(0, ddof=1), rtol=1e-9)
    assert np.allclose(total.var(False), values.var(0), rtol=1e-9)
    assert Population(1, np.ones(2), np.zeros(2)).var(True).tolist() == [0.0, 0.0]
    assert Population().merge(Population()) == Population()


def test_modes_and_everything_else_stay():
    model = deep().train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    before = {name: a.clone() for name, a in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    gap = nk.statistics_gap(model, data())
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    done = nk.recalibrate(model, data())
    assert [m.training for m in model.modules()] == modes
    assert done.layers == gap.layers and (done.closed, gap.closed) == (True, False)
    changed = {name for name, a in model.state_dict().items() if not torch.equal(a, before[name])}
    assert changed == {
        f"{k}.{name}" for k in (1, 5, 9) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert not any(m._forward_pre_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())
    again = nk.statistics_gap(model, data())
    assert max(layer.size for layer in again.layers) <= 1e-5


def test_the_gap_in_numbers():
    model = nn.BatchNorm1d(2, eps=0.0)
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    gap = nk.statistics_gap(model, [x]).layers[0]
    # Means 1 and 2, variances 2 and 8: recorded are 0 and 1.
    assert gap.mean == pytest.approx(0.5**0.5) and gap.var == pytest.approx((1 / 8, 1 / 2)) and gap.count == 2


def test_a_last_batch_of_one_sample_and_an_empty_one():
    """No batch norm would train on them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    batches = [torch.randn(8, 3), torch.randn(0, 3), torch.randn(1, 3)]
    nk.recalibrate(model, batches)
    met(model, whole(model, batches))


def test_a_shared_norm_and_one_without_batches():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.unused, self.none = (
                nn.BatchNorm1d(3),
                nn.BatchNorm1d(3),
                nn.BatchNorm1d(3, track_running_stats=False),
            )
            self.frozen = nt.FrozenBatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) + self.norm(3 * x)

    model = Shares()
    x = torch.randn(8, 3)
    report = nk.recalibrate(model, [x])
    expected = torch.cat([x, 3 * x]).double()
    met(model.norm, [(expected.mean(0), expected.var(0))])
    reasons = {layer.name: layer.reason for layer in report.left}
    assert reasons == {
        "unused": "no batch reached it",
        "none": "it has no running statistics",
        "frozen": "it is frozen: its statistics are constants",
    }
    assert model.unused.num_batches_tracked == 0


@pytest.mark.parametrize("replaced", [False, True])
def test_layers_of_normkit(replaced):
    model = deep()
    if replaced:
        nk.replace(model)
    else:
        model[1] = nt.BatchNorm2d(8)
    nk.recalibrate(model, data(), sequential=True)
    met(model, whole(model, data()))


def test_batches_as_loaders_have_them():
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    nk.recalibrate(first, data())
    dataset = torch.utils.data.TensorDataset(torch.cat(data()), torch.arange(sum(SIZES)))
    forms = [
        (torch.utils.data.DataLoader(dataset, batch_size=7), None),
        ([{"input": batch} for batch in data()], None),
        ((batch for batch in data()), None),
        ([("labels", batch) for batch in data()], lambda model, batch: model(batch[1])),
    ]
    for batches, call in forms:
        twin = copy.deepcopy(first)
        twin[1].reset_running_stats()
        nk.recalibrate(twin, batches, call=call)
        assert torch.allclose(twin[1].running_var, first[1].running_var, rtol=EXACT)


def test_half_precision():
    """Statistics are measured in float64 and rounded once; what float16 cannot hold is refused."""
    x = torch.randn(64, 3, dtype=torch.float16) * 3
    model = nn.BatchNorm1d(3).half()
    nk.recalibrate(model, x.split(16))
    assert torch.equal(model.running_var, x.double().var(0).half())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"recalibrate cannot write .* of the model, whose dtype ends at 6\.55e\+04"):
        nk.recalibrate(model, [x * 200])
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
    assert nk.statistics_gap(model, [x * 200]).layers[0].var[1] < 1e-3


def test_report():
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(12)), nt.FrozenBatchNorm2d(3))[:12]
    text = repr(nk.statistics_gap(model, [torch.randn(9, 3) + 2])).splitlines()
    assert text[0] == "Sequential: 12 norm layers measured on 1 batch, 0 left"
    assert len(text) == 12 and text[-1] == "        and 4 more, which are nearer" and text[3].endswith("  0")
    assert max(map(len, text)) <= 120
    assert "were off" in repr(nk.recalibrate(model, [torch.randn(9, 3) + 2]))


def test_progress(monkeypatch):
    """On a terminal, or when it is asked for."""
    import sys

    for asked, shown in ((True, True), (False, False), (None, False)):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        nk.recalibrate(nn.BatchNorm1d(3), [torch.randn(9, 3)] * 2, progress=asked)
        assert ("recalibrate" in stream.getvalue()) is shown
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match="progress=True needs rich"):
        nk.recalibrate(nn.BatchNorm1d(3), [torch.randn(9, 3)], progress=True)


def nan(k):
    batches = data()
    batches[k][0, 0] = float("nan")
    return batches


def used():
    batches = iter(data())
    list(batches)
    return batches


BAD = {
    "no batches": (deep, list, {}, ValueError, "received no batches: there are none in this list"),
    "used": (deep, used, {}, ValueError, "received no batches: .* used before"),
    "no iterable": (deep, lambda: 3, {}, TypeError, "takes an iterable of batches; received int"),
    "one pass": (
        deep,
        lambda: iter(data()),
        {"sequential": True},
        ValueError,
        "goes over .* a list_iterator ends after one",
    ),
    "not finite": (
        deep,
        lambda: nan(2),
        {},
        ValueError,
        "batch 3 brings layer '1' values whose mean or variance is not finite",
    ),
    "one value": (
        lambda: nn.BatchNorm1d(3),
        lambda: [torch.ones(1, 3)],
        {},
        ValueError,
        "saw one value per channel in the model, which has no variance",
    ),
    "no norm": (lambda: nn.Linear(2, 2), data, {}, ValueError, "found no batch norm in Linear, which has 1 layers"),
    "no model": (lambda: 3, data, {}, TypeError, "takes a torch.nn.Module, .* a flax.nnx.Module, .*; received int 3"),
    "compiled": (
        lambda: torch.compile(deep(), backend="eager"),
        data,
        {},
        ValueError,
        "comes before a model is compiled",
    ),
    "meta": (lambda: deep().to("meta"), data, {}, ValueError, "needs numbers; 0 is on the meta device"),
    "wrong batch": (deep, lambda: [*data(), torch.zeros(2)], {}, RuntimeError, "Expected"),
}


@pytest.mark.parametrize("function", [nk.recalibrate, nk.statistics_gap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_changes_nothing(case, function):
    build, batches, options, error, text = BAD[case]
    model = build()
    known = isinstance(model, nn.Module)
    before = {n: a.clone() for n, a in model.state_dict().items()} if known else {}
    with pytest.raises(
        error, match=f"{function.__name__} {text}" if error is not RuntimeError and "batch 3" not in text else text
    ):
        function(model, batches(), **options)
    if known:
        assert all(a.is_meta or torch.equal(a, before[n]) for n, a in model.state_dict().items())
        assert all(m.training for m in model.modules())
