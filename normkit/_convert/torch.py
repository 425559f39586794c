"""torch.nn: its norm layers read and written, and those of other packages that are known by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from .framework import LIKE, Framework, channels_at, loaded, number, switch, switches, trailing
from .record import Array, ConversionError, Momentum, Native, Norm, Say, at, ones, plain_weight

BATCH = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNorm")
INSTANCE = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "InstanceNorm")
#: The rank of x, where the class says it. BatchNorm1d takes two.
RANKS = {
    "BatchNorm2d": 4, "BatchNorm3d": 5, "InstanceNorm2d": 4, "InstanceNorm3d": 5, "LayerNorm2d": 4, "RMSNorm2d": 4,
    "FrozenBatchNorm2d": 4,
}  # fmt: skip
#: Of a new layer's class, by the rank of x.
SUFFIXES = {None: "2d", 2: "1d", 3: "1d", 4: "2d", 5: "3d"}
#: RMS norms of other packages, by class: on which side of the rounding the weight is, and its offset.
RMS = {
    "GemmaRMSNorm": ("output", 1.0),
    "Gemma2RMSNorm": ("output", 1.0),
    "Gemma3RMSNorm": ("output", 1.0),
    "LlamaRMSNorm": ("input", 0.0),
    "MistralRMSNorm": ("input", 0.0),
    "MixtralRMSNorm": ("input", 0.0),
    "Qwen2RMSNorm": ("input", 0.0),
    "Qwen3RMSNorm": ("input", 0.0),
    "Olmo2RMSNorm": ("output", 0.0),
    "Phi3RMSNorm": ("input", 0.0),
    "T5LayerNorm": ("input", 0.0),
}
#: Layer and RMS norms over the channel axis, and batch norms that are never trained.
CHANNELS = ("LayerNorm2d", "RMSNorm2d")
FROZEN = ("FrozenBatchNorm2d",)
KINDS = {
    **dict.fromkeys((*BATCH, *FROZEN), "batch_norm"),
    **dict.fromkeys(INSTANCE, "instance_norm"),
    "GroupNorm": "group_norm",
    **dict.fromkeys(("LayerNorm", "LayerNorm2d"), "layer_norm"),
    **dict.fromkeys(("RMSNorm", "RMSNorm2d", *RMS), "rms_norm"),
}
_EPS = ("eps", "variance_epsilon")
_STATS = {"eps": 1e-5, "momentum": 0.1}
_SAME = {"weight": "weight", "bias": "bias"}


class Torch(Framework):
    """``torch.nn``, and state dicts."""

    name = "torch"
    kinds: ClassVar = KINDS
    counters: ClassVar = ("num_batches_tracked",)
    sizes: ClassVar = ("num_features", "num_channels", "normalized_shape")
    arguments: ClassVar = ("num_groups", *_EPS, "momentum", "track_running_stats", "affine", "elementwise_affine",
                           "bias", "requires_grad")  # fmt: skip
    idle: ClassVar = ("device", "dtype", "process_group", "hidden_size", "dim", "channels")
    defaults: ClassVar = {
        **dict.fromkeys((*BATCH, *INSTANCE), _STATS),
        **{name: {"eps": 1e-5} for name in ("LayerNorm", "GroupNorm", *FROZEN)},
        "LayerNorm2d": {"eps": 1e-6},
        "RMSNorm": {"eps": None},
    }
    arrays: ClassVar = {
        "": {**_SAME, "mean": "running_mean", "var": "running_var", "num_batches": "num_batches_tracked"},
    }

    def read(self, native: Native, say: Say) -> Norm:
        layer, kind = native.layer, self.kind(native.layer)
        found = self.named(native)
        count = found.pop("num_batches", None)
        lengths = self.lengths(native, found)
        eps: Any = self.setting(native, next((name for name in _EPS if name in native.settings), "eps"))
        common: dict[str, Any] = {
            "lengths": lengths, "axis": (1,), "ndim": RANKS.get(layer),
            "trainable": native.settings.get("requires_grad", True) and layer not in FROZEN, "frozen": layer in FROZEN,
        }  # fmt: skip
        if "mean" in found:
            common |= {"momentum": self._momentum(native, say), "variance": "unbiased"}
            common["num_batches"] = None if count is None else int(np.asarray(count))
        if layer == "SyncBatchNorm":
            say("sync-stats", "SyncBatchNorm is read as batch norm")
        if kind == "group_norm":
            common["num_groups"] = self.setting(native, "num_groups")
        if kind in ("layer_norm", "rms_norm") and layer not in CHANNELS:
            common["axis"] = tuple(range(-len(lengths), 0))
        if kind == "rms_norm":
            common["cast"], common["weight_offset"] = RMS.get(layer, ("output", 0.0))
            if eps is None:
                eps = float(np.finfo(np.float64 if _wide(found) else np.float32).eps)
                say("eps-none", f"eps is {eps:.9g}")
        return Norm(kind, eps=eps, **common, **found)

    def write(self, norm: Norm, say: Say) -> Native:
        norm = plain_weight(norm, say)
        if norm.cast != "output":
            say("cast-point", "torch applies the weight before it rounds")
        settings: dict[str, Any] = {"eps": norm.eps}
        has = {"weight": norm.weight is not None, "bias": norm.bias is not None}
        if norm.kind in ("batch_norm", "instance_norm", "group_norm"):
            channels_at(norm, "torch")
            if has["bias"] and not has["weight"]:
                say("affine-pair", "weight is ones")
                norm = norm.but(weight=ones(norm))
            settings["affine"] = any(has.values())
            if settings["affine"] and not has["bias"]:
                settings["bias"] = False
        if norm.kind == "group_norm":
            settings = {"num_groups": norm.num_groups, "num_channels": norm.lengths[0], **settings}
            say("gn-order", "torch has the number of groups first")
            return self._native("GroupNorm", settings, norm)
        if norm.kind in ("batch_norm", "instance_norm"):
            prefix = "BatchNorm" if norm.kind == "batch_norm" else "InstanceNorm"
            if norm.ndim not in SUFFIXES:
                raise ConversionError(f"torch's {prefix} takes x of rank 2 to 5; received rank {norm.ndim}.")
            layer = f"{prefix}{SUFFIXES[norm.ndim]}"
            stats = norm.mean is not None
            settings = {"num_features": norm.lengths[0], **settings, "track_running_stats": stats}
            if stats:
                settings["momentum"] = self._new(norm, say)
            return self._native(layer, settings, norm)
        trailing(norm, "torch")
        if norm.kind == "rms_norm":
            if has["bias"]:
                raise ConversionError("torch's RMSNorm has no bias.")
            settings = {"normalized_shape": norm.lengths, **settings, "elementwise_affine": has["weight"]}
            return self._native("RMSNorm", settings, norm)
        if has["bias"] and not has["weight"]:
            say("affine-pair", "weight is ones")
            norm = norm.but(weight=ones(norm))
        affine = norm.weight is not None
        settings = {"normalized_shape": norm.lengths, **settings, "elementwise_affine": affine, "bias": has["bias"]}
        return self._native("LayerNorm", settings, norm)

    def _native(self, layer, settings, norm):
        arrays = self.stored("", norm)
        if norm.kind == "batch_norm" and norm.mean is not None:
            arrays["num_batches_tracked"] = number(norm.num_batches or 0)
        return Native(layer, settings if norm.trainable else {**settings, "requires_grad": False}, arrays)

    def _momentum(self, native: Native, say: Say) -> Momentum:
        if native.layer in FROZEN:
            return Momentum(0.0, "new")
        value = self.setting(native, "momentum")
        if value is None and native.layer in INSTANCE:
            say("momentum-none", "torch's InstanceNorm(momentum=None) never updates its statistics: the weight is 0")
            value = 0.0
        return Momentum(value, "new")

    def _new(self, norm: Norm, say: Say) -> float | None:
        if norm.momentum is None:
            raise ConversionError("There are running statistics and no momentum.")
        value = norm.momentum.of("new")
        if value is None and norm.kind == "instance_norm":
            raise ConversionError("torch's InstanceNorm does not average all batches: give it a momentum.")
        if norm.momentum.weights == "old":
            say("momentum-sense", f"momentum {norm.momentum.value} is {value} in torch")
        if norm.variance == "biased":
            say("runvar-bias", "torch divides by n - 1")
        if norm.kind == "batch_norm" and norm.num_batches is None:
            say("state-names", "num_batches_tracked is 0")
        return value

    def freezes(self, native: Native) -> bool:
        return native.layer in FROZEN

    def guess(self, arrays):
        return "BatchNorm" if {"running_mean", "running_var"} & arrays.keys() else None

    def owns(self, model: Any) -> bool:
        torch = loaded("torch")
        return isinstance(model, torch.nn.Module)

    def layers(self, model: Any) -> Iterator[tuple[str, Native]]:
        from normkit.backends.torch import layers

        last = _channels_last(model)
        for name, module, layer in self._found(model):
            if layer is not None:
                mode = {"training": module.training, "model_training": model.training}
                mode["channels_last"] = last and not isinstance(module, layers.GroupNormForward)
                if not module.training and layer not in FROZEN:
                    mode |= {"frozen": "in eval mode", "thaw": "Call train() on the layer"}
                yield name, at(name, self._take, module, layer, mode)

    def _found(self, model: Any) -> Iterator[tuple[str, Any, str | None]]:
        """The modules of a model, and the name by which each is a norm layer; a compiled model is the one within."""
        from normkit.backends.torch.models import exported

        torch = loaded("torch")
        model = getattr(model, "_orig_mod", model)
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                what = f"{name!r}, which is scripted," if name else "A scripted module"
                raise ConversionError(f"{what} does not say what it is made of: convert its state_dict().")
            if exported(module):
                raise ConversionError("An exported module is made of operators, not of layers: take what was exported.")
            yield name, module, known(module)

    def strangers(self, model: Any) -> dict[str, str]:
        from normkit.backends.torch import batch_variants
        from normkit.backends.torch.models import TorchModels

        found = ((name, module) for name, module, layer in self._found(model) if layer is None)
        # Ours that is no norm of x has a name for what it does to gradients.
        unknown = ((name, module) for name, module in found if type(module).__module__ != batch_variants.__name__)
        verdicts = ((name, TorchModels().verdict(module)) for name, module in unknown)
        return {name: f"{LIKE}: {verdict}" for name, verdict in verdicts if isinstance(verdict, str)}

    def _take(self, module: Any, layer: str, mode: Mapping[str, Any]) -> Native:
        torch = loaded("torch")
        if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise ConversionError(f"{type(module).__name__} has not seen its first x yet, and so has no arrays.")
        names = (
            "num_features", "num_groups", "num_channels", "normalized_shape", "eps", "variance_epsilon", "momentum",
            "track_running_stats",
        )  # fmt: skip
        settings = {name: getattr(module, name) for name in names if hasattr(module, name)} | switches(module)
        if layer in FROZEN:
            settings = {"eps": 1e-5} | settings
        parameters = [p for _, p in module.named_parameters(recurse=False)]
        if parameters and not any(p.requires_grad for p in parameters):
            settings["requires_grad"] = False
        if type(module).__name__ != layer:
            settings["class"] = type(module).__name__
        tensors = {name: getattr(module, name, None) for name in self.arrays[""].values()}
        arrays = {name: array(value) for name, value in tensors.items() if value is not None}
        return Native(layer, settings, arrays, mode)

    def make(self, native: Native) -> Any:
        torch = self.imported("torch")
        settings = dict(native.settings)
        frozen = settings.pop("requires_grad", True) is False
        like = next((v for k, v in native.arrays.items() if k != "num_batches_tracked"), None)
        kind = getattr(torch.nn, native.layer)
        if "bias" in settings and "bias" not in inspect.signature(kind).parameters:
            raise ConversionError(f"{native.layer} of torch {torch.__version__} has no bias=False: give it a bias.")
        layer = kind(**settings)
        layer = layer.to(tensor(like).dtype) if like is not None else layer
        self._fill(layer, native)
        return layer.requires_grad_(False) if frozen else layer

    def put(self, model: Any, natives: Mapping[str, Native]) -> Any:
        modules = {name: module for name, module, _ in self._found(model)}
        for name, native in natives.items():
            self._fill(modules[name], native)
        return model

    def _fill(self, module: Any, native: Native) -> None:
        torch = loaded("torch")
        with torch.no_grad():
            for name, value in native.arrays.items():
                getattr(module, name).copy_(tensor(value))
        for name in (*_EPS, "momentum"):
            value = native.settings.get("eps" if name in _EPS else name, self)
            if value is not self and hasattr(module, name):
                setattr(module, name, value)
        switch(module, native.settings)


def known(module: Any) -> str | None:
    """The name by which a module is a norm layer: its class's, that of the nearest one it derives from, or none.

    Classes whose forward pass may be over other axes than that of the class they derive from are tried out.
    """
    torch = loaded("torch")
    name, top = next(
        ((base.__name__, base.__module__.startswith("torch.nn.")) for base in type(module).__mro__ if _listed(base)),
        (None, False),
    )
    tried = _tried(module, name if top else None)
    if tried is not None:
        return tried or None
    if name is None and isinstance(module, torch.nn.modules.batchnorm._NormBase):
        return "BatchNorm"
    return name


def _listed(base: type) -> bool:
    name = base.__name__
    return name in KINDS and (base.__module__.startswith("torch.nn.") or name in RMS or name in CHANNELS + FROZEN)


def _tried(module: Any, base: str | None) -> str | None:
    """The name of what a module was found to compute, "" where it is none of these, None where no trial is needed."""
    from normkit.backends.models import original_of
    from normkit.backends.torch import known as others
    from normkit.backends.torch import layers

    kind, torch = type(module), loaded("torch")
    forwards = others.recipes(original_of(module) or kind)
    if not forwards and base in ("LayerNorm", "RMSNorm") and kind.forward is not getattr(torch.nn, base).forward:
        if issubclass(kind, layers.LayerNormForward | layers.RMSNormForward):
            return None
        forwards = (layers.LayerNormForward, layers.LayerNorm2dForward, layers.RMSNormForward)
    if not forwards:
        return None
    found = kind if original_of(module) else others.confirmed(module, forwards)
    if isinstance(found, str):
        return ""
    if issubclass(found, others.ChannelsFirstForward):
        return "LayerNorm2d" if module.data_format == "channels_first" else "LayerNorm"
    names = (
        (others.GemmaForward, "GemmaRMSNorm"), (others.OlmoForward, "Olmo2RMSNorm"),
        (others.LlamaForward, "LlamaRMSNorm"), (others.FrozenForward, "FrozenBatchNorm2d"),
        (others.RMSNorm2dForward, "RMSNorm2d"), (layers.LayerNorm2dForward, "LayerNorm2d"),
        (others.CohereForward, "LayerNorm"), (layers.LayerNormForward, "LayerNorm"),
        (layers.RMSNormForward, "RMSNorm"), (layers.GroupNormForward, "GroupNorm"),
        (layers.BatchNormForward, "BatchNorm2d"),
    )  # fmt: skip
    return next(name for forward, name in names if issubclass(found, forward))


def _channels_last(model: Any) -> bool:
    """Whether the kernels of a model lie in memory with their channels last."""
    torch = loaded("torch")
    kernels = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1], p.shape[2] * p.shape[3]) > 1]
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)


def array(tensor: Any) -> np.ndarray:
    """A copy in host memory, bit by bit."""
    torch = loaded("torch")
    if tensor.is_meta:
        raise ConversionError("A tensor on the meta device has no values.")
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        from .framework import library

        return tensor.contiguous().view(torch.int16).numpy().copy().view(library("ml_dtypes").bfloat16)
    return tensor.numpy().copy()


def tensor(array: np.ndarray) -> Any:
    """The tensor of an array, bit by bit."""
    torch = loaded("torch")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _wide(found: Mapping[str, Array]) -> bool:
    return any(a.dtype == np.float64 for a in found.values())
