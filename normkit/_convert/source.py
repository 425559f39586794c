"""What is converted: the norm layers of a model, of arrays by name, or of a file."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .framework import Framework, framework, framework_of
from .record import Array, ConversionError, Native, argument, at

#: Why an array of a file is left out.
NO_NORM = "it belongs to no norm layer"
Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Fallback:
    """What is said of layers that are arrays alone."""

    #: Class and arguments by layer name or pattern; later ones override earlier ones.
    settings: Settings = field(default_factory=dict)
    eps: float | None = None
    momentum: float | None = None
    #: Whether the framework's defaults stand for the rest.
    defaults: bool = False

    def __post_init__(self) -> None:
        files.by_layer(argument("settings"), self.settings)

    def over(self, settings: Settings) -> Fallback:
        """The same, with what a file says itself."""
        return replace(self, settings={**settings, **self.settings})

    def of(self, reader: Framework, name: str, arrays: Mapping[str, Array]) -> Native | None:
        """The layer of this name, or None where nothing says which one it is."""
        given: dict[str, Any] = {}
        for pattern, values in self.settings.items():
            if name == pattern or fnmatch.fnmatchcase(name, pattern):
                given |= values
        layer = given.pop("layer", None)
        layer = reader.guess(arrays) if layer is None else layer
        if layer is None:
            return None
        said = {} if self.eps is None else {reader.eps_name: self.eps}
        if self.momentum is not None and reader.guess(arrays) is not None:
            said[reader.momentum_name] = self.momentum
        usual = reader.defaults.get(layer, {}) if self.defaults else {}
        return Native(layer, {**usual, **said, **given}, arrays)


def of(source, name, fallback: Fallback) -> tuple[Framework, dict[str, Native], dict[str, str]]:
    """The framework of the source, its layers, and what else a file has."""
    if isinstance(source, str | os.PathLike):
        content = files.read(Path(source), name)
        if content.framework is None:
            raise nameless(source)
        if content.model is not None:
            return content.framework, *layers_of(content.framework, content.model)
        return content.framework, *natives_of(content.framework, content.arrays, fallback.over(content.settings))
    reader = framework_of(source)
    if reader is not None:
        if name not in (None, reader.name):
            raise ConversionError(f"framework is {name!r}, and the source is of {reader.name}.")
        return reader, *layers_of(reader, source)
    if name is None:
        raise ConversionError(
            f"The source is a model, a mapping of arrays with framework=NAME, or a path; received "
            f"{type(source).__name__}."
        )
    reader = framework(name)
    return reader, *natives_of(reader, flattened(reader, source), fallback)


def nameless(path: Any) -> ConversionError:
    """What to say of a file that does not say where it comes from."""
    return ConversionError(f"{path} does not say which framework it comes from: give {argument('framework', 'NAME')}.")


def layers_of(reader: Framework, model: Any) -> tuple[dict[str, Native], dict[str, str]]:
    """The norm layers of a model, and what looks like one and is not known."""
    return dict(reader.layers(model)), reader.strangers(model)


def natives_of(
    reader: Framework, flat: Mapping[str, Array], fallback: Fallback
) -> tuple[dict[str, Native], dict[str, str]]:
    """The norm layers among arrays by name, and the reason for each other array."""
    if not reader.has_files:
        raise ConversionError(f"{reader.name} saves arrays by position, not by name: convert the model in Python.")
    for pattern, values in fallback.settings.items():
        at(pattern, reader.validate, values)
    groups, rest = reader.split(flat)
    found = {}
    left = dict.fromkeys(sorted(rest, key=_natural), NO_NORM)
    for name, arrays in sorted(groups.items(), key=lambda item: _natural(item[0])):
        native = fallback.of(reader, name, arrays)
        if native is None:
            reason = f"nothing says which layer it is: give {argument('settings')}" if _alike(arrays) else NO_NORM
            left |= dict.fromkeys(sorted(reader.join(name, Native("", {}, arrays))), reason)
        else:
            found[name] = native
    for pattern, values in fallback.settings.items():
        if any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in groups):
            continue
        if "layer" not in values or any(c in pattern for c in "*?["):
            raise ConversionError(f"{argument('settings')} name {pattern!r}, and no layer with arrays is called that.")
        found[pattern] = Native(values["layer"], {k: v for k, v in values.items() if k != "layer"})  # has no arrays
    return found, left


def _alike(arrays: Mapping[str, Array]) -> bool:
    """Whether these could be weight and bias of a norm layer: of one shape, and a lone one has one axis."""
    shapes = {a.shape for a in arrays.values()}
    return len(shapes) == 1 and (len(arrays) > 1 or len(next(iter(shapes))) == 1)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def flattened(reader: Framework, source: Any) -> dict[str, Array]:
    """Nested mappings of arrays as one, with the framework's names."""
    if isinstance(source, tuple) and reader.name == "haiku" and len(source) == 2:
        source = {"params": source[0], "state": source[1]}
    if not isinstance(source, Mapping):
        raise ConversionError(f"Arrays of {reader.name} come as a mapping by name; received {type(source).__name__}.")
    flat: dict[str, Array] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}{reader.separator}{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = host(prefix, value)

    walk("", source)
    return flat


def host(name: str, value: Any) -> np.ndarray:
    if type(value).__module__.partition(".")[0] == "torch":
        from .torch import array

        return array(value)
    found = np.asarray(value)
    if found.dtype == object:
        raise ConversionError(f"{name} is no array; received {type(value).__name__}.")
    return found
