"""Normalization as pure functions on any array: arguments are checked, planned and handed to the array's backend."""

from __future__ import annotations

from typing import Any

from . import _calls
from ._calls import at_once, batch_plan, batch_train_plan, group_plan, instance_plan, layer_plan, rms_plan
from ._vjp import BINDERS
from .core.normalize import BatchStats

Array = Any


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
    mask: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """Normalize every position over the given axes, in training and inference alike.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with mean and biased variance over ``axis``.

    Parameters
    ----------
    x : array, floating-point, any shape
    weight, bias : array of the shape of the normalized axes, in ascending axis order, or None
    axis : the normalized axis or axes; negative values count from the end
    eps : a number >= 0, added to the variance
    mask : boolean array that broadcasts to x, or None. Statistics are taken over the elements where it is true; where
        it is false, x may be anything, and y and the gradient of x are zero
    lengths : int32 or int64 array of shape (samples,), or None. In place of a mask: how many positions of each sample
        are valid, along the first axis that is neither axis 0 nor normalized

    Returns
    -------
    array of x's shape, library, dtype, device and layout

    Raises
    ------
    TypeError
        x is no floating-point array, or a parameter is of another library.
    ValueError
        An axis is out of range, given twice or empty, a parameter has another shape or device, or eps is negative or
        NaN; mask or lengths do not fit x.

    Notes
    -----
    ========  ========================  =============================  ==========================  ====================
    here      torch.nn.LayerNorm        keras LayerNormalization       flax.nnx.LayerNorm          ONNX
    ========  ========================  =============================  ==========================  ====================
    axis      len(normalized_shape)     axis                           reduction_axes              axis (first of rest)
              trailing axes
    eps       eps = 1e-5                epsilon = 1e-3                 epsilon = 1e-6              epsilon = 1e-5
    weight    weight                    gamma                          scale                       Scale
    bias      bias                      beta                           bias                        B
    mask      no                        no                             mask                        no
    ========  ========================  =============================  ==========================  ====================

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[1, 2, 3, 4], [7, 7, 7, 7]], dtype=np.float32)
    >>> nk.layer_norm(x).round(3)
    array([[-1.342, -0.447,  0.447,  1.342],
           [ 0.   ,  0.   ,  0.   ,  0.   ]], dtype=float32)
    >>> nk.layer_norm(x + 1e6).round(3)[0]
    array([-1.342, -0.447,  0.447,  1.342], dtype=float32)
    """
    done = at_once(x, weight, bias, None, None, mask, lengths, layer_plan, axis, eps)
    if done is not None:
        return done[0]
    return _calls.run(_calls.layer_norm(x, weight, bias, axis=axis, eps=eps, mask=mask, lengths=lengths))


def rms_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    cast: str = "output",
    mask: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """Divide every position by its root mean square over the given axes.

    ``y = x / sqrt(mean(x**2) + eps) * (weight_offset + weight) + bias``

    Parameters
    ----------
    x : array, floating-point, any shape
    weight, bias : array of the shape of the normalized axes, in ascending axis order, or None
    axis : the normalized axis or axes; negative values count from the end
    eps : a number >= 0, added to the mean square
    weight_offset : added to the weight in the accumulation dtype; 1.0 for models whose weight is a deviation from one
    cast : where float16 and bfloat16 x is rounded to its dtype: "output", once, after weight and bias, or "input", what
        is normalized before it meets the weight, and y after that
    mask, lengths : as in :func:`layer_norm`

    Returns
    -------
    array of x's shape, library, dtype, device and layout

    Raises
    ------
    TypeError
        x is no floating-point array, or a parameter is of another library.
    ValueError
        An axis is out of range, given twice or empty, a parameter has another shape or device, cast is another word, or
        eps is negative or NaN; mask or lengths do not fit x.

    Notes
    -----
    =============  =======================  =========================  ====================  ====================
    here           torch.nn.RMSNorm         keras RMSNormalization     flax.nnx.RMSNorm      ONNX
    =============  =======================  =========================  ====================  ====================
    axis           len(normalized_shape)    axis                       reduction_axes        axis (first of rest)
                   trailing axes
    eps            eps = None: that of      epsilon = 1e-6             epsilon = 1e-6        epsilon = 1e-5
                   float32 for narrow x
    weight         weight                   scale                      scale                 scale
    bias           no                       no                         no                    no
    weight_offset  no                       no                         no                    no
    cast           "output"                 "output"                   "output"              "input"
    mask           no                       no                         mask                  no
    =============  =======================  =========================  ====================  ====================

    What the models of transformers do by name is in :class:`normkit.RMSNorm`, ``style``.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[3, 4], [30, 40]], dtype=np.float32)
    >>> nk.rms_norm(x, np.asarray([1, 10], dtype=np.float32)).round(3)
    array([[ 0.849, 11.314],
           [ 0.849, 11.314]], dtype=float32)
    """
    if cast == "output":
        done = at_once(x, weight, bias, None, None, mask, lengths, rms_plan, axis, eps, weight_offset)
        if done is not None:
            return done[0]
    options = {"axis": axis, "eps": eps, "weight_offset": weight_offset, "cast": cast}
    return _calls.run(_calls.rms_norm(x, weight, bias, **options, mask=mask, lengths=lengths))


