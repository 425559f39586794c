"""The tolerances, each with its reason, and the measure that they are in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from normkit.conformance.oracle import EXTENDED, Array, Real

#: One unit of each dtype: the distance from 1 to the next number.
UNIT = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
#: The smallest normal number: below it, digits are lost whatever is computed.
TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}


@dataclass(frozen=True)
class Tolerance:
    """How many units a quantity may be away from its reference, and why so many."""

    quantity: str
    dtype: str
    units: float
    reason: str


_HALF = "rounding to the dtype is half a unit; what comes before it is float32 and adds less than a hundredth"

TABLE = (
    Tolerance(
        "forward",
        "float64",
        1024,
        "sums have no wider dtype, and one by one they lose half a unit a time: NumPy is 160 off on digits (1797 "
        "samples across memory), TensorFlow 529 on photographs (273,000 pixels)",
    ),
    Tolerance(
        "forward", "float32", 2, "the stated bound: x - m, the product with rstd, weight and bias round once each"
    ),
    Tolerance("forward", "float16", 0.51, _HALF),
    Tolerance("forward", "bfloat16", 0.51, _HALF),
    Tolerance("gradient", "float64", 1024, "as forward: TensorFlow is 926 off on photographs"),
    Tolerance(
        "gradient", "float32", 8, "three terms of which each has rounded four times, and sums whose roundings add up"
    ),
    Tolerance(
        "gradient", "float16", 1, "rounding to the dtype is half a unit of the result; the scale may be half of it"
    ),
    Tolerance(
        "gradient", "bfloat16", 1, "rounding to the dtype is half a unit of the result; the scale may be half of it"
    ),
    Tolerance("second order", "float64", 2.0**14, "the reference is a difference quotient, good to 1e-12"),
    Tolerance(
        "second order", "float32", 64, "a sum of a dozen products of first-order terms, each with its own roundings"
    ),
    Tolerance("statistics", "float64", 64, "sums have no wider dtype: NumPy adds one by one across memory"),
    Tolerance("statistics", "float32", 4, "mean and variance round twice each; the mean is compared with max |x|"),
    Tolerance("running", "float64", 64, "ten steps of statistics"),
    Tolerance("running", "float32", 8, "ten steps of a product and a sum, whose roundings decay with momentum"),
    Tolerance("native", "float64", 64, "as in float32"),
    Tolerance(
        "native", "float32", 32, "sums in the library's own order and the affine folded to x*a + b, on inputs near zero"
    ),
    Tolerance("native", "float16", 1.5, "rounded once to the dtype from float32, from a folded affine"),
    Tolerance("native", "bfloat16", 1.5, "rounded once to the dtype from float32, from a folded affine"),
    Tolerance("cross", "float64", 2048, "two libraries, each within the forward tolerance of float64"),
    Tolerance("cross", "float32", 4, "two libraries, each within the forward tolerance of float64"),
    Tolerance("cross", "float16", 1, "two libraries that round to neighbours"),
    Tolerance("cross", "bfloat16", 1, "two libraries that round to neighbours"),
)

_ONE_BY_ONE = "XLA adds the squares of 188 like values to a large one, one by one, and JAX has no float64 to add in"

#: Where a library falls short of the table, by library and input, and by how much: where no kernel serves the call.
SHORTFALLS = {
    ("jax", "near-constant"): (
        Tolerance("forward", "float32", 8, f"{_ONE_BY_ONE}: 6.5 units"),
        Tolerance("gradient", "float32", 12, f"{_ONE_BY_ONE}: 9.5 units"),
    ),
}

#: As well, of constants of which one value of each set is far off, in larger sets than those of the case table.
ONE_FAR_OFF = {"jax": Tolerance("forward", "float32", 256, f"{_ONE_BY_ONE}: 183 units with 1024 samples of 4 x 4")}

_ROWS = {(row.quantity, row.dtype): row for row in TABLE}


def tolerance(quantity: str, dtype: str, library: str = "", name: str = "") -> Tolerance:
    """The row of the table for ``quantity`` in ``dtype``, or of a library's shortfall on the input of this name.

    A call that a kernel served has no library's shortfalls.
    """
    for row in SHORTFALLS.get((library, name), ()):
        if (row.quantity, row.dtype) == (quantity, dtype):
            return row
    return _ROWS[quantity, dtype]


def judged(dtype: str) -> bool:
    """Whether the oracle has digits to spare for ``dtype`` on this machine."""
    return EXTENDED or dtype != "float64"


def units(y: Array, reference: Array, dtype: str, scale: Array | None = None) -> float:
    """``max |y - reference| / (UNIT * scale)``: the error, in units of the dtype.

    ``scale`` is ``max |reference|`` unless an array is given that broadcasts with it; where it is zero, 1 stands for
    it, the size of what is normalized, and below the smallest normal number that number. NaN and infinities must stand
    where the reference has them; otherwise the error is infinite. Nothing compared with nothing is 0. Errors below the
    smallest normal number are none, but in float16: processors may flush such numbers to zero.
    """
    y, reference = np.asarray(y, Real), np.asarray(reference, Real)
    if y.shape != reference.shape:
        raise ValueError(f"shapes differ: {y.shape} and the reference's {reference.shape}")
    if y.size == 0:
        return 0.0
    finite = np.isfinite(reference)
    same = np.where(np.isnan(reference), np.isnan(y), y == reference)
    if not (same | finite).all() or not np.isfinite(y[finite]).all():
        return float("inf")
    if scale is None:
        scale = np.abs(reference[finite]).max(initial=0)
    scale = np.broadcast_to(np.asarray(scale, Real), y.shape)
    scale = np.where(scale == 0, 1, np.maximum(scale, Real(TINY[dtype])))
    errors = np.abs(y - reference, where=finite, out=np.zeros_like(y))
    if dtype != "float16":
        errors = np.where(errors < Real(TINY[dtype]), 0, errors)
    return float((errors / (Real(UNIT[dtype]) * scale)).max())
