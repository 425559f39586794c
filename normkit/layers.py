"""Layers with parameters and running statistics over the functions, for libraries without a module system."""

from __future__ import annotations

from typing import Any

from . import _validate as check
from . import _validate_layer as check_layer
from . import functional
from ._batch_norm import BatchNorm
from ._calls import CASTS
from ._layer import Layer
from .styles import Style


class LayerNorm(Layer):
    """Layer normalization: every position by its own mean and variance over the given axes.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, as :func:`normkit.layer_norm`, the same in training and
    inference.

    Parameters
    ----------
    normalized_shape : the length of the normalized axis, or the lengths of several in ascending axis order; also the
        shape of weight and bias
    axis : the normalized axis or axes; by default the last ones, as many as there are lengths
    eps : a number >= 0, added to the variance
    affine : with weight (ones at first) and bias (zeros)
    bias : with bias, where affine
    train_affine : gradients go to weight and bias; False: they are constants
    dtype : of the parameters: a name or the library's own object
    device : where the parameters are, as the library says it; by default where it puts arrays
    backend : the library of the parameters: a registered name, or any array namespace (a module)

    Raises
    ------
    TypeError
        An argument is of another type; called: x is no floating-point array, or of another library.
    ValueError
        An argument is out of range, the library is unknown; called: x has other lengths along its axes.
    ImportError
        The library is not installed.

    Notes
    -----
    ================  ========================  ==========================  ====================  ====================
    here              torch.nn.LayerNorm        keras LayerNormalization    flax.nnx.LayerNorm    ONNX
    ================  ========================  ==========================  ====================  ====================
    normalized_shape  normalized_shape          (from the input)            num_features          (from the input)
    axis              the trailing ones         axis                        reduction_axes        axis (first of rest)
    eps               eps = 1e-5                epsilon = 1e-3              epsilon = 1e-6        epsilon = 1e-5
    affine, bias      elementwise_affine, bias  scale, center               use_scale, use_bias   (optional inputs)
    weight            weight                    gamma                       scale                 Scale
    bias              bias                      beta                        bias                  B
    ================  ========================  ==========================  ====================  ====================

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> layer = nk.LayerNorm(4)
    >>> layer(np.asarray([[1, 2, 3, 4]], dtype=np.float32)).round(3)
    array([[-1.342, -0.447,  0.447,  1.342]], dtype=float32)
    >>> sorted(layer.state_dict())
    ['bias', 'weight']
    """

    _trailing = True

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        axis: int | tuple[int, ...] | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        train_affine: bool = True,
        dtype: Any = "float32",
        device: Any = None,
        backend: Any = "numpy",
    ) -> None:
        self.normalized_shape = normalized_shape
        lengths = check_layer.lengths("normalized_shape", normalized_shape)
        super().__init__(lengths, axis, eps, affine, bias, dtype, device, backend, train_affine)

    def _run(self, run, x, **valid):
        return run(functional.layer_norm, x, *self._affine(), axis=self._axes, eps=self.eps, **valid)


class RMSNorm(Layer):
    """Root mean square normalization: every position divided by its root mean square over the given axes.

    ``y = x / sqrt(mean(x**2) + eps) * (weight_offset + weight) + bias``, as :func:`normkit.rms_norm`, the same in
    training and inference.

    Parameters
    ----------
    normalized_shape : the length of the normalized axis, or the lengths of several in ascending axis order; also the
        shape of weight and bias
    axis : the normalized axis or axes; by default the last ones, as many as there are lengths
    eps : a number >= 0, added to the mean square
    weight_offset : added to the weight, by default 0.0; 1.0 for models whose weight is a deviation from one
    cast : float16 and bfloat16 are rounded once, at the "output", the default, or before the weight as well, "input"
    style : in the place of weight_offset and cast, whose they are: "llama", "mistral", "mixtral", "qwen2", "qwen3",
        "phi3", "t5", "onnx" (cast="input"), "gemma", "gemma2", "gemma3" (weight_offset=1), "torch", "keras", "flax",
        "olmo2" (neither)
    affine : with weight (``1 - weight_offset`` at first)
    bias : with bias (zeros), where affine
    train_affine, dtype, device, backend : as :class:`LayerNorm`

    Raises
    ------
    TypeError, ValueError, ImportError
        As :class:`LayerNorm`.

    Notes
    -----
    ================  =======================  =========================  =====================  ====================
    here              torch.nn.RMSNorm         keras RMSNormalization     flax.nnx.RMSNorm       ONNX
    ================  =======================  =========================  =====================  ====================
    normalized_shape  normalized_shape         (from the input)           num_features           (from the input)
    axis              the trailing ones        axis                       reduction_axes         axis (first of rest)
    eps               eps = None: that of      epsilon = 1e-6             epsilon = 1e-6         epsilon = 1e-5
                      float32 for narrow x
    affine            elementwise_affine       (always)                   use_scale              (always)
    weight            weight                   scale                      scale                  scale
    bias              no                       no                         no                     no
    cast              "output"                 "output"                   "output"               "input"
    ================  =======================  =========================  =====================  ====================

    The models' y is met to the last bit (but for one element in a thousand at most); their gradient need not be, as
    theirs rounds ``dy * weight`` to the narrow dtype before the rest: of 64 x 512 bfloat16 numbers, Llama's gradient of
    x differs in 28 % and T5's in 36 %, and in each of those normkit's is nearer to float64. Off by at most 0.43 units
    of 2**-7 of the row's largest, theirs by 0.67 and 1.07; in the median 0.022, theirs 0.028 and 0.033.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[3, 4]], dtype=np.float32)
    >>> nk.RMSNorm(2)(x).round(3)
    array([[0.849, 1.131]], dtype=float32)
    >>> nk.RMSNorm(2, style="gemma")
    RMSNorm(2, weight_offset=1)
    """

    _trailing = True
    _usual = Style()._asdict()

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        *,
        axis: int | tuple[int, ...] | None = None,
        eps: float = 1e-6,
        weight_offset: float | None = None,
        cast: str | None = None,
        style: str | None = None,
        affine: bool = True,
        bias: bool = False,
        train_affine: bool = True,
        dtype: Any = "float32",
        device: Any = None,
        backend: Any = "numpy",
    ) -> None:
        self.normalized_shape = normalized_shape
        offset = None if weight_offset is None else check.finite("weight_offset", weight_offset)
        point = None if cast is None else check.choice("cast", cast, CASTS)
        self.cast, self.weight_offset = check_layer.style(style, point, offset)
        lengths = check_layer.lengths("normalized_shape", normalized_shape)
        super().__init__(lengths, axis, eps, affine, bias, dtype, device, backend, train_affine, 1 - self.weight_offset)

    def _run(self, run, x, **valid):
        options = {"axis": self._axes, "eps": self.eps, "weight_offset": self.weight_offset, "cast": self.cast, **valid}
        return run(functional.rms_norm, x, *self._affine(), **options)