def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """Normalize every sample over groups of neighbouring channels, in training and inference alike.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with mean and biased variance over the channels of a group and
    all axes but the first and the channel axis.

    Parameters
    ----------
    x : array, floating-point, at least two axes: samples along the first (with ``axis=0`` x is one sample)
    num_groups : how many groups; divides the number of channels
    weight, bias : array of shape (channels,), or None
    axis : the channel axis; negative values count from the end
    eps : a number >= 0, added to the variance
    mask : boolean array that broadcasts to x, or None. Statistics are taken over the elements where it is true; where
        it is false, x may be anything, and y and the gradient of x are zero
    lengths : int32 or int64 array of shape (samples,), or None. In place of a mask: how many positions of each sample
        are valid, along the first axis that is neither axis 0 nor the channels'

    Returns
    -------
    array of x's shape, library, dtype, device and layout

    Raises
    ------
    TypeError
        x is no floating-point array, or a parameter is of another library.
    ValueError
        num_groups does not divide the channels, the axis is out of range or empty, a parameter has another shape or
        device, or eps is negative or NaN; mask or lengths do not fit x.

    Notes
    -----
    ==========  ===================  ==========================  ====================  ======================
    here        torch.nn.GroupNorm   keras GroupNormalization    flax.nnx.GroupNorm    ONNX (version 21)
    ==========  ===================  ==========================  ====================  ======================
    num_groups  num_groups           groups = 32, -1: instance   num_groups = 32       num_groups
    axis        1                    axis = -1                   -1                    1
    eps         eps = 1e-5           epsilon = 1e-3              epsilon = 1e-6        epsilon = 1e-5
    weight      weight               gamma                       scale                 scale
    bias        bias                 beta                        bias                  bias
    mask        no                   no                          mask                  no
    ==========  ===================  ==========================  ====================  ======================

    Source: Wu, He, "Group Normalization", arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[[1, 2], [3, 4], [10, 20], [30, 40]]], dtype=np.float32)
    >>> nk.group_norm(x, 2).round(3)
    array([[[-1.342, -0.447],
            [ 0.447,  1.342],
            [-1.342, -0.447],
            [ 0.447,  1.342]]], dtype=float32)
    """
    done = at_once(x, weight, bias, None, None, mask, lengths, group_plan, axis, eps, num_groups)
    if done is not None:
        return done[0]
    return _calls.run(_calls.group_norm(x, num_groups, weight, bias, axis=axis, eps=eps, mask=mask, lengths=lengths))


