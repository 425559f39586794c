"""The fused CPU kernels against the oracle and the core: shapes, alignments, extremes, threads, instruction sets, bad input."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from normkit.backends import kernels
from normkit.core import plan as plans
from normkit.core.normalize import Operands

from . import oracle
from .tolerances import judged, tolerance, units

if not kernels.info()["built"]:
    pytest.skip("the kernels are not built into this installation", allow_module_level=True)

DTYPES = ("float32", "float64", "float16", "bfloat16")
#: Around the widths of vectors (2 to 16 lanes), of joined rows (64), and of the chunks that are summed at once (4096).
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129)
LAYERS = {
    "layer_norm": lambda s, o: plans.layer_plan(s, tuple(sorted(a % len(s) for a in o["axis"])), o["eps"]),
    "rms_norm": lambda s, o: plans.rms_plan(s, tuple(a % len(s) for a in o["axis"]), o["eps"], o["weight_offset"]),
    "group_norm": lambda s, o: plans.group_plan(s, o["num_groups"], o["axis"], o["eps"]),
    "instance_norm": lambda s, o: plans.instance_plan(s, o["axis"], o["eps"]),
    "batch_norm": lambda s, o: plans.batch_plan(s, o["axis"], o["eps"], given=True),
    "batch_norm_train": lambda s, o: plans.batch_plan(s, o["axis"], o["eps"], given=False),
}


@pytest.fixture(autouse=True)
def _no_limit():
    yield
    kernels.limit_threads(0)


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Outputs start as NaN, at odd places between bytes that must stay as they are."""
    buffers = []
    kind = kernels.library_of(np.ndarray)
    rng = np.random.default_rng(1)

    def room(shape, dtype):
        dtype, shape = np.dtype(dtype), tuple(shape)
        lead = 64 + int(rng.integers(0, 5)) * dtype.itemsize
        raw = np.full(lead + int(np.prod(shape)) * dtype.itemsize + 64, 0xFF, np.uint8)
        buffers.append((raw, lead))
        return raw[lead:-64].view(dtype).reshape(shape)

    def empty_like(x):
        y = room(x.shape if x.flags.c_contiguous else x.transpose(_last(x.ndim)).shape, x.dtype)
        return y if x.flags.c_contiguous else y.transpose(np.argsort(_last(x.ndim)))

    monkeypatch.setattr(kind, "empty_like", empty_like)
    monkeypatch.setattr(
        kind, "statistics", lambda x, rows, shape: room((rows, *shape), "f8" if x.dtype == "f8" else "f4")
    )
    yield
    for raw, lead in buffers:
        assert (raw[:lead] == 0xFF).all(), "written before an output"
        assert (raw[-64:] == 0xFF).all(), "written after an output"


def _last(ndim):
    return (0, *range(2, ndim), 1)


def dtype_of(name):
    if name == "bfloat16":
        return pytest.importorskip("ml_dtypes").bfloat16
    return np.dtype(name)


def placed(values, dtype, shift=0):
    """The values as a read-only array whose memory starts ``shift`` bytes after a multiple of 64."""
    dtype = np.dtype(dtype)
    raw = np.zeros(values.size * dtype.itemsize + 128 + shift, np.uint8)
    start = -raw.ctypes.data % 64 + shift
    x = raw[start : start + values.size * dtype.itemsize].view(dtype).reshape(values.shape)
    x[...] = values.astype(dtype)
    x.setflags(write=False)
    return x


def make(layer, shape, options, rng, dtype, *, param_dtype=None, shift=0, spread=1.0, offset=0.0, last=False, affine=True):
    """A plan and its operands, with dy, as (plan, named arrays)."""
    plan = LAYERS[layer](shape, options)
    param_dtype = dtype if param_dtype is None else param_dtype

    def values(s, scale=1.0, at=0.0):
        return at + scale * rng.standard_normal(s)

    def laid(v):
        if not last:
            return placed(v, dtype, shift)
        return placed(v.transpose(_last(v.ndim)).copy(), dtype, shift).transpose(np.argsort(_last(v.ndim)))

    arrays = {"x": laid(values(shape, spread, offset * spread)), "dy": laid(values(shape))}
    if affine:
        arrays["weight"] = placed(values(plan.param_shape), param_dtype)
        arrays["bias"] = placed(values(plan.param_shape), param_dtype)
    if layer == "batch_norm":
        arrays["mean"] = placed(values(plan.param_shape, spread, offset * spread), param_dtype)
        arrays["var"] = placed((0.5 + rng.random(plan.param_shape)) * spread**2, param_dtype)
    return plan, arrays


