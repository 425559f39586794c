"""The functions as Keras and Flax mean a mask: it says what statistics are taken over, and y is computed everywhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from . import _calls
from . import _validate as check
from .core import plan as plans
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
) -> tuple[Array, BatchStats]:
    """:func:`normkit.batch_norm_train`, of one value per channel too: its variance is zero, and y the bias."""
    call = _calls._planned(x, _batch_plan, axis, eps)
    backend, plan, operands = _calls._checked(*call, Operands(x, weight, bias, None, None, mask), None)
    y, stats = backend.apply(plan, operands)
    assert stats is not None
    return y, stats


def _batch_plan(shape: Shape, axis: Any, eps: Any) -> Plan:
    plan = plans.batch_plan(shape, check.channel_axis(axis, shape), check.epsilon(eps), given=False)
    check.reduces(plan)
    return _everywhere(plan)


@functools.lru_cache(maxsize=4096)
def _everywhere(plan: Plan) -> Plan:
    return dataclasses.replace(plan, everywhere=True)