def instance_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """Normalize every channel of every sample by its own statistics.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with mean and biased variance over all axes but the first and
    the channel axis. A channel of one value gives ``bias``.

    Parameters
    ----------
    x : array, floating-point, at least three axes: samples along the first (with ``axis=0`` x is one sample)
    weight, bias : array of shape (channels,), or None
    axis : the channel axis; negative values count from the end
    eps : a number >= 0, added to the variance
    mask, lengths : as in :func:`group_norm`

    Returns
    -------
    array of x's shape, library, dtype, device and layout

    Raises
    ------
    TypeError
        x is no floating-point array, or a parameter is of another library.
    ValueError
        There is no axis besides samples and channels, the axis is out of range or empty, a parameter has another shape
        or device, or eps is negative or NaN; mask or lengths do not fit x.

    Notes
    -----
    ======  =============================  ================================  =====================  ====================
    here    torch.nn.InstanceNorm2d        keras GroupNormalization(-1)      flax.nnx.InstanceNorm  ONNX
    ======  =============================  ================================  =====================  ====================
    axis    1                              axis = -1                         feature_axes = -1      1
    eps     eps = 1e-5                     epsilon = 1e-3                    epsilon = 1e-6         epsilon = 1e-5
    weight  weight (affine=False: none)    gamma                             scale                  scale
    bias    bias                           beta                              bias                   B
    mask    no                             no                                mask                   no
    ======  =============================  ================================  =====================  ====================

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[[1, 2, 3], [10, 20, 30]]], dtype=np.float32)
    >>> nk.instance_norm(x).round(3)
    array([[[-1.225,  0.   ,  1.225],
            [-1.225,  0.   ,  1.225]]], dtype=float32)
    """
    done = at_once(x, weight, bias, None, None, mask, lengths, instance_plan, axis, eps)
    if done is not None:
        return done[0]
    return _calls.run(_calls.instance_norm(x, weight, bias, axis=axis, eps=eps, mask=mask, lengths=lengths))


