"""PyTorch's models: which layers are norms, what takes their place, and which models are beyond replacing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.utils import parametrize

from normkit.backends.models import original_of, stand_in
from normkit.backends.torch import batch_variants, known, layers
from normkit.backends.torch.batch_norms import TorchRecalibrates
from normkit.backends.torch.folding import TorchFolds
from normkit.backends.torch.objective import TorchDifferentiates

#: torch.nn's layers, and ours in their place.
OURS = {getattr(nn, kind): getattr(layers, kind) for kind in layers.__all__ if hasattr(nn, kind)}

#: Norms that normkit has not.
OTHERS = {
    nn.SyncBatchNorm: "its statistics are those of all processes, which normkit's are not",
    nn.LocalResponseNorm: "normkit has no local response norm",
    nn.CrossMapLRN2d: "normkit has no local response norm",
}

_NORM = re.compile(r"norm(?!al)|BN\d?d?$|\bLRN\b|LRN", re.IGNORECASE)
_QUANTIZED = re.compile(r"torch\.ao\.(nn|quantization)\.(?!.*(functional_modules|stubs)$)")


class TorchModels(TorchFolds, TorchRecalibrates, TorchDifferentiates):
    """Models of PyTorch, for :func:`normkit.replace` and what it shares with fold and recalibrate."""

    def refuse(self, model: Any, function: str = "replace") -> None:
        """Raise for what is compiled, scripted, exported or quantized."""
        if not isinstance(model, nn.Module):
            raise ValueError(f"{function} comes before torch.export; received an {type(model).__name__}.")
        for name, module in model.named_modules():
            what = _beyond(module)
            if what:
                where = f"{name} in this {type(model).__name__}" if name else f"this {type(model).__name__}"
                raise ValueError(f"{function} comes before a model is {what}; {where} is {what} already.")
            if function != "replace":
                _refuse_unnumbered(function, name or "the model", module)

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """All modules, by all their names."""
        # A program that was exported has none.
        return model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else iter(())

    def verdict(self, layer: nn.Module) -> type | str | None:
        """By the class, and where that is not torch.nn's by its forward pass."""
        kind: Any = type(layer)
        if original_of(layer) is not None:
            return "it was replaced before"
        if kind is batch_variants.BackwardGradientNorm:
            return "it is normkit's already: the identity, but for gradients"
        if kind.__module__ in (layers.__name__, batch_variants.__name__):
            return "it is normkit's already"
        if isinstance(layer, _LazyNormBase):
            return "it is lazy and not built yet: run one batch through the model, then replace"
        if kind in OTHERS:
            return OTHERS[kind]
        base = next((c for c in kind.__mro__ if c in OURS), None)
        recipes = known.recipes(kind)
        if base is None and not recipes:
            return _unknown(layer)
        if "forward" in vars(layer):
            return "its forward was set on the instance"
        if parametrize.is_parametrized(layer):
            return "it is parametrized: remove the parametrizations, or replace before they are registered"
        if kind in OURS:
            return stand_in(kind, OURS[kind])
        if recipes:
            return known.confirmed(layer, recipes)
        assert base is not None
        if not known.inherits(kind, base):
            return f"it is a subclass of torch.nn.{base.__name__} with a forward pass of its own"
        return stand_in(kind, known.FORWARD[OURS[base]])

    def changed(self, model: nn.Module) -> None:
        """Nothing is remembered of a model: what is compiled is refused."""


def _refuse_unnumbered(function: str, name: str, module: nn.Module) -> None:
    held = [a for a in (*module._parameters.values(), *module._buffers.values()) if a is not None]
    if any(nn.parameter.is_lazy(a) for a in held):
        raise ValueError(
            f"{function} needs numbers; {name} is lazy and not built yet: run one batch through the model."
        )
    if any(a.is_meta for a in held):
        raise ValueError(f"{function} needs numbers; {name} is on the meta device, where there are none.")


def _unknown(layer: nn.Module) -> str | None:
    """Why a norm that nobody knows is left; ``None`` for what is no norm, or is made of layers that hold parameters."""
    kind = type(layer)
    if not _NORM.search(kind.__name__) or kind.__module__.startswith("torch.nn.utils."):
        return None
    if any(True for child in layer.children() for _ in child.parameters()):
        return None
    if any(isinstance(child, tuple(OURS)) for child in layer.modules() if child is not layer):
        return None
    return "normkit does not know this class"


def exported(module: nn.Module) -> bool:
    """Whether a module is a program of operators, in which layers are no more."""
    if isinstance(module, torch.fx.GraphModule):
        targets = (node.target for node in module.graph.nodes if node.op == "call_function")
        if any(isinstance(target, torch._ops.OpOverload) for target in targets):
            return True
    return type(module).__module__.startswith("torch.export.")


def _beyond(module: nn.Module) -> str:
    """What was done to a module after which its layers are not to be changed."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
        return "compiled"
    if exported(module):
        return "exported"
    return "quantized" if _QUANTIZED.match(kind.__module__) else ""