def _order(x):
    """The strides that matter."""
    return [stride for stride, n in zip(x.strides, x.shape, strict=True) if n > 1]


def operands_of(arrays):
    return Operands(*(arrays.get(name) for name in Operands._fields))


def run(plan, arrays):
    """y and the gradients, from the kernels."""
    operands = operands_of(arrays)
    assert kernels.refusal(plan, operands) is None
    y, stats = kernels.forward(plan, operands)
    gradients = kernels.vjp(plan, operands, stats, arrays["dy"])
    return y, stats, {k: g for k, g in gradients._asdict().items() if g is not None}


def judge(layer, plan, arrays, options, dtype, *, gradient=True):
    """The kernels against the oracle, within the suite's tolerances."""
    y, stats, gradients = run(plan, arrays)
    real = {k: v.astype(oracle.Real) for k, v in arrays.items()}
    named = {k: v for k, v in real.items() if k != "dy"}
    options = dict(options, axis=options["axis"][0] if options["axis"] == (-1,) else options["axis"])
    assert y.dtype == arrays["x"].dtype
    assert _order(y) == _order(arrays["x"])
    if not judged(dtype):
        return
    assert units(y, oracle.forward(layer, named, options), dtype) <= tolerance("forward", dtype).units
    if not gradient:
        return
    wanted = oracle.vjp(layer, named, real["dy"], options)
    scales = oracle.gradient_scales(layer, named, real["dy"], options)
    assert set(gradients) == set(wanted)
    for name, g in gradients.items():
        assert g.dtype == arrays[name].dtype
        kind = str(arrays[name].dtype)
        narrow = dtype if np.dtype(arrays[name].dtype).itemsize > arrays["x"].dtype.itemsize else kind
        narrow = "float32" if narrow in ("float16", "bfloat16") and kind in ("float32", "float64") else narrow
        error = units(g, wanted[name], narrow, np.maximum(scales[name], np.abs(wanted[name]).max(initial=0)))
        assert error <= tolerance("gradient", narrow).units, name


def shapes(layer, rng):
    """A random shape and its options."""

    def size(most=129):
        return int(rng.choice([n for n in SIZES if n <= most]))

    options = {"eps": float(rng.choice([1e-5, 1e-3]))}
    if layer in ("layer_norm", "rms_norm"):
        shape = (size(33), size(129) if rng.random() < 0.7 else int(rng.choice([768, 4095, 4096, 4097, 9001])))
        options["axis"] = (-1,)
        if layer == "rms_norm":
            options["weight_offset"] = float(rng.choice([0.0, 1.0]))
        return shape, options
    channels, first = size(65), rng.random() < 0.5
    spatial = (size(65), size(33))[: int(rng.integers(1, 3))]
    if rng.random() < 0.2:
        spatial = (int(rng.choice([4095, 4096, 4099, 8200])),)
    if np.prod(spatial) < 2:
        spatial = (*spatial[:-1], 2)
    batch = size(9)
    shape = (batch, channels, *spatial) if first else (batch, *spatial, channels)
    if layer.startswith("batch_norm") and rng.random() < 0.3:
        shape, first = (max(size(), 2), channels), True
    options["axis"] = 1 if first else len(shape) - 1
    if layer == "group_norm":
        options["num_groups"] = int(rng.choice([g for g in range(1, channels + 1) if channels % g == 0]))
    return shape, options


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_fuzz(layer, dtype, seed):
    rng = np.random.default_rng([seed, DTYPES.index(dtype), list(LAYERS).index(layer)])
    shape, options = shapes(layer, rng)
    kind = dtype_of(dtype)
    plan, arrays = make(
        layer,
        shape,
        options,
        rng,
        kind,
        param_dtype=rng.choice([dtype, "float32", "float64"]) if dtype != "bfloat16" else kind,
        # Off the vectors, and off the elements themselves.
        shift=int(rng.choice([0, 1, np.dtype(kind).itemsize, 16, 3 * np.dtype(kind).itemsize])),
        last=len(shape) > 2 and options["axis"] == 1 and rng.random() < 0.5,
        affine=rng.random() < 0.8,
    )
    judge(layer, plan, arrays, options, dtype)


