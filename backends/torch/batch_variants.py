"""Relatives of batch norm that take one thing out of it or put one in: to ask of a model why batch norm helps it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit import functional, lp_norms
from normkit.backends.torch.layers import BatchNormForward
from normkit.core.normalize import BatchStats

__all__ = ["BackwardGradientNorm", "GhostBatchNorm", "LpNorm", "NoisyBatchNorm", "StopGradientBatchNorm"]


class _Variant(BatchNormForward, _BatchNorm):
    """The arguments and state of torch's batch norms, for (N, C, ...) of any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class NoisyBatchNorm(_Variant):
    """Batch norm, then noise whose distribution is drawn anew for every batch and channel: in training only.

    ``y = scale * batch_norm(x) + shift``, with ``scale ~ N(s, spread)`` and ``shift ~ U(m - spread, m + spread)`` for
    every element, where ``s ~ U(1, largest_scale)`` and ``m ~ U(-largest_shift, largest_shift)`` for every channel of
    the batch. Distributions of the next layer's inputs then move from batch to batch.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats : as in :class:`torch.nn.BatchNorm2d`
    largest_shift, largest_scale : bounds of the channels' means and scales
    spread : of both within a channel
    generator : what numbers are drawn from; None: torch's own

    Raises
    ------
    ValueError
        A bound is negative, or largest_scale is below 1; else as :class:`torch.nn.BatchNorm2d`.

    Notes
    -----
    Source: Santurkar, Tsipras, Ilyas, Madry, "How Does Batch Normalization Help Optimization?", arXiv:1805.11604,
    whose numbers are the defaults.
    """

    def __init__(
        self,
        num_features: int,
        *args: Any,
        largest_shift: float = 0.5,
        largest_scale: float = 1.25,
        spread: float = 0.1,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, *args, **kwargs)
        if not (largest_shift >= 0 and largest_scale >= 1 and spread >= 0):
            raise ValueError(
                "NoisyBatchNorm wants largest_shift >= 0, largest_scale >= 1 and spread >= 0; received "
                f"{largest_shift}, {largest_scale} and {spread}."
            )
        self.largest_shift, self.largest_scale, self.spread = largest_shift, largest_scale, spread
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if not self.training:
            return y
        channel = (1, y.shape[1], *(1 for _ in y.shape[2:]))
        options = {"generator": self.generator, "device": y.device, "dtype": y.dtype}
        mean = (torch.rand(channel, **options) * 2 - 1) * self.largest_shift
        scale = torch.rand(channel, **options) * (self.largest_scale - 1) + 1
        shift = mean + (torch.rand(y.shape, **options) * 2 - 1) * self.spread
        return y * (scale + torch.randn(y.shape, **options) * self.spread) + shift


class LpNorm(_Variant):
    """Batch norm by the mean p-norm in the place of the standard deviation: :func:`normkit.lp_batch_norm_train`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats : as in :class:`torch.nn.BatchNorm2d`
    p : 1, 2 or infinity
    centred : take the norm of x - mean
    consistent : multiply the norm so that it estimates the standard deviation of Gaussian x

    Raises
    ------
    ValueError
        p is another number; else as :class:`torch.nn.BatchNorm2d`.

    Notes
    -----
    ``running_var`` is the running square of the norm. Sources: Santurkar et al., arXiv:1805.11604; Hoffer et al.,
    arXiv:1803.01814.
    """

    _unbiased = False

    def __init__(
        self, num_features: int, p: float, *args: Any, centred: bool = False, consistent: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_features, *args, **kwargs)
        if p not in (1, 2, math.inf):
            raise ValueError(f"p must be 1, 2 or infinity; received {p!r}.")
        self.p, self.centred, self.consistent = p, centred, consistent

    def _by_batch(self, input: Tensor) -> tuple[Tensor, BatchStats]:
        return lp_norms.lp_batch_norm_train(
            input,
            self.weight,
            self.bias,
            p=self.p,
            eps=self.eps,
            centred=self.centred,
            consistent=self.consistent,
        )

    def extra_repr(self) -> str:
        """As torch's, with p."""
        return f"{super().extra_repr()}, p={self.p}, centred={self.centred}, consistent={self.consistent}"


class StopGradientBatchNorm(_Variant):
    """Batch norm whose statistics are constants in the backward pass: the same y, ``dx = dy * weight / std``.

    Distributions are pinned, and nothing else: what batch norm does to the gradient is taken out. Arguments and state
    are those of :class:`torch.nn.BatchNorm2d`.
    """

    def _by_batch(self, input: Tensor) -> tuple[Tensor, BatchStats]:
        with torch.no_grad():
            _, stats = functional.batch_norm_train(input.detach(), eps=self.eps)
        y = functional.batch_norm(input, stats.mean, stats.var, self.weight, self.bias, eps=self.eps)
        return y, stats


class GhostBatchNorm(_Variant):
    """Batch norm by so many samples at a time: :func:`normkit.batch_norm_train` with ``virtual_batch_size``.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats : as in :class:`torch.nn.BatchNorm2d`
    virtual_batch_size : how many samples, one after the other, are normalized together

    Raises
    ------
    ValueError
        virtual_batch_size is no positive integer or does not divide the batch; else as :class:`torch.nn.BatchNorm2d`.

    Notes
    -----
    Source: Hoffer, Hubara, Soudry, "Train longer, generalize better", arXiv:1705.08741.
    """

    def __init__(self, num_features: int, virtual_batch_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        if type(virtual_batch_size) is not int or virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size must be a positive integer; received {virtual_batch_size!r}.")
        self.virtual_batch_size = virtual_batch_size

    def _by_batch(self, input: Tensor) -> tuple[Tensor, BatchStats]:
        size = self.virtual_batch_size
        return functional.batch_norm_train(input, self.weight, self.bias, eps=self.eps, virtual_batch_size=size)

    def extra_repr(self) -> str:
        """As torch's, with the virtual batch."""
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


class BackwardGradientNorm(nn.Module):
    """The identity, whose gradient is scaled sample by sample to a root mean square of 1: ``sqrt(n) * dy / |dy|``.

    With n elements in a sample. A gradient of zero stays zero. Between layers it keeps gradients from fading and from
    growing; their lengths are lost.

    Notes
    -----
    Source: Cabana, Lago-Fernández, "Backward Gradient Normalization in Deep Neural Networks", arXiv:2106.09475.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point() or input.dim() < 2:
            raise ValueError(
                f"BackwardGradientNorm takes floating-point samples of at least 2 dimensions; received {input.dtype} "
                f"of {tuple(input.shape)}."
            )
        return _Unit.apply(input)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (dy,) = gradients
        wide = dy.flatten(1).to(torch.float64 if dy.dtype == torch.float64 else torch.float32)
        # Of what is relative to the largest: squares leave the range before gradients do.
        largest = wide.abs().amax(1, keepdim=True)
        relative = wide / torch.where(largest > 0, largest, 1.0)
        length = relative.square().mean(1, keepdim=True).sqrt()
        return (relative / torch.where(length > 0, length, 1.0)).to(dy.dtype).reshape(dy.shape)
