"""Every check of an argument, and every message that refuses one."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Number
from typing import Any

from ._dispatch import _by_type, backend_of, describe
from ._values import FOR_ONE
from .backends import Backend
from .backends.protocol import FLOATING
from .core.normalize import BatchStats, Operands
from .core.plan import Plan, Shape, Size

DTYPES = ", ".join(sorted(FLOATING))


def array(name: str, x: Any) -> tuple[Backend, Shape]:
    """The backend and the shape of ``x``, a floating-point array with at least one axis."""
    backend = _by_type.get(type(x)) or backend_of(name, x)
    if backend.dtype(x) not in FLOATING:
        _floating(backend, name, x)
    shape = backend.shape(x)
    an_axis(name, len(shape))
    return backend, shape


def an_axis(name: str, rank: int) -> None:
    """There is one at least."""
    if not rank:
        raise ValueError(f"{name} must have at least one axis; received an array of shape ().")


def companion(backend: Backend, x: Any, name: str, a: Any, shape: Shape, of: str = "x") -> None:
    """``a`` is of x's library and device, floating, and of this shape; ``of`` is what the user knows x as."""
    _same_place(backend, x, name, a, of)
    _floating(backend, name, a)
    if tuple(backend.shape(a)) != shape:
        raise ValueError(f"{name} must have shape {shape}; received shape {tuple(backend.shape(a))}.")


def operands(backend: Backend, shape: Shape, given: Operands) -> Operands:
    """Parameters and statistics are x's companions; what they mostly are is looked at first, because it is quick."""
    x = given.x
    if not backend.suit(given, shape, backend.device(x)):
        for name, a in zip(Operands._fields[1:5], given[1:5], strict=True):
            if a is not None:
                companion(backend, x, name, a, shape)
    return given


def valid(backend: Backend, plan: Plan, x: Any, mask: Any | None, lengths: Any | None) -> Any:
    """The mask of x, given as such or by the lengths of its samples."""
    if lengths is None:
        broadcasts(backend, x, mask)
        return mask
    if mask is not None:
        raise ValueError("mask and lengths exclude each other; received both.")
    return _prefixes(backend, plan, x, lengths)


def broadcasts(backend: Backend, x: Any, a: Any) -> None:
    """``a`` is a mask: a boolean array that broadcasts to x."""
    _same_place(backend, x, "mask", a)
    if backend.dtype(a) != "bool":
        raise TypeError(f"mask must be a boolean array; received dtype {backend.dtype(a)}.")
    shape, target = tuple(backend.shape(a)), tuple(backend.shape(x))
    fits = len(shape) <= len(target) and all(
        n == m or n == 1 or n is None or m is None for n, m in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(f"mask must broadcast to x of shape {target}; received shape {shape}.")


def _prefixes(backend: Backend, plan: Plan, x: Any, lengths: Any) -> Any:
    """A mask of the first so many positions of each sample."""
    _same_place(backend, x, "lengths", lengths)
    if backend.dtype(lengths) not in ("int32", "int64"):
        raise TypeError(f"lengths must be of dtype int32 or int64; received {backend.dtype(lengths)}.")
    axis, shape, received = plan.positions, tuple(plan.shape), tuple(backend.shape(lengths))
    if axis is None:
        raise ValueError(f"lengths needs an axis of positions, and x of shape {shape} has none here: pass a mask.")
    if len(received) != 1 or not (received[0] == shape[0] or None in (received[0], shape[0])):
        raise ValueError(f"lengths must have shape {shape[:1]}; received shape {received}.")
    most = shape[axis]
    beyond = backend.least(lengths) or (0 if most is None else most - backend.least(most - lengths))
    if beyond < 0 or (most is not None and beyond > most):
        raise ValueError(f"lengths must be in [0, {most}], axis {axis} of x; received {beyond:.0f}.")
    return backend.positions(x, axis, lengths.dtype) < backend.namespace(x).reshape(
        lengths, (-1, *(1 for _ in shape[1:]))
    )


def _floating(backend: Backend, name: str, a: Any) -> None:
    if backend.dtype(a) not in FLOATING:
        raise TypeError(
            f"{name} must be of a real floating-point dtype ({DTYPES}); received {backend.dtype(a)}: convert it first."
        )


def library(backend: Backend, name: str, a: Any, of: str = "x") -> None:
    """``a`` is an array of this library."""
    if backend_of(name, a) is not backend:
        raise TypeError(
            f"{name} must be of the same library as {of} ({backend.name}); received {describe(a)}: convert one of them."
        )


def _same_place(backend: Backend, x: Any, name: str, a: Any, of: str = "x") -> None:
    library(backend, name, a, of)
    ours, theirs = backend.device(x), backend.device(a)
    if ours != theirs:
        raise ValueError(
            f"{name} must be on the same device as {of} ({ours}); received one on {theirs}: move one of them."
        )


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
            f"{name} must be in [{-len(shape)}, {len(shape) - 1}] for x of shape {tuple(shape)}; received {index}."
        )
    return index % len(shape)


def channel_axis(axis: Any, shape: Shape) -> int:
    """A channel axis of known, non-zero length."""
    index = one_axis("axis", axis, shape)
    if shape[index] is None:
        raise ValueError(f"The channel axis {axis} must have a known length; received x of shape {tuple(shape)}.")
    if shape[index] == 0:
        raise ValueError(f"The channel axis {axis} must not be empty; received x of shape {tuple(shape)}.")
    return index


