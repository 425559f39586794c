"""Where figures come from: versions, processor, device, threads, date."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import normkit as nk
from normkit.backends import kernels
from normkit.bench.engines import Engine, cores

#: What the libraries read for how many threads to use, when they are imported.
LIMITS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "PJRT_NPROC")


def limit_threads(count: int) -> None:
    """Let every library use ``count`` threads, those of them that are imported after this."""
    os.environ.update(dict.fromkeys(LIMITS, str(count)))


def describe(engines: Iterable[Engine]) -> dict[str, Any]:
    """What has to be known to read a figure, ready for JSON."""
    engines = list(engines)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": cores(),
        "versions": {"normkit": nk.__version__, **_versions(p for e in engines for p in e.packages)},
        "devices": {e.library.name: e.device() for e in engines},
        "threads": {e.library.name: threads for e in engines if (threads := e.threads()) is not None},
        "kernels": {e.library.name: kernels.info() for e in engines},
        "variables": {k: v for k, v in os.environ.items() if k.startswith("NORMKIT_") or k in LIMITS},
    }


def merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two descriptions in one, where each is of other libraries."""
    return {**a, **{k: {**a.get(k, {}), **v} if isinstance(v, dict) else v for k, v in b.items()}}


def free_memory() -> float:
    """Bytes that may be had without swapping; infinite where the system does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else ()
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the top modules' distributions, those that are installed."""
    known = metadata.packages_distributions()
    return {p: metadata.version(known[p][0]) for p in packages if p in known}


def _processor() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
