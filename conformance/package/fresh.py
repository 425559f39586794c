"""Python code in a fresh interpreter, away from the source tree."""

import os
import subprocess
import sys
from pathlib import Path


def run(code: str, cwd: Path, *, path: Path | None = None) -> str:
    """Standard output of ``code``; what it printed to standard error is in the exception where it fails."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise AssertionError(f"exit status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()
