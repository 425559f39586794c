"""Norms by the 1-, 2- and maximum norm, as pure functions on the same core."""

from __future__ import annotations

from typing import Any

from . import _calls
from ._vjp import BINDERS
from .core.normalize import BatchStats

Array = Any


def lp_layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    p: float,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
    centred: bool = False,
    consistent: bool = False,
    mask: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """Layer norm by the mean p-norm in the place of the standard deviation.

    ``y = (x - mean) / sqrt(norm**2 + eps) * weight + bias``, with ``norm = mean(|x|**p)**(1/p)`` over ``axis``, of x as
    it is (``centred=True``: of x - mean), and for p = inf the largest ``|x|``.

    Parameters
    ----------
    x : array, floating-point, any shape
    weight, bias : array of the shape of the normalized axes, in ascending axis order, or None
    p : 1, 2 or infinity
    axis : the normalized axis or axes; negative values count from the end
    eps : a number >= 0, added to the square of the norm
    centred : take the norm of x - mean; with p = 2 this is :func:`normkit.layer_norm`
    consistent : multiply the norm so that it estimates the standard deviation of Gaussian x: by ``sqrt(pi / 2)`` for
        p = 1, by ``(1 + sqrt(pi * ln(4))) / (2 * sqrt(2 * ln(n)))`` for p = inf and n elements
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
        p is another number, ``consistent`` is asked of p = inf where the number of elements is not one known number;
        else as :func:`normkit.layer_norm`.

    Notes
    -----
    The gradient has no centred term where the norm is that of x as it is: with g = dy * weight, n elements and
    s = sqrt(norm**2 + eps), ``dx = (g - mean(g) - sum(g * (x - mean)) / s * u) / s``, where u = norm / s * dnorm/dx is
    ``x / (n * s)`` for p = 2, ``sign(x) * norm / (n * s)`` for p = 1, and ``sign(x) * norm / s`` at the largest ``|x|``
    for p = inf (several share it). Of x - mean, u is less its mean.

    ===========  =============================  ====================================================
    here         Santurkar et al. 2018, B       Hoffer et al. 2018, L1 and L-infinity batch norm
    ===========  =============================  ====================================================
    p            p                              1, infinity (top-k)
    centred      False                          True
    consistent   False                          True
    eps          none                           added to the norm
    ===========  =============================  ====================================================

    Sources: Santurkar, Tsipras, Ilyas, Madry, "How does batch normalization help optimization?", arXiv:1805.11604;
    Hoffer, Banner, Golan, Soudry, "Norm matters", arXiv:1803.01814.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[1, 2, 6]], dtype=np.float32)
    >>> nk.lp_layer_norm(x, p=1).round(3)
    array([[-0.667, -0.333,  1.   ]], dtype=float32)
    >>> nk.lp_layer_norm(x, p=float("inf")).round(3)
    array([[-0.333, -0.167,  0.5  ]], dtype=float32)
    """
    call = _calls.lp_layer_norm(
        x, weight, bias, p=p, axis=axis, eps=eps, centred=centred, consistent=consistent, mask=mask, lengths=lengths
    )
    return _calls.run(call)


def lp_batch_norm_train(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    p: float,
    axis: int = 1,
    eps: float = 1e-5,
    centred: bool = False,
    consistent: bool = False,
    mask: Array | None = None,
    lengths: Array | None = None,
) -> tuple[Array, BatchStats]:
    """Batch norm by the mean p-norm in the place of the standard deviation, in training.

    ``y = (x - mean) / sqrt(norm**2 + eps) * weight + bias``, with ``norm = mean(|x|**p)**(1/p)`` over all axes but the
    channel axis, as in :func:`normkit.lp_layer_norm`.

    Parameters
    ----------
    x : array, floating-point, at least two axes
    weight, bias : array of shape (channels,), or None
    p : 1, 2 or infinity
    axis : the channel axis; negative values count from the end
    eps : a number >= 0, added to the square of the norm
    centred : take the norm of x - mean; with p = 2 this is :func:`normkit.batch_norm_train`
    consistent : multiply the norm so that it estimates the standard deviation of Gaussian x
    mask, lengths : as in :func:`normkit.batch_norm_train`

    Returns
    -------
    y : array of x's shape, library, dtype, device and layout
    stats : BatchStats(mean, var, count) of shape (channels,) in the accumulation dtype, where var is ``norm**2``: for
        ``RunningStats.update(stats, unbiased=False)``, and with what that gives :func:`normkit.batch_norm` is the norm
        in inference; not differentiated

    Raises
    ------
    TypeError
        x is no floating-point array, or another array is of another library.
    ValueError
        p is another number, ``consistent`` is asked of p = inf where the number of elements is not one known number;
        else as :func:`normkit.batch_norm_train`.

    Notes
    -----
    The gradient, the frameworks' and papers' names and the sources: see :func:`normkit.lp_layer_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[1, 10], [3, 20]], dtype=np.float32)
    >>> y, stats = nk.lp_batch_norm_train(x, p=1)
    >>> y.round(3)
    array([[-0.5  , -0.333],
           [ 0.5  ,  0.333]], dtype=float32)
    """
    backend, plan, operands = _calls.lp_batch_norm_train(
        x, weight, bias, p=p, axis=axis, eps=eps, centred=centred, consistent=consistent, mask=mask, lengths=lengths
    )
    y, stats = backend.apply(plan, operands)
    assert stats is not None
    return y, stats


def normalize(
    x: Array,
    *,
    p: float = 2,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-12,
    mask: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """Divide every position by its p-norm over the given axes.

    ``y = x / max(norm, eps)``, with ``norm = sum(|x|**p)**(1/p)``, and for p = inf the largest ``|x|``.

    Parameters
    ----------
    x : array, floating-point, any shape
    p : 1, 2 or infinity
    axis : the axis or axes of one vector; negative values count from the end
    eps : a number >= 0, the least that is divided by: a vector below it is divided by eps, zero stays zero
    mask : boolean array that broadcasts to x, or None. Where it is false, x may be anything, and y and the gradient of
        x are zero
    lengths : int32 or int64 array of shape (samples,), or None. In place of a mask: how many positions of each sample
        are valid, along the first axis that is neither axis 0 nor normalized

    Returns
    -------
    array of x's shape, library, dtype, device and layout

    Raises
    ------
    TypeError
        x is no floating-point array.
    ValueError
        p is another number, an axis is out of range, given twice or empty, or eps is negative or NaN; mask or lengths
        do not fit x.

    Notes
    -----
    ====  ==============================  ======================  ==========================  ========================
    here  torch.nn.functional.normalize   keras                   tf.math.l2_normalize        ONNX LpNormalization
    ====  ==============================  ======================  ==========================  ========================
    p     p = 2.0, any                    ops.normalize: order    2                           p = 2, or 1
    axis  dim = 1                         axis = -1               axis                        axis = -1
    eps   eps = 1e-12                     epsilon = 1e-7          sqrt(epsilon) = 1e-6        0
    ====  ==============================  ======================  ==========================  ========================

    keras.layers.UnitNormalization is p = 2. flax adds its epsilon to the square, chainer to the norm.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[3, 4], [0, 0]], dtype=np.float32)
    >>> nk.normalize(x)
    array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    return _calls.run(_calls.normalize(x, p=p, axis=axis, eps=eps, mask=mask, lengths=lengths))


BINDERS |= {
    normalize: _calls.normalize,
    lp_layer_norm: _calls.lp_layer_norm,
    lp_batch_norm_train: _calls.lp_batch_norm_train,
}
