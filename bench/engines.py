"""How each library runs a workload, as a program would: forward, backward, both; and the copy all is compared with."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import normkit as nk
from normkit.backends import kernels
from normkit.bench.timing import Thunk
from normkit.conformance import inputs, measure
from normkit.conformance.cases import Case
from normkit.conformance.libraries import LIBRARIES, Library, first

Array = Any
Function = Callable[..., Any]
Compile = Callable[[Function], Function]
EAGER = "eager"


def unchanged(function: Function) -> Function:
    """The function, not compiled."""
    return function


def bound(case: Case, function: Function, given: Mapping[str, Array]) -> Function:
    """The function of x and the parameters: the case's options, and statistics, which nobody learns, are filled in."""
    options = dict(case.options)
    fixed = [given[name] for name in ("mean", "var") if name in given]
    if case.layer == "group_norm":
        fixed.append(options.pop("num_groups"))
    if not fixed:
        return lambda *arrays: function(*arrays, **options)
    return lambda x, *params: function(x, *fixed, *params, **options)


class Engine:
    """What resembles NumPy: gradients by ``nk.vjp``, or by the function's own ``vjp``."""

    #: Packages besides the library whose versions matter.
    packages: tuple[str, ...] = ("numpy",)
    #: The library is meant to be used compiled.
    compiles = False

    def __init__(self, library: Library) -> None:
        self.library = library

    @property
    def modes(self) -> tuple[str, ...]:
        """Eager, then the library's compiled modes."""
        return (EAGER, *self.library.modes, *self.library.batch_modes)

    def device(self) -> str:
        """What computes."""
        return "cpu"

    def use(self, device: str) -> None:
        """Compute on a device that was asked for."""
        raise ValueError(f"{self.library.name} has no choice of device here; torch and jax have. Received {device!r}.")

    def threads(self) -> int | None:
        """How many threads compute, where that is known."""
        return None

    def arrays(self, case: Case, dtype: str) -> dict[str, Array]:
        """Normally distributed operands, and ``dy``."""
        given = measure.arrays(self.library, case, inputs.operands(case, inputs.BY_NAME["normal"], dtype), dtype)
        for array in given.values():
            self.done(array)
        return given

    def thunk(
        self, case: Case, module: ModuleType, given: Mapping[str, Array], direction: str, mode: str = EAGER
    ) -> Thunk:
        """``module``'s function for the case, made ready: what is left to do is the pass."""
        function = getattr(module, case.layer)
        function = bound(case, function if direction == "forward" else self.differentiable(function), given)
        compiled = functools.partial(self.library.compiled, mode=mode) if mode != EAGER else unchanged
        args = [given[name] for name in ("x", "weight", "bias") if name in given]
        return getattr(self, direction)(function, args, given["dy"], compiled)

    def differentiable(self, function: Function) -> Function:
        """What ``backward`` and ``both`` are made of."""
        return getattr(function, "vjp", None) or functools.partial(nk.vjp, function)

    def forward(self, function: Function, args: Sequence[Array], dy: Array, compiled: Compile) -> Thunk:
        """y, without a gradient in sight."""
        function = compiled(function)
        return lambda: function(*args)

    def backward(self, function: Function, args: Sequence[Array], dy: Array, compiled: Compile) -> Thunk:
        """The gradients of everything, after a forward pass that is not timed."""
        pullback = function(*args)[1]
        return lambda: pullback(dy)

    def both(self, function: Function, args: Sequence[Array], dy: Array, compiled: Compile) -> Thunk:
        """A forward pass that keeps what the gradients need, and the gradients."""
        return lambda: function(*args)[1](dy)

    def copy(self, x: Array) -> Thunk:
        """x, copied to memory that is there already."""
        to = self.library.xp.empty_like(x)
        return lambda: self.library.xp.copyto(to, x)

    def double(self, x: Array) -> Thunk:
        """x * 2, by the library itself."""
        return lambda: x * 2

    def bare(self, x: Array, dy: Array, direction: str) -> Thunk:
        """What reads and writes as much as a pass, by the library itself: x * 2, x + dy, or one and the other."""
        forward, backward = self.double(x), self.total(x, dy)
        return {"forward": forward, "backward": backward, "both": lambda: (forward(), backward())}[direction]

    def total(self, x: Array, dy: Array) -> Thunk:
        """x + dy, by the library itself."""
        return lambda: x + dy

    def done(self, result: Any) -> Any:
        """The result, computed."""
        return result

    def wait(self) -> None:
        """Block until the device has done all."""

    def forget(self) -> None:
        """Drop what was compiled for other comparisons, where it would stand in the way of the next."""


class NumpyEngine(Engine):
    """NumPy computes in one thread, the kernels in more."""

    def threads(self):
        return kernels.info().get("threads")


class CupyEngine(Engine):
    """CuPy: the stream is waited for."""

    packages = ("cupy", "numpy")

    def device(self):
        return self.library.xp.cuda.runtime.getDeviceProperties(0)["name"].decode()

    def wait(self):
        self.library.xp.cuda.get_current_stream().synchronize()


