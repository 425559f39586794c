"""The command `normkit divergences`: what frameworks do differently, as a table, and shown on small inputs."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normkit import _terminal
from normkit.conformance.divergences import DIVERGENCES, GROUPS, Divergence, demonstration
from normkit.conformance.divergences.demonstration import Demonstration, Outcome
from normkit.conformance.divergences.frameworks import DISTRIBUTIONS

SCHEMA = {"name": "normkit-divergences", "version": 1}
#: From this width on, each is one line of a table.
WIDE = 150


@click.command(short_help="What frameworks do differently, and a demonstration of each.")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--run", is_flag=True, help="Show each on a small input, in every framework that is installed.")
@_terminal.json_option
@_terminal.color_option
def divergences(ids: tuple[str, ...], run: bool, path: str | None, color: str) -> int:
    """List what frameworks do differently, and which argument of normkit selects which; of each ID, say more.

    With --run, torch, Keras, Flax, ONNX and others compute the same small input, beside normkit.

    Exit status: 0, 1 where a framework does not do what the table says, 2 for a wrong call.
    """
    found = [_named(id) for id in ids] or list(DIVERGENCES.values())
    console = _terminal.console(color)
    with _terminal.written(path) as write:
        shown = dict(_shown(found)) if run else {}
        rows = [{**d.json(), "demonstration": shown[d.id].json() if d.id in shown else None} for d in found]
        write({"schema": SCHEMA, "versions": versions() if run else {}, "divergences": rows})
    if ids:
        for d in found:
            _show_one(console, d, shown.get(d.id), run)
    elif run:
        _show_verdicts(console, shown.values())
    else:
        _show_table(console)
    if run:
        told = ", ".join(f"{name} {version}" for name, version in versions().items())
        console.print(Text(told, "dim"))
    return 1 if any(s.surprises() for s in shown.values()) else 0


def versions() -> dict[str, str]:
    """The frameworks that are installed."""
    found = {}
    for module, names in DISTRIBUTIONS.items():
        if importlib.util.find_spec(module) is not None:
            found[module] = next(filter(None, map(_version, names)), "")
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _named(id: str) -> Divergence:
    if id in DIVERGENCES:
        return DIVERGENCES[id]
    near = difflib.get_close_matches(id, DIVERGENCES, cutoff=0.4) or list(DIVERGENCES)[:3]
    raise click.UsageError(f"There is no divergence {id!r}; the nearest: {', '.join(near)}.")


def _shown(found: Iterable[Divergence]) -> Iterator[tuple[str, Demonstration]]:
    backends = (name for name in ("tensorflow", "jax", "torch") if importlib.util.find_spec(name))
    os.environ["KERAS_BACKEND"] = next(backends, "tensorflow")
    recipes = demonstration.recipes()
    return ((d.id, recipes[d.id].run()) for d in found if d.id in recipes)


def _show_table(console: Console) -> None:
    """Five columns where there is room, and what would be a line of them below each other where there is none."""
    wide = console.width >= WIDE
    for group, rows in GROUPS.items():
        console.print(Text(group, "bold cyan"))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim", show_header=wide)
        table.add_column("id", no_wrap=True, style="yellow", width=max(map(len, DIVERGENCES)))
        if wide:
            for name, ratio in (
                ("what differs", 3),
                ("in which frameworks", 5),
                ("normkit’s argument", 3),
                ("link", 5),
            ):
                table.add_column(name, ratio=ratio, overflow="fold")
        else:
            table.add_column(overflow="fold")
        for d in rows:
            who, argument = d.frameworks.replace("; ", "\n"), d.arguments.replace("; ", "\n")
            cells = [Text(d.title, "bold"), Text(who), Text(argument, "green"), _link(d.link)]
            if not wide and argument:
                cells[2] = Text(f"normkit: {d.arguments}", "green")
            table.add_row(d.id, *(cells if wide else [Text("\n").join(cell for cell in cells if cell.plain)]))
            table.add_row()
        console.print(table)
    console.print("normkit divergences ID --run shows one on a small input.")


def _link(url: str) -> Text:
    return Text(url, f"dim link {escape(url)}")


def _show_one(console: Console, d: Divergence, shown: Demonstration | None, run: bool) -> None:
    console.print(Text.assemble((d.id, "bold yellow"), "  ", (d.title, "bold")))
    console.print(Padding(Text(_sentence(d.explanation)), (0, 0, 0, 2)))
    if d.conversion:
        console.print(Padding(Text(f"convert: {_sentence(d.conversion)}"), (0, 0, 0, 2)))
    for url in dict.fromkeys(d.links.values()):
        console.print(Padding(_link(url), (0, 0, 0, 2)))
    console.print()
    if shown is not None:
        _show_demonstration(console, shown)
        return
    if d.sides:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
        for name in ("what is done", "by", "normkit"):
            table.add_column(name, overflow="fold")
        for side in d.sides:
            table.add_row(side.does, ", ".join(side.by) or "–", Text(side.argument or "–", "green"))
        console.print(Padding(table, (0, 0, 0, 2)))
        console.print()
    if d.unseen:
        console.print(Padding(Text(f"No demonstration: {d.unseen}."), (0, 0, 1, 2)))
    elif not run:
        console.print(Padding(Text(f"normkit divergences {d.id} --run shows it.", "dim"), (0, 0, 1, 2)))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _show_demonstration(console: Console, shown: Demonstration) -> None:
    console.print(Padding(Text.assemble(("input: ", "dim"), shown.input), (0, 0, 0, 2)))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in (shown.quantity, "which is"):
        table.add_column(name, overflow="fold")
    for outcome in shown.outcomes:
        style = "dim" if outcome.absent else "green" if outcome.own else ""
        table.add_row(Text(_label(outcome), style), Text(outcome.text(), style), Text(shown.side(outcome).does, style))
    console.print(Padding(table, (0, 0, 0, 2)))
    refusals = {o.label: o.message for o in shown.outcomes if o.message}
    for label, message in refusals.items():
        console.print(Padding(Text(f"{label}: {message}", "dim"), (0, 0, 0, 2)))
    if shown.without:
        console.print(Padding(Text(f"not shown: {', '.join(shown.without)}", "dim"), (0, 0, 0, 2)))
    console.print()
    console.print(Padding(Text(shown.verdict(), "bold"), (0, 0, 0, 2)))
    for surprise in shown.surprises():
        console.print(Padding(Text(f"✗ {surprise}", "red"), (0, 0, 0, 2)))
    console.print()


def _label(outcome: Outcome) -> str:
    return outcome.label.replace("normkit ", "normkit, ", 1)


def _show_verdicts(console: Console, shown: Iterable[Demonstration]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("id", no_wrap=True, style="yellow")
    table.add_column("on a small input", overflow="fold")
    for s in shown:
        text = Text(f"{s.quantity}: {s.verdict()}")
        for surprise in s.surprises():
            text.append(f"\n✗ {surprise}", "red")
        table.add_row(s.divergence.id, text)
    console.print(table)
    console.print()
    for d in DIVERGENCES.values():
        if d.unseen:
            console.print(Text.assemble((d.id, "yellow"), f": no demonstration: {d.unseen}"))
    console.print()