def several_axes(axis: Any, shape: Shape) -> tuple[int, ...]:
    """Normalized axes, non-negative and ascending, none twice, each of known, non-zero length."""
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    if not given:
        raise ValueError("axis must name at least one axis; received ().")
    axes = tuple(sorted(one_axis("axis", a, shape) for a in given))
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must not name an axis twice; received {axis} for x of shape {tuple(shape)}.")
    for a in axes:
        if shape[a] is None:
            raise ValueError(f"The normalized axis {a} must have a known length; received x of shape {tuple(shape)}.")
        if shape[a] == 0:
            raise ValueError(f"The normalized axis {a} must not be empty; received x of shape {tuple(shape)}.")
    return axes


def number(name: str, value: Any) -> float:
    """A real number that is not an array: it shapes the computation rather than taking part in it."""
    if type(value) is float:
        return value
    # Of arrays, one of shape () that holds a real number.
    dtype = getattr(value, "dtype", "float")
    kind = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
    real = str(kind).startswith(("float", "bfloat", "int", "uint")) and getattr(value, "shape", ()) == ()
    if isinstance(value, (bool, str, bytes, bytearray)) or not real:
        raise TypeError(f"{name} must be a number; received {describe(value)}.")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; received {describe(value)}.") from None
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold; received a larger integer.") from None


def finite(name: str, value: Any) -> float:
    """A number that is neither infinite nor NaN."""
    result = number(name, value)
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite; received {value}.")
    return result


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
        raise ValueError(
            f"{plan.layer} needs an axis to take statistics over; received x of shape {tuple(plan.shape)}."
        )


def several_values(plan: Plan) -> None:
    """A batch has more than one value per channel, or none."""
    if plan.count == 1:
        raise ValueError(
            f"batch_norm_train needs more than one value per channel, one has no variance; received x of shape "
            f"{tuple(plan.shape)}: {FOR_ONE}."
        )


def divides(plan: Plan, size: int) -> None:
    """A batch is made of whole virtual batches."""
    assert plan.split is not None
    n = plan.shape[plan.split]
    if n is not None and n % size:
        raise ValueError(f"virtual_batch_size must divide the batch, {n} samples; received {size}.")


def several_taps(plan: Plan) -> None:
    """The kernel of one output channel has more than one value."""
    if plan.count == 1 or not plan.axes:
        raise ValueError(
            f"weight_standardization needs more than one value for each output channel, one has no variance; received "
            f"a kernel of shape {tuple(plan.shape)}."
        )


def bound(name: str, value: Any, least: float) -> Any:
    """A number that is not less, or an array of shape (), whose value is not looked at."""
    if getattr(value, "shape", None) == () and not isinstance(value, Number):  # as NumPy's scalars are
        return value
    if math.isnan(found := number(name, value)) or found < least:
        raise ValueError(f"{name} must be at least {least:g}; received {value}.")
    return found


def order(p: Any) -> float:
    """The p of a p-norm that there is."""
    value = number("p", p)
    if value not in (1, 2, math.inf):
        raise ValueError(f"p must be 1, 2 or infinity; received {p}.")
    return value


def counted(plan: Plan, consistent: Any, mask: Any, lengths: Any) -> None:
    """What the largest of n Gaussian values is like depends on n, which is one known number."""
    assert plan.power is not None
    if not consistent or plan.power.p != math.inf:
        return
    if mask is not None or lengths is not None:
        raise ValueError("consistent=True with p=inf needs as many elements in each set; received a mask or lengths.")
    if plan.count is None:
        raise ValueError(
            f"consistent=True with p=inf needs a known number of elements; received x of shape {tuple(plan.shape)}."
        )


def single_value(policy: Any) -> str:
    """What a function that has no running statistics can do of one value per channel."""
    if policy == "running":
        raise ValueError(
            "single_value must be 'raise' or 'zero' in batch_norm_train, which has no running statistics; received "
            "'running': use a layer, or batch_norm for such a batch."
        )
    return choice("single_value", policy, ("raise", "zero"))


def variance(backend: Backend, name: str, var: Any) -> None:
    """No negative value, where looking costs nothing; elsewhere a negative variance shows as NaN in y."""
    least = backend.least(var)
    if least < 0:
        raise ValueError(f"{name} must not be negative; received a smallest value of {least}.")


def batch_statistics(value: Any) -> None:
    """What batch_norm_train returns beside y."""
    if not isinstance(value, BatchStats):
        raise TypeError(
            f"batch_stats must be the BatchStats that batch_norm_train returns beside y; received {describe(value)}."
        )
    natural("batch_stats.count", value.count)


def natural(name: str, value: Any) -> None:
    """A count: an integer, zero or more, or an array of them, whose values are not looked at."""
    if hasattr(value, "dtype"):
        return
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer or an array; received {describe(value)}.")
    if type(value) is int and value < 0:
        raise ValueError(f"{name} must not be negative; received {value}.")


def flag(name: str, value: Any) -> bool:
    """True or False, and not what is as good as one of them."""
    return choice(name, value, (True, False))


def choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """One of a few words, or of True, False and None."""
    if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}; received {value!r}.")
    return value
