"""The handler that XLA calls: NumPy's bits in every dtype and on any number of threads, and calls that do not fit."""

from __future__ import annotations

import ctypes
import functools
import threading

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.backends.jax import fused
from normkit.backends.kernels import programs
from normkit.conformance import kernel_inputs
from normkit.conformance.jax_inputs import SMALL, as_usual, called, jax, same
from normkit.conformance.kernel_inputs import LARGE, LAYERS
from normkit.conformance.xla_runtime import Buffer, Runtime, Version
from normkit.core.normalize import Operands

__all__ = ["as_usual"]


def _bits(call):
    y, used = jax.jit(functools.partial(fused.forward, call.plan, save=True))(call.operands)
    return y, used, jax.jit(functools.partial(fused.vjp, call.plan))(call.operands, used, call.dy)


def _assert_bits(call):
    wanted, stats = kernels.forward(call.plan, call.arrays)
    gradients = kernels.vjp(call.plan, call.arrays, stats, call.dys)
    for count in (1, 2, 5):
        kernels.limit_threads(count)
        y, used, found = _bits(call)
        assert same(y, wanted)
        if stats is not None:
            there = kernels.moments(call.plan, stats)
            for name in ("mean", "residue", "var", "rstd"):
                assert (getattr(there, name) is None) == (getattr(used, name) is None)
                assert getattr(there, name) is None or same(getattr(used, name), getattr(there, name)), name
        for name, gradient in gradients._asdict().items():
            assert gradient is None or same(getattr(found, name), gradient), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layer", "shape", "options", "last"), [row for row in LARGE if not row[3]])
def test_the_bits_of_numpy(layer, shape, options, last, dtype):
    """On any number of threads."""
    _assert_bits(called(layer, shape, options, dtype))


@pytest.mark.parametrize("param_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", kernel_inputs.DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_bits_of_numpy_in_every_dtype(layer, dtype, param_dtype):
    _assert_bits(called(layer, dtype=dtype, param_dtype=np.dtype(param_dtype)))


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("layer_norm", {"axis": (0, 2)}),
        ("rms_norm", {"axis": (1,), "weight_offset": 1.0}),
        ("group_norm", {"axis": 2, "num_groups": 2}),
        ("instance_norm", {"axis": 2}),
    ],
)
def test_axes_that_no_kernel_has(layer, options):
    """x is turned, and y and its gradient are turned back."""
    call = called(layer, (2, 3, 4, 5), options)
    assert programs.turned(call.plan)[1] is not None
    wanted, stats = kernels.forward(call.plan, call.arrays)
    gradients = kernels.vjp(call.plan, call.arrays, stats, call.dys)
    before = kernels.served()
    y, _, found = _bits(call)
    assert kernels.served().since(before) == (1, 1)
    assert same(y, wanted)
    for name in ("x", "weight", "bias"):
        assert same(getattr(found, name), getattr(gradients, name)), name


@pytest.mark.parametrize(
    ("layer", "options"), [("layer_norm", {"axis": (0, 2)}), ("group_norm", {"axis": 2, "num_groups": 2})]
)
def test_the_gradient_of_a_gradient_along_axes_that_no_kernel_has(layer, options):
    """That of a call turned is the formula's, turned."""
    call = called(layer, (2, 3, 4, 5), options, "float64")
    function = functools.partial(getattr(nk, layer), **options)

    def second(x, weight):
        def first(weight):
            return jax.grad(lambda x: (function(x, weight=weight) ** 3).sum())(x)

        return jax.grad(lambda weight: (first(weight) ** 2).sum())(weight)

    found = jax.jit(second)(call.operands.x, call.operands.weight)
    with kernels.off():
        wanted = jax.jit(lambda *arrays: second(*arrays))(call.operands.x, call.operands.weight)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)  # both are the core's formula, in float64


@pytest.mark.parametrize(("dtype", "spread"), [("float16", 1e-6), ("float32", 1e-42)])
@pytest.mark.parametrize("layer", ["layer_norm", "batch_norm_train"])
def test_subnormal_numbers_are_no_zeros(layer, dtype, spread):
    """XLA's threads flush them; the kernels on them do not, and leave the threads as they were."""
    for at in (SMALL[layer], ((3000, 8, 17), SMALL[layer][1])):
        call = called(layer, *at, dtype, spread=spread)
        assert call.arrays.x.astype("f8").std() > 0
        assert same(_bits(call)[0], kernels.forward(call.plan, call.arrays)[0])
    tiny = jax.numpy.float32(1e-40)
    assert jax.jit(lambda a, x: (nk.layer_norm(x), a * 1)[1])(tiny, call.operands.x) == jax.jit(lambda a: a * 1)(tiny)


def _by_hand(takes=(4, 6), returns=(4, 6), **changed):
    """The custom call as the lowering writes it, with some attributes changed."""
    plan = called("layer_norm", (4, 6), {"axis": (-1,)}, affine=False)[0]
    attributes = fused._attributes(plan, ("x",), ("y",), None, ())
    out = jax.ShapeDtypeStruct(returns, "float32")
    call = jax.ffi.ffi_call(programs.TARGET, out)
    return np.asarray(call(jax.numpy.ones(takes, "float32"), **{**attributes, **changed}))


