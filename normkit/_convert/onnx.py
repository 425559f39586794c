"""ONNX: the norm operators of a graph read and written."""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    """ONNX graphs: a ModelProto. Layers have the names of modules that PyTorch's exporters noted, or those of nodes."""

    name = "onnx"
    sizes: ClassVar = ("lengths",)
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
        for name, norm in graph.norms().items():
            arrays = {key: graph.value(where, name) for key, where in norm.places.items()}
            if norm.layer == "GroupNormalization":  # of shape (C, 1, 1) where they are factors
                arrays = {key: value.reshape(-1) for key, value in arrays.items()}
            yield name, Native(norm.layer, norm.settings, arrays)

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
        new = copy.deepcopy(model)
        graph = _Graph(new)
        norms = graph.norms()
        for name, native in natives.items():
            for key, value in native.arrays.items():
                graph.write(norms[name], name, key, value)
            for node in norms[name].nodes:
                graph.set(node, native.settings)
        model.CopyFrom(new)
        return model


@dataclass
class _Found:
    """A norm layer of a graph: operator, settings, inputs of nodes that are its arrays, and nodes that have its eps."""

    layer: str
    settings: dict[str, Any]
    inputs: dict[str, list[tuple[Any, int]]]
    nodes: list[Any]

    @property
    def places(self) -> dict[str, str]:
        """The names of the constants."""
        return {key: node.input[index] for key, ((node, index), *_) in self.inputs.items()}


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
            elif node.op_type == "Identity" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
        self.users: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.made = {output: node for node in self.graph.node for output in node.output}

    def value(self, where: str, name: str) -> np.ndarray:
        if where not in self.constants:
            raise ConversionError(f"{name}: {where!r} is computed, not a constant.")
        return np.array(self.onnx.numpy_helper.to_array(self.constants[where]))

    def norms(self) -> dict[str, _Found]:
        """The norm layers by name; one that is called twice, with the same constants, is one."""
        found: dict[str, _Found] = {}
        for node in self.graph.node:
            if node.op_type in INPUTS and node.domain in ("", "ai.onnx"):
                norm, last = self._group(node) or (self._plain(node), node)
                name = _scope(last)
                if name in found and norm.places and found[name].places == norm.places:
                    found[name].nodes.append(node)
                    for key, inputs in norm.inputs.items():
                        found[name].inputs[key] += inputs
                else:
                    found[name if name not in found else last.name or last.output[0]] = norm
        return found

    def _plain(self, node: Any) -> _Found:
        settings = {**Onnx.defaults[node.op_type], **self._attributes(node), **self._rank(node.input[0])}
        if node.op_type == "GroupNormalization":
            settings["opset"] = self.opset
        named = enumerate(zip(INPUTS[node.op_type], node.input[1:], strict=False), 1)
        inputs = {key: [(node, index)] for index, (key, where) in named if where}
        return _Found(node.op_type, settings, inputs, [node])

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

    def _group(self, node: Any) -> tuple[_Found, Any] | None:
        """Reshape, InstanceNormalization of ones and zeros, Reshape, Mul, Add: group norm, and its last node."""
        before, after = self.made.get(node.input[0]), self.users.get(node.output[0], [])
        if node.op_type != "InstanceNormalization" or before is None or before.op_type != "Reshape":
            return None
        values = [self.constants.get(name) for name in (before.input[1], *node.input[1:3])]
        if None in values or len(after) != 1 or after[0].op_type != "Reshape":
            return None
        shape, scale, bias = (self.onnx.numpy_helper.to_array(value) for value in values)
        if len(shape) != 3 or shape[1] < 1 or (scale != 1).any() or bias.any():
            return None
        inputs: dict[str, list[tuple[Any, int]]] = {}
        last = after[0]
        for op, key in (("Mul", "scale"), ("Add", "bias")):
            users = self.users.get(last.output[0], [])
            if len(users) == 1 and users[0].op_type == op:
                index = next((i for i, name in enumerate(users[0].input) if name in self.constants), None)
                if index is not None:
                    inputs[key], last = [(users[0], index)], users[0]
        settings = {"num_groups": int(shape[1]), "epsilon": 1e-5, **self._attributes(node)}
        settings |= self._rank(before.input[0])
        if not inputs and "channels" in settings:
            settings["lengths"] = (settings["channels"],)
        return _Found("GroupNormalization", settings, inputs, [node]), last

    def write(self, norm: _Found, name: str, key: str, value: Array) -> None:
        """Write an array of a layer; exporters merge constants that are equal, and this one gets one of its own."""
        where, numpy_helper = norm.places[key], self.onnx.numpy_helper
        old = self.constants[where]
        value = value.astype(self.onnx.helper.tensor_dtype_to_np_dtype(old.data_type)).reshape(tuple(old.dims))
        initializers = {tensor.name for tensor in self.graph.initializer}
        if where not in initializers or len(self.users[where]) > len(norm.inputs[key]):
            names = (f"{name}.{key}{'_' * n}" for n in itertools.count())
            where = next(new for new in names if new not in self.constants and new not in self.made)
            for node, index in norm.inputs[key]:
                self.users[node.input[index]].remove(node)
                node.input[index] = where
            self.users[where] = [node for node, _ in norm.inputs[key]]
            old = self.constants[where] = self.graph.initializer.add()
        old.CopyFrom(numpy_helper.from_array(value, where))

    def set(self, node: Any, settings: Mapping[str, Any]) -> None:
        """Write eps and momentum into a node."""
        for key in ("epsilon", "momentum"):
            if key in settings:
                for a in [a for a in node.attribute if a.name == key]:
                    node.attribute.remove(a)
                node.attribute.append(self.onnx.helper.make_attribute(key, float(settings[key])))


def _scope(node: Any) -> str:
    """The module that a node is from, where an exporter of PyTorch says it; else the node's name."""
    said = [p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
    if said:
        modules = ast.literal_eval(said[0])[:-1]
        parts = modules[-1:]
    else:  # "/layer1/layer1.0/bn/Add"
        parts = []
        for part in node.name.split("/")[1:-1] if node.name.startswith("/") else ():
            parts = parts[:-1] if parts and part.startswith(f"{parts[-1]}.") else parts
            parts = [*parts, part]
    return ".".join(parts) or node.name or node.output[0]


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
