"""What the tests of the kernels in JAX share: small calls of every layer, in NumPy's arrays and in JAX's."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from normkit.backends import kernels
from normkit.conformance.kernel_inputs import SMALL, dtype_of, make, need_kernels, operands_of
from normkit.conformance.libraries import LIBRARIES
from normkit.core.normalize import Operands
from normkit.core.plan import Plan

jax: Any = pytest.importorskip("jax")
need_kernels()
if jax.default_backend() != "cpu":
    pytest.skip("the kernels are for the CPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def as_usual(monkeypatch):
    """float64 is there, and kernels serve wherever they can."""
    monkeypatch.setattr(kernels, "mode", "1")
    with LIBRARIES["jax"].session():
        yield
    kernels.limit_threads(0)


class Call(NamedTuple):
    """A plan, its operands, and dy, each in NumPy and in JAX."""

    plan: Plan
    arrays: Operands
    operands: Operands
    dys: Any
    dy: Any


def called(layer, shape=None, options=None, dtype="float32", **more) -> Call:
    """A call of the layer, small unless a shape is given."""
    at = SMALL[layer] if shape is None else (shape, options)
    plan, arrays = make(layer, at[0], {"eps": 1e-5, **at[1]}, np.random.default_rng(3), dtype_of(dtype), **more)
    mine = {name: jax.numpy.asarray(a) for name, a in arrays.items()}
    return Call(plan, operands_of(arrays), operands_of(mine), arrays["dy"], mine["dy"])


def same(a, b) -> bool:
    """Whether two arrays have the same dtype, shape and bits."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
