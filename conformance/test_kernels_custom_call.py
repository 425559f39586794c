"""The custom call that TensorFlow's XLA makes, made by hand: NumPy's bits, and calls that make no sense."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from normkit.backends import kernels
from normkit.backends.kernels import programs
from normkit.backends.kernels.programs import GRADIENTS, SLOTS, STATS
from normkit.conformance.descriptions import MEANINGLESS, described
from normkit.conformance.kernel_inputs import DTYPES, LARGE, LAYERS, SMALL, dtype_of, make, need_kernels, run
from normkit.conformance.xla_runtime import pointer
from normkit.core.normalize import Operands

need_kernels()
_P = ctypes.c_void_p


def custom_call(operands, results, text):
    """As XLA makes it: a result by itself is where its memory is, several are in a list of theirs."""
    handler = ctypes.CFUNCTYPE(None, _P, _P, ctypes.c_char_p, ctypes.c_size_t, _P)(
        pointer(kernels._kernels.custom_call())
    )
    given, taken = ((_P * len(list_))(*(a.ctypes.data for a in list_)) for list_ in (operands, results))
    handler(taken[0] if len(results) == 1 else ctypes.addressof(taken), given, text, len(text), None)


def called(plan, given, results, length=None):
    """The results by name, from arrays that have memory of their own, to the byte; ``length`` is an unknown batch's."""
    given = {name: np.array(given[name], order="C") for name in SLOTS if name in given}
    dtypes = {name: a.dtype for name, a in given.items()}
    layouts = programs.layouts(plan, dtypes, np.dtype("f8" if dtypes["x"] == "f8" else "f4"))
    layouts[STATS] = ((len(programs.saved(plan)), *layouts[STATS][0]), layouts[STATS][1])
    taken = {name: np.full(layouts[name][0], np.nan, layouts[name][1]) for name in results}
    dtypes |= {name: a.dtype for name, a in taken.items()}
    there = {name: dtype.name for name, dtype in dtypes.items()}
    if length is None:
        custom_call(list(given.values()), list(taken.values()), programs.description(plan, there).encode())
        return taken
    one = programs.sample(dataclasses.replace(plan, shape=(None, *plan.shape[1:]), view=(None, *plan.view[1:])))
    text = programs.description(one.plan, there, one.times)
    custom_call([np.array([length]), *given.values()], list(taken.values()), text.encode())
    return taken


def both_ways(plan, arrays, length=None):
    """y, statistics and gradients as the kernels' own entry gives them, and as the custom call does."""
    y, stats, gradients = run(plan, arrays)
    given = {"given_" * (name in ("mean", "var")) + name: a for name, a in arrays.items()}
    dy = given.pop("dy")
    found = called(plan, given, ["y"] if stats is None else ["y", STATS], length)
    yield y, found["y"]
    if stats is not None:
        yield stats, found[STATS]
        given[STATS] = found[STATS]
    wanted = {slot: name for name, slot in zip(programs.OPERANDS, GRADIENTS, strict=True) if name in given}
    found = called(plan, {**given, "dy": dy}, list(wanted), length)
    for slot, name in wanted.items():
        yield gradients[name.removeprefix("given_")], found[slot]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_bits_of_numpy(layer, dtype, affine):
    """Without parameters the gradient is one result, which is not in a list."""
    shape, options = SMALL[layer]
    plan, arrays = make(
        layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(5), dtype_of(dtype), affine=affine
    )
    for wanted, found in both_ways(plan, arrays):
        assert wanted.dtype == found.dtype
        assert wanted.tobytes() == found.tobytes()


@pytest.mark.parametrize(("layer", "shape", "options", "last"), [row for row in LARGE if not row[3]])
def test_the_bits_of_numpy_on_several_threads(layer, shape, options, last):
    plan, arrays = make(layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(6), np.dtype("f4"))
    try:
        for count in (1, 2, 5):
            kernels.limit_threads(count)
            for wanted, found in both_ways(plan, arrays):
                assert wanted.tobytes() == found.tobytes()
    finally:
        kernels.limit_threads(0)


