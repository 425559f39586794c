"""Batch norms of a PyTorch model and the layers beside them, found by running it; folded, and unfolded again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.backends import kernels
from normkit.backends.models import Pair
from normkit.backends.torch import known
from normkit.backends.torch.batch_norms import formula, numbers

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class TorchFolds:
    """PyTorch's batch norms, for :func:`normkit.fold`."""

    def training(self, layer: nn.Module) -> bool:
        """Any layer's mode: one that drops out makes outputs of no use."""
        return layer.training

    @torch.no_grad()
    def outputs(self, model: nn.Module, run: Callable[[], Any]) -> list[tuple[Any, float]]:
        """Tensors anywhere in what the model returns."""
        found = [a for a in _tensors(run()) if a.is_floating_point()]
        return [(numbers(a), torch.finfo(a.dtype).eps) for a in found]

    def pairs(self, model: nn.Module, run: Callable[[], Any]) -> list[tuple[Any, Pair | str]]:
        """By following each output to what takes it."""
        norms = [layer for layer in model.modules() if formula(layer) is not None]
        linears = [layer for layer in model.modules() if isinstance(layer, (*_CONVOLUTIONS, nn.Linear))]
        with _Trace(model, [*norms, *linears]) as trace:
            trace.returned(run())
        return [(norm, trace.pair(norm)) for norm in norms]

    def norm(self, pair: Pair) -> tuple[Any, Any, Any, Any, float]:
        """Buffers and parameters; torchvision's and transformers' frozen ones may have no eps."""
        layer = pair.norm
        tensors = (numbers(a) for a in (layer.running_mean, layer.running_var, layer.weight, layer.bias))
        mean, var, weight, bias = tensors
        return mean, var, weight, bias, getattr(layer, "eps", 1e-5)

    def linear(self, pair: Pair) -> tuple[Any, Any]:
        """In one form for all: convolutions hold (outputs, inputs per group), transposed ones (inputs, outputs)."""
        layer = pair.linear
        weight, groups = numbers(layer.weight), getattr(layer, "groups", 1)
        weight = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return weight.swapaxes(1, 2) if isinstance(layer, _TRANSPOSED) else weight, numbers(layer.bias)

    @torch.no_grad()
    def errors(
        self, model: nn.Module, run: Callable[[], Any], trials: list[tuple[Pair, Any, Any]]
    ) -> list[tuple[float, float]]:
        """By hooks: what enters a pair goes through the layer that would take its place as well."""
        beside = [_Beside(*trial) for trial in trials]
        with contextlib.ExitStack() as hooks:
            for (pair, _, _), other in zip(trials, beside, strict=True):
                first, second = (pair.linear, pair.norm) if pair.after else (pair.norm, pair.linear)
                hooks.callback(first.register_forward_pre_hook(other.enter, with_kwargs=True).remove)
                hooks.callback(second.register_forward_hook(other.leave).remove)
            run()
        return [other.error for other in beside]

    @torch.no_grad()
    def put(self, model: nn.Module, pair: Pair, weight: Any, bias: Any) -> Callable[[], None]:
        """In place: the weight stays the parameter that it is."""
        linear = pair.linear
        new_weight, new_bias = _tensors_of(linear, weight, bias)
        old_weight, old = linear.weight.clone(), linear.bias
        old_bias = None if old is None else old.clone()
        linear.weight.copy_(new_weight)
        if old is None:
            linear.bias = nn.Parameter(new_bias, requires_grad=linear.weight.requires_grad)
        else:
            old.copy_(new_bias)
        torch.clear_autocast_cache()  # which has the old weight, where autocast is on around all this
        rest = remainder(pair.norm)
        places = [(m, n) for m in model.modules() for n, child in m._modules.items() if child is pair.norm]
        for parent, name in places:
            parent._modules[name] = rest

        @torch.no_grad()
        def undo() -> None:
            linear.weight.copy_(old_weight)
            linear.bias = old
            if old is not None:
                old.copy_(old_bias)
            torch.clear_autocast_cache()
            for parent, name in places:
                parent._modules[name] = pair.norm

        return undo


def remainder(norm: Any) -> nn.Module:
    """What a batch norm does beside: nothing, or what it holds for afterwards."""
    cls = formula(norm)
    if not (isinstance(cls, type) and issubclass(cls, known.ACTING)):
        return nn.Identity().eval()
    rest = [part for part in (norm.drop, norm.act) if not isinstance(part, nn.Identity)]
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest).eval()


class _Beside:
    """What would take a pair's place, computed beside the pair."""

    def __init__(self, pair: Pair, weight: Any, bias: Any) -> None:
        self.linear, self.rest = _with(pair.linear, *_tensors_of(pair.linear, weight, bias)), remainder(pair.norm)
        self.error = (float("inf"), 1.0)

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.taken = _tensors((args, kwargs))

    def leave(self, layer: nn.Module, args: tuple, y: Tensor) -> None:
        # Not by calling it: the copy has the hooks of the layer, this one among them.
        apart = (self.rest(self.linear.forward(*self.taken)).double() - y.double()).abs().max()
        self.error = float(apart / y.double().abs().max()) if apart else 0.0, torch.finfo(y.dtype).eps


