"""What the commands share: colours, a console, a file for JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

color_option = click.option(
    "--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True, help="Colours."
)
json_option = click.option("--json", "path", metavar="FILE", help="Write every figure to FILE.")


@contextlib.contextmanager
def written(path: str | None) -> Iterator[Callable[[Any], None]]:
    """A function that writes JSON to ``path``, as :func:`replaced` writes."""
    with replaced(path, "--json") as write:
        yield lambda value: write(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replaced(path: str | None, option: str) -> Iterator[Callable[[str], None]]:
    """A function that writes text to ``path``: all of it or nothing, and known to be possible before work begins."""
    if path is None:
        yield lambda text: None
        return
    if path == "-":
        raise click.UsageError(f"{option} wants a file to write to; received '-', and standard output has the table.")
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise click.UsageError(f"{option} wants a file to write to; received {path!r}, which is none.")
    try:
        handle, part = tempfile.mkstemp(dir=target.parent, prefix=".normkit-")
    except OSError as error:
        raise click.UsageError(f"{option} cannot write {path!r}: {error.strerror}.") from None
    os.close(handle)

    def write(text: str) -> None:
        Path(part).write_text(text, "utf-8")
        Path(part).chmod(0o666 & ~_umask())
        os.replace(part, target)

    try:
        yield write
    finally:
        Path(part).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


#: Columns that tables are given where none are told of, as in a pipe; and that they need not to cut numbers.
WIDE, NARROW = 120, 80


def console(color: str) -> Console:
    """Standard output: colours on a terminal or where FORCE_COLOR asks for them; the option overrides all."""
    told = os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty()
    width = max(Console().width, NARROW) if told else WIDE
    if color == "always":
        return Console(width=width, force_terminal=True, color_system="standard", no_color=False, highlight=False)
    return Console(width=width, color_system=None if color == "never" else "auto", highlight=False)
