"""PyTorch's models as pure functions of their parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class TorchDifferentiates:
    """PyTorch's gradients, for :func:`normkit.diagnostics.objective`."""

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """Those that require gradients."""
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def value_and_grad(
        self,
        model: nn.Module,
        loss: Callable[[Any], Any],
        call: Callable[[Any], Any],
        training: bool | None,
        seed: int,
    ) -> Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
        """By functional_call, with copies of the buffers."""

        def value(holder: nn.Module) -> Any:
            return loss(call(holder))

        def run(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            buffers = {f"model.{name}": b.clone() for name, b in model.named_buffers()}
            with _mode(model, training), seeded(leaves, seed), torch.enable_grad():
                given = {f"model.{name}": p for name, p in leaves.items()}
                found = torch.func.functional_call(_Called(model, value), {**given, **buffers}, ())
                # What the loss does not depend on has a gradient of zero.
                gradients = torch.autograd.grad(found, list(leaves.values()), allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves.values(), strict=True)]
            return found.detach(), dict(zip(leaves, filled, strict=True))

        return run


class _Called(nn.Module):
    """A model that is called in the user's own way, while it holds other parameters."""

    def __init__(self, model: nn.Module, value: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self) -> Any:
        return self.value(self.model)


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """By each module's flag: ``train()`` may be overridden, to more than that."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, mode in modes:
            module.training = mode if training is None else training
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def seeded(leaves: dict[str, Tensor], seed: int) -> Iterator[None]:
    """Within, the generators of the processor and of the parameters' devices start at seed; after, they are back."""
    devices = {p.device for p in leaves.values() if p.device.type == "cuda"}
    with torch.random.fork_rng([*devices]):
        torch.manual_seed(seed)
        yield
