"""Internal covariate shift: what a step of the layers before does to the gradient of a layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _vectors as vectors
from ._record import Record, between, frozen, number
from .objective import Evaluations, Objective, alike, known, layer_name


@dataclass(frozen=True, repr=False, eq=False)
class Shift(Record):
    """Of layers 2 to K: the gradient G before the layers in front of each are updated, against G' after."""

    #: ``‖G - G'‖``, [K-1], in nats per unit of the parameters; 0 is no shift.
    l2: np.ndarray
    #: The cosine of the angle between G and G', [K-1], without unit; 1 is no shift.
    cosine: np.ndarray
    #: ``‖G - G'‖ / ‖G‖``, [K-1], without unit.
    relative: np.ndarray
    #: The layers' names.
    layers: tuple[str, ...]

    def __repr__(self) -> str:
        width = max(len(name) for name in self.layers)
        lines = [f"Shift of {number(self.layers, 'layer')}: ‖G - G'‖ {between(self.l2)}, cosine {between(self.cosine)}"]
        shown = range(len(self.layers)) if len(self.layers) <= 12 else sorted(np.argsort(self.cosine)[:12])
        lines.append(f"  {'':{width}}       l2   cosine  relative")
        lines += [
            f"  {self.layers[i]:{width}} {self.l2[i]:8.3g} {self.cosine[i]:8.3f} {self.relative[i]:9.3g}" for i in shown
        ]
        if len(shown) < len(self.layers):
            lines.append(f"  and {len(self.layers) - len(shown)} more, whose cosine is nearer to 1")
        return "\n".join(lines)


def covariate_shift(
    objective: Objective,
    params: Mapping[str, Any],
    layers: Sequence[Sequence[str]],
    updated: Mapping[str, Any],
    *,
    progress: bool | None = None,
) -> Shift:
    """How the gradient of each layer changes when only the layers before it take their step, on the same batch.

    With W_1 ... W_K the layers' parameters and W⁺ those after one step of any optimizer::

        G_i = ∇_{W_i} L(W_1, ..., W_K)        G'_i = ∇_{W_i} L(W_1⁺, ..., W_{i-1}⁺, W_i, ..., W_K)

    Parameters
    ----------
    objective : a pure function from parameters to the loss and its gradients, as :func:`objective` makes
    params : W, arrays by name
    layers : the names of each layer's parameters, layer after layer, as :func:`layers_of` groups them
    updated : W⁺, arrays by the same names
    progress : as in :func:`landscape`

    Returns
    -------
    Shift

    Raises
    ------
    TypeError
        objective or params is of another type.
    ValueError
        The objective is not pure, a loss is not finite, gradients or updated have other names or shapes; a layer names
        a parameter that does not exist or that another layer has, there are fewer than two layers, or the gradient of
        one is zero.
    ImportError
        progress=True, and rich is not installed.

    Notes
    -----
    Source: Santurkar, Tsipras, Ilyas, Madry, "How Does Batch Normalization Help Optimization?", arXiv:1805.11604,
    definition 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> def product(params):
    ...     a, b = params["a"], params["b"]
    ...     return float((a * b).sum()), {"a": b, "b": a}
    >>> params = {"a": np.asarray([2.0]), "b": np.asarray([1.0])}
    >>> updated = {"a": np.asarray([1.0]), "b": np.asarray([-1.0])}
    >>> diagnostics.covariate_shift(product, params, [["a"], ["b"]], updated)
    Shift of 1 layer: ‖G - G'‖ 1, cosine 1
              l2   cosine  relative
      b        1    1.000       0.5
    """
    at = Evaluations("covariate_shift", objective, params)
    groups = _groups(layers, params)
    missing = [name for group in groups for name in group if name not in updated]
    if missing:
        raise ValueError(f"updated of covariate_shift lacks {missing[0]!r}: it has the parameters after a step.")
    for name in itertools.chain(*groups):
        alike(f"updated[{name!r}]", updated[name], params[name], "the parameter")
    mixed = dict(params)
    l2, cosine, relative = [], [], []
    with at.steps(len(groups) - 1, progress) as advance:
        for before, group in itertools.pairwise(groups):
            mixed.update({name: updated[name] for name in before})
            own = vectors.part(at.gradient, group)
            length = vectors.norm(own)
            if not length:
                raise ValueError(
                    f"covariate_shift compares directions, and the gradient of {layer_name(group[0])} is zero."
                )
            _, gradients = at(mixed, f" after the step of the layers before {layer_name(group[0])}")
            new = vectors.part(gradients, group)
            l2.append(vectors.norm(vectors.moved(own, -1.0, new)))
            cosine.append(vectors.cosine(own, new))
            relative.append(l2[-1] / length)
            advance()
    names = tuple(layer_name(group[0]) for group in groups[1:])
    return Shift(frozen(l2), frozen(cosine), frozen(relative), names)


def _groups(layers: Any, params: Mapping[str, Any]) -> list[list[str]]:
    groups = [[group] if isinstance(group, str) else list(group) for group in layers]
    names = [name for group in groups for name in group]
    known("covariate_shift", names, params)
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"covariate_shift takes each parameter in one layer; {twice!r} is in two.")
    if len(groups) < 2 or not all(groups):
        raise ValueError(
            f"covariate_shift takes two layers or more, each with parameters; received {len(groups)}"
            f"{'' if all(groups) else ', one without'}."
        )
    return groups
