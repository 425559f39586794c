"""What conversion needs of a framework: a reader, a writer, and where the layers of its models are."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from .. import _validate as check
from .. import _validate_layer as check_layer
from .._policies import SETTINGS, USUAL
from .record import Array, ConversionError, Native, Norm, Say, argument, checked, whole

#: Where each framework's reader and writer are, and the module without which it has no layers.
FRAMEWORKS = {
    "keras": ("keras:Keras", "keras"),  # before torch: on its torch backend, a Keras layer is a torch module too
    "tf_keras": ("keras:TfKeras", "tf_keras"),
    "torch": ("torch:Torch", "torch"),
    "nnx": ("flax:Nnx", "flax"),
    "linen": ("flax:Linen", "flax"),
    "haiku": ("haiku:Haiku", "haiku"),
    "equinox": ("equinox:Equinox", "equinox"),
    "onnx": ("onnx:Onnx", "onnx"),
    "normkit": ("layers:Normkit", "normkit"),
}

#: Arguments of any framework that are numbers, and those that are integers.
NUMBERS = ("eps", "variance_epsilon", "epsilon", "momentum", "decay_rate")
COUNTS = ("num_groups", "groups", "group_size", "ndim")
#: What layers of normkit's can be told beyond what others can; and of that, what others do not lose by: how to take bad
#: input, with the rules that say so, and what is said of each layer.
SWITCHES = (*SETTINGS, "virtual_batch_size", "r_max", "d_max")
BAD_INPUT = {"single_value": "single-value", "empty_batch": "empty-batch", "nonfinite": "nan-propagation"}
MINOR = (*BAD_INPUT, "train_affine")
#: Why a module is left out.
LIKE = "it looks like a norm layer"


class Framework:
    """One framework. ``read`` and ``write`` are pure; the rest finds layers and arrays, makes and fills them."""

    name = ""
    #: What it is called in messages, where that is not its name.
    title = ""
    #: What stands between the parts of an array's name in a file.
    separator = "."
    #: Defaults of the framework's arguments, by class.
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Our names of the arrays and the framework's, by class; "" for all the others.
    arrays: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    #: The kind of norm that each class is, where that is one each.
    kinds: ClassVar[Mapping[str, str]] = {}
    #: Arguments that say the lengths of the axes.
    sizes: ClassVar[tuple[str, ...]] = ()
    #: The other arguments that settings may have, and those that say nothing of a layer's state.
    arguments: ClassVar[tuple[str, ...]] = ()
    idle: ClassVar[tuple[str, ...]] = ()
    #: Counts of batches, which are written if a source has them.
    counters: ClassVar[tuple[str, ...]] = ()
    #: What the framework calls eps and momentum.
    eps_name = "eps"
    momentum_name = "momentum"
    #: Whether files of arrays by name are usual.
    has_files = True

    def read(self, native: Native, say: Say) -> Norm:
        """The record of a layer."""
        raise NotImplementedError

    def write(self, norm: Norm, say: Say) -> Native:
        """A layer of this framework with the record's state, or a :class:`ConversionError` that says why not."""
        raise NotImplementedError

    def owns(self, model: Any) -> bool:
        """Whether this is a model (or what stands for one) of the framework."""
        raise NotImplementedError

    def layers(self, model: Any) -> Iterator[tuple[str, Native]]:
        """The norm layers of a model by name, a shared one once."""
        raise NotImplementedError

    def strangers(self, model: Any) -> dict[str, str]:
        """What looks like a norm layer of the model and is not known, and why."""
        return {}

    def make(self, native: Native) -> Any:
        """A layer of the framework, filled."""
        raise NotImplementedError

    def put(self, model: Any, natives: Mapping[str, Native]) -> Any:
        """Fill norm layers of a model, which may return another one."""
        raise NotImplementedError

    def split(self, flat: Mapping[str, Array]) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
        """Arrays of a file by layer and name within it, and those whose names no norm layer has."""
        known = {theirs for names in self.arrays.values() for theirs in names.values()}
        found: dict[str, dict[str, Array]] = {}
        rest = {}
        for key, value in flat.items():
            layer, _, name = key.rpartition(self.separator)
            if name in known:
                found.setdefault(layer, {})[name] = value
            else:
                rest[key] = value
        return found, rest

    def join(self, layer: str, native: Native) -> dict[str, Array]:
        """The layer's arrays by the names that they have in a file."""
        return {f"{layer}{self.separator}{name}" if layer else name: value for name, value in native.arrays.items()}

    def guess(self, arrays: Mapping[str, Array]) -> str | None:
        """The class of a layer that only its arrays are known of: batch norm by its statistics, nothing else."""
        raise NotImplementedError

    def kind(self, layer: str) -> str:
        """The kind of norm that a class is."""
        if layer not in tuple(self.kinds):
            raise ConversionError(
                f"{self.title or self.name} has no norm layer {layer!r}; it has: {', '.join(self.kinds)}."
            )
        return self.kinds[layer]

    def validate(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that name a class or an argument that the framework has not, or have no number for one."""
        if settings.get("layer") is not None:
            self.kind(settings["layer"])
        known = (*self.sizes, *self.arguments)
        for name, value in settings.items():
            if name not in ("layer", *known, *self.idle, *SWITCHES):
                raise ConversionError(
                    f"{self.title or self.name}'s norm layers have no {name!r}; they have: {', '.join(known)}."
                )
            if value is not None and name in NUMBERS:
                checked(check.number, name, value)
            elif value is not None and name in COUNTS:
                whole(name, value)

    def freezes(self, native: Native) -> bool:
        """Whether the layer that is written is in inference in training, or the framework has no training."""
        return False

    def switches(self, layer: str) -> Collection[str]:
        """The arguments of a new layer of this class, among which switches of normkit's may be."""
        return ()

    def class_of(self, norm: Norm) -> str:
        """The class of this kind of norm."""
        return next(name for name, kind in self.kinds.items() if kind == norm.kind)

    def setting(self, native: Native, name: str) -> Any:
        """An argument of a layer, which must be known."""
        if name not in native.settings:
            default = self.defaults.get(native.layer, {}).get(name)
            usual = "" if default is None else f" ({self.name}'s is {default!r})"
            raise ConversionError(
                f"{name} of {native.layer} is not known, and arrays do not say it: give {argument('eps')}, "
                f"{argument('momentum')}, {argument('settings')} or {argument('defaults')}{usual}."
            )
        return native.settings[name]

    def lengths(self, native: Native, found: Mapping[str, Array]) -> tuple[int, ...]:
        """The lengths of the axes, as the layer's arguments or arrays have them."""
        for name in self.sizes:
            if native.settings.get(name) is not None:
                return checked(check_layer.lengths, name, native.settings[name])
        for value in found.values():
            return tuple(value.shape)
        raise ConversionError(f"{native.layer} has no arrays, and the lengths of its axes are not known.")

    def named(self, native: Native) -> dict[str, Array]:
        """The layer's arrays by our names; one that has no place is an error."""
        theirs = {v: k for k, v in (self.arrays.get(native.layer) or self.arrays[""]).items()}
        unknown = sorted(native.arrays.keys() - theirs.keys())
        if unknown:
            raise ConversionError(f"{native.layer} has no {unknown[0]!r}; it has: {', '.join(theirs)}.")
        return {theirs[name]: value for name, value in native.arrays.items()}

    def stored(self, layer: str, norm: Norm) -> dict[str, Array]:
        """The record's arrays by the names that this class has for them."""
        names = self.arrays.get(layer) or self.arrays[""]
        return {names[name]: value for name, value in norm.arrays()}

    def imported(self, name: str) -> Any:
        """A module of the framework, which must be installed."""
        return library(name)


def library(name: str) -> Any:
    """A module, or one sentence that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        if error.name != top:
            raise
        package = {"haiku": "dm-haiku"}.get(top, top)
        raise ImportError(f"This needs {top}, which is not installed: python -m pip install {package}.") from None


def strange(modules: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Those among modules that nobody knows whose classes are called norms, and what to say of them."""
    kinds = ((name, type(module).__name__) for name, module in modules)
    return {name: f"{LIKE}: normkit does not know {kind}" for name, kind in kinds if "Norm" in kind}


def loaded(name: str) -> Any:
    """A module if something has imported it: a model of a framework that was never imported cannot be at hand."""
    return sys.modules.get(name)


@functools.cache
def framework(name: str) -> Framework:
    """The framework of this name."""
    if name not in FRAMEWORKS:
        raise ConversionError(f"There is no framework {name!r}; there are: {', '.join(FRAMEWORKS)}.")
    module, _, kind = FRAMEWORKS[name][0].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), kind)()


