"""The batch norm layer: running statistics, policies and schedules over the functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import _schedules as schedules
from . import _validate as check
from . import _validate_layer as check_layer
from . import functional, variants
from ._layer import Array, Layer, namespace
from ._policies import USUAL, Policed, batch_norm
from ._schedules import Bound
from .stats import RunningStats


class _Default(float):
    """A default, told from the same number given by the user."""


_MOMENTUM = _Default(0.9)


class BatchNorm(Policed, Layer):
    """Batch normalization: channels by the statistics of the batch in training, by running statistics in inference.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, as :func:`normkit.batch_norm_train` after ``train()`` (where a
    layer starts), with ``running = momentum * running + (1 - momentum) * batch``, and as :func:`normkit.batch_norm`
    after ``eval()``.

    Parameters
    ----------
    num_features : the length of x's channel axis, and of weight, bias and statistics
    axis : the channel axis
    eps : a number >= 0, added to the variance
    momentum : the weight of the old statistics, in [0, 1]; None weights all batches alike
    update_rate : in the place of momentum, the weight of the new statistics
    unbiased : running statistics hold the variance divided by n - 1; False: by n
    single_value : one value per channel, which has no variance: "raise"; normalize by the "running" statistics;
        "zero": y is exactly the bias. The running statistics stay as they are. With a mask it holds for each channel;
        where its counts are not at hand (traced, or not in host memory), "raise" is as "zero"
    empty_batch : a batch without elements leaves the running statistics as they are: "keep", or is refused: "raise"
    nonfinite : statistics with an infinity or NaN are merged like any other: "propagate"; "skip" leaves those of such
        a channel as they are; "raise" refuses the batch
    use_batch_stats : normalize by the statistics of the batch, in either mode; False: by the running ones; None: in
        training by the batch, in inference by the running ones
    update_stats : merge the statistics of the batch into the running ones, in either mode; False: do not; None: in
        training, where those of the batch are used
    virtual_batch_size : in training, normalize so many samples after each other as a batch of their own; the running
        statistics are those of the whole batch
    r_max, d_max : in training, batch renormalization (:func:`normkit.batch_renorm_train`) by the running statistics
        within these bounds: numbers, pairs ``((num_batches, bound), ...)`` with straight lines between them, or
        functions of num_batches. None for one of them: 1 or 0; for both: batch norm
    affine, bias, train_affine, dtype, device, backend : as :class:`LayerNorm`; the statistics are at least float32

    Attributes
    ----------
    running : RunningStats(mean, var, num_batches), replaced by every call in training that succeeds and has elements

    Raises
    ------
    TypeError, ValueError, ImportError
        As :class:`LayerNorm`; also where momentum and update_rate are both given.

    Notes
    -----
    ============  =========================  ========================  ======================  ====================
    here          torch.nn.BatchNorm2d       keras BatchNormalization  flax.nnx.BatchNorm      ONNX
    ============  =========================  ========================  ======================  ====================
    num_features  num_features               (from the input)          num_features            (from the input)
    axis          1                          axis = -1                 axis = -1               1
    eps           eps = 1e-5                 epsilon = 1e-3            epsilon = 1e-5          epsilon = 1e-5
    momentum      1 - momentum; None         momentum = 0.99           momentum = 0.99         momentum = 0.9
    update_rate   momentum = 0.1             1 - momentum              1 - momentum            1 - momentum
    unbiased      True                       False                     False                   False
    affine, bias  affine                     scale, center             use_scale, use_bias     (always)
    weight        weight                     gamma                     scale                   scale
    bias          bias                       beta                      bias                    B
    running.mean  running_mean               moving_mean               mean                    input_mean
    running.var   running_var                moving_variance           var                     input_var
    ============  =========================  ========================  ======================  ====================

    Each switch by itself, and together (blank: the default):

    =================================  ===============  ============  ============  =================================
    .                                  use_batch_stats  update_stats  train_affine  elsewhere
    =================================  ===============  ============  ============  =================================
    statistics frozen                  False                                        torch eval(), use_running_average
    frozen batch norm                  False                          False         torchvision's, trainable = False
    affine part frozen                                                False         requires_grad_(False)
    by the batch, untracked            True             False                       track_running_stats = False
    adaptive batch norm, in inference  True             True          False         torch train() of the layer
    running ones, which follow         False            True                        (none)
    =================================  ===============  ============  ============  =================================

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> layer = nk.BatchNorm(2)
    >>> x = np.asarray([[1, 10], [3, 20]], dtype=np.float32)
    >>> layer(x).round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.running
    RunningStats(mean=array([0.2, 1.5], dtype=float32), var=array([1.1, 5.9], dtype=float32), num_batches=1)
    >>> layer.eval()(x).round(3)
    array([[0.763, 3.499],
           [2.67 , 7.616]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM,
        update_rate: float | None = None,
        unbiased: bool = True,
        single_value: str = "raise",
        empty_batch: str = "keep",
        nonfinite: str = "propagate",
        use_batch_stats: bool | None = None,
        update_stats: bool | None = None,
        virtual_batch_size: int | None = None,
        r_max: Bound = None,
        d_max: Bound = None,
        affine: bool = True,
        bias: bool = True,
        train_affine: bool = True,
        dtype: Any = "float32",
        device: Any = None,
        backend: Any = "numpy",
    ) -> None:
        self.num_features = check.positive_int("num_features", num_features)
        self.momentum = check_layer.momentum(momentum, update_rate, default=_MOMENTUM)
        self.unbiased = check.flag("unbiased", unbiased)
        self.virtual_batch_size, self.r_max, self.d_max = schedules.checked(virtual_batch_size, r_max, d_max)
        self._set_policies(
            single_value=single_value,
            empty_batch=empty_batch,
            nonfinite=nonfinite,
            use_batch_stats=use_batch_stats,
            update_stats=update_stats,
        )
        super().__init__((self.num_features,), axis, eps, affine, bias, dtype, device, backend, train_affine)
        wide = "float64" if self.dtype == "float64" else "float32"
        self.running = RunningStats(*(self._filled(start, wide, device, backend) for start in (0.0, 1.0)))

    def _run(self, run, x, **valid):
        options = {"axis": self._axes[0], "eps": self.eps, **valid}
        mean, var, _ = self.running
        train, affine = self._training(), self._affine()
        if self._policies is not USUAL:
            y, stats, pullback = batch_norm(self._policies, self.training, run, train, x, mean, var, *affine, **options)
        elif self.training:
            (y, stats), pullback = run(train, x, *affine, **options)
        else:
            return run(functional.batch_norm, x, mean, var, *affine, **options)
        if stats is not None:
            self.running = self.running._merged("BatchNorm", stats, self.momentum, self.unbiased, self._policies)
        return y, pullback

    def _training(self) -> Callable:
        """The function that normalizes by the batch."""
        if self.virtual_batch_size is not None:
            return functools.partial(functional.batch_norm_train, virtual_batch_size=self.virtual_batch_size)
        if self.r_max is None and self.d_max is None:
            return functional.batch_norm_train
        mean, var, seen = self.running
        bounds = {"r_max": schedules.at(self.r_max, seen, 1.0), "d_max": schedules.at(self.d_max, seen, 0.0)}
        return functools.partial(variants.renormalized, mean=mean, var=var, **bounds)

    def _held(self):
        return self.running.mean

    def _state(self) -> dict[str, Array]:
        mean, var, num_batches = self.running
        return {**super()._state(), "running_mean": mean, "running_var": var, "num_batches_tracked": num_batches}

    def _restore(self, state):
        super()._restore(state)
        self.running = RunningStats(*(state[name] for name in ("running_mean", "running_var", "num_batches_tracked")))

    def _loaded(self, name, value, old):
        if name == "num_batches_tracked":
            return check_layer.count(name, value)
        loaded = super()._loaded(name, value, old)
        if name == "running_var":
            check_layer.no_negative(namespace(loaded), name, loaded)
        return loaded
