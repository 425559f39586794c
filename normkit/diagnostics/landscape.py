"""The loss and its gradient along one direction: how far a step can go before they are others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit._dispatch import describe

from . import _vectors as vectors
from ._record import Record, between, frozen, number
from .objective import Evaluations, Objective, known, steps_of


@dataclass(frozen=True, repr=False, eq=False)
class Landscape(Record):
    """The loss L and its gradient g at ``θ - step * direction``, for S steps. The loss is in nats where it is entropy.

    Where the loss is not finite, loss and change are infinite.
    """

    #: The steps, [S]: learning rates, where the direction is the gradient.
    step: np.ndarray
    #: How far that is from θ, [S], in units of the parameters: ``step * ‖direction‖``.
    distance: np.ndarray
    #: L there, [S], in nats.
    loss: np.ndarray
    #: ``‖g(θ) - g(θ - step * direction)‖``, [S], in nats per unit of the parameters.
    change: np.ndarray
    #: L(θ), in nats.
    loss0: float
    #: ``‖g(θ)‖``, in nats per unit of the parameters.
    grad_norm: float

    _derived = ("variation", "predictiveness", "smoothness", "beta", "relative_change")

    @property
    def variation(self) -> float:
        """The range of the loss over the steps, in nats."""
        return _range(self.loss)

    @property
    def predictiveness(self) -> float:
        """The range of the change of the gradient over the steps, in nats per unit of the parameters."""
        return _range(self.change)

    @property
    def smoothness(self) -> np.ndarray:
        """``change / distance``, [S], in nats per squared unit of the parameters."""
        return self.change / self.distance

    @property
    def beta(self) -> float:
        """The largest smoothness: "effective β". It depends on the parameters' scale, relative_change does not."""
        return float(self.smoothness.max())

    @property
    def relative_change(self) -> np.ndarray:
        """``change / ‖g(θ)‖``, [S], without unit: at 1, the gradient here says nothing of the gradient there."""
        return self.change / self.grad_norm

    def __repr__(self) -> str:
        return (
            f"Landscape: {number(self.step, 'step')}, {between(self.step)}\n"
            f"  loss             {self.loss0:.4g} here, {between(self.loss)} there\n"
            f"  gradient         norm {self.grad_norm:.3g}, changed by {between(self.relative_change)} of that\n"
            f"  smoothness       {between(self.smoothness)}"
        )


def landscape(
    objective: Objective,
    params: Mapping[str, Any],
    steps: Any,
    direction: Mapping[str, Any] | str | None = None,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Landscape:
    """Walk from the parameters θ against the gradient, and look at the loss and the gradient there.

    ``loss[s] = L(θ - steps[s] * direction)``, ``change[s] = ‖g(θ) - g(θ - steps[s] * direction)‖``. Compare models at
    equal loss, and by relative_change: weights that batch norm follows can have any scale, and smoothness goes by it.

    Parameters
    ----------
    objective : a pure function from parameters to the loss and its gradients, as :func:`objective` makes
    params : θ, arrays by name
    steps : S numbers, not zero; with the gradient as direction, learning rates
    direction : arrays by the names of the parameters; "random" for normal numbers with the gradient's norm; None for
        the gradient
    seed : of the random direction, whose numbers are drawn in the order and shapes of params
    progress : whether to show a progress bar (rich's) on standard error; None: where it takes more than a second, on a
        terminal, if rich is installed

    Returns
    -------
    Landscape

    Raises
    ------
    TypeError
        objective, params or direction is of another type.
    ValueError
        The objective is not pure, its loss at θ is not finite, its gradients have other names or shapes; the gradient
        is zero, steps are not finite or zero.
    ImportError
        progress=True, and rich is not installed.

    Notes
    -----
    Source: Santurkar, Tsipras, Ilyas, Madry, "How Does Batch Normalization Help Optimization?", arXiv:1805.11604,
    section 3.1, where steps are 1/2 to 4 learning rates.

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> def half_square(params):  # curvature 1 and 9
    ...     w, scale = params["w"], np.asarray([1.0, 9.0])
    ...     return float((scale * w * w).sum() / 2), {"w": scale * w}
    >>> params = {"w": np.asarray([1.0, 1.0])}
    >>> diagnostics.landscape(half_square, params, steps=[0.1, 0.2])
    Landscape: 2 steps, 0.1 to 0.2
      loss             5 here, 0.45 to 3.2 there
      gradient         norm 9.06, changed by 0.895 to 1.79 of that
      smoothness       8.95
    """
    steps = steps_of("landscape", "steps", steps)
    if (steps == 0).any():
        raise ValueError("steps of landscape must not be zero: smoothness is the change over the distance.")
    at = Evaluations("landscape", objective, params)
    at.needs_gradient("θ is a stationary point, where a landscape along the gradient has no extent")
    along = _direction(at, direction, seed)
    length = vectors.norm(along)
    if not length or not np.isfinite(length):
        raise ValueError(f"direction of landscape must have a finite norm above zero; received one of {length}.")
    loss, change = [], []
    with at.steps(len(steps), progress) as advance:
        for step in steps:
            there, gradient = at.beyond(vectors.moved(at.params, -float(step), along))
            apart = vectors.norm(vectors.moved(at.gradient, -1.0, gradient))
            finite = np.isfinite(there) and np.isfinite(apart)
            loss.append(there if finite else np.inf)
            change.append(apart if finite else np.inf)
            advance()
    distance = np.abs(steps) * length
    return Landscape(frozen(steps), frozen(distance), frozen(loss), frozen(change), at.loss, at.norm)


def _direction(at: Evaluations, direction: Any, seed: int) -> Mapping[str, Any]:
    if direction is None:
        return at.gradient
    if isinstance(direction, str) and direction == "random":
        return vectors.random(at.params, at.norm, seed)
    if not isinstance(direction, Mapping):
        raise TypeError(f'direction of landscape must be a dict, "random" or None; received {describe(direction)}.')
    known("landscape", list(direction), at.params)
    # Parameters that it does not name stay.
    still = {name: a * 0 for name, a in at.params.items() if name not in direction}
    return {name: direction[name] if name in direction else still[name] for name in at.params}


def _range(values: np.ndarray) -> float:
    return float(values.max() - values.min()) if np.isfinite(values).all() else float("inf")
