"""What the kernels need of an array library: is this plain memory, and new arrays of the same kind."""

from __future__ import annotations

import functools
import sys
from typing import Any

Array = Any
Order = tuple[int, ...]

_known: dict[type, Any] = {}


def library_of(kind: type):
    """The library of an array type; ``None`` where it is unknown, as a subclass is (its memory may mean anything)."""
    try:
        return _known[kind]
    except KeyError:
        found = _known[kind] = _find(kind)
        return found


def _find(kind: type):
    import numpy as np

    if kind is np.ndarray:
        return NumpyArrays(np)
    torch = sys.modules.get("torch")
    if torch is not None and kind in (torch.Tensor, torch.nn.Parameter):
        return TorchArrays(torch)
    if kind.__module__.startswith("tensorflow.") and kind.__name__ == "EagerTensor":
        from normkit.backends.tensorflow.memory import TensorflowArrays

        return TensorflowArrays()
    jax = sys.modules.get("jax")
    if jax is not None and issubclass(kind, (jax.Array, jax.core.Tracer)):
        from normkit.backends.jax.fused import JaxArrays

        return JaxArrays()
    return None


class NumpyArrays:
    """NumPy, with the bfloat16 of ml_dtypes as its bits."""

    elsewhere: str | None = None
    negated = None

    def __init__(self, np) -> None:
        self.np, self.kinds, self.empty_like = np, (np.ndarray,), np.empty_like
        self._plain = {np.dtype(t): True for t in ("f2", "f4", "f8")}

    def _known_dtype(self, dtype) -> bool:
        known = self._plain.get(dtype)
        if known is None:
            known = self._plain[dtype] = dtype.name == "bfloat16"
        return known

    def layout(self, x: Array) -> str | None:
        """``"first"`` for row-major, ``"last"`` for axis 1 innermost, else ``"strided"``; ``None`` for no such array"""
        if type(x) is not self.np.ndarray or not self._known_dtype(x.dtype):
            return None
        if x.flags.c_contiguous:
            return "first"
        last = x.ndim > 2 and x.transpose(0, *range(2, x.ndim), 1).flags.c_contiguous
        return "last" if last else "strided"

    def ordered(self, x: Array, order: Order | None = None) -> Array:
        """``x`` with its axes in this order, row-major."""
        return self.np.ascontiguousarray(x if order is None else x.transpose(order))

    def restored(self, y: Array, inverse: Order, x: Array) -> Array:
        """``y`` with its axes as they were, in memory as an array like ``x`` would be."""
        y, like = y.transpose(inverse), self.np.empty_like(x)
        if y.strides == like.strides:
            return y
        like[...] = y
        return like

    def exports(self, dtype) -> bool:
        """Whether the extension takes such arrays as they are."""
        return dtype.char in "efd"

    def like(self, dy: Array, x: Array) -> Array:
        """``dy`` in x's dtype and layout."""
        if dy.dtype == x.dtype and dy.strides == x.strides and type(dy) is self.np.ndarray:
            return dy
        laid = self.np.empty_like(x)
        laid[...] = dy
        return laid

    def statistics(self, x: Array, rows: int, shape: tuple[int, ...]) -> Array:
        """Room for the packed statistics, in the accumulation dtype."""
        return self.room(x, (rows, *shape))()

    def room(self, x: Array, shape: tuple[int, ...]):
        """What makes arrays of this shape in the accumulation dtype of x."""
        return functools.partial(self.np.empty, shape, "f8" if x.dtype.char == "d" else "f4")

    def exported(self, arrays):
        """The arrays as the extension takes them."""
        plain = self._plain
        for a in arrays:
            if a is not None and a.dtype.char not in "efd":
                return [
                    a.view("u2") if a is not None and a.dtype.char not in "efd" and plain[a.dtype] else a
                    for a in arrays
                ]
        return arrays


class TorchArrays:
    """PyTorch tensors in host memory."""

    elsewhere: str | None = None

    def __init__(self, torch) -> None:
        self.torch, self.kinds = torch, (torch.Tensor, torch.nn.Parameter)
        self.negated = torch.Tensor.is_neg
        self.empty_like = torch.empty_like
        self._plain = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

    def layout(self, x: Array) -> str | None:
        """``"first"`` for row-major, ``"last"`` for axis 1 innermost, else ``"strided"``; ``None`` for none such."""
        if (
            not x.is_cpu
            or x.dtype not in self._plain
            or x.layout is not self.torch.strided
            or type(x) not in self.kinds
        ):
            return None
        if _symbolic(x):
            return "strided"
        if x.is_contiguous():
            return "first"
        last = x.ndim > 2 and x.detach().movedim(1, -1).is_contiguous()
        return "last" if last else "strided"

    def ordered(self, x: Array, order: Order | None = None) -> Array:
        """``x`` with its axes in this order, row-major."""
        x = x.detach()
        if _symbolic(x):
            x = self.torch.empty_like(x).copy_(x)
        return (x if order is None else x.permute(order)).contiguous()

    def restored(self, y: Array, inverse: Order, x: Array) -> Array:
        """``y`` with its axes as they were, in memory as a tensor like ``x`` would be."""
        y, like = y.permute(inverse), self.torch.empty_like(x)
        return y if y.stride() == like.stride() else like.copy_(y)

    def exports(self, dtype) -> bool:
        """Whether the extension takes such tensors as they are."""
        return True

    def like(self, dy: Array, x: Array) -> Array:
        """``dy`` in x's dtype and layout."""
        if dy.dtype == x.dtype and dy.stride() == x.stride() and not _symbolic(dy):
            return dy
        return self.torch.empty_like(x).copy_(dy)

    def statistics(self, x: Array, rows: int, shape: tuple[int, ...]) -> Array:
        """Room for the packed statistics, in the accumulation dtype."""
        return x.new_empty((rows, *shape), dtype=self._accumulated(x))

    def room(self, x: Array, shape: tuple[int, ...]):
        """What makes tensors of this shape in the accumulation dtype of x."""
        one = x.new_empty((1,) * len(shape), dtype=self._accumulated(x))
        # Twice as fast as to name shape and dtype; one element stands for all of them.
        return functools.partial(self.torch.empty_like, one.expand(shape))

    def _accumulated(self, x: Array):
        return self.torch.float64 if x.dtype == self.torch.float64 else self.torch.float32

    def exported(self, arrays):
        """The arrays as the extension takes them."""
        return arrays


def _symbolic(x: Array) -> bool:
    """Whether memory does not say what a tensor's values are: a lazy negation, or zeros that have no memory."""
    return x.is_neg() or x._is_zerotensor()
