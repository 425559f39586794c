"""torch.nn's normalization layers over normkit's functions: arguments, state and repr are torch's, forward is ours.

Each forward pass is a mixin, so that :func:`normkit.replace` can put it before other classes than torch.nn's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normkit import _policies, functional
from normkit import _validate as check
from normkit._dispatch import backend_of
from normkit._layer import call
from normkit._policies import SETTINGS, USUAL, Policed, with_settings
from normkit.backends.torch import graphs
from normkit.backends.torch.ops import kept
from normkit.backends.torch.statistics import count_batch, count_by, count_instances, count_once
from normkit.core.normalize import BatchStats

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FrozenBatchNorm2d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "RMSNorm",
    "count_once",
]

Axes = tuple[int, ...]

layer_norm, rms_norm = graphs.entry(functional.layer_norm), graphs.entry(functional.rms_norm)
group_norm, instance_norm = graphs.entry(functional.group_norm), graphs.entry(functional.instance_norm)
batch_norm, batch_norm_train = graphs.entry(functional.batch_norm), graphs.entry(functional.batch_norm_train)

# What torch.compile asks of it is there before it reads a layer.
backend_of("x", torch.empty(0))


@graphs.closed(Tensor, isinstance, type)
def floating(tensor, isinstance, type):
    def floating(input: Tensor, name: str) -> None:
        """Refuse what has no real fractions, as torch does."""
        if not isinstance(input, tensor):
            raise TypeError(f"{name} takes a torch.Tensor; received {type(input).__name__}.")
        if not input.is_floating_point():
            raise NotImplementedError(f"{name} is not implemented for {input.dtype}: convert the input first.")

    return floating


def configured(original: Any) -> Callable:
    """The ``__init__`` of torch's class, with our settings by name after its arguments."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        ours = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        original.__init__(self, *args, **kwargs)
        for name, value in ours.items():
            setattr(self, name, value)

    __init__.__signature__ = with_settings(original, SETTINGS)  # type: ignore[attr-defined]
    return __init__


class PolicedModule(Policed):
    """The settings of a module with running statistics, which repr shows where they are not torch's."""

    @property
    def train_affine(self: Any) -> bool:
        """Whether weight and bias require gradients."""
        return all(p.requires_grad for p in (self.weight, self.bias) if p is not None)

    @train_affine.setter
    def train_affine(self: Any, value: bool) -> None:
        check.choice("train_affine", value, (True, False))
        for p in (self.weight, self.bias):
            if p is not None:
                p.requires_grad_(value)

    def extra_repr(self: Any) -> str:
        """As torch's, and what else was set."""
        theirs = super().extra_repr()  # type: ignore[misc]
        pairs = zip(USUAL._fields, self._policies, USUAL, strict=True)
        return ", ".join([theirs, *(f"{n}={v!r}" for n, v, usual in pairs if v != usual)])

    def _modes(self: Any, training: bool) -> tuple[bool, bool]:
        """Whether the batch's statistics are used, and whether they are counted; refused without running ones."""
        policies = self._policies
        used, updated = policies.modes(training)
        if policies.update_stats is None:
            updated = updated and self.training and self.track_running_stats
        if self.running_mean is None:
            for name, value in (("use_batch_stats", False), ("update_stats", True), ("single_value", "running")):
                if getattr(policies, name) == value:
                    raise ValueError(
                        f"{type(self).__name__} with {name}={value!r} needs running statistics; received a layer "
                        f"without: make it with track_running_stats=True."
                    )
        return used, updated


class BatchNormForward(PolicedModule):
    """Batch norm as the layer's mode says: by the batch, whose statistics are counted, or by the running ones."""

    #: Whether a running variance is n / (n - 1) times that of the values.
    _unbiased = True

    def forward(self: Any, input: Tensor) -> Tensor:
        floating(input, "batch_norm")
        self._check_input_dim(input)
        weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        known = weight if weight is not None else mean
        if known is not None and input.shape[1] != len(known):
            raise RuntimeError(
                f"{type(self).__name__} holds {len(known)} channels; got an input of size {tuple(input.shape)}, with "
                f"{input.shape[1]} at dim 1."
            )
        by_batch = self.training or mean is None or var is None
        # Looked up where its own are: torch.compile would check each class before the one that has the usual ones.
        policies, updated = self.__dict__.get("_policies", USUAL), self.training and self.track_running_stats
        refused = True
        if policies is not USUAL:
            by_batch, updated = self._modes(by_batch)
            refused = policies.single_value == "raise"
        if by_batch and refused and input.numel() == input.shape[1] != 0:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {input.shape}: use a larger "
                f"batch, or eval()."
            )
        if by_batch and self.eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {self.eps}")
        if policies is not USUAL:
            if updated and not by_batch:
                mean, var = kept(mean), kept(var)
            modes = policies._replace(use_batch_stats=by_batch, update_stats=updated)
            options = {"axis": 1, "eps": self.eps}
            y, stats, _ = _policies.batch_norm(
                modes, True, call, lambda x, *_, **__: self._by_batch(x), input, mean, var, weight, bias, **options
            )
        elif by_batch:
            y, stats = self._by_batch(input)
        else:
            return batch_norm(input, mean, var, weight, bias, eps=self.eps)
        if updated and stats is not None:
            if policies is USUAL:
                count_batch(self, stats, self._unbiased)
            else:
                count_by(policies, self, stats, self._unbiased)
        return y

    def _by_batch(self: Any, input: Tensor) -> tuple[Tensor, BatchStats]:
        policies = self.__dict__.get("_policies", USUAL)
        refused = "raise" if policies is USUAL or policies.single_value == "raise" else "zero"
        return batch_norm_train(input, self.weight, self.bias, eps=self.eps, single_value=refused)