class GroupNorm(Layer):
    """Group normalization: every sample by its own mean and variance over groups of neighbouring channels.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, as :func:`normkit.group_norm`, the same in training and
    inference.

    Parameters
    ----------
    num_groups : how many groups; divides num_channels
    num_channels : the length of x's channel axis, and of weight and bias
    axis : the channel axis
    eps : a number >= 0, added to the variance
    affine, bias, train_affine, dtype, device, backend : as :class:`LayerNorm`

    Raises
    ------
    TypeError, ValueError, ImportError
        As :class:`LayerNorm`; also where num_groups does not divide num_channels.

    Notes
    -----
    ============  ==================  =========================  ======================  ======================
    here          torch.nn.GroupNorm  keras GroupNormalization   flax.nnx.GroupNorm      ONNX (version 21)
    ============  ==================  =========================  ======================  ======================
    num_groups    num_groups          groups = 32, -1: instance  num_groups = 32         num_groups
    num_channels  num_channels        (from the input)           num_features            (from the input)
    axis          1                   axis = -1                  -1                      1
    eps           eps = 1e-5          epsilon = 1e-3             epsilon = 1e-6          epsilon = 1e-5
    affine, bias  affine, bias        scale, center              use_scale, use_bias     (always)
    weight        weight              gamma                      scale                   scale
    bias          bias                beta                       bias                    bias
    ============  ==================  =========================  ======================  ======================

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> layer = nk.GroupNorm(2, 4, axis=-1)
    >>> layer(np.asarray([[1, 3, 10, 30]], dtype=np.float32)).round(3)
    array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        train_affine: bool = True,
        dtype: Any = "float32",
        device: Any = None,
        backend: Any = "numpy",
    ) -> None:
        self.num_channels = check.positive_int("num_channels", num_channels)
        self.num_groups = check.groups(num_groups, self.num_channels)
        super().__init__((self.num_channels,), axis, eps, affine, bias, dtype, device, backend, train_affine)

    def _run(self, run, x, **valid):
        options = {"axis": self._axes[0], "eps": self.eps, **valid}
        return run(functional.group_norm, x, self.num_groups, *self._affine(), **options)


class InstanceNorm(Layer):
    """Instance normalization: every channel of every sample by its own mean and variance.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, as :func:`normkit.instance_norm`, the same in training and
    inference.

    Parameters
    ----------
    num_features : the length of x's channel axis, and of weight and bias
    axis : the channel axis
    eps : a number >= 0, added to the variance
    affine, bias, train_affine, dtype, device, backend : as :class:`LayerNorm`

    Raises
    ------
    TypeError, ValueError, ImportError
        As :class:`LayerNorm`.

    Notes
    -----
    ============  =======================  ============================  ======================  ====================
    here          torch.nn.InstanceNorm2d  keras GroupNormalization(-1)  flax.nnx.InstanceNorm   ONNX
    ============  =======================  ============================  ======================  ====================
    num_features  num_features             (from the input)              num_features            (from the input)
    axis          1                        axis = -1                     feature_axes = -1       1
    eps           eps = 1e-5               epsilon = 1e-3                epsilon = 1e-6          epsilon = 1e-5
    affine, bias  affine = False           scale, center                 use_scale, use_bias     (always)
    weight        weight                   gamma                         scale                   scale
    bias          bias                     beta                          bias                    B
    ============  =======================  ============================  ======================  ====================

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> layer = nk.InstanceNorm(1)
    >>> layer(np.asarray([[[10, 20, 30]]], dtype=np.float32)).round(3)
    array([[[-1.225,  0.   ,  1.225]]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        train_affine: bool = True,
        dtype: Any = "float32",
        device: Any = None,
        backend: Any = "numpy",
    ) -> None:
        self.num_features = check.positive_int("num_features", num_features)
        super().__init__((self.num_features,), axis, eps, affine, bias, dtype, device, backend, train_affine)

    def _run(self, run, x, **valid):
        return run(functional.instance_norm, x, *self._affine(), axis=self._axes[0], eps=self.eps, **valid)


__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]