LADDER = [(offset, 1.0) for offset in (0, 1e2, 1e4, 1e6)] + [(0, s) for s in (1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e25, 1e30)]
LADDER += [(1e4, 1e-25), (1e3, 1e26)]
STEADY = {
    "layer_norm": ((6, 1000), (-1,)),
    "rms_norm": ((6, 1000), (-1,)),
    "group_norm": ((3, 12, 9, 11), 1),
    "instance_norm": ((3, 9, 11, 20), 3),
    "batch_norm_train": ((7, 20, 13, 14), 1),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("offset", "spread"), LADDER)
@pytest.mark.parametrize("layer", STEADY)
def test_ladder(layer, offset, spread, last):
    shape, axis = STEADY[layer]
    if last and axis != 1:
        pytest.skip("one memory layout")
    options = {"axis": axis, "eps": 1e-5 if spread == 1 else 0.0}
    if layer == "group_norm":
        options["num_groups"] = 4
    if layer == "rms_norm":
        options["weight_offset"] = 0.0
    rng = np.random.default_rng(3)
    plan, arrays = make(layer, shape, options, rng, np.dtype("f4"), spread=spread, offset=offset, last=last)
    judge(layer, plan, arrays, options, "float32", gradient=False)
    if spread == 1:
        judge(layer, plan, arrays, options, "float32", gradient=offset <= 1e4)


