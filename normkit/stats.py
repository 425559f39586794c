"""Running statistics of batch norm as an immutable value."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _validate as check
from ._dispatch import backend_of
from ._policies import Policies, checked, merged
from .core.normalize import BatchStats

Array = Any

_USUAL = Policies(single_value=None)


class RunningStats(NamedTuple):
    """Mean and variance over the batches so far, one value per channel, and how many batches they come from.

    A NamedTuple of arrays: jit, vmap, torch.func and tf.function carry it as it is. ``update`` returns a new one.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> running = nk.RunningStats(np.zeros(1, np.float32), np.ones(1, np.float32))
    >>> batch = nk.BatchStats(np.ones(1, np.float32), np.full(1, 3, np.float32), 4)
    >>> running = running.update(batch, momentum=0.5)
    >>> running.mean, running.var, running.num_batches
    (array([0.5], dtype=float32), array([2.5], dtype=float32), 1)
    """

    mean: Array
    var: Array
    num_batches: Array | int = 0

    def update(
        self,
        batch_stats: BatchStats,
        momentum: float | None = 0.9,
        unbiased: bool = True,
        *,
        single_value: str | None = None,
        empty_batch: str = "keep",
        nonfinite: str = "propagate",
    ) -> RunningStats:
        """Merge the statistics of one batch.

        ``new = momentum * old + (1 - momentum) * batch``, in the accumulation dtype, rounded to the dtype of the old
        value.

        Parameters
        ----------
        batch_stats : what :func:`normkit.batch_norm_train` returned; a batch (or channel) with no elements changes
            nothing
        momentum : the weight of the old value, in [0, 1] (Keras, Flax, ONNX: the same; torch: 1 - its momentum); None
            weights all batches alike, as torch's ``momentum=None`` does
        unbiased : multiply the batch's variance by n / (n - 1), as in the definition and in torch; False for Keras,
            Flax, ONNX
        single_value : a channel with one element: "zero" and "running" leave its statistics as they are, "raise"
            refuses it, None gives it a variance of zero, or refuses it where ``unbiased``
        empty_batch : a batch without elements changes nothing: "keep", or is refused: "raise"
        nonfinite : statistics with an infinity or NaN are merged like any other: "propagate"; "skip" leaves those of
            such a channel as they are, "raise" refuses them

        Returns
        -------
        RunningStats

        Raises
        ------
        TypeError
            The statistics are of different libraries, or a count is neither an integer nor an array.
        ValueError
            momentum is outside [0, 1], unbiased neither True nor False, a count or a variance (of arrays in host
            memory) negative, the statistics have different shapes, a policy is none of these or refuses the batch; in a
            program that is being traced: "raise" of what has no values yet.

        Notes
        -----
        A batch counts (``num_batches``) where one of its channels does. Counts of elements that are not at hand in host
        memory are not looked at by ``single_value``: a channel with one element is left as it is then.
        """
        policies = _USUAL
        if single_value is not None or empty_batch != "keep" or nonfinite != "propagate":
            policies = checked(Policies(single_value, empty_batch, nonfinite), _USUAL)
        updated = self._merged("RunningStats.update", batch_stats, momentum, unbiased, policies)
        for name, var in (("var", self.var), ("batch_stats.var", batch_stats.var)):
            check.variance(backend_of(name, var), name, var)
        return updated

    def _merged(
        self, owner: str, batch_stats: BatchStats, momentum: float | None, unbiased: bool, policies: Policies
    ) -> RunningStats:
        if momentum is not None:
            momentum = check.fraction("momentum", momentum)
        check.flag("unbiased", unbiased)
        check.batch_statistics(batch_stats)
        check.natural("num_batches", self.num_batches)
        backend, shape = check.array("mean", self.mean)
        shape = tuple(shape)
        check.companion(backend, self.mean, "var", self.var, shape, of="mean")
        check.companion(backend, self.mean, "batch_stats.mean", batch_stats.mean, shape, of="mean")
        check.companion(backend, self.mean, "batch_stats.var", batch_stats.var, shape, of="mean")
        return RunningStats(*merged(owner, backend, self, batch_stats, momentum, unbiased, policies))
