"""Batch renormalization, filter response normalization and weight standardization, on the same core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import _calls
from . import _validate as check
from ._dispatch import backend_of
from ._vjp import BINDERS, COMPOSED
from .backends import Backend
from .core.moments import Habits, accumulation_dtype, at_least_one, masked, total
from .core.normalize import PLAIN, BatchStats, Operands
from .core.plan import Plan

Array = Any


def batch_renorm_train(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    r_max: float | Array = 3.0,
    d_max: float | Array = 5.0,
    axis: int = 1,
    eps: float = 1e-5,
    mask: Array | None = None,
    lengths: Array | None = None,
    single_value: str = "raise",
) -> tuple[Array, BatchStats]:
    """Batch norm in training, corrected to what running statistics would give: batch renormalization.

    ``y = ((x - m) / sqrt(v + eps) * r + d) * weight + bias``, with mean m and biased variance v of the batch,
    ``r = clip(sqrt((v + eps) / (var + eps)), 1 / r_max, r_max)`` and
    ``d = clip((m - mean) / sqrt(var + eps), -d_max, d_max)``. No derivative sees r and d.

    Parameters
    ----------
    x : array, floating-point, at least two axes
    mean, var : the running statistics, arrays of shape (channels,)
    weight, bias : array of shape (channels,), or None
    r_max : a number >= 1, or an array of shape (), so that a compiled step takes a new one. With ``r_max=1, d_max=0``
        this is :func:`normkit.batch_norm_train`, with ``inf`` for both :func:`normkit.batch_norm`, but for the gradient
    d_max : a number >= 0, or an array of shape ()
    axis : the channel axis; negative values count from the end
    eps : a number >= 0, added to the variances
    mask, lengths, single_value : as in :func:`normkit.batch_norm_train`; of a single value y is
        ``d * weight + bias``

    Returns
    -------
    y : array of x's shape, library, dtype, device and layout
    stats : BatchStats(mean, var, count) of the batch, for ``RunningStats.update``; not differentiated

    Raises
    ------
    TypeError
        x is no floating-point array, or another array is of another library.
    ValueError
        r_max is below 1 or d_max below 0; statistics have another shape, or var is negative; else as
        :func:`normkit.batch_norm_train`.

    Notes
    -----
    The batch is looked at twice: for r and d, and to be normalized. The gradients of mean and var are zero.

    =======  ======================  ================================  ==========================================
    here     Ioffe 2017              Keras 2 BatchNormalization        chainer BatchRenormalization
    =======  ======================  ================================  ==========================================
    r_max    r_max, from 1 to 3      renorm_clipping["rmax"], and      rmax = 1
                                     1 / renorm_clipping["rmin"]
    d_max    d_max, from 0 to 5      renorm_clipping["dmax"]           dmax = 0
    mean     moving average          renorm_mean                       running_mean
    var      moving average of the   renorm_stddev, the same           running_var
             deviation, squared
    =======  ======================  ================================  ==========================================

    Source: Ioffe, "Batch Renormalization", arXiv:1702.03275.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[1, 10], [3, 20]], dtype=np.float32)
    >>> mean, var = np.asarray([[0, 30], [1, 4]], dtype=np.float32)
    >>> y, stats = nk.batch_renorm_train(x, mean, var, r_max=2)
    >>> y.round(3)
    array([[ 1., -7.],
           [ 3., -3.]], dtype=float32)
    >>> nk.batch_norm(x, mean, var).round(3)
    array([[  1., -10.],
           [  3.,  -5.]], dtype=float32)
    """
    options = {"axis": axis, "eps": eps, "mask": mask, "lengths": lengths, "single_value": single_value}
    return renormalized(x, weight, bias, mean=mean, var=var, r_max=r_max, d_max=d_max, **options)


def renormalized(
    x: Array, weight: Array | None = None, bias: Array | None = None, **options: Any
) -> tuple[Array, BatchStats]:
    """:func:`batch_renorm_train` with its array arguments in the order of batch norm's, as a layer calls it."""
    backend, plan, operands, _ = _corrected(x, weight, bias, **options)
    y, stats = backend.apply(plan, operands)
    assert stats is not None
    return y, stats


class _Correction(NamedTuple):
    r: Array
    d: Array


