"""Running statistics of batch norm as an immutable value."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _validate as check
from .core import running
from .core.normalize import BatchStats

Array = Any


class RunningStats(NamedTuple):
    """Mean and variance over the batches so far, one value per channel, and how many batches they come from.

    A NamedTuple of arrays: jit, vmap, torch.func and tf.function carry it as it is. ``update`` returns a new one.
    """

    mean: Array
    var: Array
    num_batches: Array | int = 0

    def update(self, batch_stats: BatchStats, momentum: float | None = 0.9, unbiased: bool = True) -> RunningStats:
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

        Returns
        -------
        RunningStats

        Raises
        ------
        TypeError
            The statistics are of different libraries.
        ValueError
            momentum is outside [0, 1], the statistics have different shapes, or unbiased is asked of a single value.
        """
        if momentum is not None:
            momentum = check.fraction("momentum", momentum)
        check.batch_statistics(batch_stats)
        backend, shape = check.array("mean", self.mean)
        shape = tuple(shape)
        check.companion(backend, self.mean, "var", self.var, shape, of="mean")
        check.companion(backend, self.mean, "batch_stats.mean", batch_stats.mean, shape, of="mean")
        check.companion(backend, self.mean, "batch_stats.var", batch_stats.var, shape, of="mean")
        check.enough_values(batch_stats.count, unbiased)
        xp = backend.namespace(self.mean)
        return RunningStats(*running.update(xp, *self, batch_stats, momentum, unbiased))