def batch_norm(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """Normalize channels by given statistics: batch norm in inference.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``

    Parameters
    ----------
    x : array, floating-point, any shape
    mean, var : array of shape (channels,); var is not negative (checked where the values are at hand; else y is NaN)
    weight, bias : array of shape (channels,), or None
    axis : the channel axis; negative values count from the end
    eps : a number >= 0, added to the variance
    mask : boolean array that broadcasts to x, or None. Where it is false, x may be anything, and y and the gradient of
        x are zero
    lengths : int32 or int64 array of shape (samples,), or None. In place of a mask: how many positions of each sample
        are valid, along the first axis that is neither axis 0 nor the channels'

    Returns
    -------
    array of x's shape, library, dtype, device and layout

    Raises
    ------
    TypeError
        x is no floating-point array, or another array is of another library.
    ValueError
        The axis is out of range or empty, statistics or parameters have another shape or device, var is negative, or
        eps is negative or NaN; mask or lengths do not fit x.

    Notes
    -----
    ======  =====================  ============================  =====================  ====================
    here    torch.nn.BatchNorm2d   keras BatchNormalization      flax.nnx.BatchNorm     ONNX
    ======  =====================  ============================  =====================  ====================
    axis    1                      axis = -1                     axis = -1              1
    mean    running_mean           moving_mean                   mean                   input_mean
    var     running_var            moving_variance               var                    input_var
    eps     eps = 1e-5             epsilon = 1e-3                epsilon = 1e-5         epsilon = 1e-5
    weight  weight                 gamma                         scale                  scale
    bias    bias                   beta                          bias                   B
    mask    no                     mask                          mask                   no
    ======  =====================  ============================  =====================  ====================

    Source: Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[1, 10], [3, 20]], dtype=np.float32)
    >>> mean, var = np.asarray([[2, 10], [1, 25]], dtype=np.float32)
    >>> nk.batch_norm(x, mean, var).round(3)
    array([[-1.,  0.],
           [ 1.,  2.]], dtype=float32)
    """
    if mean is not None and var is not None:
        done = at_once(x, weight, bias, mean, var, mask, lengths, batch_plan, axis, eps)
        if done is not None:
            return done[0]
    return _calls.run(_calls.batch_norm(x, mean, var, weight, bias, axis=axis, eps=eps, mask=mask, lengths=lengths))


def batch_norm_train(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    virtual_batch_size: int | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    single_value: str = "raise",
) -> tuple[Array, BatchStats]:
    """Normalize channels by the statistics of this batch, and return those: batch norm in training.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with mean and biased variance over all axes but the channel
    axis.

    Parameters
    ----------
    x : array, floating-point, at least two axes
    weight, bias : array of shape (channels,), or None
    axis : the channel axis; negative values count from the end
    eps : a number >= 0, added to the variance
    virtual_batch_size : of ghost batch norm: so many samples after each other (along axis 0; with ``axis=0`` along axis
        1) are normalized as a batch of their own. None: all of them
    mask, lengths : as in :func:`group_norm`
    single_value : of one value per channel: "raise", or "zero": its variance is zero, y exactly the bias

    Returns
    -------
    y : array of x's shape, library, dtype, device and layout
    stats : BatchStats(mean, var, count) of shape (channels,) in the accumulation dtype, for ``RunningStats.update``;
        not differentiated

    Raises
    ------
    TypeError
        x is no floating-point array, or another array is of another library.
    ValueError
        There is one value per channel, the axis is out of range or empty, a parameter has another shape or device, or
        eps is negative or NaN; virtual_batch_size does not divide the batch; mask or lengths do not fit x.

    Notes
    -----
    A variance beyond 2**126 (in float64 2**1022) is returned as that: n / (n - 1) times it is finite then.

    An empty batch gives an empty y and a count of 0. One valid element of a channel is refused where the mask is in
    host memory; elsewhere (traced, or on a device that would have to be waited for) "raise" is as "zero".

    The statistics of virtual batches are returned merged: mean, variance and count of the whole batch, so that running
    statistics estimate the population's, however the batch is divided. Keras 2 averages the virtual batches' means and
    variances with equal weight, which leaves out the variance between them; Hoffer et al. let each of them update the
    running statistics after the other.

    ======  =====================  ============================  =====================  ====================
    here    torch.nn.BatchNorm2d   keras BatchNormalization      flax.nnx.BatchNorm     ONNX
    ======  =====================  ============================  =====================  ====================
    axis    1                      axis = -1                     axis = -1              1
    eps     eps = 1e-5             epsilon = 1e-3                epsilon = 1e-5         epsilon = 1e-5
    weight  weight                 gamma                         scale                  scale
    bias    bias                   beta                          bias                   B
    mask    no                     mask                          mask                   no
    ======  =====================  ============================  =====================  ====================

    ``virtual_batch_size`` has this name in Keras 2, and is the batch over ``num_splits`` of timm's SplitBatchNorm2d.

    Source: Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167; ghost batch norm: Hoffer, Hubara, Soudry, "Train
    longer, generalize better", arXiv:1705.08741.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[1, 10], [3, 20]], dtype=np.float32)
    >>> y, stats = nk.batch_norm_train(x)
    >>> y.round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> stats
    BatchStats(mean=array([ 2., 15.], dtype=float32), var=array([ 1., 25.], dtype=float32), count=2)
    >>> running = nk.RunningStats(np.zeros(2, np.float32), np.ones(2, np.float32))
    >>> running.update(stats).mean
    array([0.2, 1.5], dtype=float32)
    """
    if virtual_batch_size is None and single_value == "raise":
        done = at_once(x, weight, bias, None, None, mask, lengths, batch_train_plan, axis, eps)
        if done is not None:
            assert done[2] is not None
            return done[0], done[2]
    backend, plan, operands = _calls.batch_norm_train(
        x,
        weight,
        bias,
        axis=axis,
        eps=eps,
        virtual_batch_size=virtual_batch_size,
        mask=mask,
        lengths=lengths,
        single_value=single_value,
    )
    y, stats = backend.apply(plan, operands)
    assert stats is not None
    return y, stats


BINDERS |= {
    layer_norm: _calls.layer_norm,
    rms_norm: _calls.rms_norm,
    group_norm: _calls.group_norm,
    instance_norm: _calls.instance_norm,
    batch_norm: _calls.batch_norm,
    batch_norm_train: _calls.batch_norm_train,
}
