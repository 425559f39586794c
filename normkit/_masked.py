"""The functions as Keras and Flax mean a mask: it says what statistics are taken over, and y is computed everywhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from . import _calls
from . import _validate as check
from . import _values as values
from .core.normalize import BatchStats, Operands
from .core.plan import Plan, Shape

Array = Any


def over(mask: Array, fn: Callable, *args: Any, **kwargs: Any) -> Array:
    """``fn(*args, **kwargs)`` with statistics of the elements where mask, which broadcasts to x, is true."""
    backend, plan, operands = getattr(_calls, fn.__name__)(*args, mask=mask, **kwargs)
    return backend.apply(_everywhere(plan), operands)[0]


def batch_norm_train(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int,
    eps: float,
    mask: Array | None = None,
    single_value: str | None = None,
) -> tuple[Array, BatchStats]:
    """:func:`normkit.batch_norm_train`, of one value per channel too, unless ``single_value="raise"``."""
    call = _calls._planned(x, _batch_plan, axis, eps)
    if single_value == "raise":
        check.several_values(call[1])
    backend, plan, operands = _calls._checked(*call, Operands(x, weight, bias, None, None, mask), None)
    if single_value == "raise" and mask is not None:
        values.several_valid(backend, plan, operands.mask)
    y, stats = backend.apply(plan, operands)
    assert stats is not None
    return y, stats


def _batch_plan(shape: Shape, axis: Any, eps: Any) -> Plan:
    return _everywhere(_calls.batch_zero_plan(shape, axis, eps))


@functools.lru_cache(maxsize=4096)
def _everywhere(plan: Plan) -> Plan:
    return dataclasses.replace(plan, everywhere=True)
