"""What `normkit info` knows: versions, devices and threads of each library, kernels and advertised backends."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import normkit as nk
from normkit import backends
from normkit.backends import kernels as fused
from normkit.bench import engines, machine
from normkit.conformance import libraries, natives


@dataclass(frozen=True)
class Facts:
    """One library: what it is, or why there is nothing to say."""

    version: str = ""
    device: str = ""
    threads: str = ""
    #: What serves a call.
    path: str = ""
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
            path = served(library)
    except Exception as error:
        return Facts(error=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    others = {k: v for k, v in found["versions"].items() if k not in ("normkit", "numpy", library.module)}
    return Facts(
        version=str(getattr(library.xp, "__version__", "")),
        device=found["devices"][name],
        threads=str(found["threads"].get(name, "")),
        path=path,
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
    """What the fused kernels say of themselves."""
    told = fused.info()
    if not told["built"]:
        return f"none: {told['reason']}"
    others = [name for name in told["instruction_sets"] if name != told["instruction_set"]]
    pool = {"openmp": "of the OpenMP runtime that is loaded", "own": "of its own"}[told["threads_of"]]
    threads = f"{told['threads']} thread{'s' * (told['threads'] != 1)} {pool}"
    return ", ".join([
        {"0": "off", "1": "on", "require": "required"}[told["mode"]] + f" (NORMKIT_KERNELS={told['mode']})",
        told["instruction_set"] + (f" (also {', '.join(others)})" if others else ""),
        threads,
        f"huge pages {'on' if told['hugepages'] else 'off'}",
        f"for {', '.join(told['kernels'])}",
    ])  # fmt: skip


def served(library: libraries.Library) -> str:
    """Which path serves a layer norm: "kernel" or "plain"."""
    x = library.array(np.arange(2.0**14).reshape(64, 256), "float32")
    before = fused.served()
    library.numpy(nk.layer_norm(x))
    return fused.served().since(before).path(forward=1)


def advertised() -> str:
    """Backends that other distributions add."""
    try:
        found = backends.advertised()
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ", ".join(f"{entry.name} ({entry.module})" for entry in found) or "none"