class TorchEngine(Engine):
    """PyTorch: autograd."""

    packages = ("torch",)

    def device(self):
        torch = self.library.xp
        return torch.cuda.get_device_name() if torch.get_default_device().type == "cuda" else "cpu"

    def use(self, device):
        try:
            self.library.xp.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"PyTorch cannot use the device {device!r}: {str(error).partition(chr(10))[0]}") from None
        self.library.xp.set_default_device(device)

    def threads(self):
        return self.library.xp.get_num_threads()

    def differentiable(self, function):
        return function

    def backward(self, function, args, dy, compiled):
        args = [a.detach().requires_grad_() for a in args]
        y = first(compiled(function)(*args))
        grad = self.library.xp.autograd.grad
        return lambda: grad(y, args, dy, retain_graph=True, allow_unused=True)

    def both(self, function, args, dy, compiled):
        function = compiled(function)
        args = [a.detach().requires_grad_() for a in args]
        grad = self.library.xp.autograd.grad
        return lambda: grad(first(function(*args)), args, dy, allow_unused=True)

    def copy(self, x):
        to = self.library.xp.empty_like(x)
        return lambda: to.copy_(x)

    def wait(self):
        if self.library.xp.get_default_device().type == "cuda":
            self.library.xp.cuda.synchronize()

    def forget(self):
        self.library.xp.compiler.reset()


class TensorFlowEngine(Engine):
    """TensorFlow: GradientTape. It has no copy into memory that is there, so the copy makes a new tensor."""

    packages = ("tensorflow", "keras")

    def device(self):
        config = self.library.xp.config
        gpus = config.list_physical_devices("GPU")
        return config.experimental.get_device_details(gpus[0])["device_name"] if gpus else "cpu"

    def threads(self):
        set_to = self.library.xp.config.threading.get_intra_op_parallelism_threads()
        return set_to or int(os.environ.get("TF_NUM_INTRAOP_THREADS", 0)) or cores()

    def differentiable(self, function):
        return function

    def backward(self, function, args, dy, compiled):
        function = compiled(function)
        with self.library.xp.GradientTape(persistent=True) as tape:
            tape.watch(args)
            y = first(function(*args))
        return lambda: tape.gradient(y, args, output_gradients=dy)

    def both(self, function, args, dy, compiled):
        tf = self.library.xp

        def step(args, dy):
            with tf.GradientTape() as tape:
                tape.watch(args)
                y = first(function(*args))
            return tape.gradient(y, args, output_gradients=dy)

        step = compiled(step)
        return lambda: step(args, dy)

    def copy(self, x):
        return lambda: self.library.xp.raw_ops.DeepCopy(x=x)

    def forget(self):
        # Each comparison compiles functions of its own, which TensorFlow takes for retracing, and warns of.
        self.library.xp.get_logger().setLevel("ERROR")

    def wait(self):
        if self.library.xp.config.list_logical_devices("GPU"):
            self.library.xp.test.experimental.sync_devices()


class JaxEngine(Engine):
    """JAX: vjp, whole passes jitted where the mode says so. Every call is waited for."""

    packages = ("jax", "jaxlib", "flax")
    compiles = True

    def device(self):
        default = self.library.xp.config.jax_default_device
        return (default or self.library.xp.devices()[0]).device_kind

    def use(self, device):
        try:
            found = self.library.xp.devices(device)[0]
        except RuntimeError as error:
            raise ValueError(f"JAX cannot use the device {device!r}: {str(error).partition(chr(10))[0]}") from None
        self.library.xp.config.update("jax_default_device", found)

    def threads(self):
        return int(os.environ.get("PJRT_NPROC", 0)) or cores()

    def differentiable(self, function):
        return function

    def forward(self, function, args, dy, compiled):
        function = compiled(function)
        return lambda: self.done(function(*args))

    def backward(self, function, args, dy, compiled):
        pullback = self.library.xp.vjp(compiled(lambda *a: first(function(*a))), *args)[1]
        pull = compiled(lambda pullback, dy: pullback(dy))
        return lambda: self.done(pull(pullback, dy))

    def both(self, function, args, dy, compiled):
        step = compiled(lambda args, dy: self.library.xp.vjp(lambda *a: first(function(*a)), *args)[1](dy))
        return lambda: self.done(step(args, dy))

    def copy(self, x):
        to = [self.library.xp.numpy.zeros_like(x)]
        copied = self.library.xp.jit(lambda to, x: to.at[...].set(x), donate_argnums=0)

        def copy():
            to[0] = self.done(copied(to[0], x))

        return copy

    def double(self, x):
        return lambda: self.done(x * 2)

    def total(self, x, dy):
        return lambda: self.done(x + dy)

    def done(self, result):
        return self.library.xp.block_until_ready(result)


_ENGINES = {
    "numpy": NumpyEngine,
    "cupy": CupyEngine,
    "torch": TorchEngine,
    "tensorflow": TensorFlowEngine,
    "jax": JaxEngine,
}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def engine(name: str) -> Engine:
    """The engine of a library."""
    return _ENGINES.get(name, Engine)(LIBRARIES[name])
