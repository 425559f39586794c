"""Norm layers of timm, torchvision and transformers: known by name, and confirmed by their own forward pass."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from normkit import functional
from normkit.backends.models import stand_in
from normkit.backends.torch import layers as ours

#: The forward pass of each of our layers, to be put before other classes.
FORWARD = {
    cls: next(base for base in cls.__mro__ if base.__name__.endswith("Forward"))
    for cls in (getattr(ours, name) for name in ours.__all__ if name != "count_once")
}


_RULES = {
    "input": lambda x, weight: x.dtype,
    "promoted": lambda x, weight: x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype),
    "weight": lambda x, weight: x.dtype if weight is None else weight.dtype,
}


def _through(function: Any, x: Tensor, rule: str, *operands: Any, **options: Any) -> Tensor:
    """The function in the wider of two dtypes, its result in that which the rule says."""
    dtype = _RULES[rule](x, operands[-1])
    return function(x.to(torch.promote_types(x.dtype, dtype)), *operands, **options).to(dtype)


class RMSNorm2dForward(ours.RMSNormForward):
    """RMS norm over the channel axis of (N, C, H, W)."""

    _rule = "input"

    def forward(self: Any, input: Tensor) -> Tensor:
        ours.channels(self.normalized_shape, input)
        return _through(functional.rms_norm, input, self._rule, self.weight, axis=1, eps=self._eps_for(input))


class WideRMSNorm2dForward(RMSNorm2dForward):
    """RMS norm over the channel axis, in the dtype that x and the weight are promoted to."""

    _rule = "promoted"


class ChannelsFirstForward(ours.LayerNormForward):
    """Layer norm over the last axis, or over the channel axis of (N, C, H, W), as ``data_format`` says."""

    def forward(self: Any, features: Tensor) -> Tensor:
        first = self.data_format == "channels_first"
        forward: Any = ours.LayerNorm2dForward if first else ours.LayerNormForward
        return forward.forward(self, features)


class FrozenForward:
    """Frozen batch norm of buffers that x is promoted to, by the layer's eps or by 1e-5."""

    def forward(self: Any, x: Tensor) -> Tensor:
        statistics, eps = (self.running_mean, self.running_var), getattr(self, "eps", 1e-5)
        return _through(functional.batch_norm, x, "promoted", *statistics, self.weight, self.bias, eps=eps)


class LlamaForward:
    """RMS norm, rounded to the input's dtype and then multiplied by the weight."""

    _rule = "promoted"
    _offset = 0.0

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        weight = getattr(self, "weight", None)
        return _through(functional.rms_norm, hidden_states, self._rule, weight, eps=eps, weight_offset=self._offset)


class OlmoForward(LlamaForward):
    """RMS norm, multiplied by the weight and then rounded to the input's dtype."""

    _rule = "input"


class T5Forward(LlamaForward):
    """RMS norm in the weight's dtype."""

    _rule = "weight"


class GemmaForward(LlamaForward):
    """RMS norm whose weight is a deviation from one."""

    _rule, _offset = "input", 1.0


class CohereForward:
    """Layer norm without a bias."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return functional.layer_norm(hidden_states, self.weight, eps=self.variance_epsilon)


def _acting(forward: Any) -> type:
    def then(self: Any, x: Tensor) -> Tensor:
        return self.act(self.drop(forward.forward(self, x)))

    name = forward.__name__.replace("Forward", "ActForward")
    return type(name, (forward,), {"forward": then, "__module__": __name__, "__doc__": f"{forward.__doc__} Then act."})


BatchNormActForward = _acting(ours.BatchNormForward)
FrozenActForward = _acting(FrozenForward)
GroupNormActForward = _acting(ours.GroupNormForward)
LayerNormActForward = _acting(ours.LayerNormForward)
LayerNorm2dActForward = _acting(ours.LayerNorm2dForward)
RMSNormActForward = _acting(ours.RMSNormForward)
RMSNorm2dActForward = _acting(RMSNorm2dForward)
WideRMSNorm2dActForward = _acting(WideRMSNorm2dForward)

#: What does something after the norm.
ACTING = (BatchNormActForward, FrozenActForward)

#: What may take the place of a class: the first that computes what the class does is taken.
KNOWN: tuple[tuple[str, tuple[type, ...]], ...] = (
    (r"timm\.layers\.norm\.LayerNorm(Fp32)?", (ours.LayerNormForward,)),
    (r"timm\.layers\.norm\.LayerNorm2d(Fp32)?", (ours.LayerNorm2dForward,)),
    (r"timm\.layers\.norm\.GroupNorm1?", (ours.GroupNormForward,)),
    (r"timm\.layers\.norm\.RmsNorm(Fp32)?", (ours.RMSNormForward,)),
    (r"timm\.layers\.norm\.RmsNorm2d(Fp32)?", (RMSNorm2dForward, WideRMSNorm2dForward)),
    (r"timm\.layers\.norm_act\.BatchNormAct2d", (BatchNormActForward,)),
    (r"timm\.layers\.norm_act\.FrozenBatchNormAct2d", (FrozenActForward,)),
    (r"timm\.layers\.norm_act\.GroupNorm1?Act", (GroupNormActForward,)),
    (r"timm\.layers\.norm_act\.LayerNormAct(Fp32)?", (LayerNormActForward,)),
    (r"timm\.layers\.norm_act\.LayerNormAct2d(Fp32)?", (LayerNorm2dActForward,)),
    (r"timm\.layers\.norm_act\.RmsNormAct(Fp32)?", (RMSNormActForward,)),
    (r"timm\.layers\.norm_act\.RmsNormAct2d(Fp32)?", (RMSNorm2dActForward, WideRMSNorm2dActForward)),
    (r"torchvision\.ops\.misc\.FrozenBatchNorm2d", (FrozenForward,)),
    (r"torchvision\.models\.convnext\.LayerNorm2d", (ours.LayerNorm2dForward,)),
    (r"transformers\.models\..*FrozenBatchNorm2d", (FrozenForward,)),
    (r"transformers\.models\..*RMSNorm", (LlamaForward, OlmoForward, T5Forward, GemmaForward)),
    (r"transformers\.models\..*LayerNorm2d", (ours.LayerNorm2dForward,)),
    (
        r"transformers\.models\..*LayerNorm",
        (T5Forward, OlmoForward, ChannelsFirstForward, ours.LayerNormForward, CohereForward),
    ),
)


def inherits(kind: Any, base: type) -> bool:
    """Whether a subclass computes as torch.nn's class does: it defines no method that ours puts aside or calls."""
    methods = ("forward", "_apply_instance_norm", "_handle_no_batch_input", "__call__")
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in methods)


