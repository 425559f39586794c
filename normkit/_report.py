"""What was done to a model's norm layers, as a value that can be read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._dispatch import describe
from .backends.models import Layers, Models, models_of


class NormLayer(NamedTuple):
    """A norm layer of a model: its name, its class, why it was left as it was, and its other names if it has any."""

    name: str
    kind: str
    reason: str = ""
    shared: tuple[str, ...] = ()
    #: The layer that it was folded into.
    into: str = ""


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`replace`, :func:`restore` or :func:`fold` did to a model."""

    #: The model's class.
    model: str
    #: ``"replaced"``, ``"restored"`` or ``"folded"``.
    done: str
    #: The layers that were.
    changed: tuple[NormLayer, ...]
    #: The norm layers that were left as they are, each with the reason.
    left: tuple[NormLayer, ...] = ()
    #: How far the outputs are from what they were, as a share of the largest, where that was looked at.
    error: float | None = None

    def __repr__(self) -> str:
        lines = [f"{self.model}: {counted(self.changed)} {self.done}, {len(self.left)} left"]
        if self.error is not None:
            lines[0] += f"; outputs within {self.error:.1e} of the largest"
        return "\n".join([*lines, *grouped(self.changed + self.left, self.done)])


def framework_of(function: str, model: Any) -> Models:
    """What serves the model, which has to be one."""
    found = models_of(model)
    if found is None:
        raise TypeError(
            f"{function} takes a torch.nn.Module, a keras.Layer or a flax.nnx.Module; received {describe(model)}."
        )
    return found


def named(models: Layers, model: Any) -> list[tuple[Any, tuple[str, ...]]]:
    """Each layer once, with all its names."""
    found: dict[int, tuple[Any, list[str]]] = {}
    for name, layer in models.layers(model):
        found.setdefault(id(layer), (layer, []))[1].append(name)
    return [(layer, tuple(names)) for layer, names in found.values()]


#: Where a framework's own layers are, and where they are found.
_KNOWN_AS = {
    "torch.nn.modules.": "torch.nn",
    "keras.src.layers.": "keras.layers",
    "tf_keras.src.layers.": "tf_keras.layers",
    "flax.nnx.": "flax.nnx",
    "flax.linen.": "flax.linen",
    "equinox.nn.": "equinox.nn",
}


def kind_of(cls: type) -> str:
    """A class as it is known: its top module and its name."""
    top = next((known for module, known in _KNOWN_AS.items() if cls.__module__.startswith(module)), None)
    top = top or cls.__module__.partition(".")[0]
    return cls.__qualname__ if top in ("__main__", "builtins") else f"{top}.{cls.__qualname__}"


def counted(layers: Sized) -> str:
    """So many norm layers."""
    return f"{len(layers)} norm layer{'' if len(layers) == 1 else 's'}"


def _listed(names: list[str], room: int = 180) -> str:
    """As many names as there is room for, and how many there are beside."""
    shown = next((k for k in range(1, len(names)) if len(", ".join(names[: k + 1])) > room), len(names))
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest else "")


def grouped(layers: Iterable[NormLayer], done: str) -> Iterator[str]:
    """Lines for all layers of a kind of which the same is to be said, with their names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        name = " = ".join((layer.name or "(the model)", *layer.shared)) + f" into {layer.into}" * bool(layer.into)
        groups.setdefault((layer.kind, layer.reason), []).append(name)
    for (kind, reason), names in groups.items():
        yield f"{len(names):>5} {kind}, " + (f"left: {reason}" if reason else done)
        yield from textwrap.wrap(_listed(names), 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