def _corrected(x, weight, bias, *, mean, var, r_max, d_max, axis=1, eps=1e-5, **options):
    """Batch norm whose weight and bias hold r and d."""
    r_max, d_max = check.bound("r_max", r_max, 1), check.bound("d_max", d_max, 0)
    # What is refused of batch norm in inference is refused here.
    _calls.batch_norm(x, mean, var, weight, bias, axis=axis, eps=eps)
    backend, plan, operands = _calls.batch_norm_train(x, axis=axis, eps=eps, **options)
    for name, value in (("r_max", r_max), ("d_max", d_max)):
        if not isinstance(value, float):
            check.library(backend, name, value)
    xp = backend.namespace(x)
    seen = operands._replace(x=backend.constant(x))
    stats = backend.apply(plan, seen)[1]
    assert stats is not None
    dtype = stats.var.dtype

    def wide(a):
        return xp.astype(a, dtype, copy=False)

    def clipped(a, least, most):
        one = xp.ones_like(a)
        return xp.minimum(xp.maximum(a, wide(one * least)), wide(one * most))

    def root(a):
        spread = xp.sqrt(a + plan.eps)
        return spread if plan.eps else xp.where(spread > 0, spread, xp.ones_like(spread))

    mean, var = wide(backend.constant(mean)), wide(backend.constant(var))
    spread = root(var)
    r = clipped(root(stats.var) / spread, 1 / r_max, r_max)
    residue = _residue(backend, plan, seen, stats)
    d = clipped((stats.mean - mean + residue) / spread, -d_max, d_max)
    scale, shift = r, d
    if weight is not None:
        scale, shift = r * wide(weight), d * wide(weight)
    if bias is not None:
        shift = shift + wide(bias)
    return backend, plan, operands._replace(weight=scale, bias=shift), _Correction(r, d)


def _residue(backend: Backend, plan: Plan, operands: Operands, stats: BatchStats) -> Array:
    """What rounding took from the batch's mean, which d keeps: the mean of what x is from it."""
    xp = backend.namespace(operands.x)
    off = xp.astype(operands.x, stats.mean.dtype, copy=False) - xp.reshape(stats.mean, plan.param_view)
    off = total(xp, masked(xp, operands.mask, off), plan.axes, _habits(backend))
    return xp.reshape(off, plan.param_shape) / at_least_one(xp, stats.count)


def _renormalized_vjp(x, weight=None, bias=None, **options) -> tuple[Any, Callable[[Array], tuple[Array, ...]]]:
    backend, plan, operands, (r, d) = _corrected(x, weight, bias, **options)
    xp = backend.namespace(x)
    y, stats, gradients = backend.vjp(plan, operands)

    def pullback(dy: Array) -> tuple[Array, ...]:
        check.companion(backend, x, "dy", dy, tuple(backend.shape(x)))
        dx, of_scale, of_shift, *_ = gradients(dy)
        of_weight = None if weight is None else xp.astype(of_scale * r + of_shift * d, weight.dtype, copy=False)
        of_bias = None if bias is None else xp.astype(of_shift, bias.dtype, copy=False)
        return tuple(g for g in (dx, of_weight, of_bias) if g is not None)

    return (y, stats), pullback


def _renorm_vjp(x, mean, var, weight=None, bias=None, *, r_max=3.0, d_max=5.0, **options):
    out, pullback = _renormalized_vjp(x, weight, bias, mean=mean, var=var, r_max=r_max, d_max=d_max, **options)
    xp = backend_of("x", x).namespace(x)

    def with_statistics(dy: Array) -> tuple[Array, ...]:
        dx, *others = pullback(dy)
        return dx, xp.zeros_like(mean), xp.zeros_like(var), *others

    return out, with_statistics


def filter_response_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    threshold: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-6,
    mask: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """Divide every channel of every sample by its root mean square, and cut off what is below a learned threshold.

    ``y = max(x / sqrt(mean(x**2) + eps) * weight + bias, threshold)``, with the mean over all axes but the first and
    the channel axis.

    Parameters
    ----------
    x : array, floating-point, at least three axes: samples along the first (with ``axis=0`` x is one sample)
    weight, bias : array of shape (channels,), or None
    threshold : array of shape (channels,), of the thresholded linear unit, or None. Where y is the threshold, the
        gradient is the threshold's
    axis : the channel axis; negative values count from the end
    eps : a number >= 0, added to the mean square
    mask, lengths : as in :func:`normkit.instance_norm`

    Returns
    -------
    array of x's shape, library, dtype, device and layout

    Raises
    ------
    TypeError, ValueError
        As :func:`normkit.instance_norm`.

    Notes
    -----
    =========  =====================  ============================  ==========================================
    here       Singh, Krishnan        timm FilterResponseNormTlu2d  TF Addons FilterResponseNormalization, TLU
    =========  =====================  ============================  ==========================================
    axis       -1                     1                             axis = [1, 2], the reduced ones
    eps        1e-6, or learned       eps = 1e-5                    epsilon = 1e-6
    weight     gamma                  weight                        gamma
    bias       beta                   bias                          beta
    threshold  tau                    tau                           tau
    =========  =====================  ============================  ==========================================

    Source: Singh, Krishnan, "Filter Response Normalization Layer", arXiv:1911.09737. The learned eps that it has for
    one value per channel is not here.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[[1, -2, 3]]], dtype=np.float32)
    >>> nk.filter_response_norm(x, threshold=np.zeros(1, np.float32)).round(3)
    array([[[0.463, 0.   , 1.389]]], dtype=float32)
    """
    call = _calls.filter_response_norm(x, weight, bias, axis=axis, eps=eps, mask=mask, lengths=lengths)
    y = _calls.run(call)
    return y if threshold is None else _cut(call, y, threshold)[0]


