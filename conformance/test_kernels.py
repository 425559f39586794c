"""The fused CPU kernels against the oracle and the core: shapes, alignments, extremes, instruction sets."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from normkit.backends import kernels
from normkit.conformance import oracle
from normkit.conformance.kernel_inputs import (
    DTYPES,
    LAYERS,
    dtype_of,
    guarded,
    judge,
    make,
    need_kernels,
    operands_of,
    run,
    shapes,
)  # fmt: skip
from normkit.conformance.tolerances import tolerance, units
from normkit.core import plan as plans

__all__ = ["guarded"]

need_kernels()


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


@pytest.mark.parametrize("layer", ["batch_norm_train", "layer_norm"])
@pytest.mark.parametrize("rows", [1797, 20000])
def test_gradients_of_many_rows(layer, rows):
    """Sums down the columns are as right as any: not one long sum in float32 (8.3 units in some columns)."""
    options = {"axis": (-1,) if layer == "layer_norm" else 1, "eps": 1e-5}
    for seed in range(2):
        plan, arrays = make(layer, (rows, 64), options, np.random.default_rng(seed), np.dtype("f4"))
        judge(layer, plan, arrays, options, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", ["batch_norm", "batch_norm_train"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((9, 769, 5), id="blocks of which the last would be less than a vector"),
        pytest.param((30011, 4, 5), id="few channels, whose samples are shared out"),
    ],
)
def test_short_runs(layer, shape, dtype):
    options = {"axis": 1, "eps": 1e-5}
    plan, arrays = make(layer, shape, options, np.random.default_rng(3), dtype_of(dtype))
    judge(layer, plan, arrays, options, dtype)


@pytest.mark.parametrize(("layer", "groups"), [("group_norm", {"num_groups": 2}), ("instance_norm", {})])
def test_channels_on_the_first_axis(layer, groups):
    """There are no samples then: each group, or channel, is all there is of it."""
    options = {"axis": 0, "eps": 1e-5, **groups}
    plan, arrays = make(layer, (6, 5, 4), options, np.random.default_rng(2), np.dtype("f4"))
    judge(layer, plan, arrays, options, "float32")


LADDER = [(offset, 1.0) for offset in (0, 1e2, 1e4, 1e6)] + [
    (0, s) for s in (1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e25, 1e30)
]
LADDER += [(1e4, 1e-25), (1e3, 1e26)]
STEADY = {
    "layer_norm": ("layer_norm", (6, 1000), (-1,)),
    "rms_norm": ("rms_norm", (6, 1000), (-1,)),
    "group_norm": ("group_norm", (3, 12, 9, 11), 1),
    "instance_norm": ("instance_norm", (3, 9, 11, 20), 3),
    "batch_norm_train": ("batch_norm_train", (7, 20, 13, 14), 1),
    # Runs that are joined, of vectors and of less.
    "batch_norm_train, short runs": ("batch_norm_train", (9, 20, 7, 7), 1),
    "batch_norm_train, shortest runs": ("batch_norm_train", (70, 19, 3), 1),
}


def _options(layer, axis, eps):
    own = {"group_norm": {"num_groups": 4}, "rms_norm": {"weight_offset": 0.0}}
    return {"axis": axis, "eps": eps, **own.get(layer, {})}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("offset", "spread"), LADDER)
@pytest.mark.parametrize("call", STEADY)
def test_ladder(call, offset, spread, last):
    layer, shape, axis = STEADY[call]
    if last and axis != 1:
        pytest.skip("one memory layout")
    options = _options(layer, axis, 1e-5 if spread == 1 else 0.0)
    rng = np.random.default_rng(3)
    plan, arrays = make(layer, shape, options, rng, np.dtype("f4"), spread=spread, offset=offset, last=last)
    judge(layer, plan, arrays, options, "float32", gradient=False)
    if spread == 1:
        judge(layer, plan, arrays, options, "float32", gradient=offset <= 1e4)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "spread", "slope"), [("float32", 2.5e38, 1e30), ("bfloat16", 2.5e38, 1e30), ("float64", 1.3e308, 1e300)]
)
@pytest.mark.parametrize("call", STEADY)
def test_sets_as_wide_as_the_dtype(call, dtype, spread, slope, last):
    """A difference from the mean may be larger than any number of the dtype, in both directions."""
    layer, shape, axis = STEADY[call]
    if last and axis != 1:
        pytest.skip("one memory layout")
    options = _options(layer, axis, 1e-5)
    plan, arrays = make(layer, shape, options, np.random.default_rng(5), dtype_of(dtype), last=last)
    x, dy = (arrays[name].copy("K") for name in ("x", "dy"))
    x[...] = np.where(x > 1, -spread, spread)
    dy *= x.dtype.type(slope)
    judge(layer, plan, dict(arrays, x=x, dy=dy), options, dtype)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", STEADY)
def test_results_of_which_some_are_subnormal(call, dtype, last):
    """They are no zeros, which the instruction that rounds to bfloat16 takes them for."""
    layer, shape, axis = STEADY[call]
    if last and axis != 1:
        pytest.skip("one memory layout")
    options = _options(layer, axis, 1e-5)
    plan, arrays = make(layer, shape, options, np.random.default_rng(6), dtype_of(dtype), last=last)
    arrays |= {name: arrays[name] * arrays[name].dtype.type(3e-38) for name in ("weight", "bias", "dy")}
    y, _, gradients = run(plan, arrays)
    real = {name: array.astype(oracle.Real) for name, array in arrays.items()}
    dy, options = real.pop("dy"), dict(options, axis=axis if isinstance(axis, int) else axis[0])
    wanted, scales = oracle.vjp_and_scales(layer, real, dy, options)
    up = oracle.Real(2) ** 40  # where errors of this size count
    assert units(y.astype(oracle.Real) * up, oracle.forward(layer, real, options) * up, dtype) <= 2
    assert units(gradients["x"].astype(oracle.Real) * up, wanted["x"] * up, dtype, scales["x"] * up) <= 2


@pytest.mark.parametrize("call", STEADY)
def test_a_sum_of_squares_that_overflows(call):
    """Of numbers whose squares do not."""
    layer, shape, axis = STEADY[call]
    options = _options(layer, axis, 1.0)
    plan, arrays = make(layer, shape, options, np.random.default_rng(4), np.dtype("f8"), spread=2e153, offset=20.0)
    judge(layer, plan, arrays, options, "float64", gradient=False)


@pytest.mark.parametrize("call", STEADY)
@pytest.mark.parametrize("value", [3.3, -1e-30, 7e29, 0.0])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_constant_gives_bias(call, value, eps):
    layer, shape, axis = STEADY[call]
    if layer == "rms_norm":
        pytest.skip("a constant is no zero there")
    options = {"axis": axis, "eps": eps, "num_groups": 4}
    plan, arrays = make(layer, shape, options, np.random.default_rng(0), np.dtype("f4"))
    arrays["x"] = np.full(shape, value, "f4")
    y, stats, _ = run(plan, arrays)
    bias = arrays["bias"].reshape(plan.param_view)
    assert (y.reshape(plan.view) == bias).all()
    assert (kernels.moments(plan, stats).var == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("call", STEADY)
def test_nan_stays_in_its_set(call, bad, last):
    layer, shape, axis = STEADY[call]
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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_short_runs_of_all_kinds_side_by_side(dtype):
    """Channels whose runs are taken for one: each is as right, or as wrong, as if the others were not there."""
    options = {"axis": 1, "eps": 1e-5}
    plan, arrays = make("batch_norm_train", (291, 301, 29), options, np.random.default_rng(3), np.dtype(dtype))
    x = arrays["x"].copy()
    x[0, 1] += 1e5  # the pivot is far from the mean
    x[:, 2] = 3.3
    x[:, 3] *= 1e30
    x[:, 4] *= 1e-30
    x[:, 5] += 1e6
    x[:, 70:142] += np.linspace(-1e5, 1e5, 291).reshape(-1, 1, 1).astype(dtype)
    judge("batch_norm_train", plan, dict(arrays, x=x), options, dtype, gradient=False)
    y, _, _ = run(plan, dict(arrays, x=x))
    assert (y[:, 2] == arrays["bias"][2]).all()
    x[7, 6, 5] = np.nan
    x[7, 300, 28] = np.inf
    with np.errstate(invalid="ignore"):
        other, _, _ = run(plan, dict(arrays, x=x))
    assert np.isnan(other[:, [6, 300]]).any(axis=(0, 2)).all()
    left = np.delete(np.arange(301), [6, 300])
    assert (other[:, left] == y[:, left]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [200, 6000])
def test_columns_whose_sample_misleads(rows, dtype):
    """The rows that pivots are taken from lie far from all others, in one column of three."""
    options = {"axis": 1, "eps": 1e-5}
    plan, arrays = make("batch_norm_train", (rows, 80), options, np.random.default_rng(8), dtype_of(dtype))
    arrays["x"] = x = arrays["x"].copy()
    x[: rows // 32 * 32 : rows // 32, ::3] += x.dtype.type(1e4)
    judge("batch_norm_train", plan, arrays, options, dtype)


@pytest.mark.parametrize("last", [False, True])
def test_with_given_statistics_the_gradient_of_x_does_not_see_x(last):
    """Not even NaN, which those of the parameters do."""
    options = {"axis": 1, "eps": 1e-5}
    plan, arrays = make("batch_norm", (3, 20, 7, 5), options, np.random.default_rng(10), np.dtype("f4"), last=last)
    want = run(plan, arrays)[2]["x"]
    gradients = run(plan, {**arrays, "x": np.full_like(arrays["x"], np.nan)})[2]
    assert gradients["x"].tobytes() == want.tobytes()
    assert np.isnan(gradients["weight"]).all()


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


def test_kernels_agree_with_the_core():
    from normkit.backends.numpy.backend import NumpyBackend
    from normkit.core import normalize

    rng, habits = np.random.default_rng(13), NumpyBackend.habits
    for layer in LAYERS:
        for _ in range(10):
            shape, options = shapes(layer, rng)
            plan, arrays = make(layer, shape, options, rng, np.dtype("f4"))
            operands = operands_of(arrays)
            y, stats, gradients = run(plan, arrays)
            core, used = normalize.forward(np, plan, operands, habits)
            # Two answers, each within the forward tolerance of the right one.
            assert units(y, core, "float32") <= 2 * tolerance("forward", "float32").units
            if stats is None:
                continue
            mine = kernels.moments(plan, stats)
            assert mine.rstd.shape == used.rstd.shape
            np.testing.assert_allclose(mine.rstd, used.rstd, rtol=4e-7)
            # The core's own backward pass, from the kernels' statistics.
            mixed = normalize.vjp(np, plan, operands, mine, arrays["dy"], habits)
            named = {k: v for k, v in arrays.items() if k != "dy"}
            options = dict(options, axis=options["axis"][0] if options["axis"] == (-1,) else options["axis"])
            scale = oracle.vjp_and_scales(layer, named, arrays["dy"], options)[1]["x"]
            assert units(gradients["x"], mixed.x, "float32", scale) <= 2 * tolerance("gradient", "float32").units


SETS = ("aarch64",) if platform.machine() == "aarch64" else ("x86-64-v4+bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2")


@pytest.mark.parametrize("name", SETS)
def test_each_instruction_set(name, pytestconfig):
    if "numpy" not in [library.name for library in pytestconfig.libraries]:
        pytest.skip("tested with NumPy")
    if name not in kernels.info()["instruction_sets"]:
        pytest.skip(f"this processor cannot run {name}")
    if name == kernels.info()["instruction_set"]:
        pytest.skip("it is the one of this process, whose tests are these")
    if os.environ.get("NORMKIT_ISA"):
        pytest.skip("one is forced already")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib",
         "--backend", "numpy", "--pyargs",
         "normkit.conformance.test_kernels", "normkit.conformance.test_kernels_safety",
         "-k", "fuzz or ladder or constant or nan or subnormal or bits_do_not_depend_on_threads"],
        env={**os.environ, "NORMKIT_ISA": name}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
