"""What the layers share: parameters, mode, state and how they are shown."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

from . import _validate as check
from . import _validate_layer as check_layer
from ._dispatch import backend_of
from ._vjp import vjp
from .backends import ArrayBackend

Array = Any
Pullback = Callable[[Array], tuple[Array, dict[str, Array]]]


class TrainsAffine:
    """A layer whose affine part need not learn."""

    _train_affine = True

    @property
    def train_affine(self) -> bool:
        """Whether weight and bias learn."""
        return self._train_affine

    @train_affine.setter
    def train_affine(self, value: bool) -> None:
        self._train_affine = check.flag("train_affine", value)
        self._set_affine()

    def _set_affine(self) -> None:
        """Tell the parameters, where they are to know."""


class Layer(TrainsAffine):
    """One of the functions, with parameters.

    A subclass says which in ``_run``, and holds its arguments as attributes of the same name: those that differ from
    their default are shown.
    """

    weight: Array | None
    bias: Array | None
    #: Whether the layer is in training mode, which makes a difference to batch norm only.
    training: bool
    #: Whether ``axis=None`` stands for the last axes.
    _trailing = False
    #: What arguments are whose default, ``None``, leaves them to another.
    _usual: Mapping[str, Any] = {}

    def __init__(
        self,
        lengths: tuple[int, ...],
        axis: int | tuple[int, ...] | None,
        eps: float,
        affine: bool,
        bias: bool,
        dtype: Any,
        device: Any,
        backend: Any,
        train_affine: bool,
        weight: float = 1.0,
    ) -> None:
        self._lengths = lengths
        self._axes = check_layer.layer_axes(axis, len(lengths), trailing=self._trailing)
        self.axis = axis
        self.eps = check.epsilon(eps)
        self.dtype = check_layer.dtype(dtype)
        self.backend = check_layer.library(backend)[0]
        self.training = True
        self.train_affine = train_affine
        affine, bias = check.flag("affine", affine), check.flag("bias", bias)
        self.weight = self._filled(weight, self.dtype, device, backend) if affine else None
        self.bias = self._filled(0.0, self.dtype, device, backend) if affine and bias else None

    def __call__(self, x: Array, *, mask: Array | None = None, lengths: Array | None = None) -> Array:
        """Normalize x; in x's shape, library, dtype, device and layout.

        ``mask`` or ``lengths`` say what of x is valid, as in the function: y is zero elsewhere.
        """
        return self._apply(call, x, mask=mask, lengths=lengths)[0]

    def vjp(self, x: Array, *, mask: Array | None = None, lengths: Array | None = None) -> tuple[Array, Pullback]:
        """``layer(x)``, and the function from the gradient of y to those of x and of the parameters.

        ``pullback(dy)`` returns ``(dx, {"weight": ..., "bias": ...})``, with the parameters that the layer has and
        trains.
        """
        return self._named(*self._apply(vjp, x, mask=mask, lengths=lengths))

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode."""
        self.training = check.flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Switch to inference mode."""
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters, and of what else the layer learns, by name."""
        return {name: copied(value) for name, value in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy parameters and statistics from arrays of the layer's library, or NumPy arrays, into the layer's dtype.

        Raises
        ------
        TypeError
            An array is of another library, or not floating-point.
        ValueError
            Keys are missing or unknown, an array has another shape or device, or a variance is negative. The layer
            stays as it was.
        """
        current = self._state()
        check_layer.keys(type(self).__name__, state, current)
        self._restore({name: self._loaded(name, state[name], old) for name, old in current.items()})

    def __repr__(self) -> str:
        has = {"affine": self.weight is not None, "bias": self.bias is not None or self.weight is None}
        words = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = has.get(name, getattr(self, name, parameter.default))
            text = f"{value:.12g}" if isinstance(value, float) else repr(value)
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                words.append(text)
            elif value != self._usual.get(name, parameter.default):
                words.append(f"{name}={text}")
        return f"{type(self).__name__}({', '.join(words)})"

    def _run(self, run: Callable, x: Array, **valid: Array | None) -> tuple[Array, Any]:
        """``run`` with one of the functions and its arguments: y, and the pullback where ``run`` gives one."""
        raise NotImplementedError

    def _apply(self, run: Callable, x: Array, **valid: Array | None) -> tuple[Array, Any]:
        check_layer.fits(type(self).__name__, x, self._axes, self._lengths, self._held())
        return self._run(run, x, **valid)

    def _affine(self) -> tuple[Array | None, Array | None]:
        """Weight and bias; constants, where they are not trained."""
        if self._train_affine:
            return self.weight, self.bias
        weight, bias = (a if a is None else backend_of("weight", a).constant(a) for a in (self.weight, self.bias))
        return weight, bias

    def _held(self) -> Array | None:
        """One of the layer's arrays, where it has any."""
        return self.bias if self.weight is None else self.weight

    def _named(self, y: Array, pullback: Callable) -> tuple[Array, Pullback]:
        names = tuple(name for name in ("weight", "bias") if getattr(self, name) is not None)

        def named(dy: Array) -> tuple[Array, dict[str, Array]]:
            found = pullback(dy)
            of_names = dict(zip(names, found[len(found) - len(names) :], strict=True))
            return found[0], of_names if self._train_affine else {}

        return y, named

    def _filled(self, value: float, dtype: str, device: Any, backend: Any) -> Array:
        import numpy as np

        name, library = check_layer.library(backend)
        try:
            return library.create(np.full(self._lengths, value), dtype, device)
        except AttributeError:
            raise ValueError(f"dtype must be one that {name} has; received {dtype!r}.") from None

    def _state(self) -> dict[str, Array]:
        return {name: value for name in ("weight", "bias") if (value := getattr(self, name)) is not None}

    def _restore(self, state: dict[str, Any]) -> None:
        self.weight, self.bias = state.get("weight"), state.get("bias")

    def _loaded(self, name: str, value: Any, old: Array) -> Array:
        import numpy as np

        backend = backend_of(name, old)
        xp = backend.namespace(old)
        if type(value) is np.ndarray and backend.name != "numpy":
            check.array(name, value)
            library = backend if backend.namespace() is not None else ArrayBackend(xp)
            value = library.create(value.copy(), backend.dtype(old), old.device)
        check.companion(backend, old, name, value, tuple(backend.shape(old)), of="the layer")
        return xp.astype(value, old.dtype, copy=True)


def namespace(x: Array) -> Any:
    """The array API namespace of an array."""
    return backend_of("x", x).namespace(x)


def call(fn: Callable, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    """What a function returns, in the place where :func:`normkit.vjp` would give a pullback too."""
    return fn(*args, **kwargs), None


def copied(a: Array) -> Array:
    """A copy of an array; a number, even as an array of shape (), is never changed in place."""
    return namespace(a).astype(a, a.dtype, copy=True) if getattr(a, "shape", ()) else a
