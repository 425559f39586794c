"""The case table: layers, shapes, axes, options, parameters and layouts that every library is held to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from normkit.conformance import oracle

LAYERS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_train")
DTYPES = ("float64", "float32", "float16", "bfloat16")

#: The array arguments of each function in the order of its signature.
SIGNATURES = dict.fromkeys(LAYERS, ("x", "weight", "bias")) | {"batch_norm": ("x", "mean", "var", "weight", "bias")}

AFFINE = {"both": ("weight", "bias"), "weight": ("weight",), "bias": ("bias",), "none": ()}


@dataclass(frozen=True)
class Case:
    """One call of one layer: everything but the numbers and the library."""

    id: str
    layer: str
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    affine: str = "both"
    layout: str = "contiguous"
    masked: bool = False

    @property
    def sets(self) -> oracle.Sets:
        """Which elements share a statistic."""
        return oracle.sets(self.layer, self.shape, **self.options)

    @property
    def count(self) -> int:
        """How many elements one statistic is made of."""
        sets = self.sets
        return math.prod(sets.view[a] for a in sets.over)

    @property
    def param_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.sets.params)

    @property
    def names(self) -> tuple[str, ...]:
        """The array arguments that this case gives and that have a gradient, in the order of the signature."""
        given = ("x", "mean", "var", *AFFINE[self.affine])
        return tuple(name for name in SIGNATURES[self.layer] if name in given)

    def call(self, function, arrays: Mapping[str, Any]) -> Any:
        """``function``, spelled like normkit's, called with these arrays and the case's options."""
        args, options = self.arguments(arrays)
        return function(*args, **options)

    def arguments(self, arrays: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments of a function spelled like normkit's."""
        args = [arrays.get(name) for name in SIGNATURES[self.layer]]
        options = dict(self.options)
        if self.layer == "group_norm":
            args.insert(1, options.pop("num_groups"))
        if self.masked:
            options["mask"] = arrays["mask"]
        return tuple(args), options

    def __str__(self) -> str:
        return self.id


def _case(
    layer: str, shape: tuple[int, ...], affine: str = "both", layout: str = "contiguous", masked=False, **options
) -> Case:
    words = [layer, "x".join(map(str, shape)), *(f"{k}={v}".replace(" ", "") for k, v in options.items())]
    words += [affine] * (affine != "both") + [layout] * (layout != "contiguous") + ["masked"] * masked
    return Case("-".join(words), layer, shape, options, affine, layout, masked)


