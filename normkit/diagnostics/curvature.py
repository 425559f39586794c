"""The extreme eigenvalues of the Hessian, from differences of gradients alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit._validate import positive_int

from . import _vectors as vectors
from ._record import Record, frozen
from .objective import Evaluations, Objective


@dataclass(frozen=True, repr=False, eq=False)
class Curvature(Record):
    """Ritz values of the Hessian H of the loss, in nats per squared unit of the parameters."""

    #: The largest.
    largest: float
    #: The smallest: negative where the loss curves down.
    smallest: float
    #: All of them, ascending, [k] or fewer.
    ritz: np.ndarray
    #: ``‖Hv - ritz v‖`` of each, [k]: an eigenvalue of H is at most so far away.
    residual: np.ndarray

    def __repr__(self) -> str:
        return (
            f"Curvature: eigenvalues {self.smallest:.4g} to {self.largest:.4g}, within {self.residual[0]:.1g} and "
            f"{self.residual[-1]:.1g}, of {len(self.ritz)} Ritz values"
        )


def curvature(
    objective: Objective,
    params: Mapping[str, Any],
    k: int = 20,
    *,
    radius: float | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> Curvature:
    """The largest and the smallest eigenvalue of the Hessian H, by Lanczos with full reorthogonalization.

    Products with H are central differences: ``Hv = (g(θ + r v) - g(θ - r v)) / 2r`` for ``‖v‖ = 1``. Power iteration
    would find the eigenvalue of the largest magnitude, of either sign. It holds k + 3 copies of the parameters.

    Parameters
    ----------
    objective : a pure function from parameters to the loss and its gradients, as :func:`objective` makes
    params : θ, arrays by name
    k : how many steps, each with two calls; the extreme eigenvalues are there first, see ``residual``
    radius : r, in units of the parameters; None: the cube root of a unit in the last place, times ‖θ‖ (1 where that is
        zero), which errs least
    seed : start at normal numbers; None: at the gradient, whose direction is the same in every framework
    progress : as in :func:`landscape`

    Returns
    -------
    Curvature

    Raises
    ------
    TypeError
        objective or params is of another type.
    ValueError
        The objective is not pure, a loss is not finite, gradients have other names or shapes; the gradient is zero and
        no seed given, k is no positive integer, radius is not positive.
    ImportError
        progress=True, and rich is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> def half_square(params):  # curvature 1 and 9
    ...     w, scale = params["w"], np.asarray([1.0, 9.0])
    ...     return float((scale * w * w).sum() / 2), {"w": scale * w}
    >>> params = {"w": np.asarray([1.0, 1.0])}
    >>> found = diagnostics.curvature(half_square, params, k=2)
    >>> round(found.smallest, 6), round(found.largest, 6)
    (1.0, 9.0)
    """
    k = positive_int("k", k)
    if radius is not None and not 0 < radius < np.inf:
        raise ValueError(f"radius of curvature must be a finite number above zero; received {radius!r}.")
    at = Evaluations("curvature", objective, params)
    unit = vectors.unit(params)
    if radius is None:
        radius = unit ** (1 / 3) * (vectors.norm(params) or 1.0)
    if seed is None:
        at.needs_gradient("pass a seed to start elsewhere")
        start: Any = vectors.scaled(at.gradient, 1 / at.norm)
    else:
        start = vectors.random(params, 1.0, seed)

    def product(v: Any) -> Any:
        (_, ahead), (_, behind) = (at(vectors.moved(params, sign * radius, v), " near θ") for sign in (1, -1))
        return vectors.scaled(vectors.moved(ahead, -1.0, behind), 0.5 / radius)

    count = min(k, sum(int(np.prod(a.shape)) for a in params.values()))
    basis, diagonal, beside = [start], [], []
    with at.steps(2 * count, progress) as advance:
        for _ in range(count):
            w = product(basis[-1])
            advance()
            advance()
            diagonal.append(vectors.dot(w, basis[-1]))
            # Twice is enough: what one pass leaves is rounding.
            for _ in range(2):
                for q in basis:
                    w = vectors.moved(w, -vectors.dot(w, q), q)
            beside.append(vectors.norm(w))
            # The rest is the error of the differences: the space that the start reaches is exhausted.
            if beside[-1] <= 10 * unit ** (2 / 3) * max(np.abs([*diagonal, *beside[:-1]])):
                break
            basis.append(vectors.scaled(w, 1 / beside[-1]))
    tridiagonal = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    values, weights = np.linalg.eigh(tridiagonal)
    residual = beside[-1] * np.abs(weights[-1])
    return Curvature(float(values[-1]), float(values[0]), frozen(values), frozen(residual))
