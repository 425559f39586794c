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
