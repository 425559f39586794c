"""What is timed: the only place in this package where a shape is written down."""

from __future__ import annotations

import dataclasses
import math
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

    def shrunk(self) -> Workload:
        """The same with few samples, for tests: what runs is what is timed, in milliseconds."""
        return dataclasses.replace(self, size=(min(self.size[0], 2), *self.size[1:]))

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

    @property
    def elements(self) -> int:
        """How many x has."""
        return math.prod(self.size)

    def __str__(self) -> str:
        return self.name


#: 134 MB, as has BN train 64x64, which malloc maps anew in each call.
LARGE = Workload("LN 32768x1024", "layer_norm", (32768, 1024))


def _table() -> tuple[Workload, ...]:
    early, middle, late = (32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7)  # a residual network's stages
    groups, small = {"num_groups": 32}, (4, 32, 14, 14)
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
        LARGE,
        Workload("BN train 64x64", "batch_norm_train", (32, 256, 64, 64), "NCHW"),
        Workload("LN 65536x64", "layer_norm", (65536, 64), dtypes=_ALL),
        Workload("RMS 8192x768", "rms_norm", (8192, 768), dtypes=_ALL, quick=True, compiled=True),
        Workload("RMS 2048x4096", "rms_norm", (2048, 4096)),
        Workload("LN 4x64", "layer_norm", (4, 64), quick=True, small=True),
        Workload("LN 64x64", "layer_norm", (64, 64), compiled=True, small=True),
        Workload("GN8 4x32x14x14", "group_norm", small, "NCHW", {"num_groups": 8}, compiled=True, small=True),
        Workload("IN 4x32x14x14", "instance_norm", small, "NCHW", compiled=True, small=True),
        Workload("BN train 4x32x14x14", "batch_norm_train", small, "NCHW", compiled=True, small=True),
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

#: Between two calls of it, another operation runs (a framework's own threads, which ours are not to wake or wait for).
ALTERNATING = Workload("LN 256x768", "layer_norm", (256, 768))


def swept(quick: bool = False) -> tuple[Workload, ...]:
    """Layer norm from 1 KB of float32 and batch norm from 4 KB, up to 512 MB; quick: in steps of four, up to 64 MB."""
    exponents = range(0, 17, 2) if quick else range(20)
    rows = [Workload(f"LN {1 << k}x256", "layer_norm", (1 << k, 256)) for k in exponents]
    for k in exponents[1:] if quick else exponents[2:]:
        samples, channels = 1 << (k - 2) // 2, 1 << (k - 1) // 2
        name = f"BN train {samples}x{channels}x32x32"
        rows.append(Workload(name, "batch_norm_train", (samples, channels, 32, 32), "NCHW"))
    return tuple(rows)


#: One small workload of each layer: what a call costs before the first array operation.
CALLS = tuple({w.layer: w for w in WORKLOADS if w.small}.values())