def _with(linear: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """The layer with other tensors."""
    twin = copy.copy(linear)
    vars(twin)["_parameters"] = {**linear._parameters, "weight": weight, "bias": bias}
    return twin


def _tensors_of(linear: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor]:
    """In the layer's form, dtype and device."""
    weight = weight.swapaxes(1, 2) if isinstance(linear, _TRANSPOSED) else weight
    held = linear.weight
    return torch.tensor(weight.reshape(held.shape)).to(held), torch.tensor(bias).to(held)


def _tensors(values: Any) -> list[Tensor]:
    return [a for a in _pytree.tree_leaves(values) if isinstance(a, Tensor)]


class _Trace(TorchDispatchMode):
    """What takes the outputs of some layers: other such layers, operations, the model's caller."""

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.inside = 0
        #: By the tensor's id, which stays its own as long as the tensor is held here.
        self.made_by: dict[int, tuple[Tensor, nn.Module]] = {}
        self.taken_by: dict[int, list[Any]] = {}
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
        self.owners: dict[int, int] = {}
        for module in model.modules():
            for held in module._parameters.values():
                self.owners[id(held)] = self.owners.get(id(held), 0) + 1

    def __enter__(self) -> _Trace:
        self.hooks = contextlib.ExitStack()
        self.hooked = {layer for layer in self.layers if any(getattr(layer, name, None) for name in _HOOKS)}
        for layer in self.layers:
            self.hooks.callback(layer.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            self.hooks.callback(layer.register_forward_hook(self._leave, always_call=True).remove)
        self.hooks.callback(self.model.register_forward_hook(lambda layer, args, y: self.returned(y)).remove)
        self.hooks.enter_context(torch.no_grad())
        # A kernel takes its arrays without an operation that could be seen.
        self.hooks.enter_context(kernels.off())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            self._take((args, kwargs), func)
        return func(*args, **(kwargs or {}))

    def _take(self, values: Any, taker: Any) -> None:
        for a in _tensors(values):
            self.taken_by.setdefault(id(a), []).append(taker)

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.inside:
            self._take((args, kwargs), layer)
        self.inside += 1
        self.calls[layer].append((*_tensors((args, kwargs))[:1], None))

    def _leave(self, layer: nn.Module, args: tuple, y: Any) -> None:
        self.inside -= 1
        if isinstance(y, Tensor):
            self.calls[layer][-1] = (self.calls[layer][-1][0], y)
            self.made_by[id(y)] = (y, layer)
            self.taken_by.pop(id(y), None)

    def returned(self, y: Any) -> None:
        """What leaves the model, or the call of some of its layers, is taken by whoever called."""
        self._take(y, "caller")

    def pair(self, norm: Any) -> Pair | str:
        """What a batch norm can be folded into, or why it cannot."""
        cls, calls = formula(norm), self.calls[norm]
        if not isinstance(cls, type):
            return str(cls)
        if norm in self.hooked:
            return "it has hooks"
        if norm.running_mean is None or norm.running_var is None:
            return "it has no running statistics"
        if getattr(norm, "use_batch_stats", None):
            return "it normalizes by the batch in inference too"
        if len(calls) != 1:
            return f"it is called {len(calls)} times" if calls else "the sample does not reach it"
        (x, y) = calls[0]
        _, source = self.made_by.get(id(x), (x, None))
        reason = ""
        if self._maps(source):
            reason = self._beside(norm, source, x)
            if not reason:
                return Pair(norm, source, True)
        takers = self.taken_by.get(id(y), [])
        if len(takers) == 1 and self._maps(takers[0]):
            rest = not isinstance(remainder(norm), nn.Identity)
            behind = rest and "its activation stands before the layer that takes its output"
            behind = behind or self._beside(norm, takers[0], y) or self._padded(takers[0])
            if not behind:
                return Pair(norm, takers[0], False)
            reason = reason or behind
        return reason or "no convolution or linear layer stands right before or behind it"

    def _maps(self, layer: Any) -> bool:
        return isinstance(layer, (*_CONVOLUTIONS, nn.Linear))

    def _beside(self, norm: Any, linear: Any, between: Tensor) -> str:
        """Why a norm cannot be folded into a layer beside it."""
        name = next(name for name, module in self.model.named_modules() if module is linear)
        if len(self.calls[linear]) != 1:
            return f"{name}, beside it, is called {len(self.calls[linear])} times"
        if len(self.taken_by[id(between)]) != 1:
            return f"what is between it and {name} goes elsewhere as well"
        if linear in self.hooked or parametrize.is_parametrized(linear):
            return f"{name}, beside it, has hooks or parametrizations"
        held = [a for a in (linear.weight, linear.bias) if a is not None]
        if any(self.owners[id(a)] != 1 or self.taken_by.get(id(a)) for a in held):
            return f"the parameters of {name}, beside it, are used elsewhere as well"
        if between.dim() != (2 if isinstance(linear, nn.Linear) else linear.weight.dim()):
            return f"{name}, beside it, has its channels on another axis"
        return ""

    def _padded(self, linear: Any) -> str:
        """Why a layer does not meet the shift of a norm before it everywhere alike."""
        if isinstance(linear, _TRANSPOSED):
            return "the transposed convolution behind it does not meet its shift at every tap"
        padding = getattr(linear, "padding", 0)
        none = padding == "valid" or not any(padding if isinstance(padding, tuple) else (padding,))
        if none or getattr(linear, "padding_mode", "") != "zeros":
            return ""
        return "the convolution behind it pads zeros, which its shift would have to pass by"
