"""flax: the norm layers of nnx and of linen read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from .. import _validate as check
from .framework import Framework, axes_of, channels_at, loaded, strange, switch, switches
from .keras import no_statistics, old_momentum
from .record import Array, ConversionError, Momentum, Native, Norm, Say, checked, plain_weight

KINDS = {
    "BatchNorm": "batch_norm",
    "LayerNorm": "layer_norm",
    "GroupNorm": "group_norm",
    "InstanceNorm": "instance_norm",
    "RMSNorm": "rms_norm",
}
_EPS = {"epsilon": 1e-6}
_AXES = {"reduction_axes": -1, "feature_axes": -1}
_SETTINGS = ("num_features", "epsilon", "momentum", "axis", "num_groups", "group_size", "reduction_axes",
             "feature_axes", "use_scale", "use_bias")  # fmt: skip
STATS = ("mean", "var")
#: What says a module's mode.
MODES = ("use_running_average", "deterministic")


class Nnx(Framework):
    """``flax.nnx``."""

    name = "nnx"
    title = "flax"
    kinds: ClassVar = KINDS
    sizes: ClassVar = ("num_features",)
    arguments: ClassVar = tuple(name for name in _SETTINGS if name != "num_features")
    idle: ClassVar = ("use_running_average", "dtype", "param_dtype", "promote_dtype", "scale_init", "bias_init",
                      "scale_metadata", "bias_metadata", "axis_name", "axis_index_groups", "use_fast_variance",
                      "force_float32_reductions", "rngs", "name", "parent")  # fmt: skip
    eps_name = "epsilon"
    defaults: ClassVar = {
        "BatchNorm": {"epsilon": 1e-5, "momentum": 0.99, "axis": -1},
        "LayerNorm": {**_EPS, **_AXES},
        "RMSNorm": {**_EPS, **_AXES},
        "GroupNorm": {**_EPS, "num_groups": 32},
        "InstanceNorm": {**_EPS, "feature_axes": -1},
    }
    arrays: ClassVar = {"": {"weight": "scale", "bias": "bias", "mean": "mean", "var": "var"}}

    def read(self, native: Native, say: Say) -> Norm:
        kind = self.kind(native.layer)
        found, settings = self.named(native), native.settings
        lengths = self.lengths(native, found)
        common: dict[str, Any] = {"lengths": lengths, "eps": self.setting(native, "epsilon")}
        if kind == "batch_norm":
            common |= {"axis": axes_of(settings.get("axis", -1)), "variance": "biased"}
            if len(common["axis"]) > 1:
                raise ConversionError(f"batch norm over several channel axes exists in flax only: {settings['axis']}.")
            common["momentum"] = Momentum(self.setting(native, "momentum"), "old")
        elif kind == "group_norm":
            if settings.get("reduction_axes") is not None:
                raise ConversionError(f"GroupNorm(reduction_axes={settings['reduction_axes']}) exists in flax only.")
            groups = self.setting(native, "num_groups")
            if groups is None:
                groups = lengths[0] // checked(check.positive_int, "group_size", self.setting(native, "group_size"))
            common |= {"axis": (-1,), "num_groups": groups}
        elif kind == "instance_norm":
            common["axis"] = axes_of(settings.get("feature_axes", -1))
            if len(common["axis"]) > 1:
                raise ConversionError(f"InstanceNorm over feature_axes={common['axis']} exists in flax only.")
        else:
            reduced, features = axes_of(settings.get("reduction_axes", -1)), axes_of(settings.get("feature_axes", -1))
            if found and reduced != features:
                raise ConversionError(
                    f"{native.layer} with reduction_axes={reduced} and feature_axes={features} exists in flax only."
                )
            common["axis"] = reduced
        return Norm(kind, **common, **found)

    def write(self, norm: Norm, say: Say) -> Native:
        norm = plain_weight(norm, say)
        if norm.cast != "output":
            say("cast-point", "flax applies the weight before it rounds")
        if not norm.trainable:
            say("freeze-semantics", "flax has no such switch: leave it out of what is trained")
        if norm.kind == "rms_norm" and norm.bias is not None:
            raise ConversionError("flax's RMSNorm has no bias.")
        layer = self.class_of(norm)
        settings: dict[str, Any] = {"epsilon": norm.eps, "use_scale": norm.weight is not None}
        if norm.kind != "rms_norm":
            settings["use_bias"] = norm.bias is not None
        if norm.kind == "batch_norm":
            settings |= {"axis": norm.axis[0], "momentum": old_momentum(norm, say, "flax", "biased")}
        else:
            no_statistics(norm, "flax")
        if norm.kind == "group_norm":
            channels_at(norm, "flax", -1)
            settings["num_groups"] = norm.num_groups
            say("gn-order", f"num_groups={norm.num_groups}")
        elif norm.kind == "instance_norm":
            settings["feature_axes"] = norm.axis[0]
        elif norm.kind in ("layer_norm", "rms_norm"):
            settings |= self._axes(norm)
        return Native(layer, self._sized(settings, norm), self.stored(layer, norm))

    def _axes(self, norm: Norm) -> dict[str, Any]:
        if len(norm.axis) > 1:
            raise ConversionError(f"nnx has one length of parameters; received {norm.lengths}: linen has several.")
        return {"reduction_axes": norm.axis[0], "feature_axes": norm.axis[0]}

    def _sized(self, settings, norm):
        return {"num_features": norm.lengths[0], **settings}

    def guess(self, arrays: Mapping[str, Array]) -> str | None:
        return "BatchNorm" if {"mean", "var"} <= arrays.keys() else None

    def owns(self, model: Any) -> bool:
        from flax import nnx  # loaded: the module is there

        return isinstance(model, nnx.Module)

    def _found(self, model: Any) -> Iterator[tuple[str, str, Any]]:
        """The modules of a model with their names, and the classes of norm layers that they are of ("" if none)."""
        from flax import nnx

        for path, module in nnx.iter_modules(model):
            bases = (base for base in type(module).__mro__ if base.__module__.startswith("flax.nnx"))
            yield ".".join(map(str, path)), next((b.__name__ for b in bases if b.__name__ in KINDS), ""), module

    def strangers(self, model: Any) -> dict[str, str]:
        return strange((name, module) for name, layer, module in self._found(model) if not layer)

    def layers(self, model: Any) -> Iterator[tuple[str, Native]]:
        found = list(self._found(model))
        trains = any(getattr(m, name, None) is False for _, _, m in found for name in MODES)
        for name, layer, module in found:
            if not layer:
                continue
            mode: dict[str, Any] = {"model_training": trains}
            if getattr(module, "use_running_average", None):
                mode |= {"frozen": "use_running_average=True", "thaw": "Call train() on the layer"}
            settings = {key: getattr(module, key) for key in _SETTINGS if hasattr(module, key)} | switches(module)
            if type(module).__name__ != layer:
                settings["class"] = type(module).__name__
            arrays = {
                key: np.array(getattr(module, key)[...])
                for key in self.arrays[""].values()
                if getattr(module, key, None) is not None
            }
            yield name, Native(layer, settings, arrays, mode)

    def make(self, native: Native) -> Any:
        from flax import nnx

        self.imported("flax")
        settings, like = dict(native.settings), next(iter(native.arrays.values()), np.zeros((), np.float32))
        layer = getattr(nnx, native.layer)(
            settings.pop("num_features"), **settings, param_dtype=like.dtype, rngs=nnx.Rngs(0)
        )
        return self._fill(layer, native)

    def put(self, model: Any, natives: Mapping[str, Native]) -> Any:
        for name, _, module in self._found(model):
            if name in natives:
                self._fill(module, natives[name])
        return model

    def _fill(self, module: Any, native: Native) -> Any:
        jnp = self.imported("jax.numpy")
        for key, value in native.arrays.items():
            getattr(module, key).set_value(jnp.asarray(value))
        for key in ("epsilon", "momentum"):
            if key in native.settings and hasattr(module, key):
                setattr(module, key, native.settings[key])
        switch(module, native.settings)
        return module


class Linen(Nnx):
    """``flax.linen``: a layer is ``(module, variables)``; a model's variables are arrays by name."""

    name = "linen"
    separator = "/"

    def _axes(self, norm: Norm) -> dict[str, Any]:
        one = norm.axis[0] if len(norm.axis) == 1 else norm.axis
        return {"reduction_axes": one, "feature_axes": one}

    def _sized(self, settings, norm):
        return settings

    def split(self, flat):
        found: dict[str, dict[str, Array]] = {}
        rest = {}
        for key, value in flat.items():
            collection, _, path = key.partition("/")
            layer, _, name = path.rpartition("/")
            if (collection, name) in {("params", "scale"), ("params", "bias"), *(("batch_stats", n) for n in STATS)}:
                found.setdefault(layer, {})[name] = value
            else:
                rest[key] = value
        return found, rest

    def join(self, layer, native):
        middle = f"{layer}/" if layer else ""
        return {
            f"{'batch_stats' if name in STATS else 'params'}/{middle}{name}": value
            for name, value in native.arrays.items()
        }

    def owns(self, model: Any) -> bool:
        linen = loaded("flax.linen")
        return (
            linen is not None
            and isinstance(model, tuple)
            and len(model) == 2
            and isinstance(model[0], linen.Module)
            and isinstance(model[1], Mapping)
        )

    def layers(self, model: Any) -> Iterator[tuple[str, Native]]:
        module, variables = model
        layer = type(module).__name__
        if layer not in KINDS:
            raise ConversionError(
                f"A linen module says its settings only when it runs: convert the variables of this {layer} with "
                f"framework='linen' and settings."
            )
        settings = {key: getattr(module, key) for key in _SETTINGS if hasattr(module, key)}
        arrays = {k: np.asarray(v) for group in ("params", "batch_stats") for k, v in variables.get(group, {}).items()}
        yield "", Native(layer, settings, arrays)

    def strangers(self, model: Any) -> dict[str, str]:
        return {}  # layers() takes nothing but a norm layer

    def make(self, native: Native) -> Any:
        linen, jnp = self.imported("flax.linen"), self.imported("jax.numpy")
        settings = {k: v for k, v in native.settings.items() if k != "num_features"}
        variables: dict[str, dict[str, Any]] = {"params": {}}
        for key, value in native.arrays.items():
            variables.setdefault("batch_stats" if key in STATS else "params", {})[key] = jnp.asarray(value)
        return getattr(linen, native.layer)(**settings), variables

    def put(self, model: Any, natives: Mapping[str, Native]) -> Any:
        (native,) = natives.values()
        module, _ = model
        changes = {key: native.settings[key] for key in ("epsilon", "momentum") if key in native.settings}
        return module.clone(**changes), self.make(native)[1]
