"""What normkit needs of an array library, and the implementation that any conforming library gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from normkit.core.moments import Habits
from normkit.core.normalize import BatchStats, Gradients, Operands, forward, returned_stats, vjp
from normkit.core.plan import Plan, Shape

if TYPE_CHECKING:
    from normkit.backends.kernels import Applied

Array = Any

#: The dtypes that normkit computes with, by their array API (and ml_dtypes) names.
FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})


@runtime_checkable
class Backend(Protocol):
    """One array library. Everything normkit asks of it is here."""

    name: str

    def namespace(self, x: Array | None = None) -> Any:
        """The array API namespace that the core computes ``x`` with."""

    def shape(self, x: Array) -> Shape:
        """Axis lengths, ``None`` where a traced graph does not know one."""

    def dtype(self, x: Array) -> str:
        """The dtype's standard name, such as ``"bfloat16"``."""

    def device(self, x: Array) -> Any:
        """Something that is equal for arrays that can be computed together."""

    def suit(self, operands: Operands, shape: Shape, device: Any) -> bool:
        """Whether parameters and statistics are, at a glance, this library's, floating, so shaped and on this device.

        False asks for a closer look, which may find nothing amiss.
        """

    def least(self, x: Array) -> float:
        """The smallest value if it is negative and looking costs nothing (values at hand, in host memory); else 0."""

    def at_hand(self, x: Array, *, wait: bool = False) -> bool:
        """Whether values are there and looking costs nothing (in host memory); with ``wait``, whatever it costs."""

    def constant(self, x: Array) -> Array:
        """``x``, through which no gradient goes."""

    def positions(self, x: Array, axis: int, dtype: Any) -> Array:
        """0, 1, ... along this axis of ``x``, so shaped that it broadcasts to ``x``, where ``x`` is."""

    def tracing(self) -> bool:
        """Whether Python itself is being traced, so that a cache is better left alone."""

    @property
    def at_once(self) -> Callable[..., Applied | None] | None:
        """Of plan, x, weight, bias, mean, var: the result if one call gives it, else ``None``, whatever they are."""

    def apply(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None]:
        """Normalize, with the gradient attached in the library's own way; statistics where the plan lets them out."""

    def vjp(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None, Callable[[Array], Gradients]]:
        """Normalize, and the function from dy to the gradients."""

    def create(self, values: Any, dtype: str, device: Any | None = None) -> Array:
        """An array of the library from a nested sequence or a NumPy array: parameters of the plain layers."""


class ArrayBackend:
    """A backend for any library whose arrays have an array API namespace; the others refine it."""

    name = "array-api"
    at_once: Callable[..., Applied | None] | None = None
    #: Nothing is known of an unknown library's sums, and looking at a value may stall it.
    habits = Habits(wide=True)

    def __init__(self, namespace: Any | None = None) -> None:
        self._namespace = namespace
        self._dtype_names: dict[Any, str] = {}

    def namespace(self, x: Array | None = None) -> Any:
        if x is None or self._namespace is not None:
            return self._namespace
        import array_api_compat  # 2 ms that `import normkit` does not need

        return array_api_compat.array_namespace(x)

    def shape(self, x: Array) -> Shape:
        return x.shape

    def dtype(self, x: Array) -> str:
        dtype = x.dtype
        name = self._dtype_names.get(dtype)
        if name is None:
            name = self._dtype_names[dtype] = str(dtype).rpartition(".")[2]
        return name

    def device(self, x: Array) -> Any:
        return x.device if self._namespace is None else None

    def suit(self, operands: Operands, shape: Shape, device: Any) -> bool:
        kind = type(operands.x)
        for a in operands[1:5]:
            if a is None:
                continue
            if type(a) is not kind or self.device(a) != device:
                return False
            if self.shape(a) != shape or self.dtype(a) not in FLOATING:
                return False
        return True

    def least(self, x: Array) -> float:
        return 0.0

    def at_hand(self, x: Array, *, wait: bool = False) -> bool:
        return wait

    def constant(self, x: Array) -> Array:
        return x

    def positions(self, x: Array, axis: int, dtype: Any) -> Array:
        xp, n = self.namespace(x), x.shape[axis]
        numbers = xp.arange(n, dtype=dtype, device=None if self.device(x) is None else x.device)
        return xp.reshape(numbers, (n, *(1 for _ in x.shape[axis + 1 :])))

    def tracing(self) -> bool:
        return False

    def apply(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None]:
        xp = self.namespace(operands.x)
        y, used = forward(xp, plan, operands, self.habits)
        return y, returned_stats(xp, plan, operands, used)

    def vjp(self, plan: Plan, operands: Operands) -> tuple[Array, BatchStats | None, Callable[[Array], Gradients]]:
        xp = self.namespace(operands.x)
        y, used = forward(xp, plan, operands, self.habits)

        def pullback(dy: Array) -> Gradients:
            return vjp(xp, plan, operands, used, dy, self.habits)

        return y, returned_stats(xp, plan, operands, used), pullback

    def create(self, values: Any, dtype: str, device: Any | None = None) -> Array:
        xp = self.namespace()
        return xp.asarray(values, dtype=getattr(xp, dtype), device=device)