def framework_of(model: Any) -> Framework | None:
    """The framework that a model is of."""
    for name, (_, module) in FRAMEWORKS.items():
        if loaded(module) is not None and framework(name).owns(model):
            return framework(name)
    return None


def switches(layer: Any) -> dict[str, Any]:
    """What a layer of normkit's was told beyond what others can be; None where it is the usual thing."""
    usual = _usual(layer)
    found = {name: getattr(layer, name) for name in SWITCHES if usual and hasattr(layer, name)}
    return {name: None if value == usual.get(name) else value for name, value in found.items()}


def switch(layer: Any, settings: Mapping[str, Any]) -> None:
    """Tell a layer of normkit's the same."""
    usual = _usual(layer)
    for name in SWITCHES:
        if usual and name in settings:
            setattr(layer, name, usual.get(name) if settings[name] is None else settings[name])


def _usual(layer: Any) -> dict[str, Any]:
    """What a layer of normkit's is told where nothing is said; nothing for a layer of another's."""
    if not hasattr(layer, "_train_affine"):
        return {}
    return {**SETTINGS, **getattr(type(layer), "_policies", USUAL)._asdict()}


def axes_of(axis: Any) -> tuple[int, ...]:
    """One axis or several as a tuple; parameters of axes in another order than x has them mean nothing elsewhere."""
    axes = tuple(axis) if isinstance(axis, list | tuple) else (axis,)
    if (
        not axes
        or not all(isinstance(a, int) for a in axes)
        or axes != tuple(sorted(axes))
        or min(axes) < 0 <= max(axes)
    ):
        raise ConversionError(f"Axes are whole numbers of one sign, in ascending order; received {axis}.")
    return axes


def channels_at(norm: Norm, name: str, channel_axis: int = 1) -> None:
    """Refuse channels that are elsewhere than where the framework's layers have them."""
    axis = norm.channel_axis()
    there = channel_axis % norm.ndim if norm.ndim else channel_axis
    if axis != there:
        raise ConversionError(
            f"{name} has the channels at axis {channel_axis}, this {norm.kind} at axis {norm.axis[0]}: give "
            f"{argument('axis', channel_axis)} where the axes of x are moved too."
        )


def trailing(norm: Norm, name: str) -> None:
    """Refuse normalized axes other than the last ones."""
    n = len(norm.axis)
    axes = tuple(a - norm.ndim if norm.ndim and a >= 0 else a for a in norm.axis)
    if axes != tuple(range(-n, 0)):
        raise ConversionError(f"{name} normalizes trailing axes only; received axis {norm.axis}.")


def number(value: Any) -> np.ndarray:
    """A count as it is stored."""
    return np.asarray(value, np.int64)
