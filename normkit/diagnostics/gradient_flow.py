"""Whether gradients vanish or explode on their way back through the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit._dispatch import describe

from . import _vectors as vectors
from ._record import Record, between, frozen, number
from .objective import known, layer_name


@dataclass(frozen=True, repr=False, eq=False)
class Flow(Record):
    """Norms of the gradients of L layers, from the first layer to the last, and the line through their logarithms."""

    #: [L], in nats per unit of the parameters.
    norms: np.ndarray
    #: How much the logarithm of the norm grows per layer, going back: positive explodes, negative vanishes; in nats.
    growth: float
    #: The share of the variance of the logarithms that the line explains: at 1 the growth is exponential.
    r2: float
    #: The layers' names.
    layers: tuple[str, ...]

    def __repr__(self) -> str:
        verb = "explodes" if self.growth > 0 else "vanishes"
        total = abs(self.growth) * (len(self.norms) - 1) / np.log(10)
        return (
            f"Flow through {number(self.norms, 'layer')}: norms {between(self.norms)}\n"
            f"  first {self.norms[0]:.3g} ({self.layers[0]}), last {self.norms[-1]:.3g} ({self.layers[-1]})\n"
            f"  going back it {verb} by {abs(self.growth):.3g} nats per layer, {total:.2g} decades in all; "
            f"R² {self.r2:.2f}"
        )


def gradient_flow(gradients: Mapping[str, Any], layers: Sequence[Sequence[str]] | None = None) -> Flow:
    """The norm of each layer's gradient, and how it grows from layer to layer, going back.

    ``growth`` is minus the slope of the least-squares line through ``log(norms)`` over 0, 1, ..., L - 1. Compare like
    with like: gradients of weights (arrays with two axes or more), or of what passes between the layers.

    Parameters
    ----------
    gradients : arrays by name, from the first layer to the last: what an objective returns, or some of it
    layers : the names that go together, as :func:`layers_of` groups them; None takes each array by itself

    Returns
    -------
    Flow

    Raises
    ------
    TypeError
        gradients is no dict.
    ValueError
        There are fewer than two layers, one names what does not exist, or a gradient is zero or not finite.

    Notes
    -----
    At initialization, in the mean field of wide ReLU networks, batch norm makes gradients grow by a factor
    sqrt(π / (π - 1)) per layer, 0.19 nats. Source: Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz, "A Mean Field
    Theory of Batch Normalization", arXiv:1902.08129.

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> diagnostics.gradient_flow({"first": np.asarray([4.0]), "second": np.asarray([2.0]), "third": np.asarray([1.0])})
    Flow through 3 layers: norms 1 to 4
      first 4 (first), last 1 (third)
      going back it explodes by 0.693 nats per layer, 0.6 decades in all; R² 1.00
    """
    if not isinstance(gradients, Mapping):
        raise TypeError(f"gradient_flow takes a dict from names to arrays; received {describe(gradients)}.")
    groups = [[name] for name in gradients] if layers is None else [list(group) for group in layers]
    known("gradient_flow", [name for group in groups for name in group], gradients)
    if len(groups) < 2:
        raise ValueError(f"gradient_flow takes the gradients of two layers or more; received {len(groups)}.")
    names = tuple(group[0] if layers is None else layer_name(group[0]) for group in groups)
    norms = frozen([vectors.norm(vectors.part(gradients, group)) for group in groups])
    for name, value in zip(names, norms, strict=True):
        if not value or not np.isfinite(value):
            what = "zero, and has no logarithm: leave the layer out" if not value else "not finite"
            raise ValueError(f"gradient_flow takes gradients above zero; that of {name} is {what}.")
    slope, r2 = line(np.arange(len(norms)), np.log(norms))
    return Flow(norms, -slope, r2, names)


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The slope of the least-squares line, and the share of y's variance that it explains."""
    x, y = x - x.mean(), y - y.mean()
    slope, total = float(x @ y / (x @ x)), float(y @ y)
    rest = y - slope * x
    return slope, 1.0 - float(rest @ rest) / total if total else 1.0
