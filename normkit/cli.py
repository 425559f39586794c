"""The commands `normkit check`, `normkit info` and `normkit bench`."""

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
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

import normkit
from normkit import _check, _info, _table
from normkit.conformance.cases import DTYPES
from normkit.conformance.libraries import LIBRARIES, Missing

#: Ways to run a function; "compiled" stands for all but the first.
MODES = ("eager", "compiled", *(mode for library in LIBRARIES.values() for mode in library.modes))

_backends = click.option("--backend", "names", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
_color = click.option(
    "--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True, help="Colours."
)
_json = click.option("--json", "path", metavar="FILE", help="Write every figure to FILE.")


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit status; what is wrong with it is said in one sentence."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ⁻ or ✓ shows a question mark
    try:
        return main(args, prog_name="normkit", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "normkit"
        print(f"{where}: {' '.join(error.format_message().split())}", file=sys.stderr)
        return error.exit_code
    except click.Abort:
        print("normkit: interrupted", file=sys.stderr)
        return 130


@click.group()
@click.version_option(normkit.__version__, message="normkit %(version)s")
def main() -> None:
    """One normalization library for every array."""
    # Frameworks read these when they are imported. The native layers of TensorFlow are Keras's, on TensorFlow.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["KERAS_BACKEND"] = "tensorflow"


@main.command()
@_backends
@click.option("--quick", is_flag=True, help="float32 and fewer inputs: seconds.")
@_json
@_color
def check(names: tuple[str, ...], quick: bool, path: str | None, color: str) -> int:
    """Hold normkit, and each library's own layers, to float64.

    Every layer runs on photographs, digits, tabular columns and ladders of offsets and scales: forward, gradients,
    running statistics. Exit status: 0 within tolerance, 1 out of it, 2 for a wrong call.
    """
    # The arrays are small: more threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with _written(path) as write, _refusals(), _progress() as step:
        report = _check.run(names, quick=quick, step=step)
        write(report.json())
    _table.show(_console(color), report)
    return 0 if report.passed else 1


@main.command()
@_color
def info(color: str) -> int:
    """Print versions, libraries, devices, threads."""
    console = Console(stderr=True, highlight=False)
    with console.status("") if sys.stderr.isatty() else contextlib.nullcontext() as status:
        found = _info.gather(lambda name: status.update(f"importing {name}") if status else None)
    _table.info(_console(color), found)
    return 0


@main.command()
@_backends
@click.option("--quick", is_flag=True, help="Fewer workloads and rounds, float32.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Only this one; may be repeated.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Only this one; may be repeated.")
@click.option("--workload", "named", multiple=True, metavar="TEXT", help="Only those with TEXT in their names.")
@click.option("--threads", multiple=True, type=click.IntRange(1), help="So many; may be repeated, to compare.")
@click.option("--device", metavar="NAME", help="What PyTorch and JAX compute on, such as cuda.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="For one comparison.")
@click.option("--sweep", is_flag=True, help="Sizes from 1 KB to 512 MB instead of the workloads.")
@click.option("--plot", metavar="FILE", help="Draw the sweep, as .svg or .png.")
@_json
@_color
def bench(path: str | None, color: str, plot: str | None, **options: Any) -> int:
    """Time every layer against the library's own, the plain path without kernels, and a copy.

    Exit status: 0, 1 where normkit raised, 2 for a wrong call.
    """
    from normkit import _bench
    from normkit.bench import table

    with _written(path) as write, _refusals():
        if plot is not None:
            _bench.check_plot(plot, sweep=options["sweep"])
        report = _bench.run(**options, save=write, console=_bars())
    table.show(_console(color), report)
    if plot is not None:
        _bench.draw(report, plot)
    return 1 if report.broken else 0


def _bars() -> Console | None:
    """Where progress is shown."""
    return Console(stderr=True, highlight=False) if sys.stderr.isatty() else None


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A library that is unknown or missing is a wrong call."""
    try:
        yield
    except (Missing, ValueError) as error:
        raise click.UsageError(str(error)) from None


@contextlib.contextmanager
def _written(path: str | None) -> Iterator[Callable[[Any], None]]:
    """A function that writes JSON to ``path``: all of it or nothing, and known to be possible before work begins."""
    if path is None:
        yield lambda value: None
        return
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise click.UsageError(f"--json wants a file to write to; received {path!r}, which is none.")
    try:
        handle, part = tempfile.mkstemp(dir=target.parent, prefix=".normkit-")
    except OSError as error:
        raise click.UsageError(f"--json cannot write {path!r}: {error.strerror}.") from None
    os.close(handle)

    def write(value: Any) -> None:
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
        Path(part).write_text(text + "\n", "utf-8")
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


def _console(color: str) -> Console:
    """Standard output: colours on a terminal or where FORCE_COLOR asks for them; the option overrides all."""
    if color == "always":
        return Console(force_terminal=True, color_system="standard", no_color=False, highlight=False)
    return Console(color_system=None if color == "never" else "auto", highlight=False)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, str, float], None]]:
    """A bar for each library on standard error, where that is a terminal."""
    columns = TextColumn("{task.fields[name]}"), BarColumn(24), TaskProgressColumn(), TextColumn("{task.description}")
    console = Console(stderr=True, highlight=False)
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:

        def step(name: str, label: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task("", total=1.0, name=name)
            progress.update(tasks[name], completed=share, description=label)

        yield step
