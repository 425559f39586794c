"""How far the distribution of activations has moved between two moments of training, unit by unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit._validate import one_axis, positive_int

from . import _vectors as vectors
from ._record import Record, between, frozen, number

#: As in Ioffe and Szegedy's figure 1.
PERCENTILES = (15, 50, 85)


@dataclass(frozen=True, repr=False, eq=False)
class ActivationShift(Record):
    """The distribution of each of U units after, against that before."""

    #: ``(mean after - mean before) / std before``, [U], in standard deviations.
    mean: np.ndarray
    #: ``std after / std before``, [U], without unit.
    std: np.ndarray
    #: ``KL(before ‖ after)`` of histograms on common bins, to whose counts one is added, [U], in nats.
    kl: np.ndarray
    #: The 15th, 50th and 85th percentile, before and after, [2, 3, U], in units of the activations.
    percentiles: np.ndarray

    def __repr__(self) -> str:
        moved = np.abs(self.mean)
        return (
            f"ActivationShift of {number(self.kl, 'unit')}; in the median and at most:\n"
            f"  mean moved by    {np.median(moved):.3g}, {moved.max():.3g} standard deviations\n"
            f"  deviation times  {np.median(self.std):.3g}, {between(self.std)}\n"
            f"  KL divergence    {np.median(self.kl):.3g}, {self.kl.max():.3g} nats"
        )


def activation_shift(before: Any, after: Any, bins: int = 30, *, axis: int = 1) -> ActivationShift:
    """Compare what units give for the same samples before and after some steps of training.

    Parameters
    ----------
    before, after : arrays of any library, (samples, units) or (samples, channels, *spatial), of as many samples or not
    bins : of the histograms, equal in width from the smallest to the largest value of both
    axis : that of the units; all others are samples

    Returns
    -------
    ActivationShift

    Raises
    ------
    ValueError
        The arrays have fewer than two axes, other units, no samples, or numbers that are not finite.

    Notes
    -----
    Of finitely many samples the divergence is above zero where nothing moved, by about ``bins / samples``.

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> before = np.linspace(-1, 1, 1000)[:, None]
    >>> diagnostics.activation_shift(before, before + 1, bins=4)
    ActivationShift of 1 unit; in the median and at most:
      mean moved by    1.73, 1.73 standard deviations
      deviation times  1, 1
      KL divergence    2.27, 2.27 nats
    """
    bins = positive_int("bins", bins)
    one, two = (_units("before", before, axis), _units("after", after, axis))
    if one.shape[1] != two.shape[1]:
        raise ValueError(
            f"activation_shift compares the same units; before has {one.shape[1]} and after {two.shape[1]}."
        )
    std = one.std(0), two.std(0)
    apart = two.mean(0) - one.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A unit that is constant, and stays so, has not moved.
        mean = np.where(apart == 0, 0.0, apart / std[0])
        ratio = np.where(std[0] == std[1], 1.0, std[1] / std[0])
    percentiles = [np.percentile(x, PERCENTILES, axis=0) for x in (one, two)]
    low, high = np.minimum(one.min(0), two.min(0)), np.maximum(one.max(0), two.max(0))
    p, q = (_histogram(x, low, high, bins) for x in (one, two))
    return ActivationShift(frozen(mean), frozen(ratio), frozen((p * np.log(p / q)).sum(1)), frozen(percentiles))


def _units(name: str, x: Any, axis: int) -> np.ndarray:
    """(samples, units) in float64."""
    a = vectors.host(x)
    if a.ndim < 2 or not a.size:
        raise ValueError(
            f"activation_shift takes {name} as (samples, units) or (samples, channels, ...); received {a.shape}."
        )
    axis = one_axis("axis", axis, a.shape)
    a = np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis])
    if not np.isfinite(a).all():
        raise ValueError(f"activation_shift takes finite numbers; {name} has others.")
    return a


def _histogram(x: np.ndarray, low: np.ndarray, high: np.ndarray, bins: int) -> np.ndarray:
    """(units, bins): shares of the samples, each bin with one sample more."""
    width = np.where(high > low, high - low, 1.0)
    index = np.minimum(((x - low) / width * bins).astype(int), bins - 1) + np.arange(x.shape[1]) * bins
    counts = np.bincount(index.reshape(-1), minlength=x.shape[1] * bins).reshape(-1, bins) + 1.0
    return counts / counts.sum(1, keepdims=True)
