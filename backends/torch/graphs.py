"""What torch.compile makes of a call: one operator, of whose Python nothing is checked again in each call."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from normkit import _calls, functional
from normkit.backends import kernels
from normkit.backends.torch import ops
from normkit.core.normalize import BatchStats
from normkit.core.plan import Plan

#: Plans of several axes.
_OVER_AXES = ("layer_plan", "rms_plan")


def label(build: Callable[..., Plan], mode: str) -> str | None:
    """What the operator is told to plan, and what it is made of; ``None`` where there is to be none in the graph.

    Not where values are mapped or differentiated within the graph, nor in an exported program, which is to run without
    normkit. torch.compile takes the answer as it is when it reads the call.
    """
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    return f"{build.__name__} {mode} {kernels.built} {ops.SMALLEST} {ops.SMALLEST_GIVEN} {_digest()}"


@functools.cache
def _digest() -> str:
    """Of the files that say what a graph is made of: torch.compile finds programs on disk by what it has read."""
    folders = (Path(inspect.getfile(of)).parent for of in (ops, kernels, Plan))
    files = (file.read_bytes() for folder in folders for file in sorted(folder.glob("*.py")))
    return hashlib.sha256(b"".join(files)).hexdigest()


#: Functions that torch.compile meets, and what makes a short form of each.
_others: dict[Callable, Callable[[], Callable]] = {}


def shortened(made: Callable[[Callable], Callable]) -> Callable[[Callable], Callable]:
    """Mark a function of which torch.compile is to read another form: what ``made`` returns, called with the function.

    All that the other form uses is to be in its closure: there it is not checked again.
    """

    def mark(original: Callable) -> Callable:
        _others[original] = functools.partial(made, original)
        if _substitute.cache_info().currsize:
            torch.compiler.substitute_in_graph(original)(_others[original]())
        return original

    return mark


def closed(*used: Any) -> Callable[[Callable[..., Callable]], Callable]:
    """Call what makes a function with all that the function uses, and mark that: its other form is another such."""

    def mark(make: Callable[..., Callable]) -> Callable:
        return shortened(lambda _: make(*used))(make(*used))

    return mark


#: Of a function that users call: the plan, its numbers after axis and eps, and what is composed where it is another.
_FUNCTIONS: dict[Callable, tuple[Callable[..., Plan], tuple[str, ...], dict[str, Any]]] = {
    functional.layer_norm: (_calls.layer_plan, (), {}),
    functional.rms_norm: (_calls.rms_plan, ("weight_offset",), {"cast": "output"}),
    functional.group_norm: (_calls.group_plan, ("num_groups",), {}),
    functional.instance_norm: (_calls.instance_plan, (), {}),
    functional.batch_norm: (_calls.batch_plan, (), {}),
    functional.batch_norm_train: (_calls.batch_train_plan, (), {"virtual_batch_size": None, "single_value": "raise"}),
}


def entry(function: Callable) -> Callable:
    """The same function for layers to call, of which torch.compile does not check the defaults and where it leads.

    The one that users have stays as it is, for they may hand it to what asks for its name.
    """
    copied = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    build, numbers, usual = _FUNCTIONS[function]
    numbers = ("axis", "eps", *numbers)
    return shortened(lambda _: _short_function(function, build, numbers, usual, _at_once(), zip, len, any))(copied)


def _short_function(function, build, numbers, usual, at_once, zip, len, any):
    parameters = inspect.signature(function).parameters
    names, optional = tuple(parameters), {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    most = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    arrays, train = ("x", "weight", "bias", "mean", "var", "mask", "lengths"), build is _calls.batch_train_plan

    def short(*args, **kwargs):
        given = {n: a for n, a in zip(names, args)}  # noqa: C416  of dict() there would be more to check
        known = len(args) <= most and not any([n in given or n not in names for n in kwargs])
        given = {**optional, **given, **kwargs}
        if not known or any([n not in given for n in names]) or any([given[n] != usual[n] for n in usual]):
            return function(*args, **kwargs)
        done = at_once(*[given.get(n) for n in arrays], build, *[given[n] for n in numbers])
        if done is None:
            return function(*args, **kwargs)
        return (done[0], done[2]) if train else done[0]

    return short


def start_again() -> None:
    """Have torch.compile, where it is reading, read anew: it has met much that it would check before each call."""
    if torch._guards.TracingContext.try_get() is not None:
        _substitute()
        raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason="normkit reads shorter now")


def met() -> None:
    """Called where torch.compile reads :func:`normkit._calls.at_once` as it stands."""
    if not _substitute.cache_info().currsize:
        start_again()


# As torch.compiler.assume_constant_result would have them, which imports the compiler: they are called, and not read.
label._dynamo_marked_constant = True  # type: ignore[attr-defined]
met._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _substitute() -> None:
    """Name to torch.compile what it is to read in the place of :func:`normkit._calls.at_once`.

    All that this uses is in a closure, of a function that no module holds: there is nothing to check again, but for the
    kernels' mode.
    """
    torch.compiler.substitute_in_graph(_calls.at_once)(_at_once())
    for original, made in _others.items():
        torch.compiler.substitute_in_graph(original)(made())


@functools.cache
def _at_once() -> Callable:
    call, Tensor = torch.ops.normkit.call.default, torch.Tensor
    return _short(call, Tensor, label, kernels.current, BatchStats, isinstance, type, int, float, tuple)


def _short(call, Tensor, label, current, BatchStats, isinstance, type, int, float, tuple):
    over_axes = _OVER_AXES

    def at_once(x, weight, bias, mean, var, mask, lengths, build, *args):
        axis, *numbers = args
        name = label(build, current())
        if (
            name is None
            or mask is not None
            or lengths is not None
            or not isinstance(x, Tensor)
            or not (weight is None or isinstance(weight, Tensor))
            or not (bias is None or isinstance(bias, Tensor))
            or not (mean is None or (isinstance(mean, Tensor) and isinstance(var, Tensor)))
            or not (type(axis) is int or (type(axis) is tuple and name.startswith(over_axes)))
        ):
            return None
        for n in numbers:
            if type(n) is not float and type(n) is not int:
                return None
        found = call(x, weight, bias, mean, var, name, axis if type(axis) is tuple else (axis,), numbers)
        if not found:
            return None
        if not name.startswith("batch_train_plan"):
            return found[0], None, None
        return found[0], None, BatchStats(found[1], found[2], x.numel() // x.shape[axis])

    return at_once
