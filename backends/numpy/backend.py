"""NumPy: always at hand, and since 2.0 an array API namespace by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from normkit.backends import kernels
from normkit.backends.protocol import FLOATING, Array, ArrayBackend
from normkit.core.moments import Habits, Plain, Rescued
from normkit.core.normalize import BatchStats, Gradients, Operands
from normkit.core.plan import Plan, Shape


def rescue_quietly(plain: Plain, rescued: Rescued) -> tuple[Array, ...]:
    """Sums and squares that overflow are formed anew, so that NumPy need not warn of them."""
    with np.errstate(over="ignore", invalid="ignore"):
        right, result = plain()
    return result if right else rescued()


class NumpyBackend(ArrayBackend):
    """Sums are wide: NumPy adds float32 pairwise along memory only, and one by one across it."""

    name = "numpy"
    at_once = staticmethod(kernels.at_once)
    habits = Habits(wide=True, rescue=rescue_quietly, hasty=True)

    def __init__(self) -> None:
        super().__init__(np)

    def suit(self, operands: Operands, shape: Shape, device: Any) -> bool:
        for a in operands[1:5]:
            if a is not None and not (type(a) is np.ndarray and a.shape == shape and self.dtype(a) in FLOATING):
                return False
        return True

    def least(self, x: Array) -> float:
        return 0.0 if kernels.negative(x) is False else min(float(x.astype("f8", copy=False).min()), 0.0)

    def at_hand(self, x: Array, *, wait: bool = False) -> bool:
        return True

    def apply(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None]:
        found = kernels.apply(plan, operands)
        return super().apply(plan, operands) if found is None else (found.y, found.stats)

    def vjp(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None, Callable[[Array], Gradients]]:
        found = kernels.apply(plan, operands, save=True)
        if found is None:
            return super().vjp(plan, operands)
        return found.y, found.stats, lambda dy: kernels.vjp(plan, operands, found.packed, dy)
