"""The layers' variants: ghost batch norm, batch renormalization and its schedules, RMS norms by whose they are."""

import math

import numpy as np
import pytest

import normkit as nk
from normkit._convert.torch import RMS
from normkit.backends import NAMES, kernels
from normkit.conformance.misfits import refused
from normkit.styles import STYLES


@pytest.fixture(autouse=True)
def _none_required(monkeypatch):
    """No kernel is written for most of them."""
    monkeypatch.setattr(kernels, "mode", "1" if kernels.mode == "require" else kernels.mode)


def _layer(library, kind, *args, **options):
    return kind(*args, backend=library.name if library.name in NAMES else library.xp, **options)


def _array(library, *shape, seed=0):
    return library.array(np.random.default_rng(seed).normal(1, 2, shape), "float32")


def _same(library, *pairs):
    assert all(np.array_equal(library.numpy(a), library.numpy(b)) for a, b in pairs)


def test_ghost_batch_norm(library):
    """Training is the function's, statistics those of the whole batch, inference as usual."""
    layer = _layer(library, nk.BatchNorm, 3, virtual_batch_size=4)
    x = _array(library, 8, 3, 2)
    y, stats = nk.batch_norm_train(x, layer.weight, layer.bias, virtual_batch_size=4)
    expected = layer.running.update(stats, layer.momentum)
    _same(library, (layer(x), y), (layer.running.mean, expected.mean), (layer.running.var, expected.var))
    inference = nk.batch_norm(x, expected.mean, expected.var, layer.weight, layer.bias)
    _same(library, (layer.eval()(x), inference))
    assert "virtual_batch_size=4" in repr(layer)


def test_gradients_of_ghost_batch_norm_and_renormalization(library):
    x, dy = _array(library, 8, 3, 2), _array(library, 8, 3, 2, seed=1)
    ghost = _layer(library, nk.BatchNorm, 3, virtual_batch_size=2)
    expected = nk.vjp(nk.batch_norm_train, x, ghost.weight, ghost.bias, virtual_batch_size=2)[1](dy)
    dx, found = ghost.vjp(x)[1](dy)
    _same(library, (dx, expected[0]), (found["weight"], expected[1]), (found["bias"], expected[2]))
    layer = _layer(library, nk.BatchNorm, 3, r_max=1.5, d_max=0.5)
    bounds = {"r_max": 1.5, "d_max": 0.5}
    arrays = x, layer.running.mean, layer.running.var, layer.weight, layer.bias
    (y, _), pullback = nk.vjp(nk.batch_renorm_train, *arrays, **bounds)
    expected = pullback(dy)
    z, pullback = layer.vjp(x)
    dx, found = pullback(dy)
    _same(library, (y, z), (dx, expected[0]), (found["weight"], expected[3]), (found["bias"], expected[4]))


