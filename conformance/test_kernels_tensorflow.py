"""The fused CPU kernels under TensorFlow: memory that is shared, not copied, and what is left to plain operations."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.backends.kernels.libraries import library_of
from normkit.conformance.kernel_inputs import DTYPES, LARGE, dtype_of, make, need_kernels, run
from normkit.conformance.package import fresh

need_kernels()
tf = pytest.importorskip("tensorflow")


@pytest.fixture
def count():
    """How many calls kernels serve from here on."""
    before = kernels.served()
    return lambda: kernels.served().since(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layer", "shape", "options", "last"), [row for row in LARGE if not row[3]])
def test_tensorflow_has_the_same_bits(layer, shape, options, last, dtype):
    plan, arrays = make(layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(11), np.dtype(dtype_of(dtype)))
    y, stats, gradients = run(plan, arrays)
    y2, stats2, gradients2 = run(plan, {k: tf.constant(v) for k, v in arrays.items()})
    assert y.tobytes() == y2.numpy().tobytes()
    assert stats is None or stats.tobytes() == stats2.numpy().tobytes()
    for name, g in gradients.items():
        assert g.tobytes() == gradients2[name].numpy().tobytes(), name


def test_tensors_without_a_method_for_dlpack(monkeypatch):
    """TensorFlow's before 2.20."""
    from tensorflow.python.framework import ops

    monkeypatch.delattr(ops._EagerTensorBase, "__dlpack__", raising=False)
    arrays = type(library_of(type(tf.ones(1))))()
    x = np.arange(6, dtype="f4")
    (capsule,) = arrays.exported([tf.constant(x)])
    assert not kernels._kernels.negative(capsule)


AGAIN = """
import os, resource
os.environ["NORMKIT_HUGEPAGES"] = "0"
import tensorflow as tf, normkit as nk
x = tf.ones((4096, 1024))
for call in range(24):
    if call == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = nk.layer_norm(x)
    del y
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20
print(faults < 0.5 * (16 << 20) / resource.getpagesize())
"""


def test_memory_that_a_call_freed_is_there_for_the_next(tmp_path):
    """16 MB that malloc keeps, as for other arrays; aligned to a large page, they came from the system each time."""
    assert fresh.run(AGAIN, tmp_path) == "True"


def test_same_bits_with_and_without_a_tape(count):
    x, w = tf.random.normal((33, 70)), tf.Variable(tf.ones(70))
    bare, stats = nk.batch_norm_train(x, w, axis=-1)
    with tf.GradientTape() as tape:
        y, again = nk.batch_norm_train(x, w, axis=-1)
        loss = tf.reduce_sum(y * y * x)
    assert y.numpy().tobytes() == bare.numpy().tobytes()
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(stats, again, strict=True))
    assert isinstance(again.count, int)
    assert tape.gradient(loss, w).shape == (70,)
    assert count() == (2, 1)


def test_the_gradient_of_the_gradient(count):
    rng = np.random.default_rng(0)
    x, w = (tf.constant(rng.standard_normal(s)) for s in ((7, 12), (12,)))

    def second():
        with tf.GradientTape() as outer:
            outer.watch([x, w])
            with tf.GradientTape() as inner:
                inner.watch([x, w])
                loss = tf.reduce_sum(nk.layer_norm(x, w) ** 3)
            first = inner.gradient(loss, [x, w])
            total = tf.reduce_sum(first[0] ** 2) + tf.reduce_sum(first[1] ** 3)
        return outer.gradient(total, [x, w])

    fused = second()
    # Of the two gradients through y, the one that a tape follows is made of plain operations.
    assert count() == (1, 1)
    with kernels.off():
        plain = second()
    for a, b in zip(fused, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_jvp():
    x = tf.constant(np.random.default_rng(0).standard_normal((5, 9)))
    with tf.autodiff.ForwardAccumulator(x, x) as forward:
        y = nk.layer_norm(x, eps=0.1)
    with kernels.off(), tf.autodiff.ForwardAccumulator(x, x) as plain:
        y2 = nk.layer_norm(x, eps=0.1)
    np.testing.assert_allclose(forward.jvp(y), plain.jvp(y2), rtol=1e-9)


def test_what_kernels_do_not_serve(count):
    x = tf.random.normal((4, 6))
    nk.batch_norm_train(x, axis=1, mask=tf.range(4)[:, None] > 0)
    nk.layer_norm(x[:0])
    assert count() == (0, 0)


FIRST_IN_A_GRAPH = """
import tensorflow as tf, normkit as nk
from normkit.backends import kernels
tf.function(nk.layer_norm)(tf.ones((2, 3)))
nk.layer_norm(tf.ones((2, 3)))
assert kernels.served() == (2, 0), kernels.served()
"""


def test_a_backend_that_is_imported_while_a_graph_is_traced():
    done = subprocess.run([sys.executable, "-c", FIRST_IN_A_GRAPH], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_outputs_are_in_aligned_memory():
    for n in (1, 3, 65, 2_000_000):
        y = nk.layer_norm(tf.random.normal((2, n)))
        assert np.asarray(memoryview(y)).ctypes.data % 64 == 0


MEMORY = """
import resource, threading, tensorflow as tf, normkit as nk
from normkit.backends import kernels
x = tf.random.normal((2000, 2000))
kept = [nk.layer_norm(x) for _ in range(2)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(60):
    y = nk.layer_norm(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        z = nk.layer_norm(x)
    tape.gradient(z, x)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert kernels.served() == (122, 60), kernels.served()
assert grown < 200_000, grown  # kilobytes; all outputs together are 2.9 GB
x = kept.pop()
y = x[3:5] + 0
del x, kept
assert abs(float(tf.math.reduce_variance(y[0])) - 1) < 1e-3
capsule = kernels._kernels.empty(0, 2000, 2000)
del capsule
"""


def test_memory_lives_as_long_as_its_tensor():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_capsules():
    empty = kernels._kernels.empty
    x = tf.experimental.dlpack.from_dlpack(empty(1, 3, 0, 2))
    assert x.shape == (3, 0, 2) and x.dtype == tf.float64
    capsule = empty(0, 4)
    taken = tf.experimental.dlpack.from_dlpack(capsule)
    # A capsule that was taken is refused: its memory may be gone.
    assert kernels.negative(capsule) is None
    assert taken.shape == (4,)
    for error, words, arguments in (
        (ValueError, "no type 4", (4, 1)),
        (ValueError, "no type -1", (-1, 1)),
        (ValueError, "overflows", (0, 2**40, 2**40)),
        (ValueError, "negative", (0, -1)),
        (TypeError, "up to 64", (0, *[1] * 65)),
        (MemoryError, None, (0, 2**58)),
    ):
        with pytest.raises(error, match=words):
            empty(*arguments)
    stats, line = np.ones((4, 3), "f4"), np.ones(3, "f4")
    kernels._kernels.batch_stats(stats, line, line.copy())
    for error, words, arguments in (
        (ValueError, "mean must have", (stats, np.ones(4, "f4"), line)),
        (ValueError, "var must have", (stats, line, np.ones(3, "f8"))),
        (ValueError, "mean must have", (stats, None, line)),
        (TypeError, "float32 or float64", (stats.astype("f2"), line.astype("f2"), line.astype("f2"))),
        (TypeError, "takes stats", (stats, line)),
    ):
        with pytest.raises(error, match=words):
            kernels._kernels.batch_stats(*arguments)
