"""The variants by their definitions in extended precision, their cases, and derivatives by differences."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normkit.conformance import oracle
from normkit.conformance.inputs import rounded, stats_dtype
from normkit.conformance.oracle import Array, Real


@dataclass(frozen=True)
class Variant:
    """One call of one function; parameters have the shape of ``params`` axes of x."""

    function: str
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ("x", "weight", "bias")
    masked: bool = False
    layout: str = "contiguous"

    @property
    def params(self) -> tuple[int, ...]:
        axis = self.options.get("axis", AXIS.get(self.function, 1))
        axes = axis if isinstance(axis, tuple) else (axis,)
        return tuple(sorted(a % len(self.shape) for a in axes))

    def operands(self, dtype: str, x: Array | None = None) -> dict[str, Array]:
        """Numbers that the dtype holds, with dy, and a mask where there is one."""
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        size = tuple(self.shape[a] for a in self.params)
        made = {
            "x": rng.normal(0.5, 1.5, self.shape) if x is None else x,
            "weight": rng.uniform(0.5, 1.5, size),
            "bias": rng.normal(size=size),
        }
        values = {name: rounded(made[name], dtype) for name in self.names}
        values["dy"] = rounded(rng.normal(size=self.shape), dtype)
        if self.masked:
            values["mask"] = rng.random(self.shape) > 0.3
        return values

    def __str__(self) -> str:
        words = [self.function, "x".join(map(str, self.shape)), *(f"{k}={v}" for k, v in self.options.items())]
        return "-".join([*words, *["masked"] * self.masked]).replace(" ", "")


#: Where a function's axis is if it is not said.
AXIS = {"lp_layer_norm": -1}


def batch_norm_train(x, weight=None, bias=None, *, axis=1, virtual_batch_size, mask=None, **options) -> Array:
    """Batch norm of each run of so many samples."""
    x = np.asarray(x, Real)
    batch = 1 if axis == 0 else 0
    number = x.shape[batch] // virtual_batch_size
    masks = [None] * number if mask is None else np.split(np.broadcast_to(mask, x.shape), number, batch)
    parts = [
        oracle.batch_norm_train(part, weight, bias, axis=axis, mask=seen, **options)[0]
        for part, seen in zip(np.split(x, number, batch), masks, strict=True)
    ]
    return np.concatenate(parts, batch)


def lp_layer_norm(x, weight=None, bias=None, *, p, axis=-1, eps=1e-5, mask=None, **options) -> Array:
    """``(x - mean) / sqrt(norm**2 + eps) * weight + bias`` over ``axis``."""
    axes = tuple(a % np.ndim(x) for a in (axis if isinstance(axis, tuple) else (axis,)))
    return _lp(x, weight, bias, p, axes, axes, eps, mask, **options)


def lp_batch_norm_train(x, weight=None, bias=None, *, p, axis=1, eps=1e-5, mask=None, **options) -> Array:
    """The same over every axis but the channels'."""
    channel = axis % np.ndim(x)
    over = tuple(a for a in range(np.ndim(x)) if a != channel)
    return _lp(x, weight, bias, p, over, (channel,), eps, mask, **options)


def norm_of(x: Array, p: float, over: tuple[int, ...], valid: Array | None = None, mean: bool = True) -> Array:
    """The p-norm of the valid elements, or its mean."""
    size = np.abs(x) if valid is None else np.where(valid, np.abs(x), 0)
    if p == math.inf:
        return size.max(axis=over, keepdims=True)
    n = (np.ones(x.shape) if valid is None else valid).sum(axis=over, keepdims=True) if mean else 1
    return ((size**p).sum(axis=over, keepdims=True) / n) ** (Real(1) / int(p))


def _lp(x, weight, bias, p, over, params, eps, mask, centred=False, consistent=False) -> Array:
    x = np.asarray(x, Real)
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    n = valid.sum(axis=over, keepdims=True)
    d = np.where(valid, x - np.where(valid, x, 0).sum(axis=over, keepdims=True) / n, 0)
    norm = norm_of(d if centred else x, p, over, valid)
    if consistent and p == 1:
        norm = norm * np.sqrt(np.pi / Real(2))
    if consistent and p == math.inf:
        norm = norm * (1 + np.sqrt(np.pi * np.log(Real(4)))) / (2 * np.sqrt(2 * np.log(n.astype(Real))))
    return np.where(valid, affine(d / np.sqrt(norm**2 + Real(eps)), weight, bias, params), 0)


