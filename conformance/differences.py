"""Known differences of native layers from the definitions, as data: where each divergence shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from normkit.conformance.cases import LAYERS
from normkit.conformance.divergences import DIVERGENCES

TRAINED = ("layer_norm", "group_norm", "instance_norm", "batch_norm_train")
OFFSETS = ("offset 1e4", "offset 1e5", "offset 1e6", "mixed offsets", "offset 1e4, scale 1e-20", "tabular columns")
HUGE = ("scale 1e25", "scale 1e30", "offset 1e4, scale 1e25", "mixed scales")


@dataclass(frozen=True)
class Difference:
    """One way in which a native layer departs from the definition: ``layers`` on ``inputs`` of float32 in ``layouts``.

    What it is and where it is discussed stands in :mod:`normkit.conformance.divergences`, under the same ``id``. The
    suite expects it strictly: where a difference applies and the native layer agrees with the definition after all, the
    test fails, so that the entry gets removed. Differences without inputs belong to a test that names their ``id``.
    """

    id: str
    native: str
    layers: tuple[str, ...]
    condition: str
    inputs: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ("contiguous", "channels_last")

    @property
    def reason(self) -> str:
        """Why, in one sentence."""
        return DIVERGENCES[self.id].explanation

    @property
    def link(self) -> str:
        """Where it is discussed."""
        return DIVERGENCES[self.id].links[self.native]

    def applies(self, native: str, layer: str, input_name: str, layout: str = "contiguous") -> bool:
        """Whether this is to be seen in a native layer on an input."""
        return native == self.native and layer in self.layers and input_name in self.inputs and layout in self.layouts


def _offsets(id: str, native: str, layers: tuple[str, ...], inputs=OFFSETS, **options):
    return Difference(id, native, layers, "mean >> spread", inputs, **options)


def _squares(native: str, layers: tuple[str, ...]):
    return Difference("square-overflow", native, layers, "|x| > 1e19", HUGE)


DIFFERENCES = (
    _offsets("affine-folded", "torch", ("batch_norm_train", "batch_norm", "instance_norm")),
    _offsets("affine-folded", "torch", ("group_norm",), layouts=("contiguous",)),
    _offsets("const-mean-rounding", "torch", ("layer_norm",)),
    _offsets("layout-dependence", "torch", ("group_norm",), ("offset 1e1", *OFFSETS), layouts=("channels_last",)),
    _squares("torch", (*TRAINED, "rms_norm")),
    _offsets("affine-folded", "keras", ("batch_norm_train", "batch_norm")),
    _offsets("const-mean-rounding", "keras", ("layer_norm", "group_norm", "instance_norm")),
    _squares("keras", (*TRAINED, "rms_norm")),
    _offsets("affine-folded", "tf.nn", ("batch_norm_train", "batch_norm")),
    _squares("tf.nn", ("batch_norm_train",)),
    _offsets("var-fast", "flax", TRAINED, ("offset 1e1", *OFFSETS)),
    _squares("flax", (*TRAINED, "rms_norm")),
    _offsets("const-mean-rounding", "textbook", TRAINED),
    _squares("textbook", (*TRAINED, "rms_norm")),
    # Seen by tests of their own.
    Difference("momentum-sense", "torch", ("batch_norm_train",), "momentum=0.9"),
    Difference("runvar-bias", "keras", ("batch_norm_train",), "running variance"),
    Difference("runvar-bias", "flax", ("batch_norm_train",), "running variance"),
    Difference("single-value", "torch", ("instance_norm",), "one value per channel"),
    Difference("single-value", "keras", ("batch_norm_train",), "one value per channel in training"),
    Difference("single-value", "flax", ("batch_norm_train",), "one value per channel in training"),
    Difference("empty-batch", "keras", ("batch_norm_train",), "a batch of no elements"),
    Difference("empty-batch", "flax", ("batch_norm_train",), "a batch of no elements"),
    Difference("out-dtype", "flax", LAYERS, "float16 x, float32 parameters"),
)


def find(native: str, layer: str, input_name: str, layout: str = "contiguous") -> Difference | None:
    """The difference that a native layer is expected to show on an input, if any."""
    return next((d for d in DIFFERENCES if d.applies(native, layer, input_name, layout)), None)


def named(id: str, native: str) -> Iterator[Difference]:
    """The entries of one id for one native module."""
    return (d for d in DIFFERENCES if d.id == id and d.native == native)