def test_a_call_that_does_not_fit_is_an_error():
    assert _by_hand().shape == (4, 6)
    for text, changed in {
        "x has 20 elements": {"takes": (4, 5)},
        "y has 20 elements": {"returns": (4, 5)},
        "known kind": {"kind": np.int64(3)},
        "positive sizes": {"outer": np.int64(0)},
        "known kind and positive sizes": {"outer": np.int64(2**60), "channels": np.int64(2**60)},
        "weight is missing": {"operands": np.int64(0b101)},
        "dy has 24 elements of type 11": {"operands": np.int64(0b10)},
        "do not make up a call": {"results": np.int64(1 << programs.SLOTS.index("dweight")), "returns": (6,)},
        "attribute 4 must be eps, an float64": {"eps": np.float32(1)},
        "attribute 0 must be batch": {"another": np.int64(1)},
    }.items():
        with pytest.raises(Exception, match=text):
            _by_hand(**changed)


@pytest.mark.parametrize(
    ("operands", "results"),
    [
        ("x weight", "y dweight"),
        ("x given_mean given_var", "y rstd"),
        ("x dy rstd", "y"),
        ("x dy mean residue rstd", "dmean"),
    ],
)
def test_results_that_no_kernel_would_write(operands, results):
    """Nor read: what the gradient needs of centred rows is not all there."""
    plan = LAYERS["batch_norm_train"]((4, 6, 3), {"axis": 1, "eps": 1e-5})
    arrays = {name: np.ones((4, 6, 3) if name in ("x", "dy", "y") else 6, "f4") for name in programs.SLOTS}
    runtime, given, taken = Runtime(), operands.split(), results.split()
    attributes = fused._attributes(plan, given, taken, None, ())
    frame = runtime.frame([arrays[n] for n in given], [arrays[n] for n in taken], attributes)
    assert not runtime.run(frame)
    assert runtime.errors == ["normkit: the arrays do not make up a call."]


def _layer_norm(runtime):
    """A call that is large enough to be shared, and what it gives."""
    call = called("layer_norm", (700, 257), {"axis": (-1,)}, affine=False)
    y = np.full_like(call.arrays.x, np.nan)
    attributes = fused._attributes(call.plan, ("x",), ("y",), None, ())
    return runtime.frame([call.arrays.x], [y], attributes), y, kernels.forward(call.plan, call.arrays)[0]


@pytest.mark.parametrize(
    ("theirs", "answer"), [((0, 1), (0, 1)), ((0, 2), (0, 2)), ((0, 9), (0, 3)), ((1, 0), (0, 1)), (None, (0, 1))]
)
def test_the_version_that_both_sides_know(theirs, answer):
    """XLA refuses the answer where it does not know it; this is how it asks, before JAX 0.9 without saying its own."""
    runtime = Runtime()
    if theirs is not None:
        runtime.api.version = Version(*theirs)
    metadata = (ctypes.c_size_t * 8)(64)
    extension = (ctypes.c_size_t * 4)(24, 1, 0, ctypes.addressof(metadata))
    frame, _, _ = _layer_norm(runtime)
    frame.extensions = ctypes.addressof(extension)
    if theirs is None:
        frame.api = None
    assert runtime.run(frame)
    version = Version.from_buffer(metadata, ctypes.sizeof(ctypes.c_size_t))
    assert (version.major, version.minor) == answer


@pytest.mark.parametrize("refuses", ["", "schedule", "threads", "threads unknown"])
def test_threads_that_do_not_come(refuses):
    """The caller does all of the work where no thread takes a part, and a thread that comes late finds none."""
    runtime = Runtime(refuses=refuses)
    if refuses == "threads unknown":
        runtime.api.size -= 8
    frame, y, wanted = _layer_norm(runtime)
    assert runtime.run(frame)
    assert same(y, wanted)
    assert runtime.destroyed == {"schedule": 3, "threads": 1}.get(refuses, 0)
    assert len(runtime.late) == (0 if refuses else 3)
    y[...] = 0
    for task in runtime.late:
        task()
    assert not y.any()
    assert not runtime.errors


def test_threads_that_come_at_once():
    """Several programs, whose calls are shared among threads, and batches of calls too small for that."""
    called_by, wrong = [], []

    def program(layer, shape, options, instances):
        runtime = Runtime(prompt=True)
        plan = LAYERS[layer](shape, {"eps": 1e-5, **options})
        many = np.random.default_rng(0).standard_normal((instances, *shape), "f4")
        wanted = np.stack([kernels.forward(plan, Operands(x))[0] for x in many])
        attributes = fused._attributes(plan, ("x",), ("y",), instances, ("x",))

        def work():
            for _ in range(10):
                y = np.full_like(many, np.nan)
                frame = runtime.frame([many], [y], attributes)
                if not (runtime.run(frame) and same(y, wanted)):
                    wrong.append((layer, runtime.errors))
            for thread in runtime.threads:
                thread.join()

        return work

    for row in (
        ("layer_norm", (700, 257), {"axis": (-1,)}, 1),
        ("group_norm", (5, 24, 40, 11), {"axis": 1, "num_groups": 6}, 3),
        ("batch_norm_train", (4, 24, 13), {"axis": 1}, 90),
    ):
        called_by.append(threading.Thread(target=program(*row)))
    for thread in called_by:
        thread.start()
    for thread in called_by:
        thread.join()
    assert not wrong


def test_frames_of_another_age():
    for text, change in {
        "older than version 0.1": lambda frame: setattr(frame, "size", frame.size - 1),
        "version 0.1": lambda frame: setattr(frame.operands, "size", 8),
        "for execution only": lambda frame: setattr(frame, "stage", 2),
        "not a buffer of this version": lambda frame: setattr(
            Buffer.from_address(ctypes.c_void_p.from_address(frame.operands.items).value), "size", 16
        ),
    }.items():
        runtime = Runtime()
        frame, y, _ = _layer_norm(runtime)
        change(frame)
        assert not runtime.run(frame)
        assert text in runtime.errors[0]
        assert np.isnan(y).all()