def _cases() -> tuple[Case, ...]:
    case, last = _case, "channels_last"
    rows = []

    # Layers over chosen axes: trailing, leading, in the middle, several, negative, all of them.
    for layer in ("layer_norm", "rms_norm"):
        rows += [case(layer, (3, 7, 5), axis=axis) for axis in (-1, 0, 1, (1, 2), (-2, -1), (0, 2), (0, 1, 2))]
        rows += [case(layer, (5, 13), affine) for affine in ("weight", "bias", "none")]
        rows += [
            case(layer, (7,)),
            case(layer, (2, 769)),
            case(layer, (3, 1021)),
            case(layer, (2, 2, 2, 3, 5), axis=(2, -1)),
        ]
        rows += [case(layer, (3, 1)), case(layer, (1, 1, 1), axis=(0, 1, 2)), case(layer, (4, 6), eps=0.0)]
        rows += [case(layer, (2, 6, 5, 3), layout=last, axis=1), case(layer, (2, 6, 5, 3), layout=last, axis=(1, 2, 3))]
    rows += [case("rms_norm", (5, 13), weight_offset=1.0), case("rms_norm", (5, 13), "none", weight_offset=1.0)]

    # Layers with a channel axis: second, last, negative, first, in the middle; rank 2 to 5.
    for layer in ("batch_norm_train", "batch_norm"):
        rows += [case(layer, (3, 5, 7, 4), axis=axis) for axis in (1, -1, 0, 2, -3)]
        rows += [case(layer, (6, 5)), case(layer, (17, 3, 11)), case(layer, (2, 3, 4, 5, 2))]
        rows += [case(layer, (9, 7), affine) for affine in ("weight", "bias", "none")]
        rows += [case(layer, (2, 6, 5, 3), affine, last) for affine in ("both", "none")]
        rows += [case(layer, (4, 1)), case(layer, (6, 3), eps=0.0), case(layer, (31, 127), axis=-1)]
    rows += [case("batch_norm", (1, 4)), case("batch_norm", (1, 4, 1, 1), layout=last)]

    for layer, options in (("instance_norm", {}), ("group_norm", {"num_groups": 2})):
        rows += [case(layer, (2, 6, 5, 3), axis=axis, **options) for axis in (1, -3)]
        rows += [case(layer, (3, 5, 7, 4), axis=-1, **options), case(layer, (2, 4, 11), **options)]
        rows += [case(layer, (2, 4, 7), affine, **options) for affine in ("weight", "bias", "none")]
        rows += [case(layer, (2, 6, 5, 3), affine, last, **options) for affine in ("both", "none")]
        rows += [case(layer, (1, 4, 2, 3, 2), **options), case(layer, (2, 4, 6), eps=0.0, **options)]
    rows += [case("group_norm", (2, 6, 5), num_groups=g) for g in (1, 3, 6)] + [
        case("group_norm", (3, 12), num_groups=3)
    ]
    rows += [case("group_norm", (2, 5, 12, 3), axis=2, num_groups=4), case("group_norm", (2, 4, 1), num_groups=4)]
    rows += [case("instance_norm", (3, 4, 1))]

    for layer in LAYERS:
        options = {"num_groups": 2} if layer == "group_norm" else {}
        rows += [case(layer, (5, 4, 6), masked=True, **options)]
        rows += [case(layer, (5, 6, 16), "none", masked=True, axis=-1, **options)]
    return tuple({row.id: row for row in rows}.values())


CASES = _cases()

#: One case of each kind, where trying all would tell no more.
SHORT = tuple({(c.layer, c.affine, c.layout, c.masked): c for c in reversed(CASES)}.values())
SHORTEST = tuple(c for c in SHORT if c.affine == "both")

#: More than 2**20 elements in one statistic: sums that a naive order would lose digits in.
LARGE = (
    _case("batch_norm_train", (1031, 2, 1019)),
    _case("batch_norm_train", (1031, 1019, 2), axis=-1),
    _case("batch_norm_train", (16, 2, 257, 257), layout="channels_last"),
    _case("layer_norm", (2, 1050001)),
    _case("rms_norm", (1050001, 2), axis=0),
    _case("group_norm", (1, 4, 727, 727), num_groups=2),
    _case("instance_norm", (1, 2, 1025, 1025)),
)

#: No element at all, or sets without elements; training must leave statistics untouched.
EMPTY = tuple(
    _case(layer, shape, **options)
    for layer, shapes, options in (
        ("layer_norm", ((0, 5), (2, 0, 5)), {}),
        ("rms_norm", ((0, 5), (2, 0, 5)), {}),
        ("batch_norm_train", ((0, 3), (0, 3, 4), (2, 3, 0)), {}),
        ("batch_norm", ((0, 3), (2, 3, 0)), {}),
        ("group_norm", ((0, 4, 5), (2, 4, 0)), {"num_groups": 2}),
        ("instance_norm", ((0, 4, 5), (2, 4, 0)), {}),
    )
    for shape in shapes
)

#: The sites at which inputs are tried: one shape for each layer, channels at ``axis`` 1 or last.
SITES = {
    axis: {
        "layer_norm": _case("layer_norm", (24, 257)),
        "rms_norm": _case("rms_norm", (24, 257)),
        **{
            layer: _case(layer, (6, 12, 7, 9) if axis == 1 else (6, 7, 9, 12), axis=axis, **options)
            for layer, options in (
                ("batch_norm_train", {}),
                ("batch_norm", {}),
                ("group_norm", {"num_groups": 4}),
                ("instance_norm", {}),
            )
        },
    }
    for axis in (1, -1)
}
