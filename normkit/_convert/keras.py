"""Keras 3 and tf_keras: their norm layers read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from .framework import Framework, axes_of, loaded, strange, switch, switches
from .record import Array, ConversionError, Momentum, Native, Norm, Say, argument, lengths_of, ones, plain_weight

_EPS = {"epsilon": 1e-3}
KINDS = {
    "BatchNormalization": "batch_norm",
    "LayerNormalization": "layer_norm",
    "GroupNormalization": "group_norm",
    "RMSNormalization": "rms_norm",
}
RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
_SETTINGS = ("axis", "momentum", "epsilon", "center", "scale", "groups", "rms_scaling", "renorm", "synchronized")


class Keras(Framework):
    """Keras 3."""

    name = "keras"
    separator = "/"
    kinds: ClassVar = KINDS
    sizes: ClassVar = ("lengths",)
    arguments: ClassVar = (*_SETTINGS, "trainable", "ndim", "fused", "virtual_batch_size")
    idle: ClassVar = (
        *(f"{name}_{what}" for name in ("beta", "gamma") for what in ("initializer", "regularizer", "constraint")),
        "moving_mean_initializer", "moving_variance_initializer", "renorm_clipping", "renorm_momentum", "adjustment",
        "name", "dtype", "dynamic", "activity_regularizer", "autocast", "input_shape", "input_dim", "batch_size",
        "batch_shape", "batch_input_shape", "weights",
    )  # fmt: skip
    eps_name = "epsilon"
    defaults: ClassVar = {
        "BatchNormalization": {**_EPS, "momentum": 0.99, "axis": -1},
        "LayerNormalization": {**_EPS, "axis": -1},
        "GroupNormalization": {**_EPS, "axis": -1},
        "RMSNormalization": {"epsilon": 1e-6, "axis": -1},
    }
    arrays: ClassVar = {
        "": {"weight": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
        "RMSNormalization": {"weight": "scale"},
    }

    def read(self, native: Native, say: Say) -> Norm:
        kind, settings = self.kind(native.layer), native.settings
        renorm = [name for name in RENORM if name in native.arrays]
        if renorm:
            say("renorm-state", f"{', '.join(renorm)} left out")
            native = Native(native.layer, settings, {k: v for k, v in native.arrays.items() if k not in renorm})
        found = self.named(native)
        lengths = self.lengths(native, found)
        axis = settings.get("axis", -1)
        axes = axes_of(axis)
        if isinstance(axis, list | tuple) and kind == "batch_norm":
            if len(axes) > 1:
                raise ConversionError(f"batch norm over several channel axes exists in tf_keras only: {list(axis)}.")
            say("config-legacy", f"axis={list(axis)} is axis={axis[0]}")
        if settings.get("virtual_batch_size"):
            raise ConversionError("virtual_batch_size exists in tf_keras only.")
        if settings.get("rms_scaling"):
            raise ConversionError("rms_scaling=True divides by the standard deviation of x and keeps the mean: no RMS.")
        if settings.get("synchronized"):
            say("sync-stats", "synchronized=True is left out")
        common: dict[str, Any] = {
            "lengths": lengths, "axis": axes, "eps": self.setting(native, "epsilon"),
            "ndim": settings.get("ndim"), "trainable": settings.get("trainable", True),
        }  # fmt: skip
        if kind == "batch_norm":
            common["momentum"] = Momentum(self.setting(native, "momentum"), "old")
            common["variance"], common["frozen"] = self._variance(settings, say), not common["trainable"]
        if kind == "group_norm":
            groups = self.setting(native, "groups")
            if groups in (-1, lengths[0]):
                say("gn-instance", f"groups={groups} is instance norm")
                return Norm("instance_norm", **common, **found)
            common["num_groups"] = groups
        return Norm(kind, **common, **found)

    def write(self, norm: Norm, say: Say) -> Native:
        norm = plain_weight(norm, say)
        if norm.cast != "output":
            say("cast-point", f"{self.name} applies the weight before it rounds")
        one = norm.axis[0] if len(norm.axis) == 1 else list(norm.axis)
        settings: dict[str, Any] = {"axis": one, "epsilon": norm.eps}
        if norm.ndim is not None:
            settings["ndim"] = norm.ndim
        if not norm.trainable:
            settings["trainable"] = False
            if norm.mean is not None and not norm.frozen:
                say("freeze-semantics", "trainable=False: its statistics do not move either")
        if norm.kind == "rms_norm":
            return self._rms(norm, settings, say)
        settings |= {"center": norm.bias is not None, "scale": norm.weight is not None}
        if norm.weight is None and norm.bias is None:
            settings["lengths"] = norm.lengths
        if norm.kind == "batch_norm":
            settings["momentum"] = old_momentum(norm, say, self.name, self._variance(settings, say))
            return Native("BatchNormalization", settings, self.stored("BatchNormalization", norm))
        no_statistics(norm, self.name)
        if norm.kind == "layer_norm":
            return Native("LayerNormalization", settings, self.stored("LayerNormalization", norm))
        groups = norm.lengths[0] if norm.kind == "instance_norm" else norm.num_groups
        say("gn-order" if norm.kind == "group_norm" else "gn-instance", f"groups={groups}")
        settings = {"groups": groups, **settings}
        return Native("GroupNormalization", settings, self.stored("GroupNormalization", norm))

    def _rms(self, norm, settings, say):
        if norm.bias is not None:
            raise ConversionError(f"{self.name}'s RMSNormalization has no bias.")
        if norm.weight is None:
            say("affine-pair", "scale is ones")
            norm = norm.but(weight=ones(norm))
        return Native("RMSNormalization", settings, self.stored("RMSNormalization", norm))

    def _variance(self, settings: Mapping[str, Any], say: Say) -> str:
        return "biased"

    def split(self, flat):
        names = {**self.arrays[""], **{n: n for n in RENORM}, "scale": "scale"}.values()
        found: dict[str, dict[str, Array]] = {}
        rest = {}
        for key, value in flat.items():
            layer, _, name = key.rpartition("/")
            name = name.removesuffix(":0")
            if name in names:
                found.setdefault(layer, {})[name] = value
            else:
                rest[key] = value
        return found, rest

    def freezes(self, native: Native) -> bool:
        return native.settings.get("trainable", True) is False

    def guess(self, arrays):
        if {"moving_mean", "moving_variance"} & arrays.keys():
            return "BatchNormalization"
        return "RMSNormalization" if arrays.keys() == {"scale"} else None

    def owns(self, model: Any) -> bool:
        return isinstance(model, loaded("keras").layers.Layer)

    def layers(self, model: Any) -> Iterator[tuple[str, Native]]:
        trains = any(v.trainable for v in model.variables)
        for name, layer in self._found(model):
            frozen = {"frozen": "trainable=False", "thaw": "Set trainable=True"} if not layer.trainable else {}
            native = self._take(layer)
            yield name, Native(native.layer, native.settings, native.arrays, {"model_training": trains, **frozen})

    def _found(self, model: Any) -> Iterator[tuple[str, Any]]:
        """The norm layers, named by the layers that they are within, the model itself left out."""
        names: set[str] = set()
        for name, layer in _walk("", model, set()):
            if self._kind(layer) is not None:
                if name in names:
                    raise ConversionError(f"Two layers have the name {name!r}: layers are told apart by it.")
                names.add(name)
                yield name, layer

    def strangers(self, model: Any) -> dict[str, str]:
        unknown = ((name, layer) for name, layer in _walk("", model, set()) if self._kind(layer) is None)
        return strange((name, layer) for name, layer in unknown if layer.weights)

    def _kind(self, layer: Any) -> str | None:
        top = self.name
        for base in type(layer).__mro__:
            if base.__name__.removesuffix("Base") in KINDS and base.__module__.startswith(f"{top}."):
                return base.__name__.removesuffix("Base")
        return None

    def _take(self, layer: Any) -> Native:
        kind = self._kind(layer)
        assert kind is not None
        if not layer.built:
            raise ConversionError(f"Layer {layer.name!r} is not built: call the model once, or build() it.")
        settings = {name: getattr(layer, name) for name in _SETTINGS if hasattr(layer, name)} | switches(layer)
        settings["trainable"] = layer.trainable
        shape = self._shape(layer)
        if shape is not None:
            settings["ndim"] = len(shape)
            axes = settings["axis"] if isinstance(settings["axis"], list | tuple) else [settings["axis"]]
            settings["lengths"] = tuple(shape[a] for a in axes)
        if type(layer).__name__ != kind:
            settings["class"] = type(layer).__name__
        return Native(kind, settings, {self._name(v): np.array(_host(v)) for v in layer.weights})

    def _shape(self, layer: Any) -> tuple | None:
        build = layer.get_build_config() or {}
        return build.get("input_shape")

    def _name(self, variable: Any) -> str:
        return variable.name.rpartition("/")[2].removesuffix(":0")

    def make(self, native: Native) -> Any:
        keras = self.imported(self.name)
        settings = dict(native.settings)
        lengths: Any = settings.pop("lengths", None) or lengths_of(*native.arrays.values())
        ndim, trainable = settings.pop("ndim", None), settings.pop("trainable", True)
        axes = settings["axis"] if isinstance(settings["axis"], list) else [settings["axis"]]
        if ndim is None and native.layer == "BatchNormalization":
            raise ConversionError(
                f"{self.name}'s BatchNormalization is built for one rank of x: give {argument('ndim')}."
            )
        like = next(iter(native.arrays.values()), None)
        layer = getattr(keras.layers, native.layer)(**settings, dtype=None if like is None else like.dtype.name)
        shape = [None] * (ndim or max(a + 2 if a >= 0 else 1 - a for a in axes))
        for a, n in zip(axes, lengths, strict=True):
            shape[a] = n
        layer.build(tuple(shape))
        if ndim is None:
            layer.input_spec = None
        self._fill(layer, native)
        layer.trainable = trainable
        return layer

    def put(self, model: Any, natives: Mapping[str, Native]) -> Any:
        layers = dict(self._found(model))
        for name, native in natives.items():
            self._fill(layers[name], native)
        for name in ("train_function", "test_function", "predict_function"):
            if hasattr(model, name):
                setattr(model, name, None)  # these have eps and momentum as constants
        return model

    def _fill(self, layer: Any, native: Native) -> None:
        variables = {self._name(v): v for v in layer.weights}
        for name, value in native.arrays.items():
            variables[name].assign(value)
        for name in ("epsilon", "momentum"):
            if name in native.settings and hasattr(layer, name):
                setattr(layer, name, native.settings[name])
        switch(layer, native.settings)


class TfKeras(Keras):
    """tf_keras, the Keras 2 of TensorFlow."""

    name = "tf_keras"

    def _variance(self, settings: Mapping[str, Any], say: Say) -> str:
        ndim, axis = settings.get("ndim"), settings.get("axis", -1)
        if settings.get("fused") is None and ndim is None:
            say("runvar-bias-rank", "the rank is not known, and taken for one where it divides by n")
            return "biased"
        (axis,) = axis if isinstance(axis, list | tuple) else (axis,)
        fused = settings.get("fused", ndim in (4, 5) and axis % ndim in (1, ndim - 1))
        say("runvar-bias-rank", f"{'fused' if fused else 'not fused'}: it divides by {'n - 1' if fused else 'n'}")
        return "unbiased" if fused else "biased"

    def owns(self, model: Any) -> bool:
        return isinstance(model, loaded("tf_keras").layers.Layer)

    def _rms(self, norm, settings, say):
        raise ConversionError("tf_keras has no RMSNormalization.")

    def _take(self, layer: Any) -> Native:
        native = super()._take(layer)
        more = {name: getattr(layer, name, None) for name in ("fused", "virtual_batch_size")}
        more = {name: value for name, value in more.items() if value is not None}
        return Native(native.layer, {**native.settings, **more}, native.arrays)

    def _shape(self, layer: Any) -> tuple | None:
        shape = (layer.get_build_config() or {}).get("input_shape")
        return None if shape is None else tuple(shape)


def _walk(name: str, layer: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """A layer and those within it, each once, named by the layers that they are within."""
    yield name, layer
    for inner in layer._flatten_layers(recursive=False, include_self=False):
        if id(inner) not in seen:
            seen.add(id(inner))
            yield from _walk(f"{name}/{inner.name}" if name else inner.name, inner, seen)


def old_momentum(norm: Norm, say: Say, name: str, variance: str) -> float:
    """The weight of the old statistics for a framework that has nothing else; refuses batch norm without any."""
    if norm.mean is None or norm.momentum is None:
        raise ConversionError(f"{name}'s batch norm always has running statistics, and this one has none.")
    value = norm.momentum.of("old")
    if value is None:
        raise ConversionError(f"momentum=None averages all batches, which {name} cannot do: set a momentum first.")
    if norm.momentum.weights == "new":
        say("momentum-sense", f"momentum {norm.momentum.value} is {value} in {name}")
    if norm.variance != variance:
        say("runvar-bias", f"{name} divides by {'n' if variance == 'biased' else 'n - 1'}")
    if norm.num_batches:
        say("state-names", f"{norm.num_batches} batches were tracked, which {name} does not count")
    return value


def no_statistics(norm: Norm, name: str) -> None:
    """Refuse instance norm with running statistics."""
    if norm.mean is not None:
        raise ConversionError(f"Running statistics of {norm.kind} exist in torch only, not in {name}.")


def _host(variable: Any) -> Any:
    value = getattr(variable, "value", variable)
    value = value() if callable(value) else value
    if type(value).__module__.startswith("torch"):
        from .torch import array

        return array(value)
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)