TEAMS = """
import os, threading
import numpy as np
import torch
from normkit.backends import kernels
from normkit.conformance.test_kernels_custom_call import custom_call, described

def work():
    custom_call([x], [np.empty_like(x)], text)
    called.wait(), counted.wait()

assert kernels.info()["threads_of"] == "openmp"
kernels.limit_threads(3)
x, text = np.ones(({rows}, 1024), "f4"), described("0 0 {rows} 1 1024 1 1e-05 0.0 1").encode()
called, counted = threading.Barrier(5), threading.Barrier(5)
before = len(os.listdir("/proc/self/task"))
callers = [threading.Thread(target=work) for _ in range(4)]
[c.start() for c in callers]
called.wait()
print(len(os.listdir("/proc/self/task")) - before - len(callers))
counted.wait()
[c.join() for c in callers]
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted as Linux lists them")
@pytest.mark.parametrize(("rows", "workers"), [(255, {0}), (256, {1, 2})])
def test_threads_of_callers_share_one_pool(rows, workers):
    """From 1 MB; OpenMP would make two threads for each of the four, where they are more than the processors."""
    pytest.importorskip("torch")
    environment = os.environ | {"OMP_NUM_THREADS": "3"}
    script = TEAMS.replace("{rows}", str(rows))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in workers


@pytest.mark.parametrize("layer", LAYERS)
def test_the_length_of_a_batch_comes_with_the_call(layer):
    shape, options = SMALL[layer]
    plan, arrays = make(layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(5), np.dtype("f4"))
    for wanted, found in both_ways(plan, arrays, shape[0]):
        assert wanted.tobytes() == found.tobytes()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_batch_of_none(layer):
    """What is written: no y, and zeros for what is summed over it."""
    shape, options = SMALL[layer]
    plan, arrays = make(layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(5), np.dtype("f4"))
    given = {"given_" * (name in ("mean", "var")) + name: a for name, a in arrays.items()}
    dy = given.pop("dy")
    train = layer == "batch_norm_train"
    found = called(plan, given, ["y", *[STATS] * (layer != "batch_norm")], 0)
    assert np.isnan(found["y"]).all()
    assert not train or not found[STATS].any()
    wanted = [slot for name, slot in zip(programs.OPERANDS, GRADIENTS, strict=True) if name in given]
    stats = {STATS: found[STATS]} if STATS in found else {}
    found = called(plan, {**given, "dy": dy, **stats}, wanted, 0)
    assert np.isnan(found.pop("y")).all()
    assert found
    assert not any(a.any() for a in found.values())


def test_which_lengths_a_call_can_be_told():
    """Where all that are unknown make one size, no other order of axes is needed, and none has parameters."""

    def sample(layer, shape, **options):
        return programs.sample(LAYERS[layer](shape, {"eps": 1e-5, **options}))

    assert sample("layer_norm", (None, 3, 4), axis=(-1,)).times == "outer"
    assert sample("batch_norm_train", (None, 4), axis=1).times == "inner"
    assert sample("group_norm", (None, 3, 4), axis=2, num_groups=2).times == "outer"
    assert sample("layer_norm", (2, 3, 4), axis=(-1,)) is None
    assert sample("layer_norm", (None, None, 4), axis=(-1,)).times == "outer"
    assert sample("layer_norm", (2, None, 4), axis=(-1,)).times == "outer"
    assert sample("batch_norm_train", (None, None, None, 4), axis=3).times == "inner"
    assert sample("batch_norm_train", (None, 4, None), axis=1) is None
    assert sample("instance_norm", (None, None, 4), axis=2) is None
    assert sample("layer_norm", (None, 3, 4), axis=(1,)) is None
    assert sample("batch_norm_train", (None, 4), axis=0) is None


def test_a_call_by_hand():
    plan = LAYERS["layer_norm"]((4, 6), {"axis": (-1,), "eps": 1e-5})
    assert described() == programs.description(plan, {"x": "float32", "y": "float32"})
    x, y = np.arange(24, dtype="f4").reshape(4, 6), np.full((4, 6), np.nan, "f4")
    custom_call([x], [y], described().encode())
    assert y.tobytes() == kernels.forward(plan, Operands(x))[0].tobytes()


CALLS = """
import os
import numpy as np
from normkit.conformance.test_kernels_custom_call import MEANINGLESS, custom_call

room = [np.ones(4 * 24, "f4") for _ in range(16)]
for text in MEANINGLESS.values():
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    else:
        custom_call(room[:8], room[8:], text.encode())
        os._exit(0)
"""


LENGTHS = """
import os
import numpy as np
from normkit.conformance.test_kernels_custom_call import custom_call, described

x = np.ones((4, 6), "f4")
for length in (-1, 2**61):
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    else:
        custom_call([np.array([length]), x], [np.empty_like(x)], described("outer 0 0 4 1 6 1 1e-05 0.0 1").encode())
        os._exit(0)
"""


def test_lengths_that_make_no_sense():
    done = subprocess.run([sys.executable, "-c", LENGTHS], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["-6", "-6"], done.stderr
    said = "normkit: a batch has a length that makes no sense in a call from an XLA program: outer 0 0 4"
    assert [line[: len(said)] for line in done.stderr.splitlines()] == [said, said]


def test_calls_that_make_no_sense():
    """XLA gives no way to say so: the process ends, with one sentence, before memory is touched."""
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = zip(MEANINGLESS.items(), done.stdout.split(), done.stderr.splitlines(), strict=True)
    for (what, text), status, said in told:
        assert status == "-6", what
        assert said == f"normkit: what was asked for makes no sense in a call from an XLA program: {text}"
