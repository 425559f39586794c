"""Calls that the kernels serve at once: arrays in a known order, and nothing made for any others."""

from __future__ import annotations

import numpy as np
import pytest

from normkit.backends import kernels
from normkit.conformance import libraries
from normkit.conformance.kernel_inputs import make, need_kernels, operands_of

need_kernels()

#: A layer, the shape of x, and options; with axis 1 last in memory there are kernels for all but layer norm.
CALLS = [
    ("layer_norm", (12,), {"axis": (-1,)}),
    ("layer_norm", (6, 5, 12), {"axis": (-1,)}),
    ("group_norm", (3, 6, 7, 5), {"num_groups": 3, "axis": 1}),
    ("batch_norm_train", (4, 6, 9), {"axis": 1}),
    ("batch_norm_train", (4, 6, 7, 5), {"axis": 1}),
    ("batch_norm_train", (4, 6, 3, 2, 5), {"axis": 1}),
    ("batch_norm", (4, 6, 7, 5), {"axis": 1}),
]
#: A call, and whether axis 1 is last in memory.
ORDERED = [(call, last) for call in CALLS for last in (False, True) if not (last and call[0] == "layer_norm")]


@pytest.fixture(params=["numpy", "torch"])
def laid(request):
    """An array of NumPy as one of the library's, in the same order."""
    if request.param == "numpy":
        return lambda a: a
    if not libraries.installed("torch"):
        pytest.skip("torch is not installed")
    torch = libraries.library("torch").xp

    def tensor(a):
        flat = torch.asarray(a.ravel(order="K").copy())
        return flat.as_strided(a.shape, [n // a.itemsize for n in a.strides])

    return tensor


class _Served:
    """A plan that a kernel has served once: the first call of a shape takes the long way."""

    def __init__(self, laid, call, last):
        layer, shape, options = call
        rng = np.random.default_rng(12)
        self.plan, arrays = make(layer, shape, {"eps": 1e-5, **options}, rng, np.dtype("f4"), last=last)
        arrays = {name: laid(a) for name, a in arrays.items()}
        self.x, *self.params, _ = operands_of(arrays)
        self.dy = arrays["dy"]
        self.first = kernels.apply(self.plan, operands_of(arrays), save=True)
        self.gradients = kernels.gradients(self.plan, operands_of(arrays), self.first.packed, self.dy, kernels.ALL)

    def again(self, x):
        return kernels.at_once(self.plan, x, *self.params, True)

    def pulled_back(self, x, dy):
        return kernels.gradients_at_once(self.plan, x, dy, *self.params, self.first.packed, kernels.ALL)


def _same(found, wanted):
    if wanted is None or found is None:
        return found is wanted
    in_order = [a.strides if isinstance(a, np.ndarray) else a.stride() for a in (found, wanted)]
    return in_order[0] == in_order[1] and np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.parametrize(("call", "last"), ORDERED)
def test_arrays_in_a_known_order_are_served_at_once(laid, call, last):
    """With the bits, and in the order in memory, of the long way."""
    served = _Served(laid, call, last)
    done = served.again(served.x)
    assert done is not None
    assert _same(done.y, served.first.y)
    assert _same(done.packed, served.first.packed)
    for found, wanted in zip(done.stats or (), served.first.stats or (), strict=True):
        assert found == wanted if isinstance(wanted, int) else _same(found, wanted)
    found = served.pulled_back(served.x, served.dy)
    assert found is not None
    for gradient, wanted in zip(found, served.gradients, strict=True):
        assert _same(gradient, wanted)


@pytest.mark.parametrize(("call", "last"), ORDERED)
def test_for_other_arrays_nothing_is_made(laid, call, last, monkeypatch):
    """Memory that is made and not used is new to the next call, which then waits for the system."""
    makers = []
    bind = kernels._kernels.bind

    def counted(maker):
        return maker and (lambda *arguments: makers.append(maker) or maker(*arguments))

    monkeypatch.setattr(
        kernels._kernels, "bind", lambda types, negated, *rest: bind(types, negated, *map(counted, rest[:3]), *rest[3:])
    )
    served = _Served(laid, call, last)
    assert served.again(served.x) is not None
    assert makers
    makers.clear()
    with_gaps = laid(np.zeros((*served.x.shape[:-1], 2 * served.x.shape[-1]), "f4"))[..., ::2]
    assert served.again(with_gaps) is None
    assert served.pulled_back(with_gaps, served.dy) is None
    assert served.pulled_back(served.x, with_gaps) is None
    if served.x.ndim > 1:
        otherwise = laid(np.zeros(tuple(served.x.shape), "f4", order="F"))
        assert served.pulled_back(served.x, otherwise) is None
    assert not makers
