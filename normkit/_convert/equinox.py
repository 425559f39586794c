"""equinox: its norm layers read and written. They take one sample, without the axis of the batch."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from .framework import Framework, channels_at, loaded, trailing
from .keras import no_statistics, old_momentum
from .record import Array, ConversionError, Momentum, Native, Norm, Say, ones, plain_weight

KINDS = {"BatchNorm": "batch_norm", "LayerNorm": "layer_norm", "GroupNorm": "group_norm", "RMSNorm": "rms_norm"}
_SETTINGS = ("input_size", "eps", "momentum", "mode", "axis_name", "shape", "groups", "channels", "channelwise_affine",
             "use_weight", "use_bias")  # fmt: skip


class Equinox(Framework):
    """``equinox.nn``: a layer, or a model; with batch norm, ``(model, state)``."""

    name = "equinox"
    kinds: ClassVar = KINDS
    counters: ClassVar = ("counter",)
    sizes: ClassVar = ("shape", "channels", "input_size")
    has_files = False
    defaults: ClassVar = {name: {"eps": 1e-5} for name in KINDS}
    arrays: ClassVar = {"": {"weight": "weight", "bias": "bias", "mean": "mean", "var": "var"}}

    def read(self, native: Native, say: Say) -> Norm:
        kind, settings = self.kind(native.layer), native.settings
        counter = native.arrays.get("counter")
        found = self.named(Native(native.layer, settings, {k: v for k, v in native.arrays.items() if k != "counter"}))
        lengths = self.lengths(native, found)
        common: dict[str, Any] = {"lengths": lengths, "eps": self.setting(native, "eps")}
        if kind == "batch_norm":
            rate = self.setting(native, "momentum")
            common |= {"axis": (1,), "momentum": Momentum(rate, "old"), "variance": "biased"}
            if settings.get("mode") == "batch" and counter is not None:
                count = int(counter)
                common["num_batches"] = count
                dtype = found["mean"].dtype.type
                scale = dtype(1) if count == 0 else dtype(1) - dtype(rate) ** dtype(count)
                if scale != 1:
                    found |= {key: found[key] / scale for key in ("mean", "var")}
                    say("debias", f"statistics are divided by 1 - momentum ** {count}, as equinox does in inference")
        elif kind == "group_norm":
            groups = self.setting(native, "groups")
            common |= {"axis": (1,), "num_groups": groups}
            if groups == lengths[0]:
                say("gn-instance", f"groups={groups} is instance norm")
                kind, common["num_groups"] = "instance_norm", None
        else:
            common["axis"] = tuple(range(-len(lengths), 0))
        return Norm(kind, **common, **found)

    def write(self, norm: Norm, say: Say) -> Native:
        norm = plain_weight(norm, say)
        if norm.cast != "output":
            say("cast-point", "equinox applies the weight before it rounds")
        if not norm.trainable:
            say("freeze-semantics", "equinox has no such switch: leave it out of what is trained")
        if norm.kind == "instance_norm":
            no_statistics(norm, "equinox")
            say("gn-instance", f"groups={norm.lengths[0]}")
            norm = norm.but(kind="group_norm", num_groups=norm.lengths[0])
        settings: dict[str, Any] = {"eps": norm.eps}
        if norm.kind in ("layer_norm", "rms_norm"):
            trailing(norm, "equinox")
            settings |= {
                "shape": norm.lengths,
                "use_weight": norm.weight is not None,
                "use_bias": norm.bias is not None,
            }
        else:
            channels_at(norm, "equinox")
            if (norm.weight is None) != (norm.bias is None):
                key, value = ("weight", ones(norm)) if norm.weight is None else ("bias", 0 * ones(norm))
                say("affine-pair", f"{key} is {'ones' if key == 'weight' else 'zeros'}")
                norm = norm.but(**{key: value})
            settings["channelwise_affine"] = norm.weight is not None
        if norm.kind == "group_norm":
            settings |= {"groups": norm.num_groups, "channels": norm.lengths[0]}
            if norm.num_groups != norm.lengths[0]:
                say("gn-order", f"groups={norm.num_groups}")
        if norm.kind == "batch_norm":
            settings["momentum"] = old_momentum(norm, say, "equinox", "biased")
            settings |= {"input_size": norm.lengths[0], "axis_name": "batch", "mode": "ema"}
            say("eqx-default-mode", "mode='ema'")
        layer = self.class_of(norm)
        return Native(layer, settings, self.stored(layer, norm))

    def guess(self, arrays: Mapping[str, Array]) -> str | None:
        return None

    def owns(self, model: Any) -> bool:
        eqx = loaded("equinox")
        return isinstance(_parts(model)[0], eqx.Module)

    def _found(self, model: Any) -> Iterator[tuple[str, str, Any]]:
        jax = loaded("jax")
        leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: _kind(x) is not None)[0]
        for path, leaf in leaves:
            kind = _kind(leaf)
            if kind is not None:
                yield jax.tree_util.keystr(path, simple=True, separator="."), kind, leaf

    def layers(self, model: Any) -> Iterator[tuple[str, Native]]:
        layers, state = _parts(model)
        trains = _trains(layers)
        for name, kind, layer in self._found(layers):
            mode: dict[str, Any] = {}
            settings = {key: getattr(layer, key) for key in _SETTINGS if hasattr(layer, key)}
            if type(layer).__name__ != kind:
                settings["class"] = type(layer).__name__
            arrays = {key: value for key in ("weight", "bias") if (value := getattr(layer, key, None)) is not None}
            if kind == "BatchNorm":
                if state is None:
                    raise ConversionError(f"{name or kind} keeps its statistics in a State: give (model, state).")
                arrays["mean"], arrays["var"] = state.get(layer.ema_state_index or layer.batch_state_index)
                mode["model_training"] = trains
                if layer.inference:
                    mode |= {"frozen": "inference=True", "thaw": "Take equinox.nn.inference_mode(layer, False)"}
                if layer.mode == "ema":
                    mode["initial"] = bool(state.get(layer.ema_first_time_index))
                if layer.mode == "batch":
                    arrays["counter"] = state.get(layer.batch_counter)
            yield name, Native(kind, settings, {key: np.array(value) for key, value in arrays.items()}, mode)

    def make(self, native: Native) -> Any:
        eqx = self.imported("equinox")
        settings, like = dict(native.settings), next(iter(native.arrays.values()), np.zeros((), np.float32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = eqx.nn.make_with_state(getattr(eqx.nn, native.layer))(**settings, dtype=like.dtype)
        model = self.put(made, {"": native})
        return model if native.layer == "BatchNorm" else model[0]

    def put(self, model: Any, natives: Mapping[str, Native]) -> Any:
        jax, jnp = self.imported("jax"), self.imported("jax.numpy")
        layers, state = _parts(model)
        state = jax.tree_util.tree_map(lambda leaf: leaf, state)  # set() takes the old one away
        filled = {}
        for name, kind, layer in self._found(layers):
            if name not in natives:
                continue
            native = natives[name]
            changes = {key: jnp.asarray(native.arrays[key]) for key in ("weight", "bias") if key in native.arrays}
            changes |= {key: native.settings[key] for key in ("eps", "momentum") if key in native.settings}
            filled[name] = _but(layer, changes)
            if kind == "BatchNorm":
                state = _fill(state, layer, native, jnp)
        keys = [name for name, _, _ in self._found(layers)]
        leaves, structure = jax.tree_util.tree_flatten(layers, is_leaf=lambda x: _kind(x) is not None)
        order = iter(keys)
        leaves = [filled.get(next(order), leaf) if _kind(leaf) is not None else leaf for leaf in leaves]
        layers = jax.tree_util.tree_unflatten(structure, leaves)
        return (layers, state) if isinstance(model, tuple) else layers


def _trains(layers: Any) -> bool:
    """Whether some layer, which may be no norm, is not in its inference mode."""
    jax = loaded("jax")
    found = jax.tree.leaves(layers, is_leaf=lambda x: hasattr(x, "inference"))
    return any(getattr(layer, "inference", None) is False for layer in found)


def _fill(state: Any, layer: Any, native: Native, jnp: Any) -> Any:
    from .haiku import debiased

    pair = jnp.asarray(native.arrays["mean"]), jnp.asarray(native.arrays["var"])
    if layer.mode == "ema":
        state = state.set(layer.ema_first_time_index, jnp.array(False))
        return state.set(layer.ema_state_index, pair)
    count = debiased(native.settings["momentum"], native.arrays["mean"].dtype)
    state = state.set(layer.batch_counter, state.get(layer.batch_counter) * 0 + count)  # of the same, weak type
    return state.set(layer.batch_state_index, pair)


def _but(layer: Any, changes: Mapping[str, Any]) -> Any:
    """The layer with changes, also of what is no array."""
    new = object.__new__(type(layer))
    for f in dataclasses.fields(layer):
        object.__setattr__(new, f.name, changes.get(f.name, getattr(layer, f.name)))
    return new


def _kind(layer: Any) -> str | None:
    for base in type(layer).__mro__:
        if base.__name__ in KINDS and base.__module__.startswith("equinox."):
            return base.__name__
    return None


def _parts(model: Any) -> tuple[Any, Any]:
    eqx = loaded("equinox")
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[1], eqx.nn.State):
        return model
    return model, None
