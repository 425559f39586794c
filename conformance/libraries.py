"""One adapter for each array library: arrays in and out, gradients in the library's own way, its compiled modes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any


class Kind(NamedTuple):
    """What an array is, apart from its shape and values."""

    library: str
    dtype: str
    device: str
    layout: str


class Missing(ImportError):
    """A library was asked for that is not installed."""


class Library:
    """NumPy-like libraries; the others refine it. Arrays are made of float64 NumPy arrays that hold exact values."""

    name = "numpy"
    #: The top module, without which the library is not installed.
    module = "numpy"
    dtypes: tuple[str, ...] = ("float64", "float32", "float16")
    layouts: tuple[str, ...] = ("contiguous", "channels_last")
    #: The compiled modes, each a name for :meth:`compiled`.
    modes: tuple[str, ...] = ()
    #: More of them, for functions of x whose first axis is the batch and is not normalized.
    batch_modes: tuple[str, ...] = ()
    #: The library differentiates by itself, so that second derivatives exist.
    differentiates = False
    #: Every new shape costs a second of compiling, so that fewer cases are tried.
    thrifty = False
    #: Where the library's own layers have their channels.
    channel_axis = 1
    #: There are fused kernels for its arrays.
    kernels = True

    @functools.cached_property
    def xp(self) -> Any:
        """The library's module."""
        return importlib.import_module(self.module)

    def session(self) -> contextlib.AbstractContextManager:
        """The settings under which the library has all its dtypes."""
        return contextlib.nullcontext()

    def array(self, values: np.ndarray, dtype: str, layout: str = "contiguous") -> Array:
        """An array of ``dtype`` ("bool" for masks); "channels_last" keeps the shape and puts axis 1 last in memory."""
        x = np.ascontiguousarray(np.asarray(values).astype(dtype))
        if layout == "channels_last":
            x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        x.setflags(write=False)
        return x

    def numpy(self, x: Array) -> np.ndarray:
        """The values as float64."""
        return np.asarray(x).astype(np.float64)

    def kind(self, x: Array) -> Kind:
        """What ``x`` is; refuses what is no array of this library."""
        if type(x) is not np.ndarray:
            raise TypeError(f"not a NumPy array: {type(x)}")
        return Kind(self.name, str(x.dtype), "cpu", "contiguous")

    def vjp(self, function: Callable, args: Sequence, options: Mapping, dy: Array) -> tuple[Any, dict[int, Array]]:
        """What the function returns, and the gradients of ``sum(y * dy)`` by position of the argument."""
        import normkit as nk

        y, pullback = (getattr(function, "vjp", None) or functools.partial(nk.vjp, function))(*args, **options)
        return y, dict(zip(_positions(args), pullback(dy), strict=True))

    def hessian_product(self, function: Callable, args: Sequence, options: Mapping, dy: Array, directions: Sequence):
        """The second derivative of ``sum(y * dy)`` times ``directions``, by position of the argument."""
        raise NotImplementedError(f"{self.name} has no second derivatives")

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of arrays, mapped over their first axis."""
        raise NotImplementedError(f"{self.name} has no vmap")

    def compiled(self, function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        """``function`` of arrays only, compiled in one of :attr:`modes`, or of :attr:`batch_modes`."""
        modes = (*self.modes, *self.batch_modes)
        raise ValueError(f"{self.name} has no mode {mode!r}; there are: {', '.join(modes) or 'none'}")


class Strict(Library):
    """array-api-strict with its extensions off."""

    name, module = "strict", "array_api_strict"
    kernels = False
    dtypes = ("float64", "float32")
    layouts = ("contiguous",)

    def session(self):
        return self.xp.ArrayAPIStrictFlags(enabled_extensions=())

    def array(self, values, dtype, layout="contiguous"):
        return self.xp.asarray(np.array(np.asarray(values).astype(dtype), order="C"))

    def kind(self, x):
        if type(x) is not type(self.xp.zeros(())):
            raise TypeError(f"not an array of array-api-strict: {type(x)}")
        return Kind(self.name, str(x.dtype).rpartition(".")[2], str(x.device), "contiguous")


class Cupy(Library):
    """CuPy on the current device."""

    name, module = "cupy", "cupy"
    kernels = False

    def array(self, values, dtype, layout="contiguous"):
        x = self.xp.asarray(np.asarray(values).astype(dtype), order="C")
        if layout == "channels_last":
            x = self.xp.moveaxis(self.xp.ascontiguousarray(self.xp.moveaxis(x, 1, -1)), -1, 1)
        return x

    def numpy(self, x):
        return self.xp.asnumpy(x).astype(np.float64)

    def kind(self, x):
        if type(x) is not self.xp.ndarray:
            raise TypeError(f"not a CuPy array: {type(x)}")
        return Kind(self.name, str(x.dtype), str(x.device), "contiguous")


class Torch(Library):
    """PyTorch on its default device: autograd and torch.compile."""

    name, module = "torch", "torch"
    dtypes = ("float64", "float32", "float16", "bfloat16")
    modes = ("torch.compile",)
    differentiates = True

    def array(self, values, dtype, layout="contiguous"):
        x = self.xp.asarray(np.array(values, order="C")).to(getattr(self.xp, dtype), copy=True)
        x = x.to(self.xp.get_default_device())
        if layout == "channels_last":
            x = x.to(memory_format=self._formats[x.ndim])
        return x

    @property
    def _formats(self):
        return {4: self.xp.channels_last, 5: self.xp.channels_last_3d}

    def numpy(self, x):
        return x.detach().to("cpu", self.xp.float64).numpy()

    def kind(self, x):
        if type(x) is not self.xp.Tensor:
            raise TypeError(f"not a PyTorch tensor: {type(x)}")
        last = x.ndim in self._formats and x.is_contiguous(memory_format=self._formats[x.ndim])
        layout = "contiguous" if x.is_contiguous() else "channels_last" if last else f"strides {x.stride()}"
        return Kind(self.name, str(x.dtype).removeprefix("torch."), str(x.device), layout)

    def vjp(self, function, args, options, dy):
        args = self._watched(args)
        out = function(*args, **options)
        positions = _positions(args)
        inputs = [args[i] for i in positions]
        found = self.xp.autograd.grad(first(out), inputs, dy, allow_unused=True)
        return out, {i: g for i, g in zip(positions, found, strict=True) if g is not None}

    def hessian_product(self, function, args, options, dy, directions):
        args = self._watched(args)
        positions = _positions(args)
        inputs = [args[i] for i in positions]
        slopes = self.xp.autograd.grad(first(function(*args, **options)), inputs, dy, create_graph=True)
        pairs = [(s, v) for s, v in zip(slopes, directions, strict=True) if s.requires_grad]
        found = self.xp.autograd.grad([s for s, _ in pairs], inputs, [v for _, v in pairs], allow_unused=True)
        return dict(zip(positions, [self._filled(g, x) for g, x in zip(found, inputs, strict=True)], strict=True))

    def _filled(self, gradient, x):
        return self.xp.zeros_like(x) if gradient is None else gradient

    def _watched(self, args):
        return [a.detach().requires_grad_() if isinstance(a, self.xp.Tensor) else a for a in args]

    def vmap(self, function):
        return self.xp.func.vmap(function)

    def compiled(self, function, mode):
        if mode not in self.modes:
            return super().compiled(function, mode)
        # A program compiles a function for a few shapes; the suite does for more than torch keeps.
        self.xp.compiler.reset()
        return self.xp.compile(function, fullgraph=True, dynamic=False)


class TensorFlow(Library):
    """TensorFlow: GradientTape and tf.function. PyTorch, where it is installed, is imported before it."""

    name, module = "tensorflow", "tensorflow"
    dtypes = ("float64", "float32", "float16", "bfloat16")
    layouts = ("contiguous",)
    modes = ("tf.function", "tf.function(jit_compile=True)")
    batch_modes = ("tf.function(jit_compile=True), any batch",)
    differentiates = True
    channel_axis = -1

    @functools.cached_property
    def xp(self):
        if importlib.util.find_spec("torch"):
            importlib.import_module("torch")  # the other order can crash
        return importlib.import_module("tensorflow")

    def array(self, values, dtype, layout="contiguous"):
        tf = self.xp
        return tf.constant(values) if dtype == "bool" else tf.cast(tf.constant(np.asarray(values, np.float64)), dtype)

    def numpy(self, x):
        return self.xp.cast(x, "float64").numpy()

    def kind(self, x):
        if not isinstance(x, self.xp.Tensor) or isinstance(x, self.xp.Variable):
            raise TypeError(f"not a TensorFlow tensor: {type(x)}")
        return Kind(self.name, x.dtype.name, x.device, "contiguous")

    def vjp(self, function, args, options, dy):
        positions = _positions(args)
        inputs = [args[i] for i in positions]
        with self.xp.GradientTape() as tape:
            tape.watch(inputs)
            out = function(*args, **options)
            y = first(out)
        found = tape.gradient(y, inputs, output_gradients=dy)
        return out, {i: g for i, g in zip(positions, found, strict=True) if g is not None}

    def hessian_product(self, function, args, options, dy, directions):
        positions = _positions(args)
        inputs = [args[i] for i in positions]
        with self.xp.GradientTape() as outer:
            outer.watch(inputs)
            with self.xp.GradientTape() as tape:
                tape.watch(inputs)
                y = first(function(*args, **options))
            slopes = tape.gradient(y, inputs, output_gradients=dy)
        zero = self.xp.UnconnectedGradients.ZERO
        found = outer.gradient(slopes, inputs, output_gradients=list(directions), unconnected_gradients=zero)
        return dict(zip(positions, found, strict=True))

    def compiled(self, function, mode):
        if mode not in (*self.modes, *self.batch_modes):
            return super().compiled(function, mode)
        if mode in self.modes:
            return self.xp.function(function, jit_compile=mode.endswith("(jit_compile=True)") or None)
        tf, program = self.xp, None

        def of_any_batch(*args):
            nonlocal program
            if program is None:
                shape = tf.nest.flatten(args)[0].shape  # x's

                def spec(a):
                    return tf.TensorSpec((None, *shape[1:]) if a.shape == shape else a.shape, a.dtype)

                signature = tf.nest.map_structure(spec, args)
                program = tf.function(function, input_signature=signature, jit_compile=True, autograph=False)
            return program(*args)

        return of_any_batch


class Jax(Library):
    """JAX with float64 switched on: vjp and jit."""

    name, module = "jax", "jax"
    dtypes = ("float64", "float32", "float16", "bfloat16")
    layouts = ("contiguous",)
    modes = ("jax.jit",)
    thrifty = True
    differentiates = True
    channel_axis = -1

    def session(self):
        if hasattr(self.xp, "enable_x64"):
            return self.xp.enable_x64(True)
        return importlib.import_module("jax.experimental").enable_x64(True)  # where older JAX has it

    def array(self, values, dtype, layout="contiguous"):
        return self.xp.numpy.asarray(np.asarray(values), dtype=getattr(self.xp.numpy, dtype))

    def numpy(self, x):
        return np.asarray(x).astype(np.float64)

    def kind(self, x):
        if not isinstance(x, self.xp.Array):
            raise TypeError(f"not a JAX array: {type(x)}")
        return Kind(self.name, str(x.dtype), str(x.device), "contiguous")

    def vjp(self, function, args, options, dy):
        positions = _positions(args)

        def call(*arrays):
            out = function(*_placed(args, positions, arrays), **options)
            return first(out), out

        _, pullback, out = self.xp.vjp(call, *(args[i] for i in positions), has_aux=True)
        return out, dict(zip(positions, pullback(dy), strict=True))

    def hessian_product(self, function, args, options, dy, directions):
        positions = _positions(args)

        @self.xp.jit  # compiled as one program in half the time
        def product(arrays, dy, directions):
            def slopes(*arrays):
                _, pullback = self.xp.vjp(lambda *a: first(function(*_placed(args, positions, a), **options)), *arrays)
                return pullback(dy)

            return self.xp.vjp(slopes, *arrays)[1](directions)

        found = product(tuple(args[i] for i in positions), dy, tuple(directions))
        return dict(zip(positions, found, strict=True))

    def vmap(self, function):
        return self.xp.vmap(function)

    def compiled(self, function, mode):
        return self.xp.jit(function) if mode in self.modes else super().compiled(function, mode)


#: PyTorch stands before TensorFlow, as it must be imported before it.
LIBRARIES: dict[str, Library] = {a.name: a for a in (Library(), Strict(), Torch(), TensorFlow(), Jax(), Cupy())}


def installed(name: str) -> bool:
    """Whether the library can be imported (for CuPy: and finds a device)."""
    if importlib.util.find_spec(LIBRARIES[name].module) is None:
        return False
    return name != "cupy" or importlib.import_module("cupy").cuda.is_available()


def library(name: str) -> Library:
    """The adapter of a library that is installed."""
    if name not in LIBRARIES:
        raise ValueError(f"There is no library {name!r}; there are: {', '.join(LIBRARIES)}.")
    if not installed(name):
        device = " or finds no device" if name == "cupy" else ""
        raise Missing(f"{name} was asked for, but {LIBRARIES[name].module} is not installed{device}.")
    return LIBRARIES[name]


def available() -> tuple[list[str], list[str]]:
    """The names of the libraries that are installed, and of those that are not."""
    there = [name for name in LIBRARIES if installed(name)]
    return there, [name for name in LIBRARIES if name not in there]


def first(out: Any) -> Array:
    """y, of a function that returns y or (y, statistics)."""
    return out[0] if isinstance(out, tuple) else out


def _positions(args: Sequence) -> list[int]:
    return [i for i, a in enumerate(args) if a is not None and not isinstance(a, int)]


def _placed(args: Sequence, positions: Sequence[int], arrays: Sequence) -> list:
    placed = dict(zip(positions, arrays, strict=True))
    return [placed.get(i, a) for i, a in enumerate(args)]
