"""Running statistics against precise ones, channel by channel; of whole models in normkit/_population.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit._batches import Batches
from normkit._dispatch import describe
from normkit.core.normalize import BatchStats
from normkit.core.population import Population, of_channels

from . import _vectors as vectors
from ._record import Record, between, frozen, number


@dataclass(frozen=True, repr=False, eq=False)
class ChannelGap(Record):
    """How far running statistics are from precise ones in each of C channels, both with eps added to the variance."""

    #: ``KL(precise ‖ running)`` of the normal distributions with these means and variances, [C], in nats.
    kl: np.ndarray
    #: ``(running mean - precise mean) / precise deviation``, [C], in standard deviations.
    mean: np.ndarray
    #: ``running variance / precise variance``, [C], without unit.
    var: np.ndarray

    def __repr__(self) -> str:
        return (
            f"ChannelGap of {number(self.kl, 'channel')}\n"
            f"  means            off by {np.abs(self.mean).max():.3g} standard deviations at most\n"
            f"  variances        {between(self.var)} times\n"
            f"  KL divergence    {np.median(self.kl):.3g} nats in the median, {self.kl.max():.3g} at most"
        )


def channel_gap(running: Any, precise: Any, eps: float) -> ChannelGap:
    """Of ``(mean, var, ...)`` each, arrays of one length."""
    named = []
    for name, statistics in (("running", running), ("precise", precise)):
        if not isinstance(statistics, (tuple, list)) or len(statistics) < 2:
            raise TypeError(
                f"statistics_gap takes {name} statistics as (mean, var), RunningStats or BatchStats; received "
                f"{describe(statistics)}."
            )
        mean, var = (vectors.host(a).reshape(-1) for a in statistics[:2])
        if mean.shape != var.shape or not mean.size:
            raise ValueError(
                f"statistics_gap takes a mean and a variance for each channel; {name} has {len(mean)} and {len(var)}."
            )
        if not (var + eps > 0).all() or not np.isfinite(mean).all() or not np.isfinite(var).all():
            raise ValueError(f"statistics_gap takes finite statistics with var + eps > 0; {name} has others.")
        named.append((mean, var + eps))
    (mean, var), (to_mean, to_var) = named
    if mean.shape != to_mean.shape:
        raise ValueError(
            f"statistics_gap compares the same channels; running has {len(mean)} and precise {len(to_mean)}."
        )
    return between_statistics(mean, var, to_mean, to_var)


def between_statistics(mean: np.ndarray, var: np.ndarray, to_mean: np.ndarray, to_var: np.ndarray) -> ChannelGap:
    """The gap of running statistics to precise ones, whatever they are."""
    with np.errstate(all="ignore"):
        apart, ratio = (mean - to_mean) / np.sqrt(to_var), var / to_var
        kl = (np.log(ratio) + (1 + apart**2) / ratio - 1) / 2
    return ChannelGap(frozen(kl), frozen(apart), frozen(ratio))


def precise_statistics(batches: Iterable[Any], axis: int = 1) -> BatchStats:
    """Mean and variance of the channels over all batches together, in float64, each value weighing the same.

    Counts, means and sums of squared deviations are merged, so that nothing of what is between batches is lost::

        mean = Σ n_k mean_k / n        var = Σ n_k (var_k + (mean_k - mean)²) / n,  n = Σ n_k

    Parameters
    ----------
    batches : arrays of any library with the same channels, of any lengths
    axis : the channel axis

    Returns
    -------
    BatchStats
        mean, var (divided by n) and count, NumPy arrays.

    Raises
    ------
    TypeError
        batches is not iterable.
    ValueError
        There are no batches, or batches have other channels.

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> diagnostics.precise_statistics([np.asarray([[1.0], [3.0]]), np.asarray([[5.0]])])
    BatchStats(mean=array([3.]), var=array([2.66666667]), count=3)
    """
    total = Population()
    for batch in Batches("precise_statistics", batches).once(lambda: None):
        found = of_channels(np, vectors.host(batch), axis)
        if total.count and found.count and total.mean.shape != found.mean.shape:
            raise ValueError(
                f"precise_statistics takes batches with the same channels; received {len(total.mean)}, then "
                f"{len(found.mean)}."
            )
        total = total.merge(found)
    if not total.count:
        raise ValueError("precise_statistics takes batches with values; all are empty.")
    return BatchStats(total.mean, total.var(unbiased=False), total.count)