@functools.cache
def recipes(kind: Any) -> tuple[type, ...]:
    """What may take the place of a class, which takes one tensor."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    found = next((forwards for pattern, forwards in KNOWN if re.fullmatch(pattern, name)), ())
    return found if found and len(inspect.signature(kind.forward).parameters) == 2 else ()


def confirmed(layer: nn.Module, forwards: tuple[type, ...]) -> type | str:
    """A class that computes what the layer's does, in both modes and in every mixture of dtypes that it takes."""
    tensors = tuple(
        (n, a.shape) for held in (layer._parameters, layer._buffers) for n, a in held.items() if a is not None
    )
    plain = (bool, int, float, str, tuple, type(None))
    settings = tuple((n, v) for n, v in vars(layer).items() if isinstance(v, plain) and n != "training")
    key = (type(layer), forwards, tensors, settings, tuple(layer._modules))
    if key not in _confirmed:
        _confirmed[key] = _confirm(layer, forwards)
    return _confirmed[key]


_confirmed: dict[tuple, type | str] = {}


def _confirm(layer: nn.Module, forwards: tuple[type, ...]) -> type | str:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for forward in forwards:
            cls = stand_in(type(layer), forward)
            if all(_agree(layer, cls, *dtypes, training) for training in (False, True) for dtypes in _DTYPES):
                return cls
    return "its forward pass is not the formula that normkit knows under this name"


_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
)


class _Marked(nn.Module):
    """In the place of an activation, so that it shows whether it was applied and when."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + 1


def _agree(layer: nn.Module, cls: type, x_dtype: torch.dtype, dtype: torch.dtype, training: bool) -> bool:
    """Whether two classes compute the same with the layer's settings and other numbers; as well where theirs raises."""
    native, twin = _twin(layer, dtype, training), _twin(layer, dtype, training)
    twin.__class__ = cls
    x = _sample(native, cls, x_dtype)
    try:
        reference = native.forward(x.clone())
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return x_dtype is not dtype
    try:
        y = twin.forward(x)
    except AttributeError as error:
        if error.obj is twin:
            return False  # it has not what ours asks it for
        raise
    except ValueError:
        return False  # its parameters have another shape
    limit = 2.0**-4 if torch.bfloat16 in (x_dtype, dtype) else 2.0**-17
    pairs = zip((reference, *native._buffers.values()), (y, *twin._buffers.values()), strict=True)
    return all(_near(a, b, limit) for a, b in pairs)


def _near(a: Tensor | None, b: Tensor | None, share: float) -> bool:
    """Equal in dtype and shape, and in value to a share of the largest: 64 units of float32, 8 of bfloat16."""
    if a is None or b is None:
        return a is b
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return bool((a.double() - b.double()).abs().max() <= share * a.double().abs().max())


def _twin(layer: nn.Module, dtype: torch.dtype, training: bool) -> nn.Module:
    """The layer with other numbers, on the processor, in which eps shows; the layer itself is not touched."""
    numbers = torch.Generator("cpu").manual_seed(0)
    twin = copy.copy(layer)

    def other(a: Tensor | None, positive: bool) -> Tensor | None:
        if a is None or not a.is_floating_point():
            return a if a is None else torch.zeros(a.shape, dtype=a.dtype, device="cpu")
        values = torch.rand(a.shape, generator=numbers, device="cpu")
        return ((values + 0.5) * (_eps(layer) if positive else 1)).to(dtype)

    parameters = {name: other(a, False) for name, a in layer._parameters.items()}
    vars(twin).update(
        _parameters={name: None if a is None else nn.Parameter(a) for name, a in parameters.items()},
        _buffers={name: other(a, "var" in name) for name, a in layer._buffers.items()},
        _modules={name: _Marked() for name in layer._modules},
        training=training,
    )
    return twin


def _sample(twin: nn.Module, cls: type, dtype: torch.dtype) -> Tensor:
    """Input for the twin, of a spread in which eps shows."""
    held = next((a for a in (*twin._parameters.values(), *twin._buffers.values()) if a is not None and a.dim()), None)
    shape = tuple(getattr(twin, "normalized_shape", (16,) if held is None else held.shape))
    last = issubclass(cls, (ours.LayerNormForward, LlamaForward, CohereForward)) or (
        issubclass(cls, ours.RMSNormForward) and not issubclass(cls, RMSNorm2dForward)
    )
    if getattr(twin, "data_format", None) == "channels_first":
        last = False
    if "num_channels" in vars(twin):
        shape = (twin.num_channels,)
    x = torch.randn(
        (2, 3, *shape) if last else (2, *shape, 3, 5), generator=torch.Generator("cpu").manual_seed(1), device="cpu"
    )
    return (x * _eps(twin) ** 0.5).to(dtype)


def _eps(layer: Any) -> float:
    return getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", None) or 1e-5
