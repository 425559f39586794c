"""How a framework's models plug in: what normkit.replace, fold and recalibrate need of each, and where it is found."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from normkit.backends import Entry
from normkit.core.population import Population


class Layers(Protocol):
    """One framework's models, and where their layers are."""

    def refuse(self, model: Any, function: str = "replace") -> None:
        """Raise if no layer of the model can be changed: it is compiled, exported, quantized."""

    def layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Every layer of the model with its name, the model's own being ``""``; a shared one once for each name."""


@runtime_checkable
class Models(Layers, Protocol):
    """What :func:`normkit.replace` needs: a layer gets another class, so that all it holds stays its own."""

    def verdict(self, layer: Any) -> type | str | None:
        """The class that a norm layer takes (made by :func:`stand_in`), why it takes none, or ``None`` for the rest."""

    def changed(self, model: Any) -> None:
        """Layers have another class now: what was traced with the one they had is to be traced anew."""


class Pair(NamedTuple):
    """A batch norm and the convolution or linear layer that it can be folded into: one has the other's output alone."""

    norm: Any
    linear: Any
    #: Whether the norm comes after.
    after: bool


@runtime_checkable
class Folds(Models, Protocol):
    """A framework whose batch norms :func:`normkit.fold` folds. Arrays that pass here are NumPy's, in float64."""

    def training(self, layer: Any) -> bool:
        """Whether a layer is in training mode."""

    def outputs(self, model: Any, run: Callable[[], Any]) -> list[tuple[Any, float]]:
        """The floating-point arrays in what the model returns, each with the eps of its dtype; ``run`` calls it."""

    def pairs(self, model: Any, run: Callable[[], Any]) -> list[tuple[Any, Pair | str]]:
        """Each batch norm of the model with what it can be folded into, or why it cannot."""

    def norm(self, pair: Pair) -> tuple[Any, Any, Any, Any, float]:
        """Mean, variance, weight, bias and eps of the batch norm; weight and bias may be ``None``."""

    def linear(self, pair: Pair) -> tuple[Any, Any]:
        """The weight of the other as (groups, outputs, inputs, taps), and its bias or ``None``."""

    def errors(
        self, model: Any, run: Callable[[], Any], trials: list[tuple[Pair, Any, Any]]
    ) -> list[tuple[float, float]]:
        """How far each pair is off with a new weight and bias, as a share of its largest output; the dtype's eps."""

    def put(self, model: Any, pair: Pair, weight: Any, bias: Any) -> Callable[[], None]:
        """Write the weight and bias, and take the norm out of the model; what is returned undoes it."""


class Recorded(NamedTuple):
    """The running statistics of a batch norm, in float64, and how it uses them."""

    mean: Any
    var: Any
    eps: float
    #: The largest number of the dtype that they are stored in.
    largest: float
    #: Whether stored variances are n / (n - 1) times those of the values.
    unbiased: bool = False


@runtime_checkable
class Recalibrates(Layers, Protocol):
    """A framework whose running statistics :func:`normkit.recalibrate` measures. Arrays are NumPy's, in float64."""

    def recorded(self, layer: Any) -> Recorded | str | None:
        """The running statistics of a batch norm; why it has none; ``None`` for what is no batch norm.

        Asked before the model is called, and after: some layers tell their eps, or that they are none, when called.
        """

    def record(self, layer: Any, mean: Any, var: Any, batches: int) -> None:
        """Write the running statistics of a batch norm, which come from so many batches."""

    def inference(self, model: Any) -> AbstractContextManager:
        """Within, every layer is in its inference mode; after, modes and running statistics are what they were."""

    def watch(self, layers: Iterable[Any], see: Callable[[Any, Population], bool]) -> AbstractContextManager:
        """Within, ``see`` gets each layer that is called and what it is called with.

        Where ``see`` returns true, the layer normalizes by the statistics of that, else by its running ones.
        """


@runtime_checkable
class Differentiates(Models, Protocol):
    """A framework whose models :func:`normkit.diagnostics.objective` makes pure functions of."""

    def parameters(self, model: Any) -> dict[str, Any]:
        """Copies of the parameters that are trained, by name."""

    def value_and_grad(
        self,
        model: Any,
        loss: Callable[[Any], Any],
        call: Callable[[Any], Any],
        training: bool | None,
        seed: int,
    ) -> Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]]:
        """The function from parameters to ``loss(call(model))`` and its gradients, which leaves the model as it is."""