def affine(y: Array, weight, bias, params: tuple[int, ...]) -> Array:
    """``y * weight + bias``, of parameters with these axes."""
    shape = [n if a in params else 1 for a, n in enumerate(y.shape)]
    y = y if weight is None else y * np.asarray(weight, Real).reshape(shape)
    return y if bias is None else y + np.asarray(bias, Real).reshape(shape)


def forward(variant: Variant, values: Mapping[str, Array]) -> Array:
    """y by the definition."""
    return globals()[variant.function](**{k: v for k, v in values.items() if k != "dy"}, **variant.options)


def vjp(variant: Variant, values: Mapping[str, Array], h: float = 2.0**-14) -> dict[str, Array]:
    """Gradients of ``sum(y * dy)`` by central differences, extrapolated once."""
    values = {k: v if k == "mask" else np.asarray(v, Real) for k, v in values.items()}

    def slope(name: str, index: tuple[int, ...], step: float) -> Real:
        found = []
        for moved in (step, -step):
            array = values[name].copy()
            array[index] += moved
            found.append((forward(variant, {**values, name: array}) * values["dy"]).sum())
        return (found[0] - found[1]) / (2 * Real(step))

    gradients = {name: np.empty(values[name].shape, Real) for name in variant.names}
    for name, gradient in gradients.items():
        for index in np.ndindex(gradient.shape):
            fine = slope(name, index, h)
            gradient[index] = fine + (fine - slope(name, index, 2 * h)) / 3
    return gradients


def hessian_product(variant: Variant, values: Mapping[str, Array], directions: Mapping[str, Array]) -> dict[str, Array]:
    """The second derivative times ``directions``, by differences of :func:`vjp`: good to 1e-10."""
    h = 2.0**-12

    def gradient(step: float) -> dict[str, Array]:
        moved = {k: np.asarray(values[k], Real) + step * np.asarray(v, Real) for k, v in directions.items()}
        return vjp(variant, {**values, **moved})

    def slope(step: float) -> dict[str, Array]:
        ahead, behind = gradient(step), gradient(-step)
        return {k: (ahead[k] - behind[k]) / (2 * step) for k in ahead}

    coarse, fine = slope(2 * h), slope(h)
    return {k: fine[k] + (fine[k] - coarse[k]) / 3 for k in fine}


def given(library, variant: Variant, values: Mapping[str, Array], dtype: str) -> dict[str, Any]:
    """The numbers as a library's arrays."""
    kinds = {"mask": "bool", "mean": stats_dtype(dtype), "var": stats_dtype(dtype)}
    return {name: library.array(value, kinds.get(name, dtype)) for name, value in values.items()}


_INF = math.inf
GHOST = (
    Variant("batch_norm_train", (6, 3, 2), {"virtual_batch_size": 3}),
    Variant("batch_norm_train", (6, 2, 3), {"virtual_batch_size": 2, "axis": -1}, masked=True),
    Variant("batch_norm_train", (3, 4, 3), {"virtual_batch_size": 2, "axis": 0}),
    Variant("batch_norm_train", (8, 5), {"virtual_batch_size": 4}),
)
LP = (
    *(Variant("lp_layer_norm", (5, 7), {"p": p}) for p in (1, 2, _INF)),
    *(Variant("lp_layer_norm", (3, 4, 2), {"p": p, "axis": (0, 2), "centred": True}) for p in (1, _INF)),
    *(Variant("lp_batch_norm_train", (5, 3, 2), {"p": p}) for p in (1, 2, _INF)),
    *(Variant("lp_batch_norm_train", (7, 3), {"p": p, "centred": True, "consistent": True}) for p in (1, _INF)),
    *(Variant("lp_batch_norm_train", (5, 3, 2), {"p": p, "axis": -1}, masked=True) for p in (1, 2)),
    Variant("lp_layer_norm", (4, 6), {"p": _INF, "centred": True}, masked=True),
)
VARIANTS = GHOST + LP
#: One of each kind, and fewer, where a library takes a second for each.
FEW = tuple({(v.function, v.options.get("p")): v for v in VARIANTS}.values())
FEWER = tuple({(v.function.split("_")[0], v.options.get("p")): v for v in VARIANTS}.values())
