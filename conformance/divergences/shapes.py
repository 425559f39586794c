"""Divergences of axes, shapes, names, arguments and files."""

from __future__ import annotations

from normkit.conformance.divergences.record import Divergence, Side

_TORCH = "https://docs.pytorch.org/docs/stable/generated/torch.nn."
_KERAS_SOURCE = "https://github.com/keras-team/keras/tree/master/keras/src/layers/normalization"
_FLAX = "https://github.com/google/flax/blob/main/flax/nnx/nn/normalization.py"
_ONNX = "https://onnx.ai/onnx/operators/onnx__"

SHAPES = (
    Divergence(
        "axis-layout",
        "Where the channels are",
        "axis 1 in torch and ONNX, the last one in Keras, Flax and Haiku; Keras is told otherwise by an argument",
        {"torch": f"{_TORCH}BatchNorm2d.html", "keras": _KERAS_SOURCE},
        (
            Side("axis 1", ("torch", "ONNX"), "axis=1"),
            Side("the last axis", ("Keras", "Flax", "Haiku"), "axis=-1"),
        ),
        "the channel axis is the one that was asked for: move the axes of x accordingly",
    ),
    Divergence(
        "axis-param-shape",
        "The shape of LayerNorm's parameters",
        "that of the normalized axes in torch and Keras; Flax and Haiku are told the parameters' axes apart from those",
        {"flax": _FLAX, "torch": f"{_TORCH}LayerNorm.html"},
        (
            Side("that of the normalized axes", ("torch", "Keras"), "layer_norm"),
            Side("that of other axes", ("Flax", "Haiku")),
        ),
        "parameters are reshaped by the rule of the framework, never by their size",
    ),
    Divergence(
        "axis-general",
        "Which axes RMS norm normalizes",
        "Flax any; torch and ONNX the trailing ones; Keras says any and raises for others than those",
        {"keras": _KERAS_SOURCE, "torch": "https://github.com/pytorch/pytorch/issues/71465"},
        (
            Side("any axis", ("Flax", "Haiku"), "axis=1"),
            Side("others than trailing ones are refused", ("torch", "Keras")),
        ),
    ),
    Divergence(
        "affine-pair",
        "Whether there is a weight without a bias",
        "ONNX's InstanceNormalization has both always, torch's layers and the JAX libraries' have a switch for each",
        {"onnx": f"{_ONNX}InstanceNormalization.html"},
        (
            Side("one alone is refused", ("ONNX",)),
            Side("one alone", ("torch", "Keras", "Flax"), "weight, bias"),
        ),
        "a framework that has weight and bias together or not at all gets the missing one: ones or zeros",
    ),
    Divergence(
        "gn-order",
        "How numbers of groups and channels are passed",
        "torch and equinox take groups before channels, Liger channels before groups; -1 groups are the number of "
        "channels in Keras",
        {"liger": "https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/transformers/group_norm.py"},
        (
            Side("-1 groups: one per channel", ("Keras",), "instance_norm"),
            Side("-1 groups: refused", ("torch", "Flax"), "group_norm"),
        ),
        "numbers of groups and of channels are passed by keyword",
    ),
    Divergence(
        "gn-instance",
        "Whether there is an instance norm",
        "Keras and equinox have it as group norm with one channel per group",
        {"keras": f"{_KERAS_SOURCE}/group_normalization.py"},
        (
            Side("a layer of its own", ("torch", "Flax", "Haiku", "ONNX"), "InstanceNorm"),
            Side("a group norm", ("Keras", "Equinox")),
        ),
        "frameworks without instance norm have it as group norm with one channel per group",
    ),
    Divergence(
        "gn1-vs-ln",
        "Group norm of one group beside layer norm",
        "both reduce the same axes; group norm has a parameter per channel, layer norm one per element",
        {"torch": f"{_TORCH}GroupNorm.html"},
        (
            Side("a parameter per channel", ("torch GroupNorm", "Keras GroupNormalization"), "GroupNorm"),
            Side("a parameter per element", ("torch LayerNorm", "Keras LayerNormalization"), "LayerNorm"),
        ),
    ),
    Divergence(
        "onnx-gn18",
        "Whether group norm scales groups or channels",
        "GroupNormalization has a scale per group in ONNX's operator set 18, one per channel from 21 on",
        {"onnx": "https://github.com/onnx/onnx/issues/5466"},
        (
            Side("per group", ("ONNX 18",)),
            Side("per channel", ("ONNX 21", "torch", "Flax"), "always"),
        ),
        "GroupNormalization-18 has a scale per group: it is repeated over the group's channels",
    ),
    Divergence(
        "onnx-gn-body",
        "GroupNormalization in onnxruntime",
        "its function body has the variance as E[x²] - E[x]², and runtimes inline it: NaN where the mean is large",
        {"onnx": "https://github.com/microsoft/onnxruntime/issues/28463"},
        (
            Side("wrong", ("onnxruntime GroupNormalization",)),
            Side("right", ("onnxruntime InstanceNormalization",), "always"),
        ),
        "group norm is written as Reshape and InstanceNormalization: the function body of GroupNormalization-21 takes "
        "its variance as E[x²] - E[x]²",
    ),
    Divergence(
        "state-names",
        "What the state is called",
        "weight and bias in torch, gamma and beta in Keras, scale and bias in Flax and ONNX, scale and offset in Haiku",
        {"keras": "https://github.com/gmalivenko/pytorch2keras/issues/120"},
        (
            Side("weight, bias, running_mean, running_var, num_batches_tracked", ("torch",), "state_dict()"),
            Side("gamma, beta, moving_mean, moving_variance", ("Keras",), 'convert(to="keras")'),
            Side("scale, bias, mean, var", ("Flax",), 'convert(to="nnx")'),
        ),
        "arrays are taken by name; what one side does not store is named",
    ),
    Divergence(
        "config-legacy",
        "Arguments of an older version",
        "tf_keras writes axis=[3] into its files, which Keras 3 refuses",
        {"keras": "https://github.com/keras-team/keras/issues/15790"},
        (
            Side("read", ("tf_keras",), "convert"),
            Side("refused", ("Keras",)),
        ),
        "arguments of an older version are read as what they mean",
    ),
    Divergence(
        "2d-input-meaning",
        "What the axes of a matrix are",
        "torch's InstanceNorm1d reads it as channels and length, its BatchNorm1d as samples and channels",
        {"torch": f"{_TORCH}InstanceNorm1d.html"},
        (
            Side("channels, length", ("torch InstanceNorm1d",), "axis=0"),
            Side("samples, channels", ("torch BatchNorm1d", "Keras", "Flax"), "axis=1"),
        ),
    ),
    Divergence(
        "liger-bias-init",
        "A bias that starts at random",
        "Liger's LayerNorm and GroupNorm start their bias at random numbers; without one they have zeros",
        {"liger": "https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/transformers/group_norm.py"},
        (Side("random", ("Liger",)), Side("zeros", ("torch", "Keras", "Flax"), "always")),
        unseen="Liger's kernels run on a GPU",
    ),
    Divergence(
        "subclass",
        "A norm layer with a forward pass of its own",
        "a model's subclass may compute something else than the framework's layer whose state it holds",
        {"timm": "https://github.com/huggingface/pytorch-image-models/tree/main/timm/layers"},
        conversion="a subclass with a forward of its own is read as the norm layer that it holds",
        unseen="it is a model's own code, not a framework's",
    ),
)
