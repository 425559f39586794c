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
from normkit.bench.engines import Engine


def describe(engines: Iterable[Engine]) -> dict[str, Any]:
    """What has to be known to read a figure, ready for JSON."""
    engines = list(engines)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"normkit": nk.__version__, **_versions(p for e in engines for p in e.packages)},
        "devices": {e.library.name: e.device() for e in engines},
        "threads": {e.library.name: threads for e in engines if (threads := e.threads()) is not None},
        "variables": {k: v for k, v in os.environ.items() if k.startswith("NORMKIT_") or k.endswith("_NUM_THREADS")},
    }


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
