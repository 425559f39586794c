"""What the loss and its gradients make of the scale of some weights: nothing, where normalization follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _vectors as vectors
from ._record import Record, between, frozen, number
from .objective import Evaluations, Objective, known, steps_of


@dataclass(frozen=True, repr=False, eq=False)
class ScaleResponse(Record):
    """Loss and gradients with N parameters w at F times their size. Scale-invariant ones have a radial part of zero."""

    #: The factors a, [F].
    factor: np.ndarray
    #: L(a w), [F], in nats; infinite where it is not finite. The same as loss0 where L is scale-invariant.
    loss: np.ndarray
    #: ``‖∇L(a w)‖`` of these parameters together, [F], in nats per unit of the parameters; scale-invariant: as 1 / a.
    grad_norm: np.ndarray
    #: ``⟨w, ∇w⟩ / (‖w‖ ‖∇w‖)`` of each parameter, [N], without unit; scale-invariant: 0.
    radial: np.ndarray
    #: ``1 / ‖w‖²`` of each, [N], in inverse squared units of the parameters: how far a learning rate turns w.
    effective_step: np.ndarray
    #: L(w), in nats.
    loss0: float
    #: ``‖∇L(w)‖`` of these parameters together.
    grad_norm0: float
    #: The parameters' names.
    names: tuple[str, ...]

    _derived = ("spread",)

    @property
    def spread(self) -> float:
        """The largest ``|L(a w) - L(w)|``, in nats: 0 is scale-invariant."""
        return float(np.abs(self.loss - self.loss0).max())

    def __repr__(self) -> str:
        lines = [
            f"ScaleResponse: {number(self.names, 'parameter')} at {between(self.factor)} times their size",
            f"  loss             {self.loss0:.4g}, changed by {self.spread:.2g} at most",
            f"  |a| ‖∇L(a w)‖    {between(np.abs(self.factor) * self.grad_norm / self.grad_norm0)} of what it is at 1",
            "                   radial   1 / ‖w‖²",
        ]
        order = np.argsort(-np.abs(self.radial))[:12]
        lines += [f"  {self.radial[i]:23.2g} {self.effective_step[i]:10.3g}  {self.names[i]}" for i in order]
        return "\n".join(lines + [f"  and {len(self.names) - 12} more"] * (len(self.names) > 12))


def scale_response(
    objective: Objective,
    params: Mapping[str, Any],
    names: Sequence[str],
    factors: Any,
    *,
    progress: bool | None = None,
) -> ScaleResponse:
    """Multiply some parameters by each factor, and look at the loss and at their gradients.

    The weights w before a batch norm (with their bias, or where it is zero) are scale-invariant but for eps:
    ``L(a w) = L(w)``, so ``∇L(a w) = ∇L(w) / a`` and ``⟨w, ∇L(w)⟩ = 0``.

    Parameters
    ----------
    objective : a pure function from parameters to the loss and its gradients, as :func:`objective` makes
    params : arrays by name
    names : of the N parameters that are scaled together
    factors : F numbers, not zero
    progress : as in :func:`landscape`

    Returns
    -------
    ScaleResponse

    Raises
    ------
    TypeError
        objective or params is of another type.
    ValueError
        The objective is not pure, its loss is not finite, its gradients have other names or shapes; a name does not
        exist, a parameter or its gradient is zero, a factor is zero or not finite.
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
    >>> diagnostics.scale_response(half_square, params, ["w"], [0.5, 2])
    ScaleResponse: 1 parameter at 0.5 to 2 times their size
      loss             5, changed by 15 at most
      |a| ‖∇L(a w)‖    0.25 to 4 of what it is at 1
                       radial   1 / ‖w‖²
                         0.78        0.5  w
    """
    factors = steps_of("scale_response", "factors", factors)
    if (factors == 0).any():
        raise ValueError("factors of scale_response must not be zero: weights of zero have no scale.")
    names = (names,) if isinstance(names, str) else tuple(names)
    at = Evaluations("scale_response", objective, params)
    known("scale_response", names, params)
    if not names:
        raise ValueError("names of scale_response must be those of one parameter or more; received none.")
    radial, effective = [], []
    for name in names:
        w, gradient = vectors.part(params, [name]), vectors.part(at.gradient, [name])
        length = vectors.norm(w)
        if not length or not vectors.norm(gradient):
            raise ValueError(
                f"scale_response looks at directions, and {'the gradient of ' * bool(length)}{name} is zero."
            )
        radial.append(vectors.cosine(w, gradient))
        effective.append(1 / length**2)
    loss, grad_norm = [], []
    with at.steps(len(factors), progress) as advance:
        for factor in factors:
            there, gradients = at.beyond({**params, **vectors.scaled(vectors.part(params, names), float(factor))})
            size = vectors.norm(vectors.part(gradients, names))
            finite = np.isfinite(there) and np.isfinite(size)
            loss.append(there if finite else np.inf)
            grad_norm.append(size if finite else np.inf)
            advance()
    own = vectors.norm(vectors.part(at.gradient, names))
    return ScaleResponse(
        frozen(factors), frozen(loss), frozen(grad_norm), frozen(radial), frozen(effective), at.loss, own, names
    )