@runtime_checkable
class Functional(Recalibrates, Protocol):
    """A framework whose models are functions."""

    def opened(self, model: Any) -> Any:
        """What a model comes as, in one: called without its state, and written to; what it was made of is not."""

    def state(self, model: Any) -> Any:
        """The state of what was opened, as the framework has it."""


#: By the model's type, which is looked up in modules that are imported already. Keras's layers may be torch modules.
MODELS = (
    Entry("keras", "keras", ("Layer",), "normkit.backends.keras.models:KerasModels"),
    Entry("flax", "flax", ("nnx.Module",), "normkit.backends.flax.models:FlaxModels"),
    Entry("torch", "torch", ("nn.Module", "export.ExportedProgram"), "normkit.backends.torch.models:TorchModels"),
)

#: Models of which normkit only knows the running statistics.
MEASURED = (Entry("tf_keras", "tf_keras", ("layers.Layer",), "normkit.backends.tf_keras.models:TfKerasModels"),)

#: The first of what stands for a model that is a function: it holds no state, and comes with it.
FUNCTIONS = (
    Entry("linen", "flax", ("linen.Module",), "normkit.backends.flax.linen:LinenModels"),
    Entry("haiku", "haiku", ("TransformedWithState",), "normkit.backends.haiku.models:HaikuModels"),
    Entry("equinox", "equinox", ("Module",), "normkit.backends.equinox.models:EquinoxModels"),
)


def models_of(model: Any) -> Models | None:
    """What serves models of this type, if anything does."""
    return _of(model, MODELS)


def measured_of(model: Any) -> Layers | None:
    """What measures the running statistics of models of this type, if anything does."""
    first = model[0] if type(model) is tuple and model else None
    return _of(model, (*MODELS, *MEASURED)) or _of(first, FUNCTIONS)


def _of(model: Any, entries: tuple[Entry, ...]) -> Any:
    return next((_load(entry.backend) for entry in entries if entry.matches(type(model))), None)


@functools.cache
def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)()


def stand_in(original: type, ours: type) -> type:
    """The class of a layer that was ``original``: that class, with the methods of ``ours`` before its own."""
    return _stand_in(original, ours)


def original_of(layer: Any) -> type | None:
    """The class that a replaced layer had, if it was replaced."""
    return vars(type(layer)).get("_stands_in_for")


@functools.cache
def _stand_in(original: type, ours: type) -> type:
    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        # The class is found by no name, but made of two that are; unless the framework has a way of its own.
        reduced = super(made, self).__reduce_ex__(protocol)
        plain = reduced[0] in (copyreg.__newobj__, copyreg._reconstructor)  # type: ignore[attr-defined]
        return (_again, (original, ours), *reduced[2:]) if plain else reduced

    body = {
        "__module__": original.__module__,
        "__qualname__": f"normkit.{original.__qualname__}",
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_stands_in_for": original,
    }
    bases = (ours,) if issubclass(ours, original) else (ours, original)
    made: Any = type(original)(original.__name__, bases, body)
    return made


def _again(original: type, ours: type) -> Any:
    cls: Any = stand_in(original, ours)
    return cls.__new__(cls)


#: What is said where a layer, or a copy of it, is called while a program is made of the model.
COMPILED = "{} gets what has no numbers yet: the model compiles its own call, which has to be taken off first."

#: What calls of layers go through, by the layer's id.
_between: dict[int, Callable] = {}


@contextlib.contextmanager
def through(layer: Any, method: str, between: Callable) -> Iterator[None]:
    """Within, calls of a layer's method are calls of ``between(the method, *its arguments)``."""
    kind: Any = type(layer)
    object.__setattr__(layer, "__class__", _opened(kind, method))
    _between[id(layer)] = between
    try:
        yield
    finally:
        del _between[id(layer)]
        object.__setattr__(layer, "__class__", kind)


@functools.cache
def _opened(kind: Any, method: str) -> Any:
    own = getattr(kind, method)

    @functools.wraps(own)
    def opened(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in _between:
            raise ValueError(COMPILED.format(kind.__name__))
        return _between[id(self)](functools.partial(own, self), *args, **kwargs)

    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, method: opened}
    return type(kind)(kind.__name__, (kind,), body)
