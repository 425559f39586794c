"""What is timed: the only place in this package where a shape is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from normkit.conformance.cases import Case
from normkit.conformance.libraries import Library

DIRECTIONS = ("forward", "backward", "both")

#: Tensors of x's size that each direction moves through memory at least: x, y; x, dy, dx; all of them.
MOVED = {"forward": 2, "backward": 3, "both": 5}

_ALL = ("float32", "bfloat16")


@dataclass(frozen=True)
class Workload:
    """One layer on one shape, in words that do not depend on the library's habits.

    ``size`` is (samples, channels, *spatial) where there is a ``layout``, NCHW or NHWC; else it is the array's shape.
    """

    name: str
    layer: str
    size: tuple[int, ...]
    layout: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dtypes: tuple[str, ...] = ("float32",)
    quick: bool = False
    #: Timed in the compiled modes too.
    compiled: bool = False
    #: So small that the time of the call is what one sees.
    small: bool = False

    def case(self, library: Library) -> Case:
        """The workload as the library has it: channels-last is a memory format in PyTorch, an axis order elsewhere."""
        affine = "weight" if self.layer == "rms_norm" else "both"  # no native RMS norm has a bias
        options = dict(self.options)
        if not self.layout:
            return Case(self.name, self.layer, self.size, options, affine)
        strided = self.layout == "NHWC" and library.name == "torch"
        last = self.layout == "NHWC" and not strided
        samples, channels, *spatial = self.size
        shape = (samples, *spatial, channels) if last else self.size
        options["axis"] = -1 if last else 1
        return Case(self.name, self.layer, shape, options, affine, "channels_last" if strided else "contiguous")

    def __str__(self) -> str:
        return self.name


def _table() -> tuple[Workload, ...]:
    early, middle, late = (32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7)  # a residual network's stages
    groups = {"num_groups": 32}
    rows = [
        Workload("BN train 56x56", "batch_norm_train", early, "NCHW", dtypes=_ALL, quick=True, compiled=True),
        Workload("BN train 14x14", "batch_norm_train", middle, "NCHW"),
        Workload("BN train 7x7", "batch_norm_train", late, "NCHW"),
        Workload("BN train 56x56 NHWC", "batch_norm_train", early, "NHWC", dtypes=_ALL, quick=True, compiled=True),
        Workload("BN train 14x14 NHWC", "batch_norm_train", middle, "NHWC"),
        Workload("BN eval 56x56", "batch_norm", early, "NCHW", compiled=True),
        Workload("BN eval 56x56 NHWC", "batch_norm", early, "NHWC"),
        Workload("GN32 56x56", "group_norm", early, "NCHW", groups, quick=True, compiled=True),
        Workload("GN32 56x56 NHWC", "group_norm", early, "NHWC", groups, dtypes=_ALL, compiled=True),
        Workload("IN 56x56", "instance_norm", early, "NCHW"),
        Workload("LN 8192x768", "layer_norm", (8192, 768), dtypes=_ALL, quick=True, compiled=True),
        Workload("LN 2048x4096", "layer_norm", (2048, 4096)),
        Workload("LN 65536x64", "layer_norm", (65536, 64), dtypes=_ALL),
        Workload("RMS 8192x768", "rms_norm", (8192, 768), dtypes=_ALL, quick=True, compiled=True),
        Workload("RMS 2048x4096", "rms_norm", (2048, 4096)),
        Workload("LN 4x64", "layer_norm", (4, 64), small=True),
        Workload("LN 8x768", "layer_norm", (8, 768), quick=True, compiled=True, small=True),
        Workload("RMS 8x768", "rms_norm", (8, 768), small=True),
        Workload("BN train 8x8", "batch_norm_train", (4, 8, 8, 8), "NCHW", small=True),
        Workload("BN eval 8x8", "batch_norm", (4, 8, 8, 8), "NCHW", small=True),
        Workload("GN2 8x8", "group_norm", (4, 8, 8, 8), "NCHW", {"num_groups": 2}, small=True),
        Workload("IN 8x8", "instance_norm", (4, 8, 8, 8), "NCHW", small=True),
    ]
    return tuple(rows)


WORKLOADS = _table()
QUICK = tuple(w for w in WORKLOADS if w.quick)

#: One small workload of each layer: what a call costs before the first array operation.
CALLS = tuple({w.layer: w for w in WORKLOADS if w.small}.values())
