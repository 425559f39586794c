"""What kernels are not made for, and must not crash on: arguments of any kind, memory that is gone, no elements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.conformance.kernel_inputs import need_kernels
from normkit.conformance.libraries import first

need_kernels()

REFUSED = (TypeError, ValueError, OverflowError, BufferError, MemoryError)
#: A kernel of (4, 6) with a parameter's length, its sizes, and how many sets have statistics.
KERNELS = [("rows", (0, 4, 1, 6, 1), 6, 4), ("channels", (1, 2, 1, 4, 3), 4, 4), ("columns", (2, 1, 6, 1, 4), 6, 6)]
GUARD = 64


def _hostile():
    """Anything but what is asked for, made anew, as outputs may be written to."""
    x, frozen = np.ones((4, 6), "f4"), np.ones((4, 6), "f4")
    frozen.setflags(write=False)
    line, raw = np.ones(48, "f4"), np.zeros(200, "u1")
    return [
        None, frozen, raw[1:97].view("f4").reshape(4, 6), line[:24], line[8:32], x[::-1], x.T, x[:, ::2],
        np.lib.stride_tricks.as_strided(x, (4, 6), (4, 4)), np.broadcast_to(np.float32(1), (4, 6)),
        np.empty((4, 6), "f8"), np.ones((4, 6), "f2"), np.ones((4, 6), "u2"), np.ones((4, 6), ">f4"),
        np.ones((4, 6), "i4"), np.ones(5, "f4"), np.ones((0, 6), "f4"), np.array(1.0), np.float32(1),
        np.ones((1,) * 20, "f4"), np.ma.array(x), memoryview(x), bytearray(96), b"bytes", "text", [1.0] * 24, object(),
        (np.ndarray,), kernels._kernels.empty(0, 4, 6), kernels._kernels.empty(1, 4, 4), True, -1, 0, 3, 2**40, 2**70,
        1.5, float("nan"),
    ]  # fmt: skip


class _Calls:
    """The extension's functions with arguments that fit, in memory with a guard on both sides."""

    def __init__(self, sizes, params, sets):
        self.raw = []
        self.sizes, self.params, self.sets = sizes, params, sets

    def room(self, *shape):
        raw = np.full(int(np.prod(shape)) + 2 * GUARD, 7, "f4")
        self.raw.append(raw)
        return raw[GUARD:-GUARD].reshape(shape)

    def _like(self, x):
        return self.room(*np.shape(x))

    def arguments(self):
        x, weight, bias = np.ones((4, 6), "f4"), np.ones(self.params, "f4"), np.ones(self.params, "f4")
        stats = self.room(4, self.sets)
        stats[...] = 1
        forward = [x, None, weight, bias, None, None, self.room(4, 6), stats, None, None, None, None]
        backward = [x, x.copy(), *forward[2:6], self.room(4, 6), stats, self.room(self.params), self.room(self.params)]
        backward += [None, None]
        made = [self._like, lambda: self.room(4, self.sets), None]
        if self.sizes[0]:
            made[2] = lambda: self.room(self.params)
        bind = [(np.ndarray,), None, *made, (self.params,), *self.sizes, 1e-5, 0.0, True]
        bound = kernels._kernels.bind(*bind)
        return {
            "call": [[way, *self.sizes, 1e-5, 0.0, True, *a] for way, a in ((False, forward), (True, backward))],
            "apply": [[bound, x, weight, bias, None, None, True]],
            "pull_back": [[bound, *backward[:6], stats, [True] * 5]],
            "bind": [bind, [*bind, *bind[6:]]],
            "batch_stats": [[np.ones((4, 6), "f4"), self.room(6), self.room(6)]],
            "negative": [[x]],
        }

    def intact(self):
        return all((raw[:GUARD] == 7).all() and (raw[-GUARD:] == 7).all() for raw in self.raw)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for what is an error from 2.2 on
@pytest.mark.parametrize(("sizes", "params", "sets"), [row[1:] for row in KERNELS], ids=[row[0] for row in KERNELS])
def test_arguments_of_any_kind(sizes, params, sets):
    """One after the other in the place of what fits, and some pairs: done or refused, and written nowhere else."""
    rng = np.random.default_rng(0)
    calls = _Calls(sizes, params, sets)
    refused = set()
    for name, lists in calls.arguments().items():
        function = getattr(kernels._kernels, name)
        for which, usual in enumerate(lists):
            function(*usual)  # what fits is taken
            pairs = [sorted(rng.choice(len(usual), 2, replace=False)) for _ in range(8 * (len(usual) > 1))]
            for places in [*((i,) for i in range(len(usual))), *pairs]:
                fitting, hostile = calls.arguments()[name][which], _hostile()
                for i in range(len(hostile)):
                    arguments = list(fitting)
                    for shift, place in enumerate(places):
                        arguments[place] = hostile[(i + 7 * shift) % len(hostile)]
                    try:
                        function(*arguments)
                    except REFUSED:
                        refused.add(name)
                assert calls.intact(), (name, places)
                calls.raw.clear()
    assert refused >= {"call", "apply", "pull_back", "bind", "batch_stats"}


