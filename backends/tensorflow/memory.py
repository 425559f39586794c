"""What the kernels need of TensorFlow: memory of eager tensors through DLPack, and new tensors on memory of our own."""

from __future__ import annotations

import tensorflow as tf

from normkit.backends.kernels import _kernels
from normkit.backends.protocol import Array

_from_dlpack = tf.experimental.dlpack.from_dlpack


class TensorflowArrays:
    """Eager tensors in host memory; they are row-major, all of them."""

    elsewhere: str | None = None

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            host = tf.constant(0)
        self._kind, self._host = type(host), host.device
        # The method came with TensorFlow 2.20.
        self._capsule = getattr(self._kind, "__dlpack__", tf.experimental.dlpack.to_dlpack)
        # Looked up by identity: there is one object of each dtype, and it is slow to hash. Numbers as in src/kernels.h.
        self._types = {id(t): i for i, t in enumerate((tf.float32, tf.float64, tf.float16, tf.bfloat16))}

    def layout(self, x: Array) -> str | None:
        """``"first"``; ``None`` for no such tensor."""
        return "first" if type(x) is self._kind and id(x.dtype) in self._types and x.device == self._host else None

    def ordered(self, x: Array, order: tuple[int, ...]) -> Array:
        """``x`` with its axes in this order."""
        return tf.transpose(x, order)

    def restored(self, y: Array, inverse: tuple[int, ...], x: Array) -> Array:
        """``y`` with its axes as they were."""
        return tf.transpose(y, inverse)

    def empty_like(self, x: Array) -> Array:
        """A tensor of x's shape and dtype."""
        return _from_dlpack(_kernels.empty(self._types[id(x.dtype)], *x.shape.as_list()))

    def like(self, dy: Array, x: Array) -> Array:
        """``dy`` in x's dtype, where the kernels can read it."""
        if dy.dtype is x.dtype and self.layout(dy) is not None:
            return dy
        with tf.device(self._host):
            return tf.cast(tf.identity(dy), x.dtype)

    def statistics(self, x: Array, rows: int, shape: tuple[int, ...]) -> Array:
        """Room for the packed statistics, in the accumulation dtype."""
        return _from_dlpack(_kernels.empty(int(x.dtype is tf.float64), rows, *shape))

    def exported(self, arrays):
        """The arrays as the extension takes them: capsules, which hold the memory until the call is over."""
        return [None if a is None else self._capsule(a) for a in arrays]
