"""The fused CPU kernels and the process they run in: threads, forks, modes, refusals, buffers not to be touched."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.conformance.kernel_inputs import (
    DTYPES,
    LARGE,
    dtype_of,
    extension_call,
    guarded,
    judge,
    make,
    need_kernels,
    operands_of,
    run,
)  # fmt: skip
from normkit.core import plan as plans
from normkit.core.normalize import Operands

__all__ = ["guarded"]

need_kernels()


@pytest.fixture(autouse=True)
def _no_limit():
    yield
    kernels.limit_threads(0)


@pytest.mark.parametrize(("layer", "shape", "options", "last"), LARGE)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bits_do_not_depend_on_threads(layer, shape, options, last, dtype):
    options = {"eps": 1e-5, **options}
    plan, arrays = make(layer, shape, options, np.random.default_rng(5), np.dtype(dtype), last=last)
    results = []
    for count in (1, 2, 5):
        kernels.limit_threads(count)
        y, stats, gradients = run(plan, arrays)
        results.append((y, *([] if stats is None else [stats]), *gradients.values()))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()
    judge(layer, plan, arrays, options, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layer", "shape", "options", "last"), LARGE)
def test_torch_has_the_same_bits(layer, shape, options, last, dtype):
    torch = pytest.importorskip("torch")
    kind = dtype_of(dtype)
    plan, arrays = make(layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(11), kind, last=last)
    y, stats, gradients = run(plan, arrays)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[y.itemsize]
    tensors = {
        k: torch.from_numpy(v.view(f"i{v.itemsize}").copy("K")).view(getattr(torch, dtype)) for k, v in arrays.items()
    }
    y2, stats2, gradients2 = run(plan, tensors)
    assert y2.stride() == tensors["x"].stride()
    assert y.tobytes() == y2.view(bits).numpy().tobytes()
    assert stats is None or stats.tobytes() == stats2.numpy().tobytes()
    for name, g in gradients.items():
        assert g.tobytes() == gradients2[name].view(bits).numpy().tobytes(), name


def test_many_threads_call_at_once():
    plan, arrays = make(
        "layer_norm", (600, 257), {"axis": (-1,), "eps": 1e-5}, np.random.default_rng(7), np.dtype("f4")
    )
    want = run(plan, arrays)[0].tobytes()
    wrong = []

    def work():
        for _ in range(20):
            y, _ = kernels.forward(plan, operands_of(arrays))
            if y.tobytes() != want:
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _script(text, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=120)


LIMITS = """
import {imported}
import numpy as np, threadpoolctl
import normkit as nk
from normkit.backends import kernels
x = np.random.default_rng(0).standard_normal((3000, 65)).astype("f4")
y = nk.layer_norm(x)
{limited}
assert (nk.layer_norm(x) == y).all()
"""
WITHIN = """
torch.set_num_threads(3)
with threadpoolctl.threadpool_limits(1):
    assert kernels.info()["threads"] == 1
    assert (nk.layer_norm(x) == y).all()
assert kernels.info()["threads"] == 3
"""


@pytest.mark.parametrize(
    ("imported", "limited"),
    [
        ("sys", "assert kernels.info()['threads'] == 1"),
        ("torch", "assert kernels.info()['threads'] == 1"),
        ("torch", "torch.set_num_threads(5); assert kernels.info()['threads'] == 5"),
        ("torch", "torch.set_num_threads(5); kernels.limit_threads(2); assert kernels.info()['threads'] == 2"),
        ("torch", WITHIN),
    ],
)
def test_limits_of_threads(imported, limited):
    """OMP_NUM_THREADS, and what sets the limits of an OpenMP runtime that is loaded."""
    pytest.importorskip("threadpoolctl")
    pytest.importorskip(imported)
    done = _script(LIMITS.format(imported=imported, limited=limited), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_many_threads_call_at_once_on_the_pool_of_torch():
    pytest.importorskip("torch")
    done = _script(CALLERS)
    assert done.returncode == 0, done.stderr


CALLERS = """
import threading, torch
import normkit as nk
from normkit.backends import kernels
torch.set_num_threads(2)
x = torch.randn(600, 257)
want = nk.layer_norm(x)
done = []
def work():
    for _ in range(20):
        torch.mul(x, 2)
        done.append(torch.equal(nk.layer_norm(x), want))
workers = [threading.Thread(target=work) for _ in range(6)]
[w.start() for w in workers], [w.join() for w in workers]
assert len(done) == 120 and all(done) and kernels.info()["threads_of"] == "openmp"
"""

FORK = """
import os, sys
{imported}
import numpy as np
import normkit as nk
from normkit.backends import kernels
x = np.random.default_rng(0).standard_normal((3000, 65)).astype("f4")
kernels.limit_threads(2)
before = nk.layer_norm(x)
{used}
child = os.fork()
if child == 0:
    same = (nk.layer_norm(x) == before).all()
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert (nk.layer_norm(x) == before).all()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("torch", [False, True])
def test_right_after_fork(torch):
    if torch:
        pytest.importorskip("torch")
    done = _script(
        FORK.format(
            imported="import torch" if torch else "",
            used="torch.ones(1000, 1000).mul(2); assert kernels.info()['threads_of'] == 'openmp'" if torch else "",
        ),
        PYTHONWARNINGS="ignore",
    )
    assert done.returncode == 0, done.stderr


