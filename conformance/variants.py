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
    def output(self) -> tuple[str, ...]:
        """The arrays that have a gradient."""
        return tuple(n for n in self.names if n not in ("mean", "var"))

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
            "gain": rng.uniform(0.5, 1.5, size),
            "threshold": rng.normal(size=size),
            "mean": rng.normal(0.5, 0.5, size),
            "var": rng.uniform(0.5, 4.0, size),
        }
        made["kernel"] = made["x"]
        values = {name: rounded(made[name], dtype) for name in self.names}
        values["dy"] = rounded(rng.normal(size=self.shape), dtype)
        if self.masked:
            values["mask"] = rng.random(self.shape) > 0.3
        return values

    def __str__(self) -> str:
        words = [self.function, "x".join(map(str, self.shape)), *(f"{k}={v}" for k, v in self.options.items())]
        return "-".join([*words, *["masked"] * self.masked]).replace(" ", "")


#: Where a function's axis is if it is not said.
AXIS = {"lp_layer_norm": -1, "normalize": -1, "rms_norm": -1, "weight_standardization": 0}


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


def normalize(x, *, p=2, axis=-1, eps=1e-12, mask=None) -> Array:
    """``x / max(norm, eps)``."""
    x = np.asarray(x, Real) if mask is None else np.where(mask, np.asarray(x, Real), 0)
    return x / np.maximum(norm_of(x, p, axis if isinstance(axis, tuple) else (axis,), mean=False), Real(eps))


def batch_renorm_train(x, mean, var, weight=None, bias=None, *, r_max=3.0, d_max=5.0, axis=1, eps=1e-5, mask=None):
    """Batch norm times r, plus d, before weight and bias; for derivatives, r and d may be given (see :func:`fixed`)."""
    r, d = fixed(x, mean, var, r_max, d_max, axis, eps, mask)
    return _renorm(x, weight, bias, r, d, axis, eps, mask)


def fixed(x, mean, var, r_max, d_max, axis, eps, mask) -> tuple[Array, Array]:
    """r and d, which no derivative sees."""
    batch = oracle.batch_statistics(x, axis=axis, mask=mask)
    spread = np.sqrt(np.asarray(var, Real) + Real(eps))
    r = np.clip(np.sqrt(batch.var + Real(eps)) / spread, 1 / Real(r_max), Real(r_max))
    return r, np.clip((batch.mean - np.asarray(mean, Real)) / spread, -Real(d_max), Real(d_max))


def _renorm(x, weight, bias, r, d, axis, eps, mask) -> Array:
    y = oracle.batch_norm_train(x, r, d, axis=axis, eps=eps, mask=mask)[0]
    y = affine(y, weight, bias, (axis % np.ndim(x),))
    return y if mask is None else np.where(mask, y, 0)


def filter_response_norm(x, weight=None, bias=None, threshold=None, *, axis=1, eps=1e-6, mask=None) -> Array:
    """RMS norm of each channel of each sample, and no less than the threshold."""
    channel = axis % np.ndim(x)
    over = tuple(a for a in range(np.ndim(x)) if a not in (0, channel))
    y = affine(oracle.rms_norm(x, axis=over, eps=eps, mask=mask), weight, bias, (channel,))
    if threshold is not None:
        y = np.maximum(y, affine(np.zeros(y.shape, Real), None, threshold, (channel,)))
    return y if mask is None else np.where(mask, y, 0)


def weight_standardization(kernel, gain=None, *, axis=0, eps=1e-6) -> Array:
    """Every output channel by its own mean and variance."""
    kernel = np.asarray(kernel, Real)
    over = tuple(a for a in range(kernel.ndim) if a != axis % kernel.ndim)
    d = kernel - kernel.mean(axis=over, keepdims=True)
    return affine(d / np.sqrt((d**2).mean(axis=over, keepdims=True) + Real(eps)), gain, None, (axis % kernel.ndim,))


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


