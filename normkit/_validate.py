"""Every check of an argument, and every message that refuses one."""

from __future__ import annotations

import math
import operator
from typing import Any

from ._dispatch import backend_of, describe
from .backends import Backend
from .backends.protocol import FLOATING
from .core.plan import Plan, Shape, Size


def array(name: str, x: Any) -> Backend:
    """The backend of ``x``, a floating-point array with at least one axis."""
    backend = backend_of(name, x)
    if backend.dtype(x) not in FLOATING:
        raise TypeError(f"{name} must be a real floating-point array; received dtype {backend.dtype(x)}.")
    if not backend.shape(x):
        raise ValueError(f"{name} must have at least one axis; received an array of shape ().")
    return backend


def companion(backend: Backend, x: Any, name: str, a: Any, shape: Shape) -> None:
    """``a`` is of x's library and device, floating, and of this shape."""
    _same_place(backend, x, name, a)
    if backend.dtype(a) not in FLOATING:
        raise TypeError(f"{name} must be a real floating-point array; received dtype {backend.dtype(a)}.")
    if backend.shape(a) != shape and tuple(backend.shape(a)) != shape:
        raise ValueError(f"{name} must have shape {shape}; received shape {tuple(backend.shape(a))}.")


def mask(backend: Backend, x: Any, a: Any) -> None:
    """``a`` is a boolean array that broadcasts to x."""
    _same_place(backend, x, "mask", a)
    if backend.dtype(a) != "bool":
        raise TypeError(f"mask must be a boolean array; received dtype {backend.dtype(a)}.")
    shape, target = tuple(backend.shape(a)), tuple(backend.shape(x))
    fits = len(shape) <= len(target) and all(
        n == m or n == 1 or n is None or m is None for n, m in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(f"mask must broadcast to x of shape {target}; received shape {shape}.")


def _same_place(backend: Backend, x: Any, name: str, a: Any) -> None:
    other = backend_of(name, a)
    if other is not backend:
        raise TypeError(f"{name} must be of the same library as x ({backend.name}); received {describe(a)}.")
    ours, theirs = backend.device(x), backend.device(a)
    if ours != theirs:
        raise ValueError(f"{name} must be on the same device as x ({ours}); received one on {theirs}.")


def one_axis(name: str, axis: Any, shape: Shape) -> int:
    """A channel axis, counted from the front."""
    if isinstance(axis, bool):
        raise TypeError(f"{name} must be an integer; received {axis!r}.")
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"{name} must be an integer; received {describe(axis)}.") from None
    if not -len(shape) <= index < len(shape):
        raise ValueError(
            f"{name} must be in [{-len(shape)}, {len(shape) - 1}] for x of shape {shape}; received {index}."
        )
    return index % len(shape)


def channel_axis(axis: Any, shape: Shape) -> int:
    """A channel axis of known, non-zero length."""
    index = one_axis("axis", axis, shape)
    if shape[index] is None:
        raise ValueError(f"The channel axis {axis} must have a known length; received x of shape {shape}.")
    if shape[index] == 0:
        raise ValueError(f"The channel axis {axis} must not be empty; received x of shape {shape}.")
    return index


def several_axes(axis: Any, shape: Shape) -> tuple[int, ...]:
    """Normalized axes, non-negative and ascending, none twice, each of known, non-zero length."""
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    if not given:
        raise ValueError("axis must name at least one axis; received ().")
    axes = tuple(sorted(one_axis("axis", a, shape) for a in given))
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must not name an axis twice; received {axis} for x of shape {shape}.")
    for a in axes:
        if shape[a] is None:
            raise ValueError(f"The normalized axis {a} must have a known length; received x of shape {shape}.")
        if shape[a] == 0:
            raise ValueError(f"The normalized axis {a} must not be empty; received x of shape {shape}.")
    return axes


def number(name: str, value: Any) -> float:
    """A real number that is not an array: it shapes the computation rather than taking part in it."""
    if isinstance(value, bool) or (hasattr(value, "shape") and value.shape != ()):
        raise TypeError(f"{name} must be a number; received {describe(value)}.")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; received {describe(value)}.") from None


def epsilon(eps: Any) -> float:
    """A finite number, zero or more."""
    value = number("eps", eps)
    if not 0 <= value < math.inf:
        raise ValueError(f"eps must be a finite number >= 0; received {eps}.")
    return value


def fraction(name: str, value: Any) -> float:
    """A number from 0 to 1."""
    result = number(name, value)
    if not 0 <= result <= 1:
        raise ValueError(f"{name} must be in [0, 1]; received {value}.")
    return result


def positive_int(name: str, value: Any) -> int:
    """An integer, one or more."""
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a positive integer; received {describe(value)}.") from None
    if isinstance(value, bool) or result < 1:
        raise ValueError(f"{name} must be a positive integer; received {value!r}.")
    return result


def groups(num_groups: Any, channels: Size) -> int:
    """A number of groups that divides the channels."""
    count = positive_int("num_groups", num_groups)
    if channels is None or channels % count:
        raise ValueError(f"num_groups must divide the number of channels, {channels}; received {count}.")
    return count


def reduces(plan: Plan) -> None:
    """There is an axis to take statistics over."""
    if not plan.axes:
        raise ValueError(f"{plan.layer} needs an axis to take statistics over; received x of shape {plan.shape}.")


def several_values(plan: Plan) -> None:
    """A batch has more than one value per channel, or none."""
    if plan.count == 1:
        raise ValueError(
            f"batch_norm_train needs more than one value per channel, one has no variance; received x of shape "
            f"{plan.shape}: use a larger batch, or batch_norm with running statistics "
            f'(in a layer: single_value="running").'
        )


def variance(backend: Backend, name: str, var: Any) -> None:
    """No negative value, where looking costs nothing; elsewhere a negative variance shows as NaN in y."""
    values = backend.peek(var)
    if values is not None and values.size and values.min() < 0:
        raise ValueError(f"{name} must not be negative; received a smallest value of {float(values.min())}.")


def enough_values(count: Any, unbiased: bool) -> None:
    """The unbiased variance of one value does not exist."""
    if unbiased and isinstance(count, int) and count == 1:
        raise ValueError("unbiased=True needs more than one value per channel; received a count of 1.")