@pytest.mark.parametrize("layer", STEADY)
@pytest.mark.parametrize("value", [3.3, -1e-30, 7e29, 0.0])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_constant_gives_bias(layer, value, eps):
    if layer == "rms_norm":
        pytest.skip("a constant is no zero there")
    shape, axis = STEADY[layer]
    options = {"axis": axis, "eps": eps, "num_groups": 4}
    plan, arrays = make(layer, shape, options, np.random.default_rng(0), np.dtype("f4"))
    arrays["x"] = np.full(shape, value, "f4")
    y, stats, _ = run(plan, arrays)
    bias = arrays["bias"].reshape(plan.param_view)
    assert (y.reshape(plan.view) == bias).all()
    assert (kernels.moments(plan, stats).var == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layer", STEADY)
def test_nan_stays_in_its_set(layer, bad, last):
    shape, axis = STEADY[layer]
    if last and axis != 1:
        pytest.skip("one memory layout")
    options = {"axis": axis, "eps": 1e-5, "num_groups": 4, "weight_offset": 0.0}
    rng = np.random.default_rng(0)
    plan, arrays = make(layer, shape, options, rng, np.dtype("f4"), last=last)
    clean, _, _ = run(plan, arrays)
    x = arrays["x"].copy("K")
    x[(1,) * x.ndim] = bad
    with np.errstate(invalid="ignore"):
        y, _, _ = run(plan, dict(arrays, x=x))
    touched = np.zeros(plan.view, bool)
    touched[tuple(slice(None) if a in plan.axes else i for a, i in enumerate(np.unravel_index(
        np.ravel_multi_index((1,) * x.ndim, shape), plan.view)))] = True  # fmt: skip
    touched = touched.reshape(shape)
    assert np.isnan(y[touched]).any()
    assert (y[~touched] == clean[~touched]).all()


LARGE = [
    ("layer_norm", (700, 257), {"axis": (-1,)}, False),
    ("layer_norm", (3, 100_001), {"axis": (-1,)}, False),
    ("rms_norm", (5000, 33), {"axis": (-1,), "weight_offset": 0.0}, False),
    ("group_norm", (5, 24, 40, 41), {"axis": 1, "num_groups": 6}, False),
    ("group_norm", (5, 24, 40, 41), {"axis": 1, "num_groups": 6}, True),
    ("instance_norm", (2, 900, 40, 7), {"axis": 3}, False),
    ("batch_norm_train", (16, 24, 33, 31), {"axis": 1}, False),
    ("batch_norm_train", (16, 24, 33, 31), {"axis": 1}, True),
    ("batch_norm_train", (3, 2, 100_003), {"axis": 1}, False),
    ("batch_norm_train", (40_000, 9), {"axis": 1}, False),
    ("batch_norm", (16, 24, 33, 31), {"axis": 1}, False),
    ("batch_norm", (16, 24, 33, 31), {"axis": 1}, True),
]


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


def test_large_outputs_written_past_the_caches():
    # 24 MB: above the threshold for non-temporal stores on machines with up to 6 MB of second-level cache in use.
    for shift in (0, 4, 20):
        options = {"axis": (-1,), "eps": 1e-5}
        rng = np.random.default_rng(6)
        plan, arrays = make("layer_norm", (3000, 2048), options, rng, np.dtype("f4"), shift=shift)
        y, _, gradients = run(plan, arrays)
        # A call on two rows at a time is small: it stores through the caches, in the same order of additions.
        for row in (0, 1500, 2998):
            part = plans.layer_plan((2, 2048), (1,), 1e-5)
            few = {k: v[row : row + 2] if k in ("x", "dy") else v for k, v in arrays.items()}
            y2, _, g2 = run(part, few)
            assert (y[row : row + 2] == y2).all()
            assert (gradients["x"][row : row + 2] == g2["x"]).all()


def test_many_threads_call_at_once():
    plan, arrays = make("layer_norm", (600, 257), {"axis": (-1,), "eps": 1e-5}, np.random.default_rng(7), np.dtype("f4"))
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


@pytest.mark.parametrize("name", kernels.info()["instruction_sets"])
def test_each_instruction_set(name):
    if os.environ.get("NORMKIT_ISA"):
        pytest.skip("one is forced already")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--pyargs", f"{__package__}.test_kernels", "-k",
         "fuzz or ladder or constant or nan or threads"],
        env={**os.environ, "NORMKIT_ISA": name}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_modes():
    text = "import numpy as np, normkit as nk; from normkit.backends import kernels as k; x = np.ones((2, 3), 'f4')\n"
    asked = "calls = []; real = k.forward; k.forward = lambda *a, **o: calls.append(1) or real(*a, **o)\n"
    for mode, count in (("0", 0), ("1", 1), ("require", 1)):
        done = _script(text + asked + f"nk.layer_norm(x); assert len(calls) == {count}", NORMKIT_KERNELS=mode)
        assert done.returncode == 0, done.stderr
    done = _script(text + "nk.layer_norm(x, axis=0)", NORMKIT_KERNELS="require")
    assert "KernelError: NORMKIT_KERNELS=require, but no kernel serves this layer_norm: there is none for axes (0,)" in done.stderr
    done = _script(text, NORMKIT_KERNELS="yes")
    assert "NORMKIT_KERNELS must be 0, 1 or require; received 'yes'." in done.stderr
    done = _script(text, NORMKIT_ISA="x86-64-v9")
    assert "cannot run the kernels for NORMKIT_ISA=x86-64-v9" in done.stderr


def test_refusals():
    x = np.ones((4, 6), "f4")
    plan = plans.layer_plan((4, 6), (1,), 1e-5)
    weight = np.ones(12, "f4")[::2]
    for operands, words in (
        (Operands(x.astype(">f4")), "x is not"),
        (Operands(x.astype("i4")), "x is not"),
        (Operands(np.ones((4, 12), "f4")[:, ::2]), "x is not"),
        (Operands(x[:, ::-1]), "x is not"),
        (Operands(np.broadcast_to(x[:1], (4, 6))), "x is not"),
        (Operands(np.ma.masked_array(x)), "MaskedArray"),
        (Operands(x, weight), "a parameter"),
        (Operands(x, mask=x > 0), "a mask"),
    ):
        assert words in kernels.refusal(plan, operands)
    assert "axes (0,)" in kernels.refusal(plans.layer_plan((4, 6), (0,), 1e-5), Operands(x))
    assert "shape (0, 6)" in kernels.refusal(plans.layer_plan((0, 6), (1,), 1e-5), Operands(x[:0]))


