"""ONNX: the norm operators of a graph read and written."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from .framework import Framework, channels_at, loaded, trailing
from .keras import no_statistics, old_momentum
from .record import Array, ConversionError, Momentum, Native, Norm, Say, ones, plain_weight

#: The operators, and the names of their inputs after x.
INPUTS = {
    "BatchNormalization": ("scale", "B", "input_mean", "input_var"),
    "LayerNormalization": ("Scale", "B"),
    "GroupNormalization": ("scale", "bias"),
    "InstanceNormalization": ("scale", "B"),
    "RMSNormalization": ("scale",),
}
#: The version of the operators that is written, and the one that RMSNormalization came with.
OPSET, RMS_OPSET = 17, 23


class Onnx(Framework):
    """ONNX graphs: a ModelProto. Nodes are known by their names, or that of their output."""

    name = "onnx"
    eps_name = "epsilon"
    has_files = False
    # Attributes have these values by the standard where a node does not say them.
    defaults: ClassVar = {
        "BatchNormalization": {"epsilon": 1e-5, "momentum": 0.9},
        **{name: {"epsilon": 1e-5} for name in INPUTS if name != "BatchNormalization"},
    }
    arrays: ClassVar = {
        "BatchNormalization": {"weight": "scale", "bias": "B", "mean": "input_mean", "var": "input_var"},
        "LayerNormalization": {"weight": "Scale", "bias": "B"},
        "GroupNormalization": {"weight": "scale", "bias": "bias"},
        "InstanceNormalization": {"weight": "scale", "bias": "B"},
        "RMSNormalization": {"weight": "scale"},
    }

    def read(self, native: Native, say: Say) -> Norm:
        layer, settings = native.layer, native.settings
        arrays = dict(native.arrays)
        groups = settings.get("num_groups")
        if layer == "GroupNormalization" and settings.get("opset", 21) < 21:
            size = settings["channels"] // groups if "channels" in settings else None
            if size is None:
                raise ConversionError("GroupNormalization-18 has a scale per group, and the channels are not known.")
            arrays = {key: np.repeat(value, size) for key, value in arrays.items()}
            say("onnx-gn18", f"scale and bias are repeated {size} times")
        found = self.named(Native(layer, settings, arrays))
        lengths, eps = self.lengths(native, found), self.setting(native, "epsilon")
        common: dict[str, Any] = {"lengths": lengths, "eps": eps, "ndim": settings.get("ndim")}
        if layer == "BatchNormalization":
            momentum = Momentum(self.setting(native, "momentum"), "old")
            return Norm("batch_norm", axis=(1,), momentum=momentum, variance="biased", **common, **found)
        if layer == "GroupNormalization":
            return Norm("group_norm", axis=(1,), num_groups=groups, cast=_cast(settings), **common, **found)
        if layer == "InstanceNormalization":
            return Norm("instance_norm", axis=(1,), **common, **found)
        kind = "layer_norm" if layer == "LayerNormalization" else "rms_norm"
        return Norm(kind, axis=tuple(range(-len(lengths), 0)), cast="input", **common, **found)

    def write(self, norm: Norm, say: Say) -> Native:
        norm = plain_weight(norm, say)
        if not norm.trainable:
            say("freeze-semantics", "ONNX has no such switch")
        settings: dict[str, Any] = {"epsilon": norm.eps}
        if norm.ndim is not None:
            settings["ndim"] = norm.ndim
        if norm.kind == "rms_norm" and norm.bias is not None:
            raise ConversionError("ONNX's RMSNormalization has no bias.")
        if norm.kind in ("layer_norm", "rms_norm"):
            trailing(norm, "ONNX")
            settings["axis"] = -len(norm.axis)
            if norm.cast != "input":
                say("cast-point", "ONNX applies the weight after it rounds")
        else:
            channels_at(norm, "ONNX")
        if norm.weight is None:
            say("affine-pair", "scale is ones")
            norm = norm.but(weight=ones(norm))
        if norm.bias is None and norm.kind in ("batch_norm", "group_norm", "instance_norm"):
            say("affine-pair", "bias is zeros")
            norm = norm.but(bias=np.zeros_like(norm.weight))
        if norm.kind == "batch_norm":
            settings["momentum"] = old_momentum(norm, say, "ONNX", "biased")
        else:
            no_statistics(norm, "ONNX")
        if norm.kind == "group_norm":
            settings["num_groups"] = norm.num_groups
            say("onnx-gn-body", "Reshape, InstanceNormalization, Reshape, Mul, Add")
        layer = {"batch_norm": "BatchNormalization", "layer_norm": "LayerNormalization", "rms_norm": "RMSNormalization",
                 "group_norm": "GroupNormalization", "instance_norm": "InstanceNormalization"}[norm.kind]  # fmt: skip
        return Native(layer, settings, self.stored(layer, norm))

    def guess(self, arrays: Mapping[str, Array]) -> str | None:
        return None

    def owns(self, model: Any) -> bool:
        return isinstance(model, loaded("onnx").ModelProto)

    def layers(self, model: Any) -> Iterator[tuple[str, Native]]:
        graph = _Graph(model)
        for name, layer, settings, places in graph.norms():
            arrays = {key: graph.value(where, name) for key, where in places.items()}
            if layer == "GroupNormalization":  # of shape (C, 1, 1) where they are factors
                arrays = {key: value.reshape(-1) for key, value in arrays.items()}
            yield name, Native(layer, settings, arrays)

    def make(self, native: Native) -> Any:
        onnx = self.imported("onnx")
        settings = dict(native.settings)
        ndim = settings.pop("ndim", None)
        opset = RMS_OPSET if native.layer == "RMSNormalization" else OPSET
        like = next(iter(native.arrays.values()))
        nodes, constants = _group(onnx, native, ndim) if native.layer == "GroupNormalization" else _one(onnx, native)
        kind = onnx.helper.np_dtype_to_tensor_dtype(like.dtype)
        shape = None if ndim is None else [None] * ndim
        x, y = (onnx.helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y"))
        initializers = [onnx.numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in constants.items()]
        graph = onnx.helper.make_graph(nodes, "norm", [x], [y], initializers)
        opsets = [onnx.helper.make_opsetid("", opset)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model)
        return model

    def put(self, model: Any, natives: Mapping[str, Native]) -> Any:
        onnx = loaded("onnx")
        new = copy.deepcopy(model)
        graph = _Graph(new)
        shared: dict[str, Array] = {}
        for name, _, _, places in graph.norms():
            for key, where in places.items() if name in natives else ():
                value = natives[name].arrays[key]
                old = graph.constants[where]
                shape = tuple(old.dims)
                value = value.astype(onnx.helper.tensor_dtype_to_np_dtype(old.data_type)).reshape(shape)
                if where in shared and not np.array_equal(shared[where], value, equal_nan=True):
                    raise ConversionError(f"{name} shares {where!r} with another layer, which gets other values.")
                shared[where] = value
                old.CopyFrom(onnx.numpy_helper.from_array(value, old.name))
            if name in natives:
                graph.set(name, natives[name].settings)
        model.CopyFrom(new)
        return model


class _Graph:
    """The nodes and constants of a model's graph."""

    def __init__(self, model: Any) -> None:
        self.onnx = loaded("onnx")
        self.graph = model.graph
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.users: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.made = {output: node for node in self.graph.node for output in node.output}

    def value(self, where: str, name: str) -> np.ndarray:
        if where not in self.constants:
            raise ConversionError(f"{name}: {where!r} is computed, not a constant.")
        return np.array(self.onnx.numpy_helper.to_array(self.constants[where]))

    def norms(self) -> Iterator[tuple[str, str, dict[str, Any], dict[str, str]]]:
        """Name, operator, settings and the constants' names of each norm layer."""
        for node in self.graph.node:
            if node.op_type not in INPUTS or node.domain not in ("", "ai.onnx"):
                continue
            group = self._group(node) if node.op_type == "InstanceNormalization" else None
            if group is not None:
                yield group
                continue
            settings = {**Onnx.defaults[node.op_type], **self._attributes(node)}
            settings |= self._rank(node.input[0])
            if node.op_type == "GroupNormalization":
                settings["opset"] = self.opset
            places = {key: where for key, where in zip(INPUTS[node.op_type], node.input[1:], strict=False) if where}
            yield node.name or node.output[0], node.op_type, settings, places

    def _rank(self, name: str) -> dict[str, int]:
        """The rank and channels of a value, where the graph says them."""
        for info in (*self.graph.input, *self.graph.value_info):
            if info.name == name and info.type.tensor_type.HasField("shape"):
                dims = info.type.tensor_type.shape.dim
                known = {"ndim": len(dims)}
                return known | ({"channels": dims[1].dim_value} if len(dims) > 1 and dims[1].dim_value else {})
        return {}

    def _attributes(self, node: Any) -> dict[str, Any]:
        found = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        # Attributes are float32: the shortest number that is the same one is what was meant.
        return {key: float(str(np.float32(v))) if isinstance(v, float) else v for key, v in found.items()}

    def _group(self, node: Any) -> tuple[str, str, dict[str, Any], dict[str, str]] | None:
        """Reshape, InstanceNormalization of ones and zeros, Reshape, Mul, Add: group norm."""
        before = self.made.get(node.input[0])
        after = self.users.get(node.output[0], [])
        if before is None or before.op_type != "Reshape" or len(after) != 1 or after[0].op_type != "Reshape":
            return None
        shape = self.constants.get(before.input[1])
        shape = None if shape is None else self.onnx.numpy_helper.to_array(shape)
        scale, bias = (self.constants.get(name) for name in node.input[1:3])
        if shape is None or len(shape) != 3 or shape[1] < 1 or scale is None or bias is None:
            return None
        unit = self.onnx.numpy_helper.to_array
        if (unit(scale) != 1).any() or unit(bias).any():
            return None
        places, last = {}, after[0]
        for op, key in (("Mul", "scale"), ("Add", "bias")):
            users = self.users.get(last.output[0], [])
            where = None
            if len(users) == 1 and users[0].op_type == op:
                where = next((n for n in users[0].input if n in self.constants), None)
            if where is None:
                return None
            places[key], last = where, users[0]
        settings = {
            "num_groups": int(shape[1]),
            "epsilon": 1e-5,
            **self._attributes(node),
            **self._rank(before.input[0]),
        }
        return last.name or last.output[0], "GroupNormalization", settings, places

    def set(self, name: str, settings: Mapping[str, Any]) -> None:
        """Write eps and momentum into the node of this name."""
        for node in self.graph.node:
            group = self._group(node) if node.op_type == "InstanceNormalization" else None
            if node.op_type in INPUTS and name == (group[0] if group else node.name or node.output[0]):
                for key in ("epsilon", "momentum"):
                    if key not in settings:
                        continue
                    for a in [a for a in node.attribute if a.name == key]:
                        node.attribute.remove(a)
                    node.attribute.append(self.onnx.helper.make_attribute(key, float(settings[key])))


