"""Plans: what a normalization does to arrays of given shapes, as frozen values that hold no arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

#: The length of one axis; ``None`` where a graph is traced and the length is not known yet.
Size = int | None
Shape = tuple[Size, ...]


#: Layers whose parameters are along the axes that are reduced.
OVER_AXES = frozenset({"layer_norm", "rms_norm", "lp_layer_norm", "normalize"})


class Power(NamedTuple):
    """A p-norm, ``factor * mean(|x|**p)**(1/p)``: ``sqrt(norm**2 + eps)`` is what is divided by."""

    #: 1, 2 or infinity (the maximum).
    p: float
    #: The norm of x - mean, or of x itself.
    centred: bool = False
    #: A sum in the place of the mean.
    total: bool = False
    #: The larger of norm and ``sqrt(eps)`` is divided by.
    floor: bool = False
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How to normalize ``x`` of one shape.

    ``x`` is seen as ``view`` (its own shape, with the channel axis split into groups where there are groups),
    reduced over ``axes``, and scaled by parameters that are reshaped to ``param_view`` so that they broadcast.
    Axes are non-negative and ascending.
    """

    layer: str
    shape: Shape
    view: Shape
    axes: tuple[int, ...]
    param_shape: Shape
    param_view: Shape
    eps: float
    center: bool = True
    weight_offset: float = 0.0
    #: The shape in which statistics leave the function; empty where they stay inside it.
    stats_shape: Shape = ()
    #: A mask says what statistics are taken over, and nothing else: y is not zero where it is false.
    everywhere: bool = False
    #: The axis of ``x`` that is two of the view: groups and channels of each, or virtual batches and samples of each.
    split: int | None = None
    #: A p-norm in the place of the root of variance or mean square.
    power: Power | None = None
    #: For narrow x: what is rounded to its dtype is the "output" alone, or the "input" of the weight too.
    cast: str = "output"

    #: How many elements are reduced into one statistic; ``None`` where an axis length is unknown.
    count: Size = field(init=False)
    #: The axes of the view along which a parameter is repeated.
    param_axes: tuple[int, ...] = field(init=False)
    #: The reduced axes are the last ones, so that a row-major library sums along memory.
    trailing: bool = field(init=False)
    #: What backends remember of the plan; a copy of it starts without.
    memo: dict[Any, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "count", product(self.view[a] for a in self.axes))
        set_(self, "param_axes", tuple(a for a, n in enumerate(self.param_view) if n == 1 and self.view[a] != 1))
        set_(self, "trailing", self.axes == tuple(range(len(self.view) - len(self.axes), len(self.view))))

    def __reduce__(self):
        return Plan, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    @property
    def empty(self) -> bool:
        """Whether ``x`` is known to hold no element."""
        return 0 in self.shape

    @property
    def run(self) -> Size:
        """How many neighbours in the view one statistic is of: the product of the last axes that are reduced."""
        kept = [a for a in range(len(self.view)) if a not in self.axes]
        return product(self.view[kept[-1] + 1 if kept else 0 :])

    @property
    def features(self) -> tuple[int, ...]:
        """The axes of ``x`` that have parameters: layer and RMS norm's reduced axes, the others' channel axis."""
        if self.layer in OVER_AXES:
            return self.axes
        (*_, axis) = (a for a in range(len(self.view)) if a not in self.axes and not (self.virtual and a == self.split))
        return (axis - (self.split is not None and axis > self.split),)

    @property
    def virtual(self) -> bool:
        """Whether a batch is normalized as several, each by itself."""
        return self.split is not None and bool(self.stats_shape)

    @property
    def positions(self) -> int | None:
        """The axis that the lengths of samples count along; ``None`` where there is none."""
        others = [a for a in range(len(self.shape)) if a not in self.features]
        return others[1] if len(others) > 1 and others[0] == 0 else None


def product(sizes) -> Size:
    """The product of axis lengths, ``None`` if one of them is unknown."""
    sizes = tuple(sizes)
    return None if None in sizes else math.prod(sizes)


def batch_plan(shape: Shape, axis: int, eps: float, *, given: bool) -> Plan:
    """One statistic per channel, over every other axis; ``given`` statistics are not computed but brought along."""
    view, channels = shape, (shape[axis],)
    return Plan(
        layer="batch_norm" if given else "batch_norm_train",
        shape=shape,
        view=view,
        axes=_others(view, (axis,)),
        param_shape=channels,
        param_view=_only(view, (axis,)),
        eps=eps,
        stats_shape=channels,
    )


