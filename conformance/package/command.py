"""The command `normkit`, run as a program, and interpreters that start otherwise."""

import os
import subprocess
import sys


def normkit_command(*args, cwd, width=80, site=None, **variables):
    """Run it as a program in ``cwd``; ``site`` is for PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TERM")}
    environment |= {"COLUMNS": str(width), "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"} | variables
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    command = [sys.executable, "-P", "-m", "normkit", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8")


def sitecustomize(folder, code):
    """A folder for PYTHONPATH whose ``code`` every interpreter runs as it starts."""
    (folder / "sitecustomize.py").write_text(code)
    return folder


def hiding(folder, *names):
    """A folder for PYTHONPATH with which no module of these names is found."""
    find = f"lambda name, *args: None if name in {names!r} else find(name, *args)"
    return sitecustomize(folder, f"import importlib.util as u\nfind = u.find_spec\nu.find_spec = {find}")
