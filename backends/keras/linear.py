"""The weights of Keras's convolutions and dense layers as a batch norm beside them meets them: read, and written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from normkit.backends.keras.batch_norms import numbers
from normkit.backends.models import Pair

L: Any = keras.layers

_DEPTHWISE = (L.DepthwiseConv1D, L.DepthwiseConv2D)
_SEPARABLE = (L.SeparableConv1D, L.SeparableConv2D)
_TRANSPOSED = (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)
_CONVOLUTIONS = (L.Conv1D, L.Conv2D, L.Conv3D, *_DEPTHWISE, *_SEPARABLE, *_TRANSPOSED)
LINEAR = (*_CONVOLUTIONS, L.Dense, L.EinsumDense)


class _Einsum:
    """The axes of an EinsumDense by their labels; those that the equation leaves out are dots."""

    def __init__(self, pair: Pair) -> None:
        layer = pair.linear
        inputs, self.kernel, output = re.split(",|->", layer.equation)
        elided = "." * (layer.input_spec.ndim - len(inputs.replace("...", "")))
        inputs, output = inputs.replace("...", elided), output.replace("...", elided)
        self.label = label = (output if pair.after else inputs)[pair.norm.axis]
        rest = self.kernel.replace(label, "")
        #: The kernel's axes and the bias's in the order of the form.
        self.order = label + rest if pair.after else rest + label
        axes = layer.bias_axes or (label if pair.after else rest)
        self.bias_order = axes.replace(label, "") + label if pair.after else rest
        #: The bias's axes as they are, with axes of length one among them.
        self.bias = output[min((output.find(a) for a in axes), default=0) :]
        self.misfit = ""
        if label not in self.kernel or (not pair.after and label in output):
            self.misfit = "has its channels on another axis"
        elif not pair.after and set(inputs) - set(output) != {label}:
            self.misfit = "sums over other axes as well"
        elif not self.bias_order:
            self.misfit = "has no axis for a bias"
        elif {*axes} != {*self.bias_order}:
            self.misfit = "has a bias along other axes"

    def read(self, kernel: Any, bias: Any) -> tuple[Any, Any]:
        weight = np.einsum(f"{self.kernel}->{self.order}", kernel)
        if bias is not None:
            bias = bias[tuple(slice(None) if a in self.bias_order else 0 for a in self.bias)]
        return weight, None if bias is None else np.einsum(f"{self._held}->{self.bias_order}", bias)

    def write(self, weight: Any, bias: Any) -> tuple[Any, Any]:
        bias = np.einsum(f"{self.bias_order}->{self._held}", bias)
        bias = bias[tuple(slice(None) if a in self.bias_order else None for a in self.bias)]
        return np.einsum(f"{self.order}->{self.kernel}", weight), bias

    @property
    def _held(self) -> str:
        return "".join(a for a in self.bias if a in self.bias_order)


def norm_of(pair: Pair) -> tuple[Any, Any, Any, Any, float]:
    """Mean, variance, weight, bias and eps of the norm, as what is written meets them.

    Of a separable convolution that is what comes from its depthwise part, behind which a norm before it is another.
    """
    norm, layer = pair.norm, pair.linear
    mean, var, weight, bias = (numbers(a) for a in (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta))
    if not pair.after and isinstance(layer, _SEPARABLE):
        depthwise = numbers(layer.depthwise_kernel)
        taps = depthwise.reshape(-1, depthwise.shape[-2] * depthwise.shape[-1]).sum(0)
        mean, var, weight, bias = (
            None if a is None else np.repeat(a, depthwise.shape[-1]) for a in (mean, var, weight, bias)
        )
        mean, bias = mean * taps, None if bias is None else bias * taps
    return mean, var, weight, bias, norm.epsilon


def weight_of(pair: Pair) -> tuple[Any, Any]:
    """The weight as (groups, outputs, inputs, taps), and the bias or ``None``.

    Taps come first in Keras, and outputs last, but in transposed convolutions.
    """
    layer = pair.linear
    kernel, bias = numbers(_kernel(layer)), numbers(layer.bias)
    if isinstance(layer, L.EinsumDense):
        kernel, bias = _Einsum(pair).read(kernel, bias)
        if pair.after:
            return kernel.reshape(1, len(kernel), -1, 1), bias
        return kernel.reshape(1, -1, kernel.shape[-1], 1), None if bias is None else bias.ravel()
    *_, first, last = kernel.shape
    flat = kernel.reshape(-1, first, last)
    if isinstance(layer, _DEPTHWISE):
        weight = flat.transpose(1, 2, 0)[:, :, None]
    elif isinstance(layer, _TRANSPOSED):
        weight = flat.transpose(1, 2, 0)[None]
    else:
        groups = getattr(layer, "groups", 1)
        weight = flat.reshape(-1, first, groups, last // groups).transpose(2, 3, 1, 0)
    return weight, bias


def written(pair: Pair, weight: Any, bias: Any) -> Callable[[], None]:
    """Give the layer a weight and bias of that form; what is returned takes them back."""
    layer = pair.linear
    kernel, old_bias = _kernel(layer), layer.bias
    old = ops.convert_to_numpy(kernel).copy()
    # What says that there is a bias, with and without one.
    switch: tuple[str, Any, Any] = "use_bias", True, False
    if isinstance(layer, L.EinsumDense):
        axes = _Einsum(pair)
        lengths = dict(zip(axes.kernel, kernel.shape, strict=True))
        bias = bias if pair.after else bias.reshape([lengths[a] for a in axes.bias_order])
        flat, bias = axes.write(weight.reshape([lengths[a] for a in axes.order]), bias)
        switch = "bias_axes", axes.bias_order, layer.bias_axes
    elif isinstance(layer, _DEPTHWISE):
        flat = weight[:, :, 0].transpose(2, 0, 1)
    elif isinstance(layer, _TRANSPOSED):
        flat = weight[0].transpose(2, 0, 1)
    else:
        flat = weight.transpose(3, 2, 0, 1)
    with np.errstate(over="ignore"):  # what is not finite is seen by its error
        kernel.assign(flat.reshape(tuple(kernel.shape)))
        if old_bias is not None:
            before = ops.convert_to_numpy(old_bias).copy()
            old_bias.assign(bias)
        else:
            layer._tracker.unlock()
            with keras.name_scope(layer.name):
                new = layer.add_weight(
                    name="bias", shape=bias.shape, initializer="zeros", trainable=True, dtype=kernel.dtype,
                    regularizer=layer.bias_regularizer, constraint=layer.bias_constraint,
                )  # fmt: skip
            layer.bias = new
            setattr(layer, *switch[:2])
            layer._tracker.lock()
            new.assign(bias)

    def undo() -> None:
        kernel.assign(old)
        if old_bias is not None:
            old_bias.assign(before)
            return
        layer._untrack_variable(layer.bias)
        layer.bias = None
        setattr(layer, switch[0], switch[2])

    return undo


def misfit(pair: Pair, between: Any) -> str:
    """Why the weights do not take the norm, with what array between the two."""
    layer, rank = pair.linear, len(between.shape)
    if isinstance(layer, L.EinsumDense):
        return _Einsum(pair).misfit
    channels = 1 if getattr(layer, "data_format", "") == "channels_first" else rank - 1
    return "" if pair.norm.axis % rank == channels else "has its channels on another axis"


def padded(layer: Any) -> str:
    """Why a layer does not meet the shift of a norm before it everywhere alike."""
    if isinstance(layer, _TRANSPOSED):
        return "the transposed convolution behind it does not meet its shift at every tap"
    if isinstance(layer, _CONVOLUTIONS) and layer.padding != "valid" and max(layer.kernel_size) > 1:
        return "the convolution behind it pads zeros, which its shift would have to pass by"
    return ""


def _kernel(layer: Any) -> Any:
    return layer.pointwise_kernel if isinstance(layer, _SEPARABLE) else layer.kernel
