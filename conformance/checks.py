"""Assertions that the tests share: what an array is comes before its values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from normkit.conformance.libraries import Kind, Library
from normkit.conformance.tolerances import tolerance, units


def assert_close(
    library: Library, found: Any, reference: np.ndarray, like: Kind, quantity: str, scale: np.ndarray | None = None
) -> None:
    """``found`` is an array like ``like``, of the reference's shape, within the tolerance of ``quantity``."""
    assert library.kind(found) == like
    values = library.numpy(found)
    assert values.shape == reference.shape
    limit = tolerance(quantity, like.dtype)
    error = units(values, reference, like.dtype, scale)
    assert error <= limit.units, f"{error:.4g} units off, where {limit.units} are tolerated: {limit.reason}"


@contextlib.contextmanager
def unchanged(library: Library, given: Mapping[str, Any]) -> Iterator[None]:
    """The arrays are the same afterwards."""
    before = {name: (library.kind(a), library.numpy(a).copy()) for name, a in given.items()}
    yield
    for name, (kind, values) in before.items():
        assert library.kind(given[name]) == kind, name
        assert np.array_equal(library.numpy(given[name]), values, equal_nan=True), f"{name} was changed"


def strided(library: Library, x: Any) -> dict[str, Any]:
    """The same values with other strides, where the library has such arrays."""
    if library.name == "torch":
        torch = library.xp
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return {"every second": wide[..., ::2], "transposed": x.transpose(0, -1).contiguous().transpose(0, -1)}
    if library.name in ("numpy", "cupy"):
        xp = library.xp
        wide = xp.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        backward = xp.ascontiguousarray(x[::-1, ..., ::-1])[::-1, ..., ::-1]
        return {"every second": wide[..., ::2], "Fortran": xp.asfortranarray(x), "negative strides": backward}
    return {}