def _extension_call(**changed):
    x = np.ones((4, 6), "f4")
    arguments = dict(
        backward=False, kind=0, outer=4, groups=1, channels=6, inner=1, eps=1e-5, offset=0.0, center=True, x=x, dy=None,
        weight=None, bias=None, mean=None, var=None, out=np.empty_like(x), stats=None, dweight=None, dbias=None, dmean=None,
        dvar=None,
    )  # fmt: skip
    arguments.update(changed)
    kernels._kernels.call(*arguments.values())
    return arguments


def test_bad_buffers_raise():
    _extension_call()
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
        (TypeError, "gradient of", {"backward": True, "dy": x, "stats": np.ones((4, 4), "f4"), "weight": np.ones(6, "f4"),
                                    "dweight": np.empty(6, "f8")}),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            _extension_call(**changed)
    with pytest.raises(TypeError, match="21 arguments"):
        kernels._kernels.call(1)


def test_gradients_of_what_is_not_needed_are_not_made():
    rng = np.random.default_rng(9)
    for layer, shape, options, last in LARGE:
        plan, arrays = make(layer, tuple(min(n, 24) for n in shape), {"eps": 1e-5, **options}, rng, np.dtype("f4"), last=last)
        operands = operands_of(arrays)
        _, stats = kernels.forward(plan, operands)
        all_ = kernels.vjp(plan, operands, stats, arrays["dy"])
        for wanted in itertools.product([False, True], repeat=5):
            some = kernels.vjp(plan, operands, stats, arrays["dy"], type(all_)(*wanted))
            for got, full, want in zip(some, all_, wanted, strict=True):
                assert (got is None) == (full is None or not want)
                assert got is None or got.tobytes() == full.tobytes()


@pytest.mark.parametrize(("layer", "shape", "options", "last"), LARGE)
def test_torch_has_the_same_bits(layer, shape, options, last):
    torch = pytest.importorskip("torch")
    plan, arrays = make(layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(11), np.dtype("f4"), last=last)
    y, stats, gradients = run(plan, arrays)
    tensors = {k: torch.from_numpy(v.copy("K")) for k, v in arrays.items()}
    if last and len(shape) not in (4, 5):
        pytest.skip("torch has no such format")
    y2, stats2, gradients2 = run(plan, tensors)
    assert y2.stride() == tensors["x"].stride()
    assert y.tobytes() == y2.numpy().tobytes()
    assert stats is None or stats.tobytes() == stats2.numpy().tobytes()
    for name, g in gradients.items():
        assert g.tobytes() == gradients2[name].numpy().tobytes(), name


def test_kernels_agree_with_the_core():
    from normkit.core import normalize

    rng = np.random.default_rng(13)
    for layer in LAYERS:
        for _ in range(10):
            shape, options = shapes(layer, rng)
            plan, arrays = make(layer, shape, options, rng, np.dtype("f4"))
            operands = operands_of(arrays)
            y, stats, gradients = run(plan, arrays)
            core, used = normalize.forward(np, plan, operands, wide=True)
            # Two answers, each within the forward tolerance of the right one.
            assert units(y, core, "float32") <= 2 * tolerance("forward", "float32").units
            if stats is None:
                continue
            mine = kernels.moments(plan, stats)
            assert mine.rstd.shape == used.rstd.shape
            np.testing.assert_allclose(mine.rstd, used.rstd, rtol=4e-7)
            # The core's own backward pass, from the kernels' statistics.
            mixed = normalize.vjp(np, plan, operands, mine, arrays["dy"], wide=True)
            named = {k: v for k, v in arrays.items() if k != "dy"}
            options = dict(options, axis=options["axis"][0] if options["axis"] == (-1,) else options["axis"])
            scale = oracle.gradient_scales(layer, named, arrays["dy"], options)["x"]
            assert units(gradients["x"], mixed.x, "float32", scale) <= 2 * tolerance("gradient", "float32").units
