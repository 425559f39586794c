"""Give a model's norm layers normkit's numbers, and take them back; what was done is a value that can be read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._dispatch import describe
from .backends.models import Models, models_of, original_of


class NormLayer(NamedTuple):
    """A norm layer of a model: its name, its class, why it was left where it was, and its other names if it has any."""

    name: str
    kind: str
    reason: str = ""
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`replace` or :func:`restore` did to a model."""

    #: The model's class.
    model: str
    #: ``"replaced"`` or ``"restored"``.
    done: str
    #: The layers that have another class now.
    changed: tuple[NormLayer, ...]
    #: The norm layers that were left as they are, each with the reason.
    left: tuple[NormLayer, ...] = ()

    def __repr__(self) -> str:
        lines = [f"{self.model}: {_counted(self.changed)} {self.done}, {len(self.left)} left"]
        for (kind, reason), names in _grouped(self.changed + self.left):
            verb = f"left: {reason}" if reason else self.done
            lines.append(f"{len(names):>5} {kind}, {verb}")
            lines.extend(textwrap.wrap(_listed(names), 112, initial_indent=" " * 8, subsequent_indent=" " * 8))
        return "\n".join(lines)


def replace(model: Any) -> Report:
    """Give every norm layer of a model normkit's forward pass. :func:`restore` takes it back.

    The layers stay the objects that they are, with their parameters, buffers, hooks and mode: only their class
    changes, to a subclass of the one they had. An optimizer that holds the parameters goes on.

    Parameters
    ----------
    model : a torch.nn.Module, which may be a norm layer itself

    Returns
    -------
    Report
        What was replaced, and what was left with the reason: a subclass with a forward pass of its own, a norm that
        normkit has not, a lazy layer that is not built, a layer that was replaced before.

    Raises
    ------
    TypeError
        model is of no framework whose layers are known.
    ValueError
        The model has no norm layer, or it is compiled, scripted, exported or quantized: nothing is changed then.
    """
    models = _models("replace", model)
    models.refuse(model)
    verdicts = [(layer, names, models.verdict(layer)) for layer, names in _named(models, model)]
    norms = [(layer, names, verdict) for layer, names, verdict in verdicts if verdict is not None]
    if not norms:
        raise ValueError(f"replace found no norm layer in {type(model).__name__}, which has {len(verdicts)} layers.")
    changed, left = [], []
    for layer, names, verdict in norms:
        kind = _kind(original_of(layer) or type(layer))
        if isinstance(verdict, str):
            left.append(NormLayer(names[0], kind, verdict, names[1:]))
        else:
            changed.append(NormLayer(names[0], kind, "", names[1:]))
            layer.__class__ = verdict
    return Report(type(model).__name__, "replaced", tuple(changed), tuple(left))


def restore(model: Any) -> Report:
    """Give back the class to every layer that :func:`replace` gave another: the model is what it was.

    What the layers learned since is kept. Layers of ``normkit.torch`` that were built as such stay.

    Parameters
    ----------
    model : a model that went through :func:`replace`, or a copy of it

    Returns
    -------
    Report

    Raises
    ------
    TypeError
        model is of no framework whose layers are known.
    ValueError
        No layer of it was replaced.
    """
    models = _models("restore", model)
    changed = []
    for layer, names in _named(models, model):
        original = original_of(layer)
        if original is not None:
            changed.append(NormLayer(names[0], _kind(original), "", names[1:]))
            layer.__class__ = original
    if not changed:
        raise ValueError(f"restore found no layer in {type(model).__name__} that normkit.replace had changed.")
    return Report(type(model).__name__, "restored", tuple(changed))


def _models(function: str, model: Any) -> Models:
    found = models_of(model)
    if found is None:
        raise TypeError(f"{function} takes a torch.nn.Module; received {describe(model)}.")
    return found


def _named(models: Models, model: Any) -> list[tuple[Any, tuple[str, ...]]]:
    """Each layer once, with all its names."""
    found: dict[int, tuple[Any, list[str]]] = {}
    for name, layer in models.layers(model):
        found.setdefault(id(layer), (layer, []))[1].append(name)
    return [(layer, tuple(names)) for layer, names in found.values()]


def _kind(cls: type) -> str:
    """A class as it is known: its top module and its name."""
    top = cls.__module__.partition(".")[0]
    if cls.__module__.startswith("torch.nn.modules."):
        top = "torch.nn"
    return cls.__qualname__ if top in ("__main__", "builtins") else f"{top}.{cls.__qualname__}"


def _counted(layers: tuple[NormLayer, ...]) -> str:
    return f"{len(layers)} norm layer{'' if len(layers) == 1 else 's'}"


def _listed(names: list[str], room: int = 180) -> str:
    """As many names as there is room for, and how many there are beside."""
    shown = next((k for k in range(1, len(names)) if len(", ".join(names[: k + 1])) > room), len(names))
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest else "")


def _grouped(layers: Iterable[NormLayer]) -> list[tuple[tuple[str, str], list[str]]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        name = " = ".join((layer.name or "(the model)", *layer.shared))
        groups.setdefault((layer.kind, layer.reason), []).append(name)
    return list(groups.items())
