"""Fold a model's batch norms into the layers beside them, and see whether it still computes the same."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from . import _validate as check
from ._batches import Call, call_with
from ._dispatch import describe
from ._report import NormLayer, Report, kind_of, named
from .backends.models import Folds, Pair, models_of, original_of
from .core import folding

#: A pair, and the weight and bias that its linear layer would get.
Trial = tuple[Pair, Any, Any]
#: How far something is off, as a share of the largest value, and the eps of its dtype.
Error = tuple[float, float]


def fold(model: Any, sample: Any, *, call: Call | None = None, tolerance: float | None = None) -> Report:
    """Fold every batch norm into the convolution or linear layer beside it, for inference.

    With ``scale = weight / sqrt(var + eps)`` and ``shift = bias - mean * scale``, a norm after the layer ``W x + b`` is
    ``(scale W) x + (scale b + shift)``; one before it is ``(W scale) x + (b + W shift)``. Weights are computed in
    float64. The sample is run to see which output goes where, and run again in the end: a model that would compute
    something else is left as it was. In a norm's place stands nothing, or the activation that was part of it.

    Parameters
    ----------
    model : a torch.nn.Module in ``eval()`` or a keras.Layer, which is changed in place
    sample : a batch that the model takes: a mapping is passed by name, of a tuple or list the first element
    call : ``call(model, sample)``, for a model that is called in another way
    tolerance : how far an output may be off, as a share of the largest; by default half of the dtype's digits, the root
        of its eps (float32: 3.5e-4)

    Returns
    -------
    Report
        What was folded into which layer; what was left and why (an output that goes elsewhere as well, a layer that is
        called twice, zeros padded between norm and convolution, hooks); how far the outputs are from what they were.

    Raises
    ------
    TypeError
        model is of no framework whose batch norms can be folded.
    ValueError
        The model has no batch norm or a layer in training mode; it is compiled, scripted, exported or quantized; its
        outputs would be off: nothing is changed then. tolerance is negative or NaN.

    Examples
    --------
    >>> import torch
    >>> import normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> report = nk.fold(model, torch.randn(2, 3, 16, 16))
    >>> report.changed[0].into
    '0'
    >>> model[1]
    Identity()
    """
    if tolerance is not None and not check.number("tolerance", tolerance) >= 0:
        raise ValueError(f"tolerance must be >= 0; received {tolerance}.")
    folds = models_of(model)
    if not isinstance(folds, Folds):
        raise TypeError(f"fold takes a torch.nn.Module or a keras.Layer; received {describe(model)}.")
    folds.refuse(model, "fold")
    title = type(model).__name__
    names = {id(layer): found for layer, found in named(folds, model)}
    for layer, found in named(folds, model):
        if folds.training(layer):
            where = found[0] or "it"
            raise ValueError(f"fold wants a model for inference; {where} is in training mode: call eval() first.")

    def run() -> Any:
        return (call or call_with)(model, sample)

    def entry(norm: Any, reason: str = "", into: str = "") -> NormLayer:
        first, *others = names[id(norm)]
        return NormLayer(first, kind_of(original_of(norm) or type(norm)), reason, tuple(others), into)

    before = folds.outputs(model, run)
    if not before:
        raise ValueError(f"fold found no floating-point array in what {title} returned.")
    folded: list[NormLayer] = []
    off: dict[int, NormLayer] = {}
    with contextlib.ExitStack() as undo:
        while True:
            pairs = folds.pairs(model, run)
            if not pairs and not folded:
                raise ValueError(f"fold found no batch norm in {title}, which has {len(names)} layers.")
            trials = _trials(folds, [pair for norm, pair in pairs if isinstance(pair, Pair) and id(norm) not in off])
            if not trials:
                break
            for (pair, weight, bias), error in zip(trials, folds.errors(model, run, trials), strict=True):
                into = names[id(pair.linear)][0]
                if _within(error, tolerance):
                    folded.append(entry(pair.norm, into=into))
                    undo.callback(folds.put(model, pair, weight, bias))
                else:
                    reason = f"{into} would be off by {error[0]:.2g} of its largest output"
                    off[id(pair.norm)] = entry(pair.norm, reason)
        worst = _worst(before, folds.outputs(model, run))
        if not _within(worst, tolerance):
            raise ValueError(
                f"fold left {title} as it was: with {len(folded)} norms folded, its output would be off by "
                f"{worst[0]:.2g} of the largest."
            )
        undo.pop_all()
    left = tuple(off.get(id(norm)) or entry(norm, str(reason)) for norm, reason in pairs)
    return Report(title, "folded", tuple(folded), left, worst[0])


def _trials(folds: Folds, pairs: list[Pair]) -> list[Trial]:
    """New weights, one pair for each linear layer, whose other norm has its turn in the next round."""
    first: dict[int, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: not pair.after):
        first.setdefault(id(pair.linear), pair)
    return [(pair, *_folded(folds, pair)) for pair in first.values()]


def _folded(folds: Folds, pair: Pair) -> tuple[Any, Any]:
    with np.errstate(all="ignore"):  # what is not finite is seen by its error
        scale, shift = folding.affine(np, *folds.norm(pair))
        return (folding.after if pair.after else folding.before)(np, *folds.linear(pair), scale, shift)


def _within(error: Error, tolerance: float | None) -> bool:
    """Whether an error is tolerated."""
    return error[0] <= (error[1] ** 0.5 if tolerance is None else tolerance)


def _worst(before: list[tuple[Any, float]], after: list[tuple[Any, float]]) -> Error:
    """The largest error of all outputs, in terms of what is tolerated of each."""
    errors = [(difference(a, b), eps) for (a, eps), (b, _) in zip(before, after, strict=True)]
    return max(errors, key=lambda error: error[0] / error[1] ** 0.5)


def difference(a: Any, b: Any) -> float:
    """``max |a - b| / max |a|``; infinite where one is not finite and the other is something else."""
    if a.shape != b.shape:
        return float("inf")
    differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
    if not (np.isfinite(a[differ]).all() and np.isfinite(b[differ]).all()):
        return float("inf")
    apart = np.abs(a[differ] - b[differ]).max(initial=0.0)
    largest = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    return float(apart / largest) if largest else float("inf" if apart else 0)
