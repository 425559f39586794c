"""normkit's own layers, read and written."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from .._layer import Layer
from .framework import SWITCHES, Framework, axes_of, number, switch, switches
from .record import Array, ConversionError, Momentum, Native, Norm, Say, ones

CLASSES = {
    "BatchNorm": "batch_norm",
    "LayerNorm": "layer_norm",
    "GroupNorm": "group_norm",
    "InstanceNorm": "instance_norm",
    "RMSNorm": "rms_norm",
}


class Normkit(Framework):
    """``normkit.BatchNorm`` and the others, on NumPy."""

    name = "normkit"
    kinds: ClassVar = CLASSES
    counters: ClassVar = ("num_batches_tracked",)
    sizes: ClassVar = ("normalized_shape", "num_channels", "num_features")
    arguments: ClassVar = ("num_groups", "axis", "eps", "momentum", "unbiased", "affine", "bias", "weight_offset",
                           "cast", *SWITCHES)  # fmt: skip
    idle: ClassVar = ("dtype", "device", "backend")
    defaults: ClassVar = {
        "BatchNorm": {"eps": 1e-5, "momentum": 0.9, "unbiased": True, "axis": 1},
        "LayerNorm": {"eps": 1e-5},
        "GroupNorm": {"eps": 1e-5, "axis": 1},
        "InstanceNorm": {"eps": 1e-5, "axis": 1},
        "RMSNorm": {"eps": 1e-6, "weight_offset": 0.0, "cast": "output"},
    }
    arrays: ClassVar = {
        "": {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var",
             "num_batches": "num_batches_tracked"},
    }  # fmt: skip

    def read(self, native: Native, say: Say) -> Norm:
        kind = self.kind(native.layer)
        found, settings = self.named(native), native.settings
        count = found.pop("num_batches", None)
        lengths = self.lengths(native, found)
        usual = tuple(range(-len(lengths), 0)) if kind in ("layer_norm", "rms_norm") else 1
        axis = axes_of(usual if settings.get("axis") is None else settings["axis"])
        common: dict[str, Any] = {"lengths": lengths, "axis": axis, "eps": self.setting(native, "eps")}
        if kind == "batch_norm":
            common["momentum"] = Momentum(self.setting(native, "momentum"), "old")
            common["variance"] = "unbiased" if settings.get("unbiased", True) else "biased"
            common["num_batches"] = None if count is None else int(count)
        if kind == "rms_norm":
            common["cast"] = settings.get("cast", "output")
        if kind == "group_norm":
            common["num_groups"] = self.setting(native, "num_groups")
        return Norm(kind, weight_offset=settings.get("weight_offset", 0.0), **common, **found)

    def write(self, norm: Norm, say: Say) -> Native:
        if norm.cast != "output" and norm.kind != "rms_norm":
            say("cast-point", "normkit applies the weight before it rounds")
        if norm.bias is not None and norm.weight is None:
            say("affine-pair", "weight is ones")
            norm = norm.but(weight=ones(norm) - ones(norm).dtype.type(norm.weight_offset))
        layer = self.class_of(norm)
        one = norm.axis[0] if len(norm.axis) == 1 else norm.axis
        settings: dict[str, Any] = {"eps": norm.eps, "affine": norm.weight is not None, "axis": one}
        if norm.weight is not None and (norm.bias is None) != (norm.kind == "rms_norm"):
            settings["bias"] = norm.bias is not None
        if norm.kind in ("layer_norm", "rms_norm"):
            settings = {"normalized_shape": norm.lengths, **settings}
        elif norm.kind == "group_norm":
            settings = {"num_groups": norm.num_groups, "num_channels": norm.lengths[0], **settings}
        else:
            settings = {"num_features": norm.lengths[0], **settings}
        if norm.weight_offset:
            settings["weight_offset"] = norm.weight_offset
        if norm.kind == "rms_norm" and norm.cast != "output":
            settings["cast"] = norm.cast
        if not norm.trainable:
            settings["train_affine"] = False
        arrays = self.stored(layer, norm)
        if norm.mean is not None and norm.kind != "batch_norm":
            raise ConversionError(f"Running statistics of {norm.kind} exist in torch only, not in normkit.")
        if norm.kind == "batch_norm":
            if norm.momentum is None or norm.mean is None:
                raise ConversionError("normkit's BatchNorm always has running statistics, and this one has none.")
            settings |= {"momentum": norm.momentum.of("old"), "unbiased": norm.variance == "unbiased"}
            if norm.momentum.weights == "new":
                say("momentum-sense", f"momentum {norm.momentum.value} is {settings['momentum']} in normkit")
            if norm.num_batches is None:
                say("state-names", "num_batches_tracked is 0")
            arrays["num_batches_tracked"] = number(norm.num_batches or 0)
        return Native(layer, settings, arrays)

    def guess(self, arrays: Mapping[str, Array]) -> str | None:
        return "BatchNorm" if {"running_mean", "running_var"} & arrays.keys() else None

    def owns(self, model: Any) -> bool:
        return isinstance(model, Layer)

    def layers(self, model: Any) -> Iterator[tuple[str, Native]]:
        names = ("normalized_shape", "num_groups", "num_channels", "num_features", "axis", "eps", "momentum",
                 "unbiased", "weight_offset", "cast")  # fmt: skip
        settings = {name: getattr(model, name) for name in names if hasattr(model, name)} | switches(model)
        yield "", Native(type(model).__name__, settings, {k: _host(k, v) for k, v in model.state_dict().items()})

    def switches(self, layer: str) -> Collection[str]:
        import normkit

        return inspect.signature(getattr(normkit, layer)).parameters.keys()

    def make(self, native: Native) -> Any:
        import normkit

        like = next((v for k, v in native.arrays.items() if k != "num_batches_tracked"), None)
        layer = getattr(normkit, native.layer)(**native.settings, dtype="float32" if like is None else like.dtype.name)
        return self.put(layer, {"": native})

    def put(self, model: Any, natives: Mapping[str, Native]) -> Any:
        (native,) = natives.values()
        model.load_state_dict(native.arrays)
        for name in ("eps", "momentum", "unbiased"):
            if name in native.settings:
                setattr(model, name, native.settings[name])
        switch(model, native.settings)
        return model


def _host(name: str, value: Any) -> np.ndarray:
    from .source import host

    return host(name, value)
