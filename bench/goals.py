"""What the kernels are to reach on a CPU with two threads; the only place where such a figure is written down."""

from __future__ import annotations

from dataclasses import dataclass

#: The geometric mean of the speedups over all rows that have a goal.
OVERALL = 3.0


@dataclass(frozen=True)
class Goal:
    """A limit for one row: the time over the floor, the native layer's time over it, or the time itself in seconds."""

    library: str
    workload: str
    direction: str
    limit: float
    #: "floor" and "seconds" from above, "native" from below.
    over: str = "floor"
    dtype: str = "float32"
    mode: str = "eager"
    #: Which native layer, where a library has several.
    native: str = ""

    def met(self, figure: float) -> bool:
        """Whether a figure is on the right side of the limit."""
        return figure >= self.limit if self.over == "native" else figure <= self.limit

    def __str__(self) -> str:
        if self.over == "seconds":
            return f"≤ {self.limit * 1e6:g} µs"
        return f"≥ {self.limit:.2g}×" if self.over == "native" else f"≤ {self.limit:g}"


def _torch(workload: str, forward: float | None = None, backward: float | None = None, dtype: str = "float32"):
    limits = {"forward": forward, "backward": backward}
    return [Goal("torch", workload, d, limit, dtype=dtype) for d, limit in limits.items() if limit is not None]


GOALS = (
    *_torch("BN train 56x56", 1.15, 1.1),
    *_torch("BN train 14x14", 2.0),
    *_torch("BN train 7x7", 2.5),
    *_torch("BN train 56x56 NHWC", 1.2, 1.5),
    *_torch("BN eval 56x56", 0.8),
    *_torch("GN32 56x56", 1.05, 1.1),
    *_torch("GN32 56x56 NHWC", 1.05),
    *_torch("LN 8192x768", 1.05, 1.1),
    *_torch("LN 2048x4096", 1.05, 1.1),
    *_torch("LN 65536x64", 1.05),
    *_torch("RMS 8192x768", 1.05, 1.1),
    *_torch("RMS 2048x4096", 1.05, 1.1),
    *_torch("BN train 56x56", 1.4, 1.7, "bfloat16"),
    *_torch("LN 8192x768", 1.4, 1.7, "bfloat16"),
    *_torch("LN 65536x64", 1.4, dtype="bfloat16"),
    *_torch("RMS 8192x768", 1.4, 1.7, "bfloat16"),
    Goal("torch", "LN 32768x1024", "forward", 2.5, "native"),
    Goal("torch", "LN 8x768", "forward", 1 / 1.15, "native"),
    Goal("numpy", "LN 8192x768", "forward", 1.05),
    Goal("numpy", "BN train 56x56", "forward", 1.05),
    Goal("numpy", "LN 4x64", "forward", 5e-6, "seconds"),
    Goal("jax", "LN 8192x768", "forward", 2.0, "native", mode="jax.jit"),
    Goal("jax", "LN 8192x768", "both", 5.0, "native", mode="jax.jit"),
    Goal("tensorflow", "LN 8192x768", "forward", 6.0, "native", native="keras"),
    Goal("tensorflow", "BN train 56x56 NHWC", "forward", 1.5, "native", native="tf.nn"),
)

_BY_ROW = {(g.library, g.workload, g.direction, g.dtype, g.mode): g for g in GOALS}


def goal(library: str, workload: str, direction: str, dtype: str, mode: str, native: str) -> Goal | None:
    """The goal of a row, where there is one."""
    found = _BY_ROW.get((library, workload, direction, dtype, mode))
    return found if found and found.native in ("", native) else None