def test_modes():
    text = "import numpy as np, normkit as nk; from normkit.backends import kernels as k; x = np.ones((2, 3), 'f4')\n"
    asked = "calls = []; real = k.forward; k.forward = lambda *a, **o: calls.append(1) or real(*a, **o)\n"
    for mode, count in (("0", 0), ("1", 1), ("require", 1)):
        done = _script(text + asked + f"nk.layer_norm(x); assert len(calls) == {count}", NORMKIT_KERNELS=mode)
        assert done.returncode == 0, done.stderr
    done = _script(text + "nk.batch_norm_train(x, mask=x > 0)", NORMKIT_KERNELS="require")
    assert (
        "KernelError: NORMKIT_KERNELS=require, but no kernel serves this batch_norm_train: a mask was given."
        in done.stderr
    )
    done = _script(text, NORMKIT_KERNELS="yes")
    assert "NORMKIT_KERNELS must be 0, 1 or require; received 'yes'." in done.stderr
    done = _script(text, NORMKIT_ISA="x86-64-v9")
    assert "cannot run the kernels for NORMKIT_ISA=x86-64-v9" in done.stderr


def test_refusals():
    x = np.ones((4, 6), "f4")
    plan = plans.layer_plan((4, 6), (1,), 1e-5)
    for operands, words in (
        (Operands(x.astype(">f4")), "x is not"),
        (Operands(x.astype("i4")), "x is not"),
        (Operands(np.ma.masked_array(x)), "MaskedArray"),
        (Operands(x, np.ones(6, ">f4")), "a parameter"),
        (Operands(x, mask=x > 0), "a mask"),
    ):
        assert words in kernels.refusal(plan, operands)
    for served in (np.ones((4, 12), "f4")[:, ::2], x[:, ::-1], np.broadcast_to(x[:1], (4, 6)), np.asfortranarray(x)):
        assert kernels.refusal(plan, Operands(served, np.ones(12, "f4")[::2])) is None
    assert kernels.refusal(plans.layer_plan((4, 6), (0,), 1e-5), Operands(x)) is None
    assert "shape (0, 6)" in kernels.refusal(plans.layer_plan((0, 6), (1,), 1e-5), Operands(x[:0]))


def test_bad_buffers_raise():
    extension_call()
    x = np.ones((4, 6), "f4")
    frozen = np.empty_like(x)
    frozen.setflags(write=False)
    line = np.ones(48, "f4")
    for error, words, changed in (
        (ValueError, "read-only", {"out": frozen}),
        (ValueError, "share memory", {"x": x, "out": x}),
        (ValueError, "share memory", {"x": line[:24], "out": line[8:32]}),
        (ValueError, "one block", {"out": np.empty((4, 12), "f4")[:, ::2]}),
        (ValueError, "one block", {"x": np.broadcast_to(np.float32(1), (4, 6))}),
        (ValueError, "one block", {"x": x[::-1]}),
        (ValueError, "24 elements; received 18", {"out": np.empty((3, 6), "f4")}),
        (ValueError, "6 elements; received 5", {"weight": np.ones(5, "f4")}),
        (TypeError, "dtype of x", {"out": np.empty((4, 6), "f8")}),
        (TypeError, "float32", {"x": np.ones((4, 6), "i4")}),
        (TypeError, "float32", {"x": np.ones((4, 6), ">f4")}),
        (TypeError, "buffer protocol", {"x": [1.0] * 24}),
        (TypeError, "out must be given", {"out": None}),
        (TypeError, "accumulation dtype", {"stats": np.empty((4, 4), "f8")}),
        (ValueError, "given together", {"mean": np.ones(6, "f4")}),
        (ValueError, "positive sizes", {"outer": 0}),
        (ValueError, "overflow", {"outer": 2**40, "channels": 2**40}),
        (ValueError, "known kind", {"kind": 3}),
        (TypeError, "dy and stats", {"backward": True}),
        (TypeError, "gradient of", {"backward": True, "dy": x, "stats": np.ones((4, 4), "f4"),
                                    "weight": np.ones(6, "f4"), "dweight": np.empty(6, "f8")}),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            extension_call(**changed)
    with pytest.raises(TypeError, match="21 arguments"):
        kernels._kernels.call(1)


def test_gradients_of_what_is_not_needed_are_not_made():
    rng = np.random.default_rng(9)
    for layer, shape, options, last in LARGE:
        plan, arrays = make(
            layer, tuple(min(n, 24) for n in shape), {"eps": 1e-5, **options}, rng, np.dtype("f4"), last=last
        )
        operands = operands_of(arrays)
        _, stats = kernels.forward(plan, operands)
        all_ = kernels.vjp(plan, operands, stats, arrays["dy"])
        for wanted in itertools.product([False, True], repeat=5):
            some = kernels.vjp(plan, operands, stats, arrays["dy"], type(all_)(*wanted))
            for got, full, want in zip(some, all_, wanted, strict=True):
                assert (got is None) == (full is None or not want)
                assert got is None or got.tobytes() == full.tobytes()


def test_calls_are_counted_where_kernels_run(monkeypatch):
    """By direction, and only what a kernel served."""
    monkeypatch.setattr(kernels, "mode", "1")
    x = np.ones((4, 8), np.float32)
    start = kernels.served()
    with kernels.off():
        nk.layer_norm(x)
    assert kernels.served() == start
    y, pullback = nk.vjp(nk.layer_norm, x)
    assert kernels.served().since(start) == (1, 0)
    pullback(y)
    assert kernels.served().since(start) == (1, 1)
    nk.batch_norm_train(x, mask=x > 0)
    assert kernels.served().since(start) == (1, 1)
    assert kernels.mode == "1"