def _cut(call: _calls.Call, y: Array, threshold: Array) -> tuple[Array, Array]:
    """``max(y, threshold)`` where x is valid, and where it is the threshold: the same place in every library."""
    backend, plan, operands = call
    check.companion(backend, operands.x, "threshold", threshold, tuple(plan.param_shape))
    xp = backend.namespace(y)
    least = xp.reshape(xp.astype(threshold, y.dtype, copy=False), plan.param_view)
    below = least >= y
    return masked(xp, operands.mask, xp.where(below, least, y)), below


def _filter_response_vjp(x, weight=None, bias=None, threshold=None, **options):
    call = _calls.filter_response_norm(x, weight, bias, **options)
    backend, plan, operands = call
    xp = backend.namespace(x)
    y, _, gradients = backend.vjp(plan, operands)
    below = None
    if threshold is not None:
        y, below = _cut(call, y, threshold)

    def pullback(dy: Array) -> tuple[Array, ...]:
        check.companion(backend, x, "dy", dy, tuple(backend.shape(x)))
        dy, cut = masked(xp, operands.mask, dy), None
        if below is not None:
            zero = xp.zeros_like(dy)
            dy, cut = xp.where(below, zero, dy), xp.where(below, dy, zero)
        found = gradients(dy)
        taken = [found.x, *(g for g in (found.weight, found.bias) if g is not None)]
        if cut is not None:
            cut = total(
                xp, xp.astype(cut, accumulation_dtype(xp, cut.dtype), copy=False), plan.param_axes, _habits(backend)
            )
            taken.append(xp.reshape(xp.astype(cut, threshold.dtype, copy=False), threshold.shape))
        return tuple(taken)

    return y, pullback


def _habits(backend: Backend) -> Habits:
    return getattr(backend, "habits", PLAIN)


def weight_standardization(kernel: Array, gain: Array | None = None, *, axis: int = 0, eps: float = 1e-6) -> Array:
    """Give each output channel of a convolution's kernel mean 0 and variance 1, to convolve with.

    ``y = (kernel - mean) / sqrt(var + eps) * gain``, with mean and biased variance over all axes but ``axis``.

    Parameters
    ----------
    kernel : array, floating-point, at least two axes
    gain : array of shape (output channels,), or None
    axis : that of the output channels: 0 in PyTorch, -1 in Keras, TensorFlow and Flax
    eps : a number >= 0, added to the variance

    Returns
    -------
    array of the kernel's shape, library, dtype, device and layout

    Raises
    ------
    TypeError
        kernel is no floating-point array, or gain is of another library.
    ValueError
        An output channel has one value, the axis is out of range or empty, gain has another shape or device, or eps is
        negative or NaN.

    Notes
    -----
    ====  ==============  ======================  =======================================================
    here  timm StdConv2d  timm ScaledStdConv2d    Qiao et al.
    ====  ==============  ======================  =======================================================
    eps   eps = 1e-6      eps = 1e-6              1e-5, added to the deviation, which is made with n - 1
    gain  no              gain * gamma / sqrt(n)  no
    ====  ==============  ======================  =======================================================

    n: the values of one output channel. Brock et al. (NFNets) divide by ``sqrt(max(var * n, eps))``.

    Sources: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
    arXiv:1903.10520; Brock, De, Smith, "Characterizing signal propagation", arXiv:2101.08692.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> kernel = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    >>> nk.weight_standardization(kernel).round(3)[0]
    array([[[-1.342, -0.447],
            [ 0.447,  1.342]]], dtype=float32)
    """
    return _calls.run(_calls.weight_standardization(kernel, gain, axis=axis, eps=eps))


BINDERS |= {weight_standardization: _calls.weight_standardization}
COMPOSED |= {
    batch_renorm_train: _renorm_vjp,
    renormalized: _renormalized_vjp,
    filter_response_norm: _filter_response_vjp,
}