@pytest.mark.parametrize("lengths", [(-1,), (2**62, 4), (2**32, 2**32), (1,) * 65, ("a",), (2**70,)])
def test_memory_of_any_size(lengths):
    with pytest.raises(REFUSED):
        kernels._kernels.empty(0, *lengths)


FUNCTIONS = {
    "layer_norm": nk.layer_norm,
    "rms_norm": nk.rms_norm,
    "group_norm": lambda x: nk.group_norm(x, 2),
    "instance_norm": nk.instance_norm,
    "batch_norm_train": nk.batch_norm_train,
}
#: Shapes without elements whose normalized axes, or channels, have a length.
EMPTY = {
    name: ((0, 6, 8), (4, 6, 0) if name.endswith(("group_norm", "instance_norm", "train")) else (4, 0, 8))
    for name in FUNCTIONS
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_elements(library, name):
    for shape in EMPTY[name]:
        x = library.array(np.zeros(shape), "float32")
        function = FUNCTIONS[name]
        assert tuple(first(function(x)).shape) == shape
        if library.differentiates:
            _, found = library.vjp(function, [x], {}, x)
        else:
            _, pullback = nk.vjp(getattr(nk, name), x, *((2,) if name == "group_norm" else ()))
            found = {0: pullback(x)[0]}
        assert tuple(found[0].shape) == shape


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elements_that_share_memory(library, name):
    if library.name == "torch":
        line = library.array(np.arange(100.0) ** 2, "float32")
        x, apart = line.as_strided((4, 6, 8), (1, 2, 3)), library.xp.clone
    elif library.name == "numpy":
        line = np.arange(100, dtype="f4") ** 2
        x, apart = np.lib.stride_tricks.as_strided(line, (4, 6, 8), (4, 8, 12)), np.ascontiguousarray
    else:
        pytest.skip(f"{library.name} has no such arrays")
    y, same = (library.numpy(first(FUNCTIONS[name](a))) for a in (x, apart(x)))
    assert np.array_equal(y, same)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_memory_that_is_gone(library, name):
    """Freed by its owner, while a tensor of its sizes is left."""
    function = FUNCTIONS[name]
    if library.name == "jax":
        x = library.array(np.ones((4, 6, 8)), "float32")
        x.delete()
        for call in (function, library.xp.jit(function)):
            with pytest.raises(RuntimeError, match="deleted"):
                call(x)
    elif library.name == "torch":
        torch = library.xp
        x = torch.ones(4, 6, 8, requires_grad=True)
        y = first(function(x))
        x.untyped_storage().resize_(0)
        for call in (lambda: function(x), lambda: function(x.detach()), y.sum().backward):
            with pytest.raises(ValueError, match="x has no memory"):
                call()
    else:
        pytest.skip(f"{library.name} frees no memory that is in use")


def test_memory_that_is_gone_in_a_graph(library):
    """As the operators of compiled graphs have it."""
    if library.name != "torch":
        pytest.skip("operators are PyTorch's")
    torch = library.xp
    nk.layer_norm(torch.ones(2, 3))  # makes them known
    from normkit.backends.torch import ops

    x, kept = torch.ones(4, 6), torch.ones(4, 6)
    call = (ops.LAYERS.index("layer_norm"), 0b10, 1, 1e-5, 0.0)
    stats = torch.ops.normkit.forward(kept, None, None, None, None, *call)[1]
    for gone in (x, x.clone(), torch.ones(6)):
        gone.untyped_storage().resize_(0)
    for operands in ((x, None, None), (kept, gone, None), (kept, None, gone)):
        with pytest.raises(RuntimeError, match="has no memory"):
            torch.ops.normkit.forward(*operands, None, None, *call)
    for operands, dy in (((x, None, None), kept), ((kept, None, None), x), ((kept, gone, None), kept)):
        with pytest.raises(RuntimeError, match=r"has no memory|not allocated"):
            torch.ops.normkit.backward(*operands, None, None, stats, dy, *call, 1)


def test_capsules_that_were_taken(library):
    """A DLPack capsule is whose it is: after that it is not looked into."""
    if library.name != "tensorflow":
        pytest.skip("only TensorFlow's arrays come in capsules")
    dlpack = library.xp.experimental.dlpack
    capsule = dlpack.to_dlpack(library.array(np.ones((4, 6)), "float32"))
    dlpack.from_dlpack(capsule)
    usual = _Calls(*KERNELS[0][1:]).arguments()["call"][0]
    for place in itertools.islice(range(len(usual)), 9, None):
        arguments = list(usual)
        arguments[place] = capsule
        with pytest.raises(TypeError, match="buffer protocol"):
            kernels._kernels.call(*arguments)