def vjp(
    variant: Variant, values: Mapping[str, Array], h: float = 2.0**-14, held: tuple[Array, Array] | None = None
) -> dict[str, Array]:
    """Gradients of ``sum(y * dy)`` by central differences, extrapolated once.

    ``held``: r and d of batch renormalization, for another x than their own.
    """
    values = {k: v if k == "mask" else np.asarray(v, Real) for k, v in values.items()}
    held = _held(variant, values) if held is None else held

    def call(moved: Mapping[str, Array]) -> Array:
        if held is None:
            return forward(variant, moved)
        where = (variant.options.get("axis", 1), 1e-5, values.get("mask"))
        return _renorm(moved["x"], moved.get("weight"), moved.get("bias"), *held, *where)

    def slope(name: str, index: tuple[int, ...], step: float) -> Real:
        found = []
        for moved in (step, -step):
            array = values[name].copy()
            array[index] += moved
            found.append((call({**values, name: array}) * values["dy"]).sum())
        return (found[0] - found[1]) / (2 * Real(step))

    gradients = {name: np.empty(values[name].shape, Real) for name in variant.output}
    for name, gradient in gradients.items():
        for index in np.ndindex(gradient.shape):
            fine = slope(name, index, h)
            gradient[index] = fine + (fine - slope(name, index, 2 * h)) / 3
    return gradients


def _held(variant: Variant, values: Mapping[str, Array]) -> tuple[Array, Array] | None:
    """What no derivative sees: r and d, where there are any."""
    if variant.function != "batch_renorm_train":
        return None
    o = {"axis": 1, "r_max": 3.0, "d_max": 5.0, **variant.options}
    x, mean, var = (values[n] for n in ("x", "mean", "var"))
    return fixed(x, mean, var, o["r_max"], o["d_max"], o["axis"], 1e-5, values.get("mask"))


def hessian_product(variant: Variant, values: Mapping[str, Array], directions: Mapping[str, Array]) -> dict[str, Array]:
    """The second derivative times ``directions``, by differences of :func:`vjp`: good to 1e-10."""
    h, held = 2.0**-12, _held(variant, values)

    def gradient(step: float) -> dict[str, Array]:
        moved = {k: np.asarray(values[k], Real) + step * np.asarray(v, Real) for k, v in directions.items()}
        return vjp(variant, {**values, **moved}, held=held)

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
    Variant("batch_norm_train", (6, 3, 2), {"virtual_batch_size": 3, "axis": -1}, masked=True),
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
_ALL = ("x", "mean", "var", "weight", "bias")
OTHERS = (
    *(Variant("normalize", (4, 5), {"p": p}, ("x",)) for p in (1, 2, _INF)),
    Variant("normalize", (3, 4, 2), {"p": 2, "axis": (0, 1)}, ("x",), masked=True),
    Variant("batch_renorm_train", (5, 4, 2), {}, _ALL),
    Variant("batch_renorm_train", (6, 4), {"r_max": 1.1, "d_max": 0.2, "axis": -1}, _ALL, masked=True),
    Variant("batch_renorm_train", (6, 4), {"r_max": _INF, "d_max": _INF}, ("x", "mean", "var")),
    Variant("filter_response_norm", (2, 3, 5), {}, ("x", "weight", "bias", "threshold")),
    Variant("filter_response_norm", (2, 5, 3), {"axis": -1}, ("x", "weight", "bias", "threshold"), masked=True),
    Variant("filter_response_norm", (2, 3, 5), {}, ("x",)),
    Variant("weight_standardization", (4, 3, 3), {}, ("kernel", "gain")),
    Variant("weight_standardization", (3, 3, 4), {"axis": -1}, ("kernel",)),
)
VARIANTS = GHOST + LP + OTHERS
#: One of each kind, and fewer, where a library takes a second for each.
FEW = tuple({(v.function, v.options.get("p")): v for v in VARIANTS}.values())
FEWER = tuple({v.function: v for v in VARIANTS if v.options.get("p") != 2}.values())
