"""dm-haiku: parameters and state of its norm layers read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..core import running
from .framework import Framework, axes_of, channels_at
from .keras import no_statistics, old_momentum
from .record import Array, ConversionError, Momentum, Native, Norm, Say, argument, plain_weight

KINDS = {"BatchNorm": "batch_norm", "LayerNorm": "layer_norm", "GroupNorm": "group_norm",
         "InstanceNorm": "instance_norm", "RMSNorm": "rms_norm"}  # fmt: skip
FIRST, LAST = "channels_first", "channels_last"
#: The names of an average's three parts, after "mean_ema/" or "var_ema/".
AVERAGE, HIDDEN, COUNTER = "average", "hidden", "counter"


class Haiku(Framework):
    """``haiku``: ``(params, state)``. A new layer is ``(transformed, params, state)``."""

    name = "haiku"
    kinds: ClassVar = KINDS
    separator = "/"
    momentum_name = "decay_rate"
    arguments: ClassVar = ("eps", "decay_rate", "groups", "axis", "param_axis", "data_format", "create_scale",
                           "create_offset")  # fmt: skip
    idle: ClassVar = ("scale_init", "offset_init", "cross_replica_axis", "cross_replica_axis_index_groups",
                      "use_fast_variance", "name")  # fmt: skip
    defaults: ClassVar = {
        "BatchNorm": {"eps": 1e-5, "data_format": LAST},
        "LayerNorm": {"eps": 1e-5},
        "GroupNorm": {"eps": 1e-5, "data_format": LAST},
        "InstanceNorm": {"eps": 1e-5, "data_format": LAST},
        "RMSNorm": {"eps": 1e-5},
    }
    arrays: ClassVar = {
        "": {"weight": "scale", "bias": "offset", "mean": f"mean_ema/{AVERAGE}", "var": f"var_ema/{AVERAGE}"},
    }

    def read(self, native: Native, say: Say) -> Norm:
        kind, settings = self.kind(native.layer), native.settings
        counters = [int(v) for k, v in native.arrays.items() if k.endswith(COUNTER)]
        kept = {k: v for k, v in native.arrays.items() if not k.endswith((HIDDEN, COUNTER))}
        found = self.named(Native(native.layer, settings, kept))
        shape = self.lengths(native, found)
        common: dict[str, Any] = {"eps": self.setting(native, "eps")}
        if kind in ("layer_norm", "rms_norm"):
            axis, parameters = axes_of(self.setting(native, "axis")), axes_of(settings.get("param_axis") or -1)
            if axis != parameters:
                raise ConversionError(
                    f"{native.layer} with axis={axis} and param_axis={parameters} exists in haiku only."
                )
            common["axis"] = axis
            # A trailing axis has parameters of its own length, others have those of x with ones.
            if axis != (-1,):
                common["ndim"] = len(shape)
            lengths = shape if axis == (-1,) else tuple(shape[a] for a in axis if -len(shape) <= a < len(shape))
        else:
            axis = (1,) if settings.get("data_format", LAST) in (FIRST, "NC...") else (-1,)
            common["axis"] = axis
            lengths = (math.prod(shape),)
            if len(shape) > 1:
                common["ndim"] = len(shape) + (kind == "group_norm")
        if math.prod(lengths) != math.prod(shape) or max(shape) != max(lengths, default=0):
            raise ConversionError(f"Parameters of shape {shape} are not those of axis {axis}.")
        if shape != lengths:
            say("axis-param-shape", f"parameters of shape {shape} are read as {lengths}")
        found = {key: value.reshape(lengths) for key, value in found.items()}
        if kind == "batch_norm":
            rate = self.setting(native, "decay_rate")
            common |= {"momentum": Momentum(rate, "old"), "variance": "biased"}
            if counters:
                if max(counters) != debiased(rate, found["mean"].dtype):  # that one is written, not counted
                    common["num_batches"] = max(counters)
                say("debias", "the average is read, not the hidden sum")
        if kind == "group_norm":
            common["num_groups"] = self.setting(native, "groups")
        return Norm(kind, lengths=lengths, **common, **found)

    def write(self, norm: Norm, say: Say) -> Native:
        norm = plain_weight(norm, say)
        if not norm.trainable:
            say("freeze-semantics", "haiku has no such switch: leave it out of what is trained")
        if norm.kind == "rms_norm" and norm.bias is not None:
            raise ConversionError("haiku's RMSNorm has no bias.")
        layer = self.class_of(norm)
        settings: dict[str, Any] = {"eps": norm.eps, "create_scale": norm.weight is not None}
        if norm.kind != "rms_norm":
            settings["create_offset"] = norm.bias is not None
        if norm.kind in ("layer_norm", "rms_norm"):
            settings |= {"axis": norm.axis, "param_axis": norm.axis}
            shape = norm.lengths if norm.axis == (-1,) else self._shape(norm, say)
        else:
            axis = norm.axis[0] if norm.axis[0] in (1, -1) else norm.channel_axis()
            if axis not in (1, -1):
                channels_at(norm, "haiku", -1)
                axis = -1
            settings["data_format"] = FIRST if axis == 1 else LAST
            short = norm.kind != "batch_norm" and axis == -1
            shape = norm.lengths if short else self._shape(norm.but(axis=(axis,)), say)
        if norm.kind == "group_norm":
            settings = {"groups": norm.num_groups, **settings}
            say("gn-order", f"groups={norm.num_groups}")
        if norm.kind != "batch_norm":
            no_statistics(norm, "haiku")
        arrays = {key: value.reshape(shape) for key, value in self.stored(layer, norm).items()}
        if norm.kind == "batch_norm":
            rate = old_momentum(norm.but(num_batches=None), say, "haiku", "biased")
            settings["decay_rate"] = rate
            counter = debiased(rate, norm.mean.dtype)  # type: ignore[union-attr]
            say("debias", f"counter is {counter}: nothing is left to debias")
            for name in ("mean_ema", "var_ema"):
                arrays[f"{name}/{HIDDEN}"] = arrays[f"{name}/{AVERAGE}"]
                arrays[f"{name}/{COUNTER}"] = np.asarray(counter, np.int32)
        return Native(layer, settings, arrays)

    def _shape(self, norm: Norm, say: Say) -> tuple[int, ...]:
        if norm.ndim is None:
            raise ConversionError(f"haiku's parameters have the rank of x: give {argument('ndim')}.")
        shape = [1] * (norm.ndim - (norm.kind == "group_norm"))
        if norm.kind == "group_norm":  # without the axis of samples
            norm = norm.but(axis=(0,))
        for a, n in zip(norm.axis, norm.lengths, strict=True):
            shape[a] = n
        if tuple(shape) != norm.lengths:
            say("axis-param-shape", f"parameters have shape {tuple(shape)}")
        return tuple(shape)

    def split(self, flat):
        found: dict[str, dict[str, Array]] = {}
        rest = {}
        for key, value in flat.items():
            collection, _, path = key.partition("/")
            layer, _, name = path.rpartition("/")
            if (
                collection == "state"
                and name in (AVERAGE, HIDDEN, COUNTER)
                and layer.endswith(("/mean_ema", "/var_ema"))
            ):
                layer, _, average = layer.rpartition("/")
                found.setdefault(layer.removesuffix("/~"), {})[f"{average}/{name}"] = value
            elif collection == "params" and name in ("scale", "offset"):
                found.setdefault(layer, {})[name] = value
            else:
                rest[key] = value
        return found, rest

    def join(self, layer, native):
        layer = layer or _module(native.layer)
        return {
            f"state/{layer}/~/{name}" if "_ema/" in name else f"params/{layer}/{name}": value
            for name, value in native.arrays.items()
        }

    def guess(self, arrays: Mapping[str, Array]) -> str | None:
        return "BatchNorm" if any("_ema/" in name for name in arrays) else None

    def owns(self, model: Any) -> bool:
        return False  # parameters are mappings like others

    def make(self, native: Native) -> Any:
        hk, jnp = self.imported("haiku"), self.imported("jax.numpy")
        settings = dict(native.settings)
        training = {"is_training"} if native.layer == "BatchNorm" else set()
        transformed = hk.transform_with_state(
            lambda x, **options: getattr(hk, native.layer)(**settings, name=_module(native.layer))(
                x, **{k: options.get(k, False) for k in training}
            )
        )
        params: dict[str, dict[str, Any]] = {}
        state: dict[str, dict[str, Any]] = {}
        for key, value in self.join("", native).items():
            collection, _, path = key.partition("/")
            layer, _, name = path.rpartition("/")
            (params if collection == "params" else state).setdefault(layer, {})[name] = jnp.asarray(value)
        return transformed, params, state


def debiased(rate: float, dtype: Any) -> int:
    """The least count at which ``rate ** count`` is zero in the dtype, so that nothing is left to debias."""
    wide = np.finfo(dtype if np.dtype(dtype).kind == "f" else np.float32)
    try:
        return running.debiased(rate, float(wide.smallest_subnormal))
    except ValueError as error:
        raise ConversionError(str(error)) from None


def _module(layer: str) -> str:
    return "".join(
        f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(layer.replace("RMS", "Rms"))
    )