def ghost_plan(shape: Shape, axis: int, eps: float, size: int) -> Plan:
    """As :func:`batch_plan`, with one statistic per channel and virtual batch: ``size`` neighbours each."""
    batch = 1 if axis == 0 else 0
    n = shape[batch]
    view = (*shape[:batch], -1 if n is None else n // size, size, *shape[batch + 1 :])
    channel = axis + (axis > batch)
    return Plan(
        layer="batch_norm_train",
        shape=shape,
        view=view,
        axes=_others(view, (batch, channel)),
        param_shape=(shape[axis],),
        param_view=_only(view, (channel,)),
        eps=eps,
        stats_shape=(shape[axis],),
        split=batch,
    )


def layer_plan(shape: Shape, axes: tuple[int, ...], eps: float) -> Plan:
    """One statistic per position outside ``axes``; parameters have the shape of ``axes``."""
    return Plan(
        layer="layer_norm",
        shape=shape,
        view=shape,
        axes=axes,
        param_shape=tuple(shape[a] for a in axes),
        param_view=_only(shape, axes),
        eps=eps,
    )


def rms_plan(shape: Shape, axes: tuple[int, ...], eps: float, weight_offset: float, cast: str = "output") -> Plan:
    """As :func:`layer_plan`, with the root of the mean square and no centring."""
    return Plan(
        layer="rms_norm",
        shape=shape,
        view=shape,
        axes=axes,
        param_shape=tuple(shape[a] for a in axes),
        param_view=_only(shape, axes),
        eps=eps,
        center=False,
        weight_offset=weight_offset,
        cast=cast,
    )


def unit_plan(shape: Shape, axes: tuple[int, ...], p: float, eps: float) -> Plan:
    """Vectors along ``axes`` divided by their p-norm, or by ``eps`` if that is more."""
    plan = rms_plan(shape, axes, eps * eps, 0.0)
    return replace(plan, layer="normalize", power=Power(p, total=True, floor=True))


def filter_response_plan(shape: Shape, axis: int, eps: float) -> Plan:
    """As :func:`instance_plan`, with the root of the mean square and no centring."""
    return replace(instance_plan(shape, axis, eps), layer="filter_response_norm", center=False)


def kernel_plan(shape: Shape, axis: int, eps: float) -> Plan:
    """One statistic per output channel of a convolution's weight; it stays inside."""
    plan = batch_plan(shape, axis, eps, given=False)
    return replace(plan, layer="weight_standardization", stats_shape=())


def lp_plan(layer: str, plan: Plan, p: float, centred: bool, consistent: bool) -> Plan:
    """A plan with the mean p-norm of x, or of x - mean, in the place of the standard deviation.

    ``consistent`` multiplies the norm so that of Gaussian x it is about the standard deviation.
    """
    factor = gaussian_factor(p, plan.count or 2) if consistent else 1.0
    return replace(plan, layer=layer, power=Power(p, centred, factor=factor))


def gaussian_factor(p: float, count: int) -> float:
    """What the mean p-norm of so many Gaussian values is multiplied by to be about their standard deviation."""
    if p == 1:
        return math.sqrt(math.pi / 2)
    if p == math.inf:
        return (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(max(count, 2))))
    return 1.0


def group_plan(shape: Shape, num_groups: int, axis: int, eps: float) -> Plan:
    """One statistic per sample (axis 0) and group of neighbouring channels; parameters are per channel."""
    channels = shape[axis]
    assert channels is not None
    view = (*shape[:axis], num_groups, channels // num_groups, *shape[axis + 1 :])
    return Plan(
        layer="group_norm",
        shape=shape,
        view=view,
        axes=_others(view, (0, axis)),
        param_shape=(channels,),
        param_view=_only(view, (axis, axis + 1)),
        eps=eps,
        split=axis,
    )


def instance_plan(shape: Shape, axis: int, eps: float) -> Plan:
    """One statistic per sample (axis 0) and channel, over every other axis."""
    return Plan(
        layer="instance_norm",
        shape=shape,
        view=shape,
        axes=_others(shape, (0, axis)),
        param_shape=(shape[axis],),
        param_view=_only(shape, (axis,)),
        eps=eps,
    )


def _others(view: Shape, kept: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(len(view)) if a not in kept)


def _only(view: Shape, kept: tuple[int, ...]) -> Shape:
    return tuple(n if a in kept else 1 for a, n in enumerate(view))
