"""CuPy: arrays on a CUDA or ROCm device, computed there."""

from __future__ import annotations

import array_api_compat.cupy as xp

from normkit.backends.protocol import Array, ArrayBackend
from normkit.core.moments import Habits


class CupyBackend(ArrayBackend):
    """CuPy's block reductions are tree sums: float32 suffices."""

    name = "cupy"
    habits = Habits()

    def __init__(self) -> None:
        super().__init__(xp)

    def device(self, x: Array) -> int:
        return x.device.id
