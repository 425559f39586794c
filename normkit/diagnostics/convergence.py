"""How fast errors fall, and the condition numbers that say how fast they can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit._validate import finite

from . import _vectors as vectors
from ._record import Record, frozen
from .gradient_flow import line


@dataclass(frozen=True, repr=False, eq=False)
class Convergence(Record):
    """The line through the logarithms of T errors."""

    #: What an iteration multiplies the error by; below 1 it converges.
    rate: float
    #: The share of the logarithms' variance that the line explains: at 1 convergence is linear.
    r2: float
    #: How many iterations it took to the tolerance; infinite if it was not met.
    iterations: float
    #: [T], in the unit of the errors.
    errors: np.ndarray
    #: In the unit of the errors.
    tolerance: float
    #: How many of the errors the line goes through.
    fitted: int

    def __repr__(self) -> str:
        met = f"{self.iterations:.0f} iterations" if np.isfinite(self.iterations) else "no iteration"
        return (
            f"Convergence: errors {self.errors[0]:.3g} to {self.errors[-1]:.3g}, times {self.rate:.6g} an iteration "
            f"(R² {self.r2:.4f}); {met} to {self.tolerance:.3g}"
        )


def convergence(errors: Any, tolerance: float, *, floor: float = 1e-10) -> Convergence:
    """The linear rate at which errors fall: ``errors[t] ≈ errors[0] * rate**t``, by least squares on logarithms.

    Parameters
    ----------
    errors : numbers >= 0, one for each iteration, such as the loss above its minimum
    tolerance : iterations are counted until an error is no larger
    floor : the line ends before the first error below ``floor * errors[0]``, where rounding is all there is

    Returns
    -------
    Convergence

    Raises
    ------
    ValueError
        There are fewer than two errors (above the floor), or one is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> diagnostics.convergence([1.0, 0.5, 0.25, 0.125], tolerance=0.2)
    Convergence: errors 1 to 0.125, times 0.5 an iteration (R² 1.0000); 3 iterations to 0.2
    """
    found = vectors.host(errors)
    if found.ndim != 1 or len(found) < 2 or not np.isfinite(found).all() or (found < 0).any():
        raise ValueError("convergence takes two numbers >= 0 or more, all finite, along one axis.")
    tolerance, floor = finite("tolerance", tolerance), finite("floor", floor)
    below = np.flatnonzero((found <= floor * found[0]) | (found == 0))
    count = int(below[0]) if len(below) else len(found)
    if count < 2:
        raise ValueError(f"convergence fits a line to errors above zero and the floor; received {count}.")
    slope, r2 = line(np.arange(count), np.log(found[:count]))
    met = np.flatnonzero(found <= tolerance)
    iterations = float(met[0]) if len(met) else np.inf
    return Convergence(float(np.exp(slope)), r2, iterations, frozen(found), tolerance, count)


@dataclass(frozen=True, repr=False, eq=False)
class Conditioning(Record):
    """Extreme eigenvalues above zero of C matrices of least squares, and κ, their ratio."""

    #: λ_max, [C], in squared units of the inputs.
    largest: np.ndarray
    #: λ_min, [C]: the smallest one above zero, as rounding leaves them.
    smallest: np.ndarray
    #: κ = λ_max / λ_min, [C], without unit.
    condition: np.ndarray
    #: How many eigenvalues are above zero, [C].
    rank: np.ndarray
    #: Of what: "inputs", "normalized inputs" and, where y was given, "centred inputs", "normalized output".
    names: tuple[str, ...]

    def __repr__(self) -> str:
        lines = ["Conditioning                κ     λ_min     λ_max  rank"]
        for i, name in enumerate(self.names):
            row = f"{self.condition[i]:9.4g} {self.smallest[i]:9.3g} {self.largest[i]:9.3g} {self.rank[i]:5.0f}"
            lines.append(f"  {name:17} {row}")
        return "\n".join(lines)


def conditioning(x: Any, y: Any = None) -> Conditioning:
    """The condition numbers of least squares on x, before and after normalization.

    "inputs" is of ``H = xᵀx / m``; "normalized inputs" of the same after each feature has mean 0 and variance 1 (batch
    norm of the inputs). With y, "centred inputs" is of ``H = (x - mean)ᵀ(x - mean) / m``, and "normalized output" of
    ``H* = H - Hu uᵀH / (uᵀHu)`` with ``u = H⁻¹ (x - mean)ᵀy / m`` (batch norm of ``x @ w``), whose eigenvalues lie
    between those of H, but for one that is zero: κ(H*) <= κ(H).

    Parameters
    ----------
    x : (samples, features), an array of any library
    y : (samples,), or None

    Returns
    -------
    Conditioning

    Raises
    ------
    ValueError
        x has not two axes, y another length; x has no variance, y nothing to do with it.

    Notes
    -----
    Source: Cai, Li, Shen, "A Quantitative Analysis of the Effect of Batch Normalization on Gradient Descent",
    arXiv:1810.00122.

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> diagnostics.conditioning(np.asarray([[9.0, 1.0], [10.0, 0.0], [11.0, 1.0]]))
    Conditioning                κ     λ_min     λ_max  rank
      inputs                  451     0.224       101     2
      normalized inputs         1         1         1     2
    """
    x = vectors.host(x)
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"conditioning takes x as finite numbers (samples, features); received the shape {x.shape}.")
    centred = x - x.mean(0)
    std = centred.std(0)
    varies = std > np.abs(x).max(0, initial=0) * len(x) * np.finfo("f8").eps
    if not varies.any():
        raise ValueError("conditioning takes features that vary; those of x are constant.")
    matrices = {"inputs": _gram(x), "normalized inputs": _gram(centred[:, varies] / std[varies])}
    if y is not None:
        y = vectors.host(y)
        if y.shape != x.shape[:1]:
            raise ValueError(f"conditioning takes y of the shape {x.shape[:1]}; received {y.shape}.")
        h, g = _gram(centred), centred.T @ (y - y.mean()) / len(x)
        size = g @ np.linalg.pinv(h, rcond=len(h) * np.finfo("f8").eps, hermitian=True) @ g
        if not size > 0:
            raise ValueError("conditioning takes y that x explains in part; it explains nothing of this.")
        matrices["centred inputs"] = h
    values = {name: _above_zero(matrix) for name, matrix in matrices.items()}
    if y is not None:
        rank = len(values["centred inputs"])
        if rank < 2:
            raise ValueError("conditioning takes two features that vary or more with y; received one.")
        # One more of its eigenvalues is zero, but for rounding, which may be large beside H's smallest.
        values["normalized output"] = np.linalg.eigvalsh(h - np.outer(g, g) / size)[1 - rank :]
    ends = np.array([(v[-1], v[0], len(v)) for v in values.values()])
    condition = ends[:, 0] / ends[:, 1]
    return Conditioning(frozen(ends[:, 0]), frozen(ends[:, 1]), frozen(condition), frozen(ends[:, 2]), tuple(values))


def _gram(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


def _above_zero(matrix: np.ndarray) -> np.ndarray:
    values = np.linalg.eigvalsh(matrix)
    return values[values > values[-1] * len(values) * np.finfo("f8").eps]
