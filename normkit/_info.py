"""What `normkit info` knows: versions, devices and threads of each library, kernels and advertised backends."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from normkit import backends
from normkit.bench import engines, machine
from normkit.conformance import libraries, natives


@dataclass(frozen=True)
class Facts:
    """One library: what it is, or why there is nothing to say."""

    version: str = ""
    device: str = ""
    threads: str = ""
    natives: str = ""
    error: str = ""


def of(name: str) -> Facts:
    """The facts of a library; it is imported."""
    library = libraries.LIBRARIES[name]
    if importlib.util.find_spec(library.module) is None:
        return Facts(error="not installed")
    try:
        with natives.quiet():
            assert library.xp
            if not libraries.installed(name):
                return Facts(error="no device")
            engine = engines.engine(name)
            found = machine.describe([engine])
    except Exception as error:
        return Facts(error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    others = {k: v for k, v in found["versions"].items() if k not in ("normkit", "numpy", library.module)}
    return Facts(
        version=str(getattr(library.xp, "__version__", "")),
        device=found["devices"][name],
        threads=str(found["threads"].get(name, "")),
        natives=", ".join(f"{k} {v}" for k, v in others.items()),
    )


def gather(step: Callable[[str], None] = lambda name: None) -> dict[str, Facts]:
    """The facts of each known library."""
    found = {}
    for name in libraries.LIBRARIES:
        step(name)
        found[name] = of(name)
    return found


def kernels() -> str:
    """What the fused kernels say of themselves, where there are any."""
    where = "normkit.backends.kernels"
    module: Any = importlib.import_module(where) if importlib.util.find_spec(where) else None
    tell = getattr(module, "info", None)
    if tell is None:
        return "none in this version"
    told = tell()
    return ", ".join(f"{k} {v}" for k, v in told.items()) if isinstance(told, dict) else str(told)


def advertised() -> str:
    """Backends that other distributions add."""
    try:
        found = backends.advertised()
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ", ".join(f"{entry.name} ({entry.module})" for entry in found) or "none"
