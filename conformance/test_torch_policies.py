"""Policies and switches of ``normkit.torch``: beside torch's own arguments, and none of them in its state."""

import inspect
import itertools

import pytest
import torch
from torch import nn

import normkit as nk
from normkit._policies import SETTINGS
from normkit.conformance.misfits import refused

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

NAMES = [f"{kind}{d}d" for kind in ("BatchNorm", "InstanceNorm") for d in (1, 2, 3)]


def _pair(name="BatchNorm1d", channels=3, **settings):
    """Our layer and torch's, of the same parameters and statistics."""
    options = {"affine": True, "track_running_stats": True}
    native = getattr(nn, name)(channels, **options)
    for a, low in ((native.weight, 0.5), (native.bias, -1.0), (native.running_mean, -1.0), (native.running_var, 0.5)):
        nn.init.uniform_(a, low, low + 2, generator=torch.Generator().manual_seed(0))
    ours = getattr(nk.torch, name)(channels, **options, **settings)
    ours.load_state_dict(native.state_dict())
    return ours, native


def _numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 2


def _statistics(layer):
    return [layer.running_mean.clone(), layer.running_var.clone(), int(layer.num_batches_tracked)]


def _same(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_come_after_torchs(name):
    ours, native = getattr(nk.torch, name), getattr(nn, name)
    parameters, theirs = (list(inspect.signature(c).parameters.values()) for c in (ours, native))
    assert parameters[: len(theirs)] == theirs
    more = parameters[len(theirs) :]
    assert {p.name: p.default for p in more} == SETTINGS and all(p.kind is p.KEYWORD_ONLY for p in more)
    a, b = ours(4), native(4)
    assert repr(a) == repr(b) and a.state_dict().keys() == b.state_dict().keys() and vars(a).keys() == vars(b).keys()
    told = ours(4, 1e-3, single_value="zero", nonfinite="skip", use_batch_stats=True)
    assert repr(told) == repr(native(4, 1e-3))[:-1] + ", single_value='zero', nonfinite='skip', use_batch_stats=True)"
    assert told.state_dict().keys() == b.state_dict().keys()


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
@pytest.mark.parametrize("policy", ["running", "zero", "raise"])
def test_one_value(name, policy):
    ours, native = _pair(name, single_value=policy)
    before, x = _statistics(ours), _numbers(1, 3, 1).requires_grad_()
    if policy == "raise":
        with pytest.raises(ValueError, match="Expected more than 1"):
            ours(x)
        return
    y, dy = ours(x), _numbers(1, 3, 1)
    dx, dweight, dbias = torch.autograd.grad(y, (x, ours.weight, ours.bias), dy)
    if policy == "zero":
        assert torch.equal(y, ours.bias.reshape(1, 3, 1)) and not dweight.any()
        assert (dx.abs() < 1e-6 * dy.abs() / ours.eps**0.5).all()
    else:
        wanted = native.eval()(x)
        _close(y, wanted)
        _close([dx, dweight], list(torch.autograd.grad(wanted, (x, native.weight), dy)))
    assert torch.equal(dbias, dy.reshape(3)) and _same(_statistics(ours), before)


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
@pytest.mark.parametrize(
    ("training", "use", "update"), [*itertools.product((True, False), (None, True, False), (None, True, False))]
)
def test_switches(name, training, use, update):
    ours, native = _pair(name, use_batch_stats=use, update_stats=update)
    ours.train(training)
    by_batch = training if use is None else use
    counted = (training and by_batch) if update is None else update
    x, dy = _numbers(4, 3, 5).requires_grad_(), _numbers(4, 3, 5)
    y = ours(x)
    wanted = native.train(by_batch)(x)
    _close(y, wanted)
    found, expected = (torch.autograd.grad(a, (x, *m.parameters()), dy) for a, m in ((y, ours), (wanted, native)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if counted != by_batch:
        native.load_state_dict(_pair(name)[1].state_dict())
        if counted:
            native.train()(x)
    after, reference = _statistics(ours), _statistics(native)
    _close(after[:2], reference[:2])
    assert after[2] == reference[2]


def test_frozen_as_everybody_says_it():
    """Statistics and affine part stay, in train() too; what was set is undone by setting it again."""
    layer, native = _pair(use_batch_stats=False, train_affine=False)
    x, before = _numbers(4, 3), _statistics(layer)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad and not layer.train_affine
    _close(layer(x), native.eval()(x).detach())
    assert _same(_statistics(layer), before) and not layer(x).requires_grad
    layer.use_batch_stats, layer.train_affine = None, True
    _close(layer(x), native.train()(x))
    assert layer.weight.requires_grad and layer.num_batches_tracked == 1 and repr(layer) == repr(native)
    layer.requires_grad_(False)
    assert not layer.train_affine
    layer.nonfinite, layer.track_running_stats, before = "skip", False, _statistics(layer)
    layer(x)
    assert _same(_statistics(layer), before)


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_that_are_not_finite(name, momentum):
    if name == "InstanceNorm1d" and momentum is None:
        pytest.skip("torch's instance norm tracks nothing then")
    x = _numbers(4, 3, 5)
    x[1, 2, 0] = torch.nan
    plain, skip, strict = (_pair(name, nonfinite=policy)[0] for policy in ("propagate", "skip", "raise"))
    for layer in (plain, skip, strict):
        layer.momentum = momentum
    before = _statistics(skip)
    plain(x)
    skip(x)
    for a, b, old in zip(_statistics(skip)[:2], _statistics(plain)[:2], before[:2], strict=True):
        assert b[2].isnan() and torch.equal(a[2], old[2]) and torch.equal(a[:2], b[:2])
    assert skip.num_batches_tracked == plain.num_batches_tracked
    kept = _statistics(skip)
    skip(torch.full((4, 3, 5), torch.inf))
    assert _same(_statistics(skip), kept)
    text = (
        rf'{name} has nonfinite="raise"; received statistics that are not finite in 1 of 3 channels: look for the '
        r'first NaN or infinity before it, or set nonfinite="skip"\.'
    )
    refused(lambda: strict(x), ValueError, text)
    assert _same(_statistics(strict), before)


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_an_empty_batch(name):
    keep, strict = _pair(name)[0], _pair(name, empty_batch="raise")[0]
    x, before = torch.zeros(0, 3, 5), _statistics(keep)
    assert keep(x).shape == (0, 3, 5) and _same(_statistics(keep), before)
    refused(lambda: strict(x), ValueError, rf'{name} has empty_batch="raise"; received a batch without elements\.')
    assert strict.eval()(x).shape == (0, 3, 5)


@pytest.mark.parametrize(
    ("setting", "value"), [("use_batch_stats", False), ("update_stats", True), ("single_value", "running")]
)
@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_without_running_statistics(name, setting, value):
    layer = getattr(nk.torch, name)(3, track_running_stats=False, **{setting: value})
    text = (
        rf"{name} with {setting}={value!r} needs running statistics; received a layer without: make it with "
        r"track_running_stats=True\."
    )
    refused(lambda: layer(_numbers(2, 3, 4)), ValueError, text)


def test_wrong_settings():
    layer = nk.torch.BatchNorm2d(3)
    text = r"single_value must be 'raise', 'running' or 'zero'; received 'skip'\."
    refused(lambda: nk.torch.BatchNorm2d(3, single_value="skip"), ValueError, text)
    refused(lambda: setattr(layer, "single_value", "skip"), ValueError, text)
    text = r"train_affine must be True or False; received None\."
    refused(lambda: nk.torch.InstanceNorm2d(3, train_affine=None), ValueError, text)


def test_a_replaced_layer_has_them_too():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    nk.replace(model)
    model[1].single_value = "zero"
    assert torch.equal(model(torch.ones(1, 2)), model[1].bias[None]) and model[1].num_batches_tracked == 0
    nk.restore(model)
    with pytest.raises(ValueError, match="Expected more than 1"):
        model(torch.ones(1, 2))


def test_what_normalizes_by_the_batch_is_not_folded():
    model = nn.Sequential(nn.Linear(2, 3), nk.torch.BatchNorm1d(3, use_batch_stats=True)).eval()
    report = nk.fold(model, _numbers(4, 2))
    assert "it normalizes by the batch in inference too" in str(report) and isinstance(model[1], nn.BatchNorm1d)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"single_value": "running"}, (1, 3)),
        ({"single_value": "zero"}, (1, 3)),
        ({"nonfinite": "skip"}, (4, 3)),
        ({"use_batch_stats": False, "update_stats": True}, (4, 3)),
    ],
)
def test_compiled(settings, shape):
    torch.compiler.reset()
    eager, compiled = _pair(**settings)[0], _pair(**settings)[0]
    step = torch.compile(compiled, fullgraph=True)
    for k in range(2):
        x = _numbers(*shape)
        if k and "nonfinite" in settings:
            x[0, 1] = torch.inf
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = step(a), eager(b)
        torch.testing.assert_close(y, wanted, equal_nan=True)
        y.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, equal_nan=True)
    _close(_statistics(compiled)[:2], _statistics(eager)[:2])
    assert compiled.num_batches_tracked == eager.num_batches_tracked


def test_raise_is_refused_in_a_program():
    torch.compiler.reset()
    step = torch.compile(_pair(nonfinite="raise")[0], fullgraph=True)
    with pytest.raises(Exception, match='BatchNorm1d with nonfinite="raise" looks at values'):
        step(_numbers(4, 3))
