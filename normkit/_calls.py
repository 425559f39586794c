"""Calls of the functions, checked and planned, before a backend has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import _validate as check
from . import _values as values
from ._dispatch import _by_type
from .backends import Backend
from .core import plan as plans
from .core.normalize import BatchStats, Operands
from .core.plan import Plan, Shape

Array = Any

#: By whom, what is to be done, to which arrays. A plain tuple: the others take longer to make.
Call = tuple[Backend, Plan, Operands]

#: What is rounded to a narrow x's dtype: y alone, or what the weight is multiplied with as well.
CASTS = ("output", "input")


#: y, what the kernels saved for the gradient, statistics: an ``Applied`` without its name.
Done = tuple[Array, Any, BatchStats | None]

#: Whether a compiler reads this Python, and who is to know of it: set by such a library's backend. Asked first, for
#: torch.compile checks before each call of a graph everything that it met on the way.
compiling: Callable[[], bool] = bool
met: Callable[[], Any] = bool


def at_once(x, weight, bias, mean, var, mask, lengths, build: Callable[..., Plan], *args: Any) -> Done | None:
    """What comes of a call like one before it, whose arrays need no other look than the kernels' own; else ``None``."""
    if compiling():
        met()
        return None
    backend = _by_type.get(type(x))
    if backend is None or backend.at_once is None or mask is not None or lengths is not None:
        return None
    try:
        plan = _cached(build, x.shape, *args)
    except (TypeError, ValueError):
        return None  # refused in a moment, with the words for it
    return backend.at_once(plan, x, weight, bias, mean, var)


def run(call: Call) -> Array:
    """y, where that is all."""
    backend, plan, operands = call
    return backend.apply(plan, operands)[0]


def layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5, mask=None, lengths=None) -> Call:
    return _checked(*_planned(x, layer_plan, axis, eps), Operands(x, weight, bias, None, None, mask), lengths)


def rms_norm(
    x, weight=None, bias=None, *, axis=-1, eps=1e-6, weight_offset=0.0, cast="output", mask=None, lengths=None
) -> Call:
    point = () if cast == "output" else (check.choice("cast", cast, CASTS),)
    planned = _planned(x, rms_plan, axis, eps, weight_offset, *point)
    return _checked(*planned, Operands(x, weight, bias, None, None, mask), lengths)


def group_norm(x, num_groups, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None, lengths=None) -> Call:
    return _checked(
        *_planned(x, group_plan, axis, eps, num_groups), Operands(x, weight, bias, None, None, mask), lengths
    )


def instance_norm(x, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None, lengths=None) -> Call:
    return _checked(*_planned(x, instance_plan, axis, eps), Operands(x, weight, bias, None, None, mask), lengths)


def batch_norm(x, mean, var, weight=None, bias=None, *, axis=1, eps=1e-5, mask=None, lengths=None) -> Call:
    backend, plan = _planned(x, batch_plan, axis, eps)
    if mean is None or var is None:
        check.backend_of("mean" if mean is None else "var", None)
    call = _checked(backend, plan, Operands(x, weight, bias, mean, var, mask), lengths)
    check.variance(backend, "var", var)
    return call


def batch_norm_train(
    x,
    weight=None,
    bias=None,
    *,
    axis=1,
    eps=1e-5,
    virtual_batch_size=None,
    mask=None,
    lengths=None,
    single_value="raise",
) -> Call:
    if virtual_batch_size is None:
        planned = _planned(x, batch_train_plan if single_value == "raise" else _zero(single_value), axis, eps)
    else:
        planned = _planned(x, ghost_plan, axis, eps, virtual_batch_size, check.single_value(single_value))
    call = _checked(*planned, Operands(x, weight, bias, None, None, mask), lengths)
    if (mask is not None or lengths is not None) and single_value == "raise":
        values.several_valid(call[0], call[1], call[2].mask)
    return call


def lp_layer_norm(
    x, weight=None, bias=None, *, p, axis=-1, eps=1e-5, centred=False, consistent=False, mask=None, lengths=None
) -> Call:
    flags = check.flag("centred", centred), check.flag("consistent", consistent)
    planned = _planned(x, lp_layer_plan, axis, eps, check.order(p), *flags)
    check.counted(planned[1], consistent, mask, lengths)
    return _checked(*planned, Operands(x, weight, bias, None, None, mask), lengths)


def lp_batch_norm_train(
    x, weight=None, bias=None, *, p, axis=1, eps=1e-5, centred=False, consistent=False, mask=None, lengths=None
) -> Call:
    flags = check.flag("centred", centred), check.flag("consistent", consistent)
    planned = _planned(x, lp_batch_plan, axis, eps, check.order(p), *flags)
    check.counted(planned[1], consistent, mask, lengths)
    return _checked(*planned, Operands(x, weight, bias, None, None, mask), lengths)


def normalize(x, *, p=2, axis=-1, eps=1e-12, mask=None, lengths=None) -> Call:
    return _checked(*_planned(x, unit_plan, axis, eps, check.order(p)), Operands(x, mask=mask), lengths)


