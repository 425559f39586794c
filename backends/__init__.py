"""The registry of array libraries.

Add a backend in five steps:

1. Subclass :class:`~normkit.backends.protocol.ArrayBackend` (or write the :class:`Backend` protocol out). A library
   that conforms to the array API standard needs a ``name`` and no more; without an entry it is served as ``array-api``.
2. Describe it by an :class:`Entry`: its name, its top module, the names of its array types there, where the backend is.
3. In another distribution, advertise the entry under the entry-point group ``normkit.backends``; here, add it to
   ``BUILTIN``.
4. Give the conformance suite an adapter (``conformance/libraries.py``).
5. Run ``python -m pytest --pyargs normkit.conformance --backend NAME``.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from normkit.backends.protocol import ArrayBackend, Backend

GROUP = "normkit.backends"


class UnknownBackendError(ValueError):
    """No backend has this name."""


class MissingLibraryError(ImportError):
    """The backend is known, and its library is not installed."""


@dataclass(frozen=True)
class Entry:
    """How a library is recognized, and where its backend is, without importing either."""

    name: str
    #: The library's top module. A type is looked for there only once the user's program has imported it.
    module: str
    #: Names of the array types, as attributes of the module (dotted where they are deeper).
    types: tuple[str, ...]
    #: ``"package.module:Class"`` of the backend, called without arguments.
    backend: str

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise ValueError(f"A backend's name consists of letters, digits, '-' and '_'; received {self.name!r}.")
        if isinstance(self.types, str) or not self.types:
            raise ValueError(f"types of backend {self.name!r} must be a tuple of type names; received {self.types!r}.")
        if self.backend.count(":") != 1:
            raise ValueError(f"backend of {self.name!r} must read 'module:Class'; received {self.backend!r}.")

    def names(self, kind: type) -> bool:
        """Whether the type, or one that it is derived from, has the name of one of the library's."""
        return any(base.__module__ == self.module and base.__qualname__ in self.types for base in kind.__mro__)

    def matches(self, kind: type) -> bool:
        """Whether arrays of this type belong to the library."""
        module = sys.modules.get(self.module)
        return module is not None and issubclass(kind, tuple(self._classes(module)))

    def _classes(self, module):
        for name in self.types:
            found = module
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is not None:
                yield found

    def load(self) -> Backend:
        """The backend, one instance for the life of the process."""
        if self.name == "torch":
            _meet_torch()
            # torch.compile, which may be tracing this, follows an import statement but no import by name.
            from normkit.backends.torch.backend import BACKEND

            return BACKEND
        return _load(self.backend)


@functools.cache
def _load(where: str) -> Backend:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)()


def _meet_torch() -> None:
    """Import PyTorch's backend. Where torch.compile reads the call that does, it is to start again and read less."""
    if "normkit.backends.torch.backend" not in sys.modules:
        importlib.import_module("normkit.backends.torch.backend")
        importlib.import_module("normkit.backends.torch.graphs").start_again()


# As torch.compiler.assume_constant_result would have it: it is called, and not read.
_meet_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]


BUILTIN = (
    Entry("numpy", "numpy", ("ndarray",), "normkit.backends.numpy.backend:NumpyBackend"),
    Entry("cupy", "cupy", ("ndarray",), "normkit.backends.cupy.backend:CupyBackend"),
    Entry("torch", "torch", ("Tensor",), "normkit.backends.torch.backend:TorchBackend"),
    Entry("tensorflow", "tensorflow", ("Tensor", "Variable"), "normkit.backends.tensorflow.backend:TensorflowBackend"),
    Entry("jax", "jax", ("Array", "core.Tracer"), "normkit.backends.jax.backend:JaxBackend"),
)
NAMES = tuple(entry.name for entry in BUILTIN)


@functools.cache
def advertised() -> tuple[Entry, ...]:
    """Entries of other distributions (entry-point group ``normkit.backends``)."""
    from importlib import metadata  # 30 ms that `import normkit` does not need

    entries: list[Entry] = []
    for point in metadata.entry_points(group=GROUP):
        entry = point.load()
        if not isinstance(entry, Entry):
            raise TypeError(f"Entry point {point.name!r} of group {GROUP!r} must be an Entry; received {entry!r}.")
        if entry.name in NAMES or entry.name in (known.name for known in entries):
            raise ValueError(f"Entry point {point.value!r} redefines the backend {entry.name!r}.")
        entries.append(entry)
    return tuple(entries)


def entries() -> Iterator[Entry]:
    """All known entries, the built-in ones first: reading the others takes milliseconds and happens only if needed."""
    yield from BUILTIN
    yield from advertised()


def backend_for_type(kind: type) -> Backend | None:
    """The backend whose arrays have this type: a built-in one, an advertised one, or any conforming library's."""
    # torch.compile, which may be tracing this, would check all of sys.modules in each call of what it made (60 µs).
    for candidate in BUILTIN:
        if candidate.names(kind):
            return candidate.load()
    for candidate in entries():
        if candidate.matches(kind):
            return candidate.load()
    return _conforming(kind.__module__.partition(".")[0]) if hasattr(kind, "__array_namespace__") else None


@functools.cache
def _conforming(module: str) -> Backend:
    """The backend of a library that has no entry: one for each, so that two are not mixed."""
    return ArrayBackend()


def entry(name: str) -> Entry:
    """The entry of this name."""
    for candidate in entries():
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in entries())
    raise UnknownBackendError(f"There is no backend {name!r}; there are: {known}.")


def get(name: str) -> Backend:
    """The backend of this name; its library is imported."""
    found = entry(name)
    try:
        importlib.import_module(found.module)
    except ModuleNotFoundError as error:
        if error.name != found.module:
            raise
        raise MissingLibraryError(f"Backend {name!r} needs {found.module}, which is not installed.") from None
    return found.load()


__all__ = [
    "BUILTIN",
    "GROUP",
    "NAMES",
    "ArrayBackend",
    "Backend",
    "Entry",
    "MissingLibraryError",
    "UnknownBackendError",
    "advertised",
    "backend_for_type",
    "entries",
    "entry",
    "get",
]
