"""Known differences of native layers from the definitions, as data: where each shows, why, where it is discussed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from normkit.conformance.cases import LAYERS

TRAINED = ("layer_norm", "group_norm", "instance_norm", "batch_norm_train")
OFFSETS = ("offset 1e4", "offset 1e5", "offset 1e6", "mixed offsets", "offset 1e4, scale 1e-20", "tabular columns")
HUGE = ("scale 1e25", "scale 1e30", "offset 1e4, scale 1e25", "mixed scales")


@dataclass(frozen=True)
class Difference:
    """One way in which a native layer departs from the definition: ``layers`` on ``inputs`` of float32 in ``layouts``.

    The suite expects it strictly: where a difference applies and the native layer agrees with the definition after all,
    the test fails, so that the entry gets removed. Differences without inputs belong to a test that names their ``id``.
    """

    id: str
    native: str
    layers: tuple[str, ...]
    condition: str
    reason: str
    link: str
    inputs: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ("contiguous", "channels_last")

    def applies(self, native: str, layer: str, input_name: str, layout: str = "contiguous") -> bool:
        """Whether this is to be seen in a native layer on an input."""
        return native == self.native and layer in self.layers and input_name in self.inputs and layout in self.layouts


_FOLDED = "the affine is folded to x * a + b, which cancels where |x| is large against its spread"
_ROUNDED = "the mean is rounded to float32 before it is taken off, and what the rounding took is not put back"
_FAST = "the variance is E[x**2] - E[x]**2, which loses every digit where the mean is large against the spread"
_SQUARES = "x**2 overflows float32 above 1.8e19, or its sum does, so that y is zero, infinite or NaN"

_TORCH_OFFSET = "https://github.com/pytorch/pytorch/issues/5410"
_TORCH_LAYER = "https://github.com/pytorch/pytorch/issues/51102"
_TORCH_HUGE = "https://github.com/pytorch/pytorch/issues/162489"
_TORCH_LAYOUT = "https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cpu/group_norm_kernel.cpp"
_KERAS = "https://github.com/keras-team/keras/pull/18795"
_KERAS_SOURCE = "https://github.com/keras-team/keras/tree/master/keras/src/layers/normalization"
_TF = "https://github.com/tensorflow/tensorflow/pull/25115"
_TF_KERNEL = "https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/kernels/fused_batch_norm_op.cc"
_FLAX = "https://github.com/google/flax/blob/main/flax/nnx/nn/normalization.py"
_CHAN = "https://doi.org/10.1080/00031305.1983.10483115"


def _offsets(id: str, native: str, layers: tuple[str, ...], reason: str, link: str, layouts=None, inputs=OFFSETS):
    options = {} if layouts is None else {"layouts": layouts}
    return Difference(id, native, layers, "mean >> spread", reason, link, inputs, **options)


def _squares(native: str, layers: tuple[str, ...], link: str):
    return Difference("square-overflow", native, layers, "|x| > 1e19", _SQUARES, link, HUGE)


DIFFERENCES = (
    _offsets("affine-folded", "torch", ("batch_norm_train", "batch_norm", "instance_norm"), _FOLDED, _TORCH_OFFSET),
    _offsets("affine-folded", "torch", ("group_norm",), _FOLDED, _TORCH_OFFSET, ("contiguous",)),
    _offsets("const-mean-rounding", "torch", ("layer_norm",), _ROUNDED, _TORCH_LAYER),
    _offsets(
        "layout-dependence",
        "torch",
        ("group_norm",),
        f"channels last takes another kernel, in which {_FAST}",
        _TORCH_LAYOUT,
        ("channels_last",),
        ("offset 1e1", *OFFSETS),
    ),
    _squares("torch", (*TRAINED, "rms_norm"), _TORCH_HUGE),
    _offsets("affine-folded", "keras", ("batch_norm_train", "batch_norm"), _FOLDED, _KERAS_SOURCE),
    _offsets("const-mean-rounding", "keras", ("layer_norm", "group_norm", "instance_norm"), _ROUNDED, _KERAS),
    _squares("keras", (*TRAINED, "rms_norm"), _KERAS_SOURCE),
    _offsets("affine-folded", "tf.nn", ("batch_norm_train", "batch_norm"), _FOLDED, _TF_KERNEL),
    _squares("tf.nn", ("batch_norm_train",), _TF),
    _offsets("var-fast", "flax", TRAINED, _FAST, _FLAX, None, ("offset 1e1", *OFFSETS)),
    _squares("flax", (*TRAINED, "rms_norm"), _FLAX),
    _offsets("const-mean-rounding", "textbook", TRAINED, _ROUNDED, _CHAN),
    _squares("textbook", (*TRAINED, "rms_norm"), _CHAN),
    # Seen by tests of their own.
    Difference(
        "momentum-sense",
        "torch",
        ("batch_norm_train",),
        "momentum=0.9",
        "momentum weights the new value in torch, the old one in normkit, Keras, Flax and ONNX",
        "https://github.com/pytorch/pytorch/issues/15298",
    ),
    *(
        Difference(
            "runvar-bias",
            native,
            ("batch_norm_train",),
            "running variance",
            "the stored variance is divided by n, not by n - 1",
            link,
        )
        for native, link in (("keras", _KERAS_SOURCE), ("flax", _FLAX))
    ),
    Difference(
        "single-value",
        "torch",
        ("instance_norm",),
        "one value per channel",
        "refused, in inference too, where the definition gives the bias",
        "https://github.com/pytorch/pytorch/issues/1381",
    ),
    *(
        Difference(
            "single-value",
            native,
            ("batch_norm_train",),
            "one value per channel in training",
            "answered with the bias, and a variance of zero goes into the running statistics",
            link,
        )
        for native, link in (("keras", _KERAS_SOURCE), ("flax", _FLAX))
    ),
    *(
        Difference(
            "empty-batch",
            native,
            ("batch_norm_train",),
            "a batch of no elements",
            "the running statistics become NaN",
            link,
        )
        for native, link in (("keras", _KERAS_SOURCE), ("flax", _FLAX))
    ),
    Difference(
        "out-dtype",
        "flax",
        LAYERS,
        "float16 x, float32 parameters",
        "y is float32 by promotion, unless the layer is given a dtype",
        _FLAX,
    ),
)


def find(native: str, layer: str, input_name: str, layout: str = "contiguous") -> Difference | None:
    """The difference that a native layer is expected to show on an input, if any."""
    return next((d for d in DIFFERENCES if d.applies(native, layer, input_name, layout)), None)


def named(id: str, native: str) -> Iterator[Difference]:
    """The entries of one id for one native module."""
    return (d for d in DIFFERENCES if d.id == id and d.native == native)
