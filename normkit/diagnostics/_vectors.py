"""Named arrays as one vector: sums, products, norms; on any array library, numbers out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from normkit._dispatch import backend_of
from normkit.backends.protocol import FLOATING, ArrayBackend

Array = Any
Vector = Mapping[str, Array]

#: Beyond these powers of two a scale would itself leave float32.
_REACH = 120


def unit(vector: Vector) -> float:
    """The coarsest relative rounding among the arrays."""
    units = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
    return max(units[backend_of(name, a).dtype(a)] for name, a in vector.items())


def floating(name: str, a: Any) -> bool:
    """Whether this is an array of floating-point numbers."""
    return backend_of(name, a).dtype(a) in FLOATING


def _wide(a: Array) -> tuple[Any, Array]:
    backend = backend_of("x", a)
    xp = backend.namespace(a)
    return xp, xp.astype(a, xp.float32) if backend.dtype(a) in ("float16", "bfloat16") else a


def array_norm(a: Array) -> float:
    """The root of the sum of squares of one array, of numbers of any size."""
    xp, a = _wide(a)
    if 0 in a.shape:
        return 0.0
    largest = float(xp.max(xp.abs(a), axis=None))
    if not largest or not math.isfinite(largest):
        return largest
    scale = 2.0 ** -max(min(math.frexp(largest)[1], _REACH), -_REACH)
    a = a * scale
    return math.sqrt(float(xp.sum(a * a, axis=None))) / scale


def norm(vector: Vector) -> float:
    """The root of the sum of squares of all arrays."""
    return math.hypot(*(array_norm(a) for a in vector.values()))


def dot(a: Vector, b: Vector) -> float:
    """The inner product; of vectors whose squares are within the range of their dtype."""
    total = 0.0
    for name in a:
        (xp, left), (_, right) = _wide(a[name]), _wide(b[name])
        total += float(xp.sum(left * right, axis=None))
    return total


def cosine(a: Vector, b: Vector) -> float:
    """The inner product of the two, each divided by its norm."""
    of_a, of_b = norm(a), norm(b)
    return dot(scaled(a, 1 / of_a), scaled(b, 1 / of_b))


def scaled(a: Vector, factor: float) -> dict[str, Array]:
    """``factor * a``, in a's dtypes."""
    return {name: _times(value, factor) for name, value in a.items()}


def moved(a: Vector, factor: float, b: Vector) -> dict[str, Array]:
    """``a + factor * b``, in a's dtypes."""
    return {name: value + _times(b[name], factor) for name, value in a.items()}


def part(a: Vector, names: Iterable[str]) -> dict[str, Array]:
    """Some of the arrays."""
    return {name: a[name] for name in names}


def _times(a: Array, factor: float) -> Array:
    """In two steps where the factor itself is beyond float32."""
    exponent = math.frexp(factor)[1] if math.isfinite(factor) else 0
    if abs(exponent) <= _REACH:
        return a * factor
    half = math.ldexp(1.0, exponent // 2)
    return (a * half) * (factor / half)


def random(like: Vector, size: float, seed: int) -> dict[str, Array]:
    """Normal numbers in the shapes and dtypes of ``like``, of this norm together."""
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal(tuple(a.shape)) for name, a in like.items()}
    length = math.sqrt(sum(float((v * v).sum()) for v in values.values()))
    made = {}
    for name, a in like.items():
        backend = backend_of(name, a)
        library = backend if backend.namespace() is not None else ArrayBackend(backend.namespace(a))
        made[name] = library.create(values[name] * (size / length), backend.dtype(a), getattr(a, "device", None))
    return made


def host(x: Any) -> np.ndarray:
    """An array of any library as one of NumPy's in float64."""
    if isinstance(x, (np.ndarray, list, tuple, float, int)):
        return np.asarray(x, "f8")
    backend = backend_of("x", x)
    if backend.dtype(x) in ("float16", "bfloat16"):
        x = _wide(x)[1]
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    elif hasattr(x, "get"):
        x = x.get()
    return np.asarray(x, "f8")
