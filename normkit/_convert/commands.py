"""The commands `normkit convert` and `normkit inspect`, and how they look."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import _terminal
from . import files
from .conversion import Conversion, convert_file, few
from .framework import FRAMEWORKS
from .inspection import Inspection, inspect
from .record import ConversionError, as_options

_NAMES = click.Choice(list(FRAMEWORKS))
_settings = click.option("--settings", metavar="FILE", help="JSON: class and arguments of layers, by name or pattern.")


@click.command(short_help="Carry the state of norm layers between frameworks.")
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@click.option("--from", "origin", type=_NAMES, help="Where IN comes from; needed where it does not say it.")
@click.option("--to", required=True, type=_NAMES, help="What OUT is for.")
@click.option("--eps", type=float, help="Of every layer of which IN does not say it.")
@click.option("--momentum", type=float, help="The same, in the sense of --from.")
@_settings
@click.option("--defaults", is_flag=True, help="Take the defaults of --from for what is not said.")
@click.option("--names", metavar="FILE", help="JSON: the name in OUT for names in IN.")
@click.option("--like", metavar="FILE", help="The model whose norm layers are filled, for .keras and .onnx.")
@click.option("--axis", type=int, help="Channel axis of batch, group and instance norm in OUT; default: as in IN.")
@click.option("--ndim", type=int, help="Rank of x, for haiku, whose parameters have it.")
@click.option("--count", type=int, help="Values per channel in a batch: rescale variances to what --to divides by.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@_terminal.json_option
@_terminal.color_option
def convert(
    source,
    target,
    origin,
    to,
    eps,
    momentum,
    settings,
    defaults,
    names,
    like,
    axis,
    ndim,
    count,
    overwrite,
    path,
    color,
) -> int:
    """Carry the state of norm layers from one framework's file to another's.

    IN and OUT are .safetensors, .npz, .keras or .onnx; IN also .pt or .pth. Only norm layers are converted; what is
    left out is named. Layers are told by name, and eps and momentum must be known: .keras and .onnx hold them, and so
    do files that this command wrote (in the metadata of .safetensors, in FILE.json next to .npz). For others give
    --eps and --momentum, --settings with a JSON file such as {"bn*": {"eps": 1e-3}, "ln": {"layer": "LayerNorm",
    "eps": 1e-6}} (in the words of --from; layers without running statistics are known by their class only), or
    --defaults.

    OUT in .safetensors or .npz has the norm layers' arrays by the names that --to has for them. OUT in .keras or .onnx
    is a copy of the model --like FILE with its norm layers filled.

    Exit status: 0, or 2 for a wrong call and for what cannot be converted; then nothing was written.
    """
    with _terminal.written(path) as write, _refusals():
        result = convert_file(
            source, target, to, like=like, overwrite=overwrite, framework=origin, axis=axis, ndim=ndim, count=count,
            settings=files.settings_file(Path(settings)) if settings else None, eps=eps, momentum=momentum,
            defaults=defaults, names=files.names_file(Path(names)) if names else None,
        )  # fmt: skip
        write(result.json())
    show_conversion(_terminal.console(color), result, target)
    return 0


@click.command("inspect", short_help="List the norm layers of a checkpoint; warn.")
@click.argument("source", metavar="FILE")
@click.option("--from", "origin", type=_NAMES, help="Where FILE comes from; by default, what its names look like.")
@_settings
@_terminal.json_option
@_terminal.color_option
def inspect_command(source, origin, settings, path, color) -> int:
    """List the norm layers of a checkpoint, and what looks wrong with them.

    FILE is .safetensors, .npz, .keras, .onnx, .pt or .pth. Files of arrays hold neither eps nor momentum; what is
    known of them comes from --settings or from `normkit convert`.

    Exit status: 0, 1 where there are findings, 2 for a wrong call.
    """
    with _terminal.written(path) as write, _refusals():
        told = files.settings_file(Path(settings)) if settings else {}
        found = inspect(source, framework=origin, settings=told)
        write(found.json())
    show_inspection(_terminal.console(color), found)
    return 1 if found.findings else 0


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What cannot be read, converted or written is a wrong call. Keras runs on the lightest backend that is there."""
    backends = (name for name in ("jax", "torch", "tensorflow") if importlib.util.find_spec(name))
    os.environ["KERAS_BACKEND"] = next(backends, "tensorflow")
    try:
        with warnings.catch_warnings(), as_options():
            warnings.simplefilter("ignore")
            yield
    except (ConversionError, ImportError) as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise click.UsageError(f"{where}{error.strerror or error}.") from None


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")


def show_conversion(console: Console, result: Conversion, target: str) -> None:
    """What was converted, which rules applied, what was left out."""
    heading = Text.assemble((f"{result.source} → {result.target}", "bold cyan"), f": {_counted(result)}")
    console.print(heading)
    table = _table()
    for name, options in (("rule", {"no_wrap": True}), ("what was done", {"ratio": 1}), ("layers", {"ratio": 1})):
        table.add_column(name, **options)
    groups: dict[tuple[str, str], list[str]] = {}
    for applied in sorted(result.rules, key=lambda a: a.rule):
        groups.setdefault((applied.rule, applied.text), []).append(applied.layer)
    for (rule, text), layers in groups.items():
        table.add_row(Text(rule, "yellow"), text, Text(few(layers), "dim"))
    console.print(table)
    console.print()
    if result.left:
        console.print(f"left out, {len(result.left)} arrays: {few(result.left)}")
        unsaid = [name for name, reason in result.left.items() if "settings" in reason]
        if unsaid:
            console.print(f"  of these, {len(unsaid)} may be norm layers, which --settings can say: {few(unsaid)}")
    console.print(Text.assemble(("✓ ", "green"), (f"{target} written", "bold green")))


def _counted(result: Conversion) -> str:
    counts: dict[str, int] = {}
    for norm in result.norms.values():
        counts[norm.kind] = counts.get(norm.kind, 0) + 1
    return ", ".join(f"{n} {kind}" for kind, n in counts.items())


def show_inspection(console: Console, found: Inspection) -> None:
    """One line for each layer, and below what looks wrong."""
    framework, _, number = found.heading().partition(":")
    console.print(Text.assemble((framework, "bold cyan"), f":{number}"))
    table = _table()
    bad = {f.layer for f in found.findings}
    for name in ("layer", "class", "shape", "eps", "momentum", "parameters", "statistics"):
        table.add_column(name, justify="right" if name in ("shape", "eps", "momentum") else "left", overflow="fold")
    for row in found.rows:
        shape = "×".join(map(str, row.lengths or ())) + (f" / {row.num_groups}" if row.num_groups else "")
        has_momentum = bool(row.statistics)
        table.add_row(
            Text(row.name or "(the layer)", "yellow" if row.name in bad else ""),
            row.layer,
            shape,
            _known(row.eps),
            (_known(row.momentum) if has_momentum else ""),
            row.dtype or "–",
            row.statistics,
        )
    if found.rows:
        console.print(table)
        console.print()
    for (kind, reason, fix), names in found.grouped().items():
        console.print(Text.assemble(("✗ ", "red"), (kind, "bold yellow"), f": {reason}. ", (f"{fix}. ", "green"),
                                    (few(names), "dim")))  # fmt: skip
    if found.unknown:
        console.print(f"{len(found.unknown)} arrays may be norm layers, which --settings can say: {few(found.unknown)}")
    if found.rows and not found.findings:
        console.print(Text.assemble(("✓ ", "green"), ("nothing looks wrong", "bold green")))


@functools.cache
def _known(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"