SCHEDULES = {
    "numbers": (2.0, 1.0),
    "pairs": (((1, 1.0), (3, 2.0)), [(0, 0.0), (2, 1.0), (4, 5.0)]),
    "functions": (lambda n: 1 + float(n), lambda n: 0.5 * float(n)),
    "one of them": (3.0, None),
}
#: After 0, 1, 2, 3, 4 batches.
BOUNDS = {
    "numbers": ((2, 2, 2, 2, 2), (1, 1, 1, 1, 1)),
    "pairs": ((1, 1, 1.5, 2, 2), (0, 0.5, 1, 3, 5)),
    "functions": ((1, 2, 3, 4, 5), (0, 0.5, 1, 1.5, 2)),
    "one of them": ((3, 3, 3, 3, 3), (0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_renormalization_follows_its_schedule(library, name):
    r_max, d_max = SCHEDULES[name]
    layer = _layer(library, nk.BatchNorm, 3, r_max=r_max, d_max=d_max, momentum=0.5)
    for step, (r, d) in enumerate(zip(*BOUNDS[name], strict=True)):
        x = _array(library, 6, 3, seed=step)
        before = layer.running
        y, stats = nk.batch_renorm_train(x, before.mean, before.var, layer.weight, layer.bias, r_max=r, d_max=d)
        _same(library, (layer(x), y), (layer.running.var, before.update(stats, 0.5).var))
    assert int(layer.running.num_batches) == step + 1


def test_a_single_value_is_renormalized_by_running_statistics(library):
    """With x̂ = 0, what is left is d."""
    layer = _layer(library, nk.BatchNorm, 3, r_max=3.0, d_max=5.0, single_value="zero")
    x = _array(library, 1, 3)
    y = library.numpy(layer(x))
    assert np.allclose(y, np.clip(library.numpy(x) / math.sqrt(1 + 1e-5), -5, 5), rtol=1e-6)
    assert not library.numpy(layer.running.mean).any()


@pytest.mark.parametrize("style", STYLES)
def test_rms_norms_by_whose_they_are(library, style):
    layer = _layer(library, nk.RMSNorm, 5, style=style, eps=1e-5)
    cast, offset = STYLES[style]
    assert (layer.cast, layer.weight_offset) == (cast, offset)
    assert np.array_equal(library.numpy(layer.weight), np.full(5, 1 - offset))
    x = _array(library, 4, 5)
    _same(library, (layer(x), nk.rms_norm(x, layer.weight, eps=1e-5, weight_offset=offset, cast=cast)))
    agreed = nk.RMSNorm(5, style=style, cast=cast, weight_offset=offset, eps=1e-5)
    assert repr(agreed) == repr(nk.RMSNorm(5, style=style, eps=1e-5))
    again = eval(repr(agreed), vars(nk))
    assert (again.cast, again.weight_offset, again.eps) == (cast, offset, 1e-5)


def test_styles_are_those_that_conversions_know():
    for name, (cast, offset) in RMS.items():
        style = name.removesuffix("RMSNorm").removesuffix("LayerNorm").lower()
        assert STYLES[style] == (cast, offset), name
    assert STYLES["onnx"] == ("input", 0) and all(STYLES[s] == ("output", 0) for s in ("torch", "keras", "flax"))


REFUSED = {
    "no style": (
        lambda: nk.RMSNorm(4, style="lama"), ValueError, r"style must be one of torch, .*; received 'lama'\.",
    ),
    "a style and a cast": (
        lambda: nk.RMSNorm(4, style="gemma", cast="input"),
        ValueError,
        r"style 'gemma' has cast='output' and weight_offset=1\.0; received cast='input'\.",
    ),
    "a style and the usual cast": (
        lambda: nk.RMSNorm(4, style="llama", cast="output"),
        ValueError,
        r"style 'llama' has cast='input' and weight_offset=0\.0; received cast='output'\.",
    ),
    "a style and the usual offset": (
        lambda: nk.RMSNorm(4, style="gemma", weight_offset=0),
        ValueError,
        r"style 'gemma' has cast='output' and weight_offset=1\.0; received weight_offset=0\.0\.",
    ),
    "no cast": (
        lambda: nk.RMSNorm(4, cast="never"), ValueError, r"cast must be 'output' or 'input'; received 'never'\.",
    ),
    "ghosts renormalized": (
        lambda: nk.BatchNorm(4, virtual_batch_size=2, r_max=2.0),
        ValueError, r"virtual_batch_size excludes batch renormalization; received 2 with r_max=2\.0 and d_max=None\.",
    ),
    "no ghosts": (
        lambda: nk.BatchNorm(4, virtual_batch_size=0),
        ValueError, r"virtual_batch_size must be a positive integer; received 0\.",
    ),
    "r_max below 1": (
        lambda: nk.BatchNorm(4, r_max=0.9), ValueError, r"r_max must be at least 1; received 0\.9\.",
    ),
    "d_max below 0 in a schedule": (
        lambda: nk.BatchNorm(4, d_max=((0, 1.0), (5, -1.0))), ValueError, r"d_max must be at least 0; received -1\.0\.",
    ),
    "a schedule out of order": (
        lambda: nk.BatchNorm(4, r_max=((5, 1.0), (0, 3.0))),
        ValueError,
        r"r_max must be a number, a function, or pairs \(num_batches, bound\) in ascending order; received .*\.",
    ),
    "a schedule without pairs": (
        lambda: nk.BatchNorm(4, r_max=(1.0, 3.0)),
        ValueError,
        r"r_max must be a number, a function, or pairs \(num_batches, bound\) in ascending order; received .*\.",
    ),
    "a function below 1": (
        lambda: nk.BatchNorm(4, r_max=lambda n: 0.5)(np.ones((3, 4), np.float32)),
        ValueError, r"r_max must be at least 1; received 0\.5\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_bad_arguments(row):
    refused(*REFUSED[row])