def filter_response_norm(x, weight=None, bias=None, *, axis=1, eps=1e-6, mask=None, lengths=None) -> Call:
    planned = _planned(x, filter_response_plan, axis, eps)
    return _checked(*planned, Operands(x, weight, bias, None, None, mask), lengths)


def weight_standardization(kernel, gain=None, *, axis=0, eps=1e-6) -> Call:
    backend, plan = _planned(kernel, kernel_plan, axis, eps)
    if gain is not None:
        check.companion(backend, kernel, "gain", gain, tuple(plan.param_shape), of="kernel")
    return backend, plan, Operands(kernel, gain)


def _checked(backend: Backend, plan: Plan, operands: Operands, lengths: Array | None) -> Call:
    if lengths is not None or operands.mask is not None:
        operands = operands._replace(mask=check.valid(backend, plan, operands.x, operands.mask, lengths))
    return backend, plan, check.operands(backend, plan.param_shape, operands)


def layer_plan(shape: Shape, axis, eps) -> Plan:
    return plans.layer_plan(shape, check.several_axes(axis, shape), check.epsilon(eps))


def rms_plan(shape: Shape, axis, eps, weight_offset, cast="output") -> Plan:
    offset = check.finite("weight_offset", weight_offset)
    return plans.rms_plan(shape, check.several_axes(axis, shape), check.epsilon(eps), offset, cast)


def group_plan(shape: Shape, axis, eps, num_groups) -> Plan:
    index = check.channel_axis(axis, shape)
    plan = plans.group_plan(shape, check.groups(num_groups, shape[index]), index, check.epsilon(eps))
    check.reduces(plan)
    return plan


def instance_plan(shape: Shape, axis, eps) -> Plan:
    plan = plans.instance_plan(shape, check.channel_axis(axis, shape), check.epsilon(eps))
    check.reduces(plan)
    return plan


def batch_plan(shape: Shape, axis, eps) -> Plan:
    return plans.batch_plan(shape, check.channel_axis(axis, shape), check.epsilon(eps), given=True)


def batch_train_plan(shape: Shape, axis, eps) -> Plan:
    plan = batch_zero_plan(shape, axis, eps)
    check.several_values(plan)
    return plan


def batch_zero_plan(shape: Shape, axis, eps) -> Plan:
    plan = plans.batch_plan(shape, check.channel_axis(axis, shape), check.epsilon(eps), given=False)
    check.reduces(plan)
    return plan


def _zero(policy: Any) -> Callable[..., Plan]:
    check.single_value(policy)
    return batch_zero_plan


def ghost_plan(shape: Shape, axis, eps, size, single_value) -> Plan:
    index, size = check.channel_axis(axis, shape), check.positive_int("virtual_batch_size", size)
    check.reduces(plans.batch_plan(shape, index, eps, given=False))
    plan = plans.ghost_plan(shape, index, check.epsilon(eps), size)
    check.divides(plan, size)
    if single_value == "raise":
        check.several_values(plan)
    return plan


def lp_layer_plan(shape: Shape, axis, eps, p, centred, consistent) -> Plan:
    return plans.lp_plan("lp_layer_norm", layer_plan(shape, axis, eps), p, centred, consistent)


def lp_batch_plan(shape: Shape, axis, eps, p, centred, consistent) -> Plan:
    return plans.lp_plan("lp_batch_norm_train", batch_train_plan(shape, axis, eps), p, centred, consistent)


def unit_plan(shape: Shape, axis, eps, p) -> Plan:
    return plans.unit_plan(shape, check.several_axes(axis, shape), p, check.epsilon(eps))


def filter_response_plan(shape: Shape, axis, eps) -> Plan:
    plan = plans.filter_response_plan(shape, check.channel_axis(axis, shape), check.epsilon(eps))
    check.reduces(plan)
    return plan


def kernel_plan(shape: Shape, axis, eps) -> Plan:
    plan = plans.kernel_plan(shape, check.channel_axis(axis, shape), check.epsilon(eps))
    check.several_taps(plan)
    return plan


@functools.lru_cache(maxsize=4096, typed=True)
def _remembered(build: Callable[..., Plan], kinds: tuple[type, ...] | None, *args: Any) -> Plan:
    return build(*args)


def _cached(build: Callable[..., Plan], shape: Shape, *args: Any) -> Plan:
    # Types tell 1 from 1.0 and from True; within a tuple it takes this.
    kinds = tuple(map(type, args[0])) if isinstance(args[0], tuple) else None
    return _remembered(build, kinds, shape, *args)


def _planned(x: Array, build: Callable[..., Plan], *args: Any) -> tuple[Backend, Plan]:
    backend, shape = check.array("x", x)
    if backend.tracing():
        return backend, build(shape, *args)
    try:
        return backend, _cached(build, shape, *args)
    except TypeError:
        # A list of axes, or an argument that is refused in a moment, cannot be looked up.
        return backend, build(shape, *args)