def _one(onnx: Any, native: Native) -> tuple[list[Any], dict[str, Array]]:
    keys = [key for key in INPUTS[native.layer] if key in native.arrays]
    settings = {k: v for k, v in native.settings.items() if k != "ndim"}
    node = onnx.helper.make_node(native.layer, ["x", *keys], ["y"], name="norm", **settings)
    return [node], {key: native.arrays[key] for key in keys}


def _group(onnx: Any, native: Native, ndim: int | None) -> tuple[list[Any], dict[str, Array]]:
    if ndim is None:
        raise ConversionError("ONNX's group norm has parameters of the rank of x: give ndim.")
    groups, eps = native.settings["num_groups"], native.settings["epsilon"]
    scale, bias = native.arrays["scale"], native.arrays["bias"]
    column = (len(scale), *[1] * (ndim - 2))
    make = onnx.helper.make_node
    nodes = [
        make("Shape", ["x"], ["shape"]),
        make("Reshape", ["x", "groups"], ["grouped"]),
        make("InstanceNormalization", ["grouped", "ones", "zeros"], ["normed"], epsilon=eps),
        make("Reshape", ["normed", "shape"], ["back"]),
        make("Mul", ["back", "scale"], ["scaled"]),
        make("Add", ["scaled", "bias"], ["y"], name="norm"),
    ]
    constants = {
        "groups": np.asarray([0, groups, -1], np.int64),
        "ones": np.ones(groups, scale.dtype),
        "zeros": np.zeros(groups, scale.dtype),
        "scale": scale.reshape(column),
        "bias": bias.reshape(column),
    }
    return nodes, constants


def _cast(settings: Mapping[str, Any]) -> str:
    return "input" if "opset" in settings else "output"
