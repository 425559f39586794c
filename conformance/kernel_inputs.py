"""Operands for the kernels' tests: odd shapes, odd places in memory, and outputs that show what was not written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normkit.backends import kernels
from normkit.backends.kernels.libraries import library_of
from normkit.conformance import oracle
from normkit.conformance.tolerances import judged, tolerance, units
from normkit.core import plan as plans
from normkit.core.normalize import Operands

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


def need_kernels() -> None:
    """Skip the module that is being imported where no kernel serves."""
    if not kernels.info()["built"]:
        pytest.skip("the kernels are not built into this installation", allow_module_level=True)
    if kernels.mode == "0":
        pytest.skip("NORMKIT_KERNELS=0", allow_module_level=True)


#: A small call of each layer.
SMALL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "layer_norm": ((5, 7, 12), {"axis": (-1,)}),
    "rms_norm": ((5, 7, 12), {"axis": (-1,), "weight_offset": 1.0}),
    "group_norm": ((5, 12, 3, 4), {"axis": 1, "num_groups": 4}),
    "instance_norm": ((5, 3, 4, 12), {"axis": 3}),
    "batch_norm": ((5, 12, 3, 4), {"axis": 1}),
    "batch_norm_train": ((5, 12, 3, 4), {"axis": 1}),
}


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Outputs start as NaN, at odd places between bytes that must stay as they are."""
    buffers = []
    kind = library_of(np.ndarray)
    rng = np.random.default_rng(1)

    def room(shape, dtype):
        dtype, shape = np.dtype(dtype), tuple(shape)
        lead = 64 + int(rng.integers(0, 5)) * dtype.itemsize
        raw = np.full(lead + int(np.prod(shape)) * dtype.itemsize + 64, 0xFF, np.uint8)
        buffers.append((raw, lead))
        return raw[lead:-64].view(dtype).reshape(shape)

    def empty_like(x):
        order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
        return room([x.shape[axis] for axis in order], x.dtype).transpose(np.argsort(order))

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
    """The NumPy dtype of this name."""
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


def make(
    layer, shape, options, rng, dtype, *, param_dtype=None, shift=0, spread=1.0, offset=0.0, last=False, affine=True
):
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
    """The arrays without dy."""
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
    y, _, gradients = run(plan, arrays)
    real = {k: v.astype(oracle.Real) for k, v in arrays.items()}
    named = {k: v for k, v in real.items() if k != "dy"}
    options = dict(options, axis=options["axis"][0] if options["axis"] == (-1,) else options["axis"])
    assert y.dtype == arrays["x"].dtype
    assert _order(y) == _order(arrays["x"])
    if not judged(dtype):
        return
    # Sums of float64 have no wider type to be merged in: their roundings add to those of the formula.
    allowed = 4 if dtype == "float64" else tolerance("forward", dtype).units
    assert units(y, oracle.forward(layer, named, options), dtype) <= allowed
    if not gradient:
        return
    wanted, scales = oracle.vjp_and_scales(layer, named, real["dy"], options)
    assert set(gradients) == set(wanted)
    for name, g in gradients.items():
        assert g.dtype == arrays[name].dtype
        kind = str(arrays[name].dtype)
        narrow = dtype if np.dtype(arrays[name].dtype).itemsize > arrays["x"].dtype.itemsize else kind
        narrow = "float32" if narrow in ("float16", "bfloat16") and kind in ("float32", "float64") else narrow
        error = units(g, wanted[name], narrow, scales[name])
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


#: Large enough to be shared among threads.
LARGE = [
    ("layer_norm", (700, 257), {"axis": (-1,)}, False),
    ("layer_norm", (3, 100_001), {"axis": (-1,)}, False),
    ("layer_norm", (32, 4096), {"axis": (-1,)}, False),
    ("rms_norm", (5000, 33), {"axis": (-1,), "weight_offset": 0.0}, False),
    # Lengths that loops are compiled for.
    ("layer_norm", (331, 64), {"axis": (-1,)}, False),
    ("layer_norm", (331, 128), {"axis": (-1,)}, False),
    ("rms_norm", (331, 64), {"axis": (-1,), "weight_offset": 0.0}, False),
    ("rms_norm", (331, 128), {"axis": (-1,), "weight_offset": 0.0}, False),
    ("group_norm", (5, 24, 40, 41), {"axis": 1, "num_groups": 6}, False),
    ("group_norm", (5, 24, 40, 41), {"axis": 1, "num_groups": 6}, True),
    ("instance_norm", (2, 900, 40, 7), {"axis": 3}, False),
    ("batch_norm_train", (16, 24, 33, 31), {"axis": 1}, False),
    ("batch_norm_train", (16, 24, 33, 31), {"axis": 1}, True),
    ("batch_norm_train", (3, 2, 100_003), {"axis": 1}, False),
    ("batch_norm_train", (37, 293, 29), {"axis": 1}, False),
    ("batch_norm_train", (13_007, 5, 9), {"axis": 1}, False),
    ("batch_norm_train", (40_000, 9), {"axis": 1}, False),
    ("batch_norm_train", (203, 1031), {"axis": 1}, False),
    ("batch_norm", (16, 24, 33, 31), {"axis": 1}, False),
    ("batch_norm", (16, 24, 33, 31), {"axis": 1}, True),
]


def extension_call(**changed):
    """The extension itself called for layer norm over rows of (4, 6) with these arguments instead of the usual."""
    x = np.ones((4, 6), "f4")
    arguments = {"backward": False, "kind": 0, "outer": 4, "groups": 1, "channels": 6, "inner": 1}
    arguments |= {"eps": 1e-5, "offset": 0.0, "center": True, "x": x, "dy": None}
    arguments |= dict.fromkeys(("weight", "bias", "mean", "var"))
    arguments |= {"out": np.empty_like(x), "stats": None}
    arguments |= dict.fromkeys(("dweight", "dbias", "dmean", "dvar"))
    arguments.update(changed)
    kernels._kernels.call(*arguments.values())
    return arguments
