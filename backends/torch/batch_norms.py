"""Which of a PyTorch model's layers are batch norms, and their running statistics: measured, written, put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize

from normkit.backends.models import Recorded, original_of
from normkit.backends.torch import batch_variants, known, layers
from normkit.core.plan import gaussian_factor
from normkit.core.population import Population

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OURS = (layers.BatchNormForward, layers.FrozenBatchNormForward, known.FrozenForward)


def formula(layer: nn.Module) -> type | str | None:
    """The class by whose forward pass a batch norm computes; why nobody knows; ``None`` for what is no batch norm."""
    kind: Any = type(layer)
    if original_of(layer) is not None or kind.__module__ in (layers.__name__, batch_variants.__name__):
        return kind if issubclass(kind, _OURS) else None
    base = next((c for c in kind.__mro__ if c in _BATCH), None)
    recipes = known.recipes(kind)
    if base is None and not isinstance(layer, _BatchNorm) and not any(issubclass(r, _OURS) for r in recipes):
        return None
    if isinstance(layer, _LazyNormBase):
        return "it is lazy and not built yet: run one batch through the model first"
    if "forward" in vars(layer):
        return "its forward was set on the instance"
    if parametrize.is_parametrized(layer):
        return "it is parametrized"
    if recipes:
        return known.confirmed(layer, recipes)
    if base is None or not known.inherits(kind, base):
        return "it is a subclass with a forward pass of its own"
    return kind


def numbers(a: Tensor | None) -> Any:
    """A tensor as a NumPy array in float64."""
    return None if a is None else a.detach().to("cpu", torch.float64).numpy().copy()


class TorchRecalibrates:
    """PyTorch's running statistics, for :func:`normkit.recalibrate`."""

    def recorded(self, layer: Any) -> Recorded | str | None:
        """Buffers, eps, and what the buffers can hold."""
        found = formula(layer)
        if found is None or isinstance(found, str):
            return found
        if not isinstance(layer, _BatchNorm):
            return "it is frozen: its statistics are constants"
        if layer.running_mean is None or layer.running_var is None:
            return "it has no running statistics"
        if isinstance(layer, batch_variants.LpNorm) and layer.centred and layer.p == 1:
            return "the 1-norm of x - mean is not known before the mean of all batches is"
        largest = torch.finfo(layer.running_var.dtype).max
        unbiased = getattr(layer, "_unbiased", True)
        return Recorded(numbers(layer.running_mean), numbers(layer.running_var), layer.eps, largest, unbiased)

    def record(self, layer: Any, mean: Any, var: Any, batches: int) -> None:
        """Written in place; ``num_batches_tracked`` is the number of batches."""
        _write(layer, mean, var)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)

    @contextlib.contextmanager
    def inference(self, model: nn.Module) -> Iterator[None]:
        """By each module's flag: ``eval()`` may be overridden, to more than that."""
        modes = [(module, module.training) for module in model.modules()]
        held = [
            (a, a.clone()) for module in model.modules() if isinstance(module, _BatchNorm) for a in module.buffers()
        ]
        try:
            for module, _ in modes:
                module.training = False
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for a, before in held:
                a.copy_(before)

    @contextlib.contextmanager
    def watch(self, layers: Iterable[nn.Module], see: Callable[[Any, Population], bool]) -> Iterator[None]:
        """By hooks; a batch's statistics stand in for the running ones while the layer is called."""

        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            found = _population(layer, next(iter((*args, *kwargs.values()))))
            if see(layer, found) and found.count:
                _write(layer, found.mean, found.var(unbiased=False))

        with contextlib.ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


class NormPopulation(NamedTuple):
    """Of the mean p-norm in the place of the standard deviation: what its square over all batches follows from."""

    values: Population
    #: The mean of ``|x|``, the least and the largest x.
    absolute: Any
    least: Any
    most: Any
    layer: batch_variants.LpNorm

    @property
    def count(self) -> int:  # type: ignore[override]  # in place of tuple.count
        """Values per channel."""
        return self.values.count

    @property
    def mean(self) -> Any:
        """Their mean."""
        return self.values.mean

    @property
    def m2(self) -> Any:
        """The sum of squares of what they are from it."""
        return self.values.m2

    def merge(self, other: NormPopulation) -> NormPopulation:
        """Those of both."""
        if not other.count:
            return self
        values = self.values.merge(other.values)
        absolute = self.absolute + (other.absolute - self.absolute) * (other.count / values.count)
        least, most = np.minimum(self.least, other.least), np.maximum(self.most, other.most)
        return NormPopulation(values, absolute, least, most, self.layer)

    def var(self, unbiased: bool) -> Any:
        """The norm's square, which the layer keeps as ``running_var``."""
        p, centre = self.layer.p, self.mean if self.layer.centred else 0.0
        if p == 2:
            square = self.values.var(False) + (self.mean - centre) ** 2
        else:
            norm = self.absolute if p == 1 else np.maximum(self.most - centre, centre - self.least)
            square = norm**2
        return square * (gaussian_factor(p, self.count) if self.layer.consistent else 1.0) ** 2


def _population(layer: nn.Module, x: Tensor) -> Any:
    """Of the channels at axis 1."""
    wide = x.detach().double()
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = x.numel() // max(x.shape[1], 1)
    if not count:
        return Population()
    mean = wide.mean(axes, keepdim=True)
    values = Population(count, numbers(mean).reshape(-1), numbers((wide - mean).square().sum(axes)))
    if not isinstance(layer, batch_variants.LpNorm):
        return values
    absolute, least, most = (numbers(a) for a in (wide.abs().mean(axes), wide.amin(axes), wide.amax(axes)))
    return NormPopulation(values, absolute, least, most, layer)


@torch.no_grad()
def _write(layer: Any, mean: Any, var: Any) -> None:
    layer.running_mean.copy_(torch.from_numpy(mean))
    layer.running_var.copy_(torch.from_numpy(var))
