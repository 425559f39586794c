"""How a framework's models plug in: what :func:`normkit.replace` needs of each, and where it is found."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from normkit.backends import Entry


@runtime_checkable
class Models(Protocol):
    """One framework's models. A layer is replaced by giving it another class, so that all it holds stays its own."""

    def refuse(self, model: Any) -> None:
        """Raise if no layer of the model can be replaced: it is compiled, exported, quantized."""

    def layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Every layer of the model with its name, the model's own being ``""``; a shared one once for each name."""

    def verdict(self, layer: Any) -> type | str | None:
        """The class that a norm layer takes (made by :func:`stand_in`), why it takes none, or ``None`` for the rest."""


#: By the model's type, which is looked up in modules that are imported already.
MODELS = (
    Entry("torch", "torch", ("nn.Module", "export.ExportedProgram"), "normkit.backends.torch.models:TorchModels"),
)


def models_of(model: Any) -> Models | None:
    """What serves models of this type, if anything does."""
    for entry in MODELS:
        if entry.matches(type(model)):
            return _load(entry.backend)
    return None


@functools.cache
def _load(where: str) -> Models:
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
        # The class is found by no name, but made of two that are.
        return (_again, (original, ours), *super(made, self).__reduce_ex__(protocol)[2:])

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