class FrozenBatchNormForward:
    """Batch norm by the layer's statistics, in either mode."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class InstanceNormForward(PolicedModule):
    """Instance norm; where statistics are tracked, they are counted in training and used in inference."""

    def _apply_instance_norm(self: Any, input: Tensor) -> Tensor:
        floating(input, "instance_norm")
        weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        if mean is not None and input.shape[1] != len(mean):
            raise RuntimeError(
                f"{type(self).__name__} holds statistics of {len(mean)} channels; got an input of size "
                f"{tuple(input.shape)}, with {input.shape[1]} at dim 1."
            )
        by_instance, updated = self.training or not self.track_running_stats, mean is not None
        policies, single = self._policies, math.prod(input.shape[2:]) == 1
        if policies is not USUAL:
            by_instance, updated = self._modes(by_instance)
        if by_instance and single and policies.single_value == "raise":
            raise ValueError(
                f"Expected more than 1 spatial element when training, got input size {input.shape}: one value has no "
                f"variance."
            )
        if by_instance and not (single and policies.single_value == "running"):
            y = instance_norm(input, weight, bias, eps=self.eps)
        else:
            if policies is not USUAL and updated:
                mean, var = kept(mean), kept(var)
            y = batch_norm(input, mean, var, weight, bias, eps=self.eps)
        if updated and (by_instance or policies is not USUAL):
            count_instances(self, input, policies)
        return y


class LayerNormForward:
    """Layer norm over the last axes."""

    def forward(self: Any, input: Tensor) -> Tensor:
        axis = trailing(self.normalized_shape, input)
        return layer_norm(input, self.weight, self.bias, axis=axis, eps=self.eps)


class LayerNorm2dForward:
    """Layer norm over the channel axis of (N, C, H, W)."""

    def forward(self: Any, input: Tensor) -> Tensor:
        channels(self.normalized_shape, input)
        return layer_norm(input, self.weight, self.bias, axis=1, eps=self.eps)


class RMSNormForward:
    """RMS norm over the last axes; without an eps, by that of the dtype that is computed in."""

    def forward(self: Any, input: Tensor) -> Tensor:
        axis = trailing(self.normalized_shape, input)
        return rms_norm(input, self.weight, axis=axis, eps=self._eps_for(input))

    def _eps_for(self: Any, input: Tensor) -> float:
        if self.eps is not None:
            return self.eps
        return torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps


class GroupNormForward:
    """Group norm, channels at axis 1."""

    def forward(self: Any, input: Tensor) -> Tensor:
        groups = self.num_groups
        divisible(input, groups, self.weight, type(self).__name__)
        return group_norm(input, groups, self.weight, self.bias, eps=self.eps)


@graphs.closed(floating, len, list, tuple, math.prod)
def divisible(floating, len, list, tuple, prod):
    def divisible(input: Tensor, groups: int, weight: Tensor | None, layer: str) -> None:
        """Floating-point channels that groups divide, with more than one value each."""
        floating(input, "group_norm")
        shape = input.shape
        if len(shape) < 2:
            raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {len(shape)}")
        if weight is not None and shape[1] != len(weight):
            raise RuntimeError(
                f"{layer} holds {len(weight)} channels; got an input of size {tuple(shape)}, with {shape[1]} at dim 1."
            )
        if shape[1] % groups:
            raise RuntimeError(
                f"Expected number of channels in input to be divisible by num_groups, but got input of shape "
                f"{list(shape)} and num_groups={groups}"
            )
        if shape[0] * shape[1] // groups * prod(shape[2:]) == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {list(shape)}: one value has no "
                f"variance."
            )

    return divisible


@graphs.closed(floating, len, range, tuple)
def trailing(floating, len, range, tuple):
    def trailing(normalized_shape: Axes, input: Tensor) -> Axes:
        """The last axes of a floating-point input, after a look at their lengths."""
        floating(input, "Normalization")
        count = len(normalized_shape)
        if not count:
            raise RuntimeError("Expected normalized_shape to be at least 1-dimensional, but got normalized_shape = []")
        if input.shape[-count:] != normalized_shape:
            raise RuntimeError(
                f"Given normalized_shape={list(normalized_shape)}, expected input with shape "
                f"[*, {', '.join(map(str, normalized_shape))}], but got input of size{list(input.shape)}"
            )
        return tuple(range(-count, 0))

    return trailing


def channels(normalized_shape: tuple[int, ...], input: Tensor) -> None:
    """An input (N, C, H, W) of floating-point numbers, with these channels."""
    floating(input, "Normalization")
    if input.dim() != 4:
        raise ValueError(f"expected 4D input (got {input.dim()}D input)")
    if input.shape[1:2] != normalized_shape:
        raise RuntimeError(
            f"Given normalized_shape={list(normalized_shape)}, expected input with shape [N, {normalized_shape[0]}, H, "
            f"W], but got input of size{list(input.shape)}"
        )


class BatchNorm1d(BatchNormForward, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` with normkit's numbers: (N, C) or (N, C, L); see :class:`BatchNorm2d`."""

    __init__ = configured(nn.BatchNorm1d)
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class BatchNorm2d(BatchNormForward, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` with normkit's numbers: (N, C, H, W).

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with mean and biased variance of the batch in training, of the
    running statistics (whose variance is unbiased) in inference. Arguments, state, repr and errors are those of
    :class:`torch.nn.BatchNorm2d`; torch's ``momentum`` is the weight of the new value.

    Notes
    -----
    Two things differ. A batch without elements is not counted. And where ``torch.compile`` is asked for the full graph,
    ``momentum=None`` is in it. Activation checkpointing counts every batch twice, here as there, but within
    :class:`count_once`.

    By name after torch's arguments, and as attributes: ``single_value``, ``empty_batch``, ``nonfinite``,
    ``use_batch_stats`` and ``update_stats`` as in :class:`normkit.BatchNorm`, where torch's ``train()`` and
    ``track_running_stats`` are what None follows; ``train_affine`` is ``requires_grad`` of weight and bias. The same in
    instance norm, of whose samples one value each is meant.
    """

    __init__ = configured(nn.BatchNorm2d)
    # Found at once: torch.compile would check that no class before the one that has it has another.
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class BatchNorm3d(BatchNormForward, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` with normkit's numbers: (N, C, D, H, W); see :class:`BatchNorm2d`."""

    __init__ = configured(nn.BatchNorm3d)
    _check_input_dim = nn.BatchNorm3d._check_input_dim


class InstanceNorm1d(InstanceNormForward, nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d` with normkit's numbers: (N, C, L) or (C, L); see :class:`InstanceNorm2d`."""

    __init__ = configured(nn.InstanceNorm1d)


class InstanceNorm2d(InstanceNormForward, nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` with normkit's numbers: (N, C, H, W) or (C, H, W).

    :func:`normkit.instance_norm`, with the arguments, state, repr and errors of :class:`torch.nn.InstanceNorm2d`.
    ``channels_last`` stays. ``momentum=None`` leaves tracked statistics where they are, as torch does.
    """

    __init__ = configured(nn.InstanceNorm2d)


class InstanceNorm3d(InstanceNormForward, nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d` with normkit's numbers: (N, C, D, H, W) or one sample; see InstanceNorm2d."""

    __init__ = configured(nn.InstanceNorm3d)


class LayerNorm(LayerNormForward, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` with normkit's numbers: :func:`normkit.layer_norm` over the last axes.

    Arguments, state, repr and errors are those of :class:`torch.nn.LayerNorm`.
    """


class LayerNorm2d(LayerNorm2dForward, nn.LayerNorm):
    """Layer norm over the channel axis of (N, C, H, W), as ConvNeXt has it: :func:`normkit.layer_norm` with ``axis=1``.

    Arguments and state are those of :class:`torch.nn.LayerNorm`, with one normalized length, the channels;
    ``channels_last`` stays.
    """

    def __init__(self, normalized_shape: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"LayerNorm2d normalizes channels, one length; received {self.normalized_shape}.")


class RMSNorm(RMSNormForward, nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` with normkit's numbers: :func:`normkit.rms_norm` over the last axes.

    Arguments, state, repr and errors are those of :class:`torch.nn.RMSNorm`; ``eps=None`` is the eps of float64 for
    float64, that of float32 for everything narrower.
    """


class GroupNorm(GroupNormForward, nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` with normkit's numbers: :func:`normkit.group_norm`.

    Arguments, state, repr and errors are those of :class:`torch.nn.GroupNorm`; ``channels_last`` stays, and gives the
    same numbers.
    """


class FrozenBatchNorm2d(FrozenBatchNormForward, nn.Module):
    """Batch norm whose statistics and affine part are buffers and never change, as detection models have it.

    Parameters
    ----------
    num_features : the number of channels
    eps : added to the variance

    Notes
    -----
    The state is weight, bias, running_mean and running_var; ``num_batches_tracked`` of a batch norm is left out when
    its state is loaded.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """As torchvision's: channels and eps."""
        return f"{self.num_features}, eps={self.eps}"
