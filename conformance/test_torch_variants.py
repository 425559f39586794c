"""The relatives of batch norm in PyTorch: what each does to y and to the gradient, modes, state, refusals."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

import normkit as nk
from normkit.torch import (
    BackwardGradientNorm,
    BatchNorm2d,
    GhostBatchNorm,
    LpNorm,
    NoisyBatchNorm,
    StopGradientBatchNorm,
)

SHAPES = (12, 5), (6, 5, 4, 3)


def images(shape=SHAPES[1], seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=numbers, dtype=torch.float64) * 3 + 2).requires_grad_()


def gradient(layer, x, seed=1):
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    return y, dy, torch.autograd.grad((y * dy).sum(), x)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_stop_gradient(shape):
    x, layer = images(shape), StopGradientBatchNorm(5, dtype=torch.float64)
    y, dy, dx = gradient(layer, x)
    expected, stats = nk.batch_norm_train(x.detach())
    std = (stats.var + layer.eps).sqrt().reshape(1, 5, *(1 for _ in shape[2:]))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, dy / std)


@pytest.mark.parametrize("p, centred", [(1, False), (2, False), (float("inf"), False), (1, True)])
def test_p_norm(p, centred):
    x, layer = images(), LpNorm(5, p, centred=centred, momentum=1.0, dtype=torch.float64)
    mean = x.mean((0, 2, 3), keepdim=True)
    of = (x - mean if centred else x).abs()
    norm = of.amax((0, 2, 3), keepdim=True) if p == float("inf") else (of**p).mean((0, 2, 3), keepdim=True) ** (1 / p)
    expected = (x - mean) / (norm**2 + layer.eps).sqrt()
    torch.testing.assert_close(layer(x), expected)
    # In inference by what was recorded, which is not made unbiased.
    torch.testing.assert_close(layer.running_var, norm.detach().flatten() ** 2)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert f"p={p}" in repr(layer)


def test_ghost():
    x, layer = images((8, 5, 4, 3)), GhostBatchNorm(5, 4, dtype=torch.float64)
    halves = [nk.batch_norm_train(part)[0] for part in x.split(4)]
    torch.testing.assert_close(layer(x), torch.cat(halves))
    with pytest.raises(ValueError, match="virtual_batch_size"):
        layer(x[:6])


def test_noise():
    x = images((4000, 5))
    layer = NoisyBatchNorm(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = nk.batch_norm_train(x)[0]
    first, second = layer(x), layer(x)
    # scale * z + shift: between batches the distribution moves, within one it is narrow.
    assert (first.mean(0) - second.mean(0)).abs().max() > 0.05
    assert first.mean(0).abs().max() <= 0.55  # 0.5 and the mean of 4000 draws
    assert ((first - plain).std(0) < 0.5).all() and ((first - plain).std(0) > 0.05).all()
    torch.testing.assert_close(layer.eval()(x), nk.batch_norm(x, layer.running_mean, layer.running_var))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-200, 1e200])
def test_backward_gradient(shape, size):
    x = images(shape)
    y = BackwardGradientNorm()(x)
    torch.testing.assert_close(y, x)
    dy = images(shape, 2).detach() * size
    dy[0] = 0
    dx = torch.autograd.grad(y, x, dy)[0]
    assert (dx[0] == 0).all()
    torch.testing.assert_close(dx.flatten(1).square().mean(1)[1:], torch.ones(len(x) - 1, dtype=x.dtype))
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(dx.flatten(1)[1:], (dy / size).flatten(1)[1:]),
        torch.ones(len(x) - 1, dtype=x.dtype),
    )


def test_state_is_that_of_batch_norm():
    state = BatchNorm2d(5).state_dict()
    for layer in (LpNorm(5, 1), GhostBatchNorm(5, 2), NoisyBatchNorm(5), StopGradientBatchNorm(5)):
        layer.load_state_dict(state)
        assert layer.state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LpNorm(5, 3), "p must be 1, 2 or infinity; received 3."),
        (lambda: GhostBatchNorm(5, 0), "virtual_batch_size must be a positive integer; received 0."),
        (lambda: NoisyBatchNorm(5, largest_scale=0.5), "largest_scale >= 1"),
        (lambda: BackwardGradientNorm()(torch.ones(3)), "at least 2 dimensions; received torch.float32"),
        (lambda: StopGradientBatchNorm(5)(torch.ones(3)), "expected at least 2D input"),
        (lambda: StopGradientBatchNorm(5)(torch.ones(3, 4)), "holds 5 channels; got an input of size"),
    ],
)
def test_refusals(make, words):
    with pytest.raises((ValueError, RuntimeError), match=words.replace("(", r"\(")):
        make()


INF = float("inf")
NORMS = (
    (1, False, False), (1, False, True), (2, False, False), (2, True, True), (INF, False, True), (INF, True, False),
)  # fmt: skip
KEEPING: dict[str, Callable[[], torch.nn.Module]] = {
    "noisy": partial(NoisyBatchNorm, 5),
    "stop gradient": partial(StopGradientBatchNorm, 5),
    "ghost": partial(GhostBatchNorm, 5, 2),
    **{
        f"p={p}, centred={centred}, consistent={consistent}": partial(
            LpNorm, 5, p, centred=centred, consistent=consistent
        )
        for p, centred, consistent in NORMS
    },
}


@pytest.mark.parametrize("make", KEEPING.values(), ids=KEEPING)
def test_recalibrate_is_one_pass_over_all_data(make):
    batches = [images((n, 5, 4, 3), seed=n).detach().float() * n - n for n in (8, 2, 6)]
    layer, whole = make(), make().double()
    whole.momentum = 1.0
    whole(torch.cat(batches).double())
    gap = nk.statistics_gap(torch.nn.Sequential(layer), batches)
    assert not gap.left and gap.layers[0].size > 1 and (layer.running_var == 1).all()
    found = nk.recalibrate(torch.nn.Sequential(layer), batches)
    assert not found.left and found.layers[0].kind == f"normkit.{type(layer).__name__}"
    # What float32 keeps of sums in float64.
    torch.testing.assert_close(layer.running_mean.double(), whole.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), whole.running_var, rtol=1e-6, atol=0)


def test_what_recalibrate_leaves():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(5), LpNorm(5, 1, centred=True), BackwardGradientNorm())
    found = nk.recalibrate(model, [images().detach().float()])
    assert [layer.name for layer in found.layers] == ["0"]
    assert [(layer.name, layer.reason) for layer in found.left] == [
        ("1", "the 1-norm of x - mean is not known before the mean of all batches is")
    ]


def test_inspect_replace_and_restore_know_them():
    layers = [*(make() for make in KEEPING.values()), BackwardGradientNorm()]
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(5), *layers)
    found = nk.inspect(model)
    assert [row.layer for row in found.rows] == ["BatchNorm2d", *(type(layer).__name__ for layer in layers[:-1])]
    assert not found.unknown
    for report in (nk.replace(model), nk.restore(model)):
        assert [layer.name for layer in report.changed] == ["0"]
        assert all(layer.reason.startswith("it is normkit's already") for layer in report.left)
    assert len(nk.replace(model).left) == len(layers)
    assert [*model][1:] == layers
