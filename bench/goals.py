"""What the kernels are to reach on a processor with two threads; the only place where such a figure is written down."""

from __future__ import annotations

from dataclasses import dataclass

#: The geometric mean of the speedups over all rows that have a goal, and the threads that all of it is about.
OVERALL, THREADS = 3.0, 2


@dataclass(frozen=True)
class Goal:
    """One row's goal, and the limit that is to hold if that is missed: over the floor, over native, or in seconds."""

    library: str
    workload: str
    direction: str
    goal: float
    limit: float
    #: "floor" and "seconds" from above, "native" from below.
    over: str = "floor"
    dtype: str = "float32"
    mode: str = "eager"
    #: Which native layer, where a library has several.
    native: str = ""

    def met(self, figure: float, bound: float) -> bool:
        """Whether a figure is on the right side of the goal or of the limit."""
        return figure >= bound if self.over == "native" else figure <= bound

    def text(self, bound: float) -> str:
        """The goal or the limit, as one reads it."""
        if self.over == "seconds":
            return f"≤ {bound * 1e6:g} µs"
        return f"≥ {bound:.2g}×" if self.over == "native" else f"≤ {bound:g}"


#: A goal and its limit.
Pair = tuple[float, float]


def _torch(workload: str, forward: Pair, backward: Pair | None = None, dtype: str = "float32") -> list[Goal]:
    pairs = {"forward": forward, "backward": backward}
    return [Goal("torch", workload, direction, *pair, dtype=dtype) for direction, pair in pairs.items() if pair]


GOALS = (
    *_torch("BN train 56x56", (1.1, 1.15), (1.05, 1.1)),
    *_torch("BN train 14x14", (2.0, 2.0)),
    *_torch("BN train 7x7", (2.5, 2.5)),
    *_torch("BN train 56x56 NHWC", (1.15, 1.2), (1.45, 1.5)),
    *_torch("BN eval 56x56", (0.8, 0.8)),
    *_torch("GN32 56x56", (1.0, 1.05), (0.9, 1.1)),
    *_torch("GN32 56x56 NHWC", (1.05, 1.05)),
    *_torch("LN 8192x768", (0.9, 1.05), (1.05, 1.1)),
    *_torch("LN 2048x4096", (1.0, 1.05), (1.05, 1.1)),
    *_torch("LN 65536x64", (0.95, 1.05)),
    *_torch("RMS 8192x768", (1.05, 1.05), (1.1, 1.1)),
    *_torch("RMS 2048x4096", (1.0, 1.05), (1.0, 1.1)),
    *_torch("BN train 56x56", (1.5, 1.5), (1.4, 1.4), "bfloat16"),
    *_torch("LN 8192x768", (1.3, 1.4), (1.6, 1.7), "bfloat16"),
    *_torch("LN 65536x64", (1.4, 1.6), dtype="bfloat16"),
    *_torch("RMS 8192x768", (1.2, 1.4), (1.6, 1.7), "bfloat16"),
    # Outputs from 64 MB on lie in memory that is new to the process.
    Goal("torch", "LN 32768x1024", "forward", 2.8, 2.5, "native"),
    Goal("torch", "BN train 64x64", "forward", 2.8, 2.5, "native"),
    Goal("torch", "LN 8x768", "forward", 1 / 1.1, 1 / 1.15, "native"),
    Goal("numpy", "LN 8192x768", "forward", 1.0, 1.05),
    Goal("numpy", "BN train 56x56", "forward", 1.0, 1.05),
    Goal("numpy", "LN 4x64", "forward", 3e-6, 5e-6, "seconds"),
    Goal("jax", "LN 8192x768", "forward", 2.0, 2.0, "native", mode="jax.jit"),
    Goal("jax", "LN 8192x768", "both", 8.0, 5.0, "native", mode="jax.jit"),
    Goal("tensorflow", "LN 8192x768", "forward", 7.0, 6.0, "native", native="keras"),
    Goal("tensorflow", "BN train 56x56 NHWC", "forward", 1.5, 1.5, "native", native="tf.nn"),
)

_BY_ROW = {(g.library, g.workload, g.direction, g.dtype, g.mode): g for g in GOALS}


def goal(library: str, workload: str, direction: str, dtype: str, mode: str, native: str) -> Goal | None:
    """The goal of a row, where there is one."""
    found = _BY_ROW.get((library, workload, direction, dtype, mode))
    return found if found and found.native in ("", native) else None


def directions(library: str, workload: str, dtype: str, mode: str) -> tuple[str, ...]:
    """The passes of a workload that have a goal."""
    return tuple(
        g.direction for g in GOALS if (g.library, g.workload, g.dtype, g.mode) == (library, workload, dtype, mode)
    )
