"""The neutral record of a norm layer's state, and a layer as its framework says it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import numpy as np

from .. import _validate as check
from .._dispatch import describe

Array = Any
#: Called with a rule's id and what it did.
Say = Callable[[str, str], None]

KINDS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
#: The arrays of a record, by the names they have here.
ARRAYS = ("weight", "bias", "mean", "var")


class ConversionError(ValueError):
    """What was received cannot be converted; the message says why."""


#: Whether it is a command that was called; and its options that are not called as the argument is.
_command: ContextVar[bool] = ContextVar("command", default=False)
_OPTIONS = {"framework": "from"}


@contextlib.contextmanager
def as_options() -> Iterator[None]:
    """Within it, messages name the command's options in the place of arguments."""
    token = _command.set(True)
    try:
        yield
    finally:
        _command.reset(token)


def argument(name: str, value: Any = "") -> str:
    """An argument of ``convert`` or ``inspect``, and its value, as a message has it."""
    if _command.get():
        return f"--{_OPTIONS.get(name, name)} {value}".rstrip()
    return f"{name}={value}" if value != "" else name


def checked(function: Callable, *args: Any) -> Any:
    """What one of normkit's checks makes of a value; what it refuses cannot be converted."""
    try:
        return function(*args)
    except (TypeError, ValueError) as error:
        raise ConversionError(str(error)) from None


def whole(name: str, value: Any) -> int:
    """An integer of either sign."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConversionError(f"{name} must be an integer; received {describe(value)}.")
    return operator.index(value)


def at(name: str, function: Callable, *args: Any) -> Any:
    """Call ``function``; what it refuses is said with the layer's name."""
    try:
        return function(*args)
    except ConversionError as error:
        raise ConversionError(f"{name}: {error}" if name else str(error)) from None


@dataclass(frozen=True)
class Momentum:
    """What running statistics are weighted with: ``value`` is the weight of the "old" or of the "new" ones.

    A value of None weights all batches alike.
    """

    value: float | None
    weights: str = "old"

    def __post_init__(self) -> None:
        if self.weights not in ("old", "new"):
            raise ConversionError(f"momentum weights the 'old' or the 'new' statistics; received {self.weights!r}.")
        if self.value is not None:
            checked(check.fraction, "momentum", self.value)

    def of(self, which: str) -> float | None:
        """The weight of the "old" or of the "new" statistics; the complement is taken of the decimal number.

        So 0.1 becomes 0.9 and 0.9 becomes 0.1, where binary arithmetic gives 0.09999999999999998.
        """
        if self.value is None or which == self.weights:
            return self.value
        return float(1 - Decimal(str(self.value)))


