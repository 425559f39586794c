"""The fused CPU kernels and memory: tensors that have none, capsules, odd addresses, shared operands, huge arrays."""

from __future__ import annotations

import math
import mmap
import os

import numpy as np
import pytest

import normkit as nk
from normkit import _calls
from normkit.backends import kernels
from normkit.backends.kernels.libraries import library_of
from normkit.conformance.kernel_inputs import LARGE, extension_call, make, need_kernels, run
from normkit.core import plan as plans
from normkit.core.normalize import Operands

need_kernels()

#: Two float16 arrays of more than 2^31 elements, and what is computed from pieces of them.
HUGE = 12 << 30


@pytest.fixture(autouse=True)
def _kernels_on(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "1")


def test_tensors_whose_memory_is_not_their_values():
    """After a plain tensor of the same shape, for which the call is remembered."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, weight, dy = (torch.tensor(rng.standard_normal(s), dtype=torch.float32) for s in ((4, 6), (6,), (4, 6)))
    wanted, pullback = nk.vjp(nk.layer_norm, x, weight)
    gradients = pullback(dy)
    negated = [torch._neg_view(-a) for a in (x, weight, dy)]
    y, pullback = nk.vjp(nk.layer_norm, *negated[:2])
    assert torch.equal(y, wanted)
    assert torch.equal(nk.layer_norm(*negated[:2]), wanted)
    assert all(map(torch.equal, pullback(negated[2]), gradients))
    assert nk.layer_norm(x.to("meta")).device.type == "meta"
    zeros = torch._efficientzerotensor((4, 6))
    assert not nk.layer_norm(zeros).any()
    assert not any(g.any() for g in nk.vjp(nk.layer_norm, x, weight)[1](zeros))
    channels = torch.ones(1, dtype=torch.complex64).mul(-1j).conj().imag  # one element is dense in any memory
    assert channels.is_neg()
    image = x.reshape(4, 1, 6)
    assert torch.equal(nk.batch_norm(image, x[0, :1], channels), nk.batch_norm(image, x[0, :1], torch.ones(1)))


@pytest.mark.parametrize("layer", ["layer_norm", "group_norm", "batch_norm_train"])
def test_outputs_without_pages_get_the_same_numbers(layer, monkeypatch):
    """All or some of them, in memory that is not theirs alone: as those that have their pages."""
    x = np.random.default_rng(0).standard_normal((520, 24, 17, 24), dtype=np.float32)
    call = {
        "layer_norm": lambda: nk.layer_norm(x, axis=-1),
        "group_norm": lambda: nk.group_norm(x, 4),
        "batch_norm_train": lambda: nk.batch_norm_train(x)[0],
    }[layer]
    aside = 65600  # bytes before and after the output, in the same pages
    rooms = []
    # Once and for all calls: it is remembered with the plan.
    monkeypatch.setattr(library_of(np.ndarray), "empty_like", lambda _: rooms.pop())

    def written_to(touched):
        memory = mmap.mmap(-1, x.nbytes + 2 * aside, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = np.frombuffer(memory, "u1")
        whole[touched] = whole[:aside] = whole[-aside:] = 255
        room = np.frombuffer(memory, x.dtype, offset=aside, count=x.size).reshape(x.shape)
        rooms.append(room)
        y = call()
        assert np.shares_memory(y, room)
        assert (whole[:aside] == 255).all() and (whole[-aside:] == 255).all()
        return y

    wanted = written_to(slice(None))
    assert np.isfinite(wanted).all()
    for touched in (slice(0), slice(5 << 20, 9 << 20), slice(0, None, 6 << 20)):
        assert (written_to(touched) == wanted).all()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_call_like_one_before_it_takes_the_short_way(kind, monkeypatch):
    """It is not planned again: what the long way begins with is gone."""
    xp = pytest.importorskip(kind)
    x, one = xp.ones((4, 6, 5), dtype=xp.float32), xp.ones(6, dtype=xp.float32)
    calls = [
        lambda: nk.layer_norm(x, axis=(1, 2)),
        lambda: nk.rms_norm(x),
        lambda: nk.group_norm(x, 2, one, one),
        lambda: nk.instance_norm(x, one),
        lambda: nk.batch_norm(x, one, one, one),
    ]
    wanted = [call() for call in calls]
    monkeypatch.setattr(_calls, "_planned", None)
    for call, y in zip(calls, wanted, strict=True):
        assert (call() == y).all()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_call_like_one_before_it_refuses_the_same(kind):
    """In the same words as without kernels."""
    xp = pytest.importorskip(kind)
    x, one = xp.ones((4, 6), dtype=xp.float32), xp.ones(6, dtype=xp.float32)
    image = x.reshape(4, 6, 1)
    assert nk.layer_norm(x, one, one) is not None and nk.batch_norm(image, one, one) is not None
    other = np.ones(6, "f4") if kind == "torch" else np.ma.ones(6, "f4")
    for weight in (
        one[:5],
        one[:1],
        one.reshape(2, 3),
        one.reshape(1, 6),
        xp.ones(6, dtype=xp.uint16),
        [1.0] * 6,
        other,
    ):
        with kernels.off(), pytest.raises((TypeError, ValueError)) as wanted:
            nk.layer_norm(x, weight)
        recorded = x.clone().requires_grad_() if kind == "torch" else x
        for call in (
            lambda a: nk.layer_norm(x, a),
            lambda a: nk.layer_norm(x, one, a),
            lambda a, x=recorded: nk.layer_norm(x, a),
        ):
            with pytest.raises(wanted.type) as refused:
                call(weight)
            assert str(refused.value).replace("bias", "weight") == str(wanted.value)
    with pytest.raises(ValueError, match="var must not be negative"):
        nk.batch_norm(image, one, -one)
    for missing in ((one, None), (None, one)):
        with pytest.raises(TypeError, match="received None"):
            nk.batch_norm(image, *missing)
    with pytest.raises(ValueError, match="axis"):
        nk.layer_norm(x, axis=2)
    y, pullback = nk.vjp(nk.layer_norm, x, one)
    wide = xp.asarray(y, dtype=xp.float64)
    assert all((a == b).all() for a, b in zip(pullback(y), pullback(wide), strict=True))
    before = kernels.served()
    nk.layer_norm(x, one[:0].new_ones(6, dtype=xp.float64) if kind == "torch" else one.astype("f8"))
    assert kernels.served().since(before) == (1, 0)


def test_capsules():
    """A capsule that is in use serves as memory; one that another library has taken over is refused."""
    x = np.arange(24, dtype="f4").reshape(4, 6)
    wanted = extension_call(x=x)["out"]
    assert (extension_call(x=x.__dlpack__())["out"] == wanted).all()

    class Holder:
        def __init__(self, capsule):
            self.capsule = capsule

        def __dlpack__(self, **_):
            return self.capsule

        def __dlpack_device__(self):
            return (1, 0)

    spent = x.__dlpack__()
    taken = np.from_dlpack(Holder(spent))
    with pytest.raises(TypeError, match="DLPack capsule; received"):
        extension_call(x=spent)
    del taken
    with pytest.raises(TypeError, match="DLPack capsule; received"):
        extension_call(x=spent)
    with pytest.raises(TypeError, match="float16"):
        extension_call(x=np.arange(24).__dlpack__())


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_any_address(kind):
    """Off the elements themselves, in bytes: the same bits as where vectors are aligned."""
    xp = pytest.importorskip(kind)
    for layer, shape, options, _ in LARGE:
        plan, arrays = make(layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(1), np.dtype("f4"))
        wanted = run(plan, arrays)
        raw = {k: np.frombuffer(bytearray(3) + v.tobytes(), "u1") for k, v in arrays.items()}
        odd = {k: v[3:].view("f4").reshape(arrays[k].shape) for k, v in raw.items()}
        assert all(v.ctypes.data % 4 for v in odd.values())
        if kind == "torch":
            odd = {k: xp.frombuffer(raw[k], dtype=xp.float32, offset=3).reshape(v.shape) for k, v in odd.items()}
        got = run(plan, odd)
        for mine, theirs in zip((got[0], *got[2].values()), (wanted[0], *wanted[2].values()), strict=True):
            assert np.asarray(mine).tobytes() == theirs.tobytes(), layer


def test_operands_that_share_memory():
    """Inputs may overlap as they like; only outputs are alone."""
    rng = np.random.default_rng(2)
    line = rng.standard_normal(40).astype("f4")
    x, weight, bias = line[:24].reshape(4, 6), line[3:9], line[5:11]
    line.setflags(write=False)
    y, pullback = nk.vjp(nk.layer_norm, x, weight, bias)
    dy = line[16:].reshape(4, 6)
    gradients = pullback(dy)
    apart, again = nk.vjp(nk.layer_norm, x.copy(), weight.copy(), bias.copy())
    assert (y == apart).all()
    assert all((a == b).all() for a, b in zip(gradients, again(dy.copy()), strict=True))
    assert not any(np.shares_memory(out, line) for out in (y, *gradients))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_no_elements(kind, monkeypatch):
    """No kernel is called, and no crash: where kernels are required too."""
    xp = pytest.importorskip(kind)
    monkeypatch.setattr(kernels, "mode", "require")
    before = kernels.served()
    for shape in ((0, 6), (0, 6, 5, 5)):
        x = xp.zeros(shape, dtype=xp.float32)
        for function, *options in ((nk.layer_norm,), (nk.rms_norm,), (nk.group_norm, 2), (nk.batch_norm_train,)):
            y, pullback = nk.vjp(function, x, *options)
            assert (y[0] if isinstance(y, tuple) else y).shape == pullback(x)[0].shape == shape
    assert kernels.served() == before
    for empty in ("x", "out", "weight"):
        with pytest.raises(ValueError, match="received 0"):
            extension_call(**{empty: np.empty((0, 6), "f4")})


def _available():
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        ("layer_norm", (3, (1 << 31) // 3 + 7), (1,)),
        ("layer_norm", ((1 << 31) // 768 + 5, 768), (1,)),
        ("batch_norm_train", (5, 3, (1 << 31) // 15 + 9), 1),
        ("batch_norm_train", ((1 << 31) // 64 + 3, 64), 1),
        ("group_norm", (2, (1 << 31) // 128 + 3, 64), 2),
    ],
)
def test_more_than_2_31_elements(request, layer, shape, axis):
    """Forward and backward in float16; of both what the last positions hold is compared with the formula."""
    if not request.config.getoption("huge"):
        pytest.skip("takes 12 GB and a minute: run it with --huge")
    if _available() < HUGE:
        pytest.skip(f"takes {HUGE >> 30} GiB; {_available() >> 30} are free")
    assert math.prod(shape) > 1 << 31
    rng = np.random.default_rng(0)
    # One period, over and over: what a sum over any number of them gives is known.
    period = rng.standard_normal(1 << 20).astype("f2")
    x = np.resize(period, shape)
    plan = {
        "layer_norm": lambda: plans.layer_plan(shape, axis, 1e-5),
        "batch_norm_train": lambda: plans.batch_plan(shape, axis, 1e-5, given=False),
        "group_norm": lambda: plans.group_plan(shape, 8, axis, 1e-5),
    }[layer]()
    y, stats = kernels.forward(plan, Operands(x))
    assert np.isfinite(y.ravel()[:: 1 << 12]).all()
    moments = kernels.moments(plan, stats)
    shape_of = [1 if a in plan.axes else n for a, n in enumerate(plan.view)]
    mean, rstd = (np.asarray(m, "f8").reshape(shape_of) for m in (moments.mean, moments.rstd))
    view, got = x.reshape(plan.view), y.reshape(plan.view)
    last = tuple(slice(-200, None) for _ in plan.view)
    few = tuple(slice(None) if a in plan.axes else slice(-200, None) for a in range(len(plan.view)))
    wanted = (view[last].astype("f8") - mean[few]) * rstd[few]
    np.testing.assert_allclose(got[last], wanted, rtol=2e-3, atol=2e-3)
    # The last set's own sums, a piece at a time.
    ends = tuple(slice(None) if a in plan.axes else slice(-1, None) for a in range(len(plan.view)))
    pieces = np.array_split(view[ends], 64, axis=plan.axes[-1] if layer != "batch_norm_train" else -1)
    count = sum(p.size for p in pieces)
    total = sum(float(p.sum(dtype="f8")) for p in pieces) / count
    square = sum(float(np.square(p, dtype="f8").sum()) for p in pieces) / count
    assert abs(mean.ravel()[-1] - total) < 1e-6
    assert abs(rstd.ravel()[-1] - 1 / math.sqrt(square - total**2 + 1e-5)) < 1e-5
    del y, got
    found = kernels.vjp(plan, Operands(x), stats, x)
    # With dy = x: dx = rstd * (x - mean) * (1 - (1 - eps rstd^2)).
    dx = found.x.reshape(plan.view)[last]
    wanted = rstd[few] * (view[last].astype("f8") - mean[few]) * 1e-5 * rstd[few] ** 2
    np.testing.assert_allclose(dx, wanted, atol=1e-6)
