"""ONNX: the norm operators of a graph read and written."""

from __future__ import annotations

import ast
import copy
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .framework import Framework, channels_at, library, loaded, trailing
from .keras import no_statistics, old_momentum
from .record import Array, ConversionError, Momentum, Native, Norm, Say, argument, ones, plain_weight

#: The operators, and the names of their inputs after x.
INPUTS = {
    "BatchNormalization": ("scale", "B", "input_mean", "input_var"),
    "LayerNormalization": ("Scale", "B"),
    "GroupNormalization": ("scale", "bias"),
    "InstanceNormalization": ("scale", "B"),
    "RMSNormalization": ("scale",),
}
#: What of constants is a constant: it says them in another shape or dtype.
FOLDED = ("Cast", "Constant", "ConstantOfShape", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose",
          "Unsqueeze")  # fmt: skip
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

    def freezes(self, native: Native) -> bool:
        return True

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
        onnx, ndim = self.imported("onnx"), native.settings.get("ndim")
        if ndim is None:
            raise ConversionError(f"ONNX's graphs are made for one rank of x: give {argument('ndim')}.")
        opset = RMS_OPSET if native.layer == "RMSNormalization" else OPSET
        like = next(iter(native.arrays.values()))
        nodes, constants = _group(onnx, native, ndim) if native.layer == "GroupNormalization" else _one(onnx, native)
        kind = onnx.helper.np_dtype_to_tensor_dtype(like.dtype)
        x, y = (onnx.helper.make_tensor_value_info(name, kind, [None] * ndim) for name in ("x", "y"))
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
        self.model, self.graph = model, model.graph
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.users: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in _inputs(node):
                self.users.setdefault(name, []).append(node)
        self.made = {output: node for node in self.graph.node for output in node.output}

    def value(self, where: str, name: str) -> np.ndarray:
        """A constant of a layer."""
        found = self.constant(where)
        if found is None:
            raise ConversionError(f"{name}: {where!r} is computed, not a constant.")
        return np.array(found)

    def constant(self, where: str) -> np.ndarray | None:
        """The value of an initializer, or of what only reshapes or casts constants."""
        if where in self.initializers:
            return self.onnx.numpy_helper.to_array(self.initializers[where])
        node = self.made.get(where)
        if node is None or node.op_type not in FOLDED or node.domain not in ("", "ai.onnx"):
            return None
        inputs = {name: self.constant(name) for name in node.input}
        if any(value is None for value in inputs.values()):
            return None
        infos = ([self.onnx.ValueInfoProto(name=name) for name in names] for names in (inputs, node.output))
        graph = self.onnx.helper.make_graph([node], "constant", *infos)
        evaluator = library("onnx.reference").ReferenceEvaluator(graph, opsets={"": self.opset})
        return evaluator.run(None, inputs)[0]

    @functools.cached_property
    def shapes(self) -> dict[str, list[Any]]:
        """The dimensions of values, as the graph says them or as they can be inferred."""
        try:
            graph = self.onnx.shape_inference.infer_shapes(self.model).graph
        except Exception:  # a model above 2 GB, or one that is wrong elsewhere
            graph = self.graph
        infos = ((i.name, i.type.tensor_type) for i in (*graph.value_info, *graph.input))
        return {name: list(tensor.shape.dim) for name, tensor in infos if tensor.HasField("shape")}

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
        """The rank and channels of a value, where they are known."""
        dims = self.shapes.get(name)
        if dims is None:
            return {}
        channels = dims[1].dim_value if len(dims) > 1 else 0
        return {"ndim": len(dims), **({"channels": channels} if channels else {})}

    def _attributes(self, node: Any) -> dict[str, Any]:
        found = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        # Attributes are float32: the shortest number that is the same one is what was meant.
        return {key: float(str(np.float32(v))) if isinstance(v, float) else v for key, v in found.items()}

    def _group(self, node: Any) -> tuple[_Found, Any] | None:
        """Reshape, InstanceNormalization of ones and zeros, Reshape, Mul, Add: group norm, and its last node."""
        before, after = self.made.get(node.input[0]), self.users.get(node.output[0], [])
        if node.op_type != "InstanceNormalization" or before is None or before.op_type != "Reshape":
            return None
        shape, scale, bias = (self.constant(name) for name in (before.input[1], *node.input[1:3]))
        if shape is None or scale is None or bias is None or len(after) != 1 or after[0].op_type != "Reshape":
            return None
        if len(shape) != 3 or shape[1] < 1 or (scale != 1).any() or bias.any():
            return None
        settings = {"num_groups": int(shape[1]), "epsilon": 1e-5, **self._attributes(node)}
        settings |= self._rank(before.input[0])
        inputs: dict[str, list[tuple[Any, int]]] = {}
        last = after[0]
        for op, key, nothing in (("Mul", "scale", 1), ("Add", "bias", 0)):
            users = self.users.get(last.output[0], [])
            if len(users) != 1 or users[0].op_type != op:
                continue
            found = ((i, self.constant(name)) for i, name in enumerate(users[0].input))
            index, value = next(((i, value) for i, value in found if value is not None), (0, None))
            if value is not None and _of_channels(value.shape, settings):
                inputs[key], last = [(users[0], index)], users[0]
            elif value is not None and value.size == 1 and value.item() == nothing:  # of a layer without affine part
                last = users[0]
        if not inputs and "channels" in settings:
            settings["lengths"] = (settings["channels"],)
        return _Found("GroupNormalization", settings, inputs, [node]), last

    def write(self, norm: _Found, name: str, key: str, value: Array) -> None:
        """Write an array of a layer; exporters merge constants that are equal, and this one gets one of its own."""
        where = norm.places[key]
        old = self.value(where, name)
        if where not in self.initializers or len(self.users[where]) > len(norm.inputs[key]):
            names = (f"{name}.{key}{'_' * n}" for n in itertools.count())
            where = next(new for new in names if new not in self.initializers and new not in self.made)
            for node, index in norm.inputs[key]:
                before, node.input[index] = node.input[index], where
                self._left(before, node)
            self.users[where] = [node for node, _ in norm.inputs[key]]
            self.initializers[where] = self.graph.initializer.add()
        value = value.astype(old.dtype).reshape(old.shape)
        self.initializers[where].CopyFrom(self.onnx.numpy_helper.from_array(value, where))

    def _left(self, where: str, user: Any) -> None:
        """A node uses a constant no more: one that nobody uses is left out, with what it was made of."""
        self.users[where].remove(user)
        if self.users[where] or any(where == info.name for info in (*self.graph.input, *self.graph.output)):
            return
        if self.initializers.pop(where, None) is not None:
            del self.graph.initializer[[tensor.name for tensor in self.graph.initializer].index(where)]
        else:
            node = self.made[where]
            self.graph.node.remove(node)
            for name in node.input:
                self._left(name, node)

    def set(self, node: Any, settings: Mapping[str, Any]) -> None:
        """Write eps and momentum into a node."""
        for key in ("epsilon", "momentum"):
            if key in settings:
                for a in [a for a in node.attribute if a.name == key]:
                    node.attribute.remove(a)
                node.attribute.append(self.onnx.helper.make_attribute(key, float(settings[key])))


def _inputs(node: Any) -> Iterator[str]:
    """What a node uses, by itself or in the branches that it holds."""
    yield from node.input
    for branch in (graph for a in node.attribute for graph in (a.g, *a.graphs)):
        for inner in branch.node:
            yield from _inputs(inner)


def _of_channels(shape: tuple[int, ...], settings: Mapping[str, Any]) -> bool:
    """Whether a factor or summand of this shape has a value for each channel of a group norm, and nothing else."""
    ndim = settings.get("ndim", len(shape) + (shape[:1] != (1,)) if shape[-1:] == (1,) else 0)
    padded = (1,) * (ndim - len(shape)) + shape
    if len(padded) != ndim or ndim < 2 or math.prod(shape) != padded[1]:
        return False
    known = settings.get("channels")
    return padded[1] == known or (known is None and padded[1] > 1 and padded[1] % settings["num_groups"] == 0)


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


def _group(onnx: Any, native: Native, ndim: int) -> tuple[list[Any], dict[str, Array]]:
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