@dataclass(frozen=True, eq=False)
class Norm:
    """One norm layer in no framework's terms. Arrays are as they are stored: no dtype, no variance is changed.

    ``y = (x - mean) / sqrt(var + eps) * (weight_offset + weight) + bias``
    """

    kind: str
    #: The shape of weight and bias: the lengths of the axes, in ascending axis order.
    lengths: tuple[int, ...]
    #: The channel axis of batch, group and instance norm; the normalized axes of layer and RMS norm.
    axis: tuple[int, ...]
    eps: float
    weight: Array | None = None
    bias: Array | None = None
    mean: Array | None = None
    var: Array | None = None
    #: Training batches that the statistics come from, where the framework counts them.
    num_batches: int | None = None
    num_groups: int | None = None
    #: Of the running statistics; None where there are none.
    momentum: Momentum | None = None
    #: What running variances are divided by in training: n - 1 ("unbiased") or n ("biased").
    variance: str | None = None
    #: For narrow x: the weight is applied before ("output") or after ("input") the result is rounded to x's dtype.
    cast: str = "output"
    weight_offset: float = 0.0
    #: The rank of x, where the layer fixes it.
    ndim: int | None = None
    #: Whether weight and bias are trained.
    trainable: bool = True
    #: Whether it is in inference in training as well: it normalizes by the running statistics, which stay.
    frozen: bool = False
    #: What else a layer of normkit's was told, by name; None where it is the usual thing.
    switches: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConversionError(f"There is no norm layer {self.kind!r}; there are: {', '.join(KINDS)}.")
        checked(check.epsilon, self.eps)
        checked(check.finite, "weight_offset", self.weight_offset)
        checked(check.choice, "cast", self.cast, ("output", "input"))
        if self.ndim is not None:
            rank = checked(check.positive_int, "ndim", self.ndim)
            if not all(-rank <= a < rank for a in self.axis):
                one = self.axis[0] if len(self.axis) == 1 else self.axis
                raise ConversionError(f"axis must be in [{-rank}, {rank - 1}] for x of rank {rank}; received {one}.")
        if (self.kind == "group_norm") != (self.num_groups is not None):
            raise ConversionError(f"num_groups belongs to group_norm, and to it alone; received {self.num_groups!r}.")
        if self.num_groups is not None and self.lengths[0] % checked(check.positive_int, "num_groups", self.num_groups):
            raise ConversionError(f"{self.lengths[0]} channels do not divide into {self.num_groups} groups.")
        if (self.mean is None) != (self.var is None):
            have, lack = ("variance", "mean") if self.mean is None else ("mean", "variance")
            raise ConversionError(f"There is a running {have} and no running {lack}.")
        for name, value in self.arrays():
            if value.dtype.type is np.void:
                raise ConversionError(f"{name} is of a dtype that NumPy has not.")
            if value.shape != self.lengths:
                raise ConversionError(f"{name} must have shape {self.lengths}; received shape {value.shape}.")

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """The arrays that the layer has, by name."""
        return ((name, value) for name in ARRAYS if (value := getattr(self, name)) is not None)

    def but(self, **changes: Any) -> Norm:
        """The record with changes."""
        return replace(self, **changes)

    def channel_axis(self, ndim: int | None = None) -> int:
        """The channel axis, counted from the front where the rank is known."""
        (axis,) = self.axis
        rank = self.ndim or ndim
        return axis % rank if rank else axis


@dataclass(frozen=True, eq=False)
class Native:
    """A layer as its framework says it: class, arguments and arrays, all by the framework's own names."""

    layer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    #: How the layer stands at the moment (training, frozen), which is no part of its state.
    mode: Mapping[str, Any] = field(default_factory=dict)


def lengths_of(*arrays: Array | None) -> tuple[int, ...] | None:
    """The shape of the first array that there is."""
    return next((tuple(a.shape) for a in arrays if a is not None), None)


def ones(norm: Norm) -> Array:
    """A weight that changes nothing, in the dtype of what the layer has."""
    like = next((value for _, value in norm.arrays()), np.zeros((), np.float32))
    return np.ones(norm.lengths, like.dtype)


def plain_weight(norm: Norm, say: Say) -> Norm:
    """The record with its weight offset added to the weight, once."""
    if not norm.weight_offset:
        return norm
    if norm.weight is None:
        return norm.but(weight_offset=0.0)
    wide = norm.weight.astype(np.float64 if norm.weight.dtype == np.float64 else np.float32)
    weight = (wide + wide.dtype.type(norm.weight_offset)).astype(wide.dtype)
    say("weight-offset", f"weight is {norm.weight_offset:g} + the stored one, added in {weight.dtype}")
    return norm.but(weight=weight, weight_offset=0.0)


def rescaled(norm: Norm, count: int, to: str) -> Norm:
    """The record with its running variance as the convention ``to`` has it for batches of ``count`` values."""
    if count < 2:
        raise ConversionError(f"{argument('count')} must be at least 2 values per channel and batch; received {count}.")
    factor = count / (count - 1) if to == "unbiased" else (count - 1) / count
    var = (norm.var.astype(np.float64) * factor).astype(norm.var.dtype)  # type: ignore[union-attr]
    return norm.but(var=var, variance=to)
