"""The command `normkit`: check, info, bench are here; convert, inspect, study, divergences in files of their own."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

import normkit
from normkit import _check, _compare, _divergences, _info, _page, _table
from normkit._convert import commands
from normkit._terminal import color_option, console, json_option, replaced, written
from normkit.conformance.cases import DTYPES
from normkit.conformance.libraries import LIBRARIES, Missing
from normkit.study.command import study

#: Ways to run a function; "compiled" stands for all but the first.
MODES = ("eager", "compiled", *(m for library in LIBRARIES.values() for m in (*library.modes, *library.batch_modes)))

_backends = click.option(
    "--backend", "names", multiple=True, metavar="NAME", help=f"One of {', '.join(LIBRARIES)}; may be repeated."
)


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
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"normkit: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left goes at the end
        return 2
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
@click.option("--html", metavar="FILE", help="Write a page: errors, ladders, agreement and, timed for it, speed.")
@click.option("--no-speed", is_flag=True, help="Time nothing for the page.")
@json_option
@click.option("--compare", nargs=2, metavar="OLD NEW", help="Show what moved between two files of --json.")
@click.option("--factor", type=click.FloatRange(min=1), help=f"For --compare; {_compare.FACTOR:g} if not given.")
@color_option
def check(
    names: tuple[str, ...],
    quick: bool,
    html: str | None,
    no_speed: bool,
    path: str | None,
    compare: tuple[str, str] | None,
    factor: float | None,
    color: str,
) -> int:
    """Hold normkit, and each library's own layers, to float64.

    Every layer runs on photographs, digits, tabular columns and ladders of offsets and scales: forward, gradients,
    running statistics. --compare measures nothing: a row has moved where its error is FACTOR times as large or as small
    as it was. Exit status: 0 within tolerance, 1 out of it (--compare: something got out of it), 2 for a wrong call.
    """
    if compare is not None:
        with _refusals():
            if names or quick or html or no_speed or path:
                raise ValueError("--compare measures nothing: beside it there may be --factor and --color.")
            old, new = (_compare.loaded(name) for name in compare)
            found = _compare.compare(old, new, factor or _compare.FACTOR)
        _table.show_changes(console(color), found)
        return 1 if found.lost else 0
    with _refusals():
        if factor is not None:
            raise ValueError("--factor is for --compare.")
        if no_speed and html is None:
            raise ValueError("--no-speed is for --html.")
        if html is not None:
            if path is not None and Path(html).resolve() == Path(path).resolve():
                raise ValueError(f"--html and --json want two files; received {html!r} for both.")
            _page.check()
    with replaced(html, "--html") as publish, written(path) as write, _refusals(), _progress() as step:
        report = _check.run(names, quick=quick, speed=html is not None and not no_speed, step=step)
        write(report.json())
        if html is not None:
            publish(_page.render(report))
    _table.show(console(color), report)
    return 0 if report.passed else 1


@main.command()
@color_option
def info(color: str) -> int:
    """Print versions, libraries, devices, threads."""
    bar = Console(stderr=True, highlight=False)
    with bar.status("") if sys.stderr.isatty() else contextlib.nullcontext() as status:
        found = _info.gather(lambda name: status.update(f"importing {name}") if status else None)
    _table.info(console(color), found)
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
@click.option("--goals", is_flag=True, help="Only what has a goal, with two threads, in one table.")
@click.option("--sweep", is_flag=True, help="Sizes from 1 KB to 512 MB instead of the workloads.")
@click.option("--load", metavar="FILE", help="Show what --json has written; nothing is timed.")
@click.option("--plot", metavar="FILE", help="Draw the sweep, as .svg or .png.")
@click.option("--markdown", is_flag=True, help="Print what has a goal, as a table in Markdown.")
@json_option
@color_option
def bench(path: str | None, color: str, plot: str | None, markdown: bool, load: str | None, **options: Any) -> int:
    """Time every layer against the library's own, the plain path without kernels, and a copy.

    Exit status: 0, 1 where normkit raised, 2 for a wrong call. What was timed before an interruption is in the FILE of
    --json, and --load shows it.
    """
    from normkit import _bench
    from normkit.bench import table

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with written(path) as write, _refusals():
        if load is not None and (path or any(options.values())):
            raise ValueError("--load times nothing: beside it there may be --plot, --markdown and --color.")
        report = None if load is None else _bench.loaded(load)
        kind = _bench.kind(options.pop("goals"), options.pop("sweep")) if report is None else report.kind
        if plot is not None:
            _bench.check_plot(plot, kind)
        if report is None:
            report = _bench.run(**options, kind=kind, save=write, console=_bars())
        if load is None and not report.rows:
            raise ValueError(table.NOTHING)
        if markdown:
            print(_bench.markdown(report))
        else:
            table.show(console(color), report)
        if plot is not None:
            _bench.draw(report, plot)
    return 1 if report.broken or report.died else 0


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
def _progress() -> Iterator[Callable[[str, str, float], None]]:
    """A bar for each library on standard error, where that is a terminal."""
    columns = TextColumn("{task.fields[name]}"), BarColumn(24), TaskProgressColumn(), TextColumn("{task.description}")
    bar = Console(stderr=True, highlight=False)
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=bar, transient=True, disable=not sys.stderr.isatty()) as progress:

        def step(name: str, label: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task("", total=1.0, name=name)
            progress.update(tasks[name], completed=share, description=label)

        yield step


main.add_command(commands.convert)
main.add_command(commands.inspect_command)
main.add_command(study)
main.add_command(_divergences.divergences)
