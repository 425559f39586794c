"""Runs of several processes, rows that have a goal, and what was saved and is shown again."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from normkit import _bench
from normkit.bench import goal_table, goals, report, rows, table
from normkit.bench.timing import Spread

pytest.importorskip("rich")


def goal_row(goal, figure):
    """A row with a goal, whose times and ratios are all ``figure`` but that of the bare operation."""
    one = Spread(figure, figure, figure)
    times = dict.fromkeys(("copy_time", "time", "native_time", "speedup", "to_floor", "native_to_floor"), one)
    small = goal.workload in ("LN 4x64", "LN 8x768")
    place = [goal.library, goal.workload, "layer_norm", (8, 64), "", goal.dtype, goal.direction, goal.mode]
    times["bare_to_floor"] = Spread(0.98, 0.98, 0.98)
    return rows.Row(*place, goal.native or "native", **times, path="kernel", small=small, threads=goals.THREADS)


def made(figure, *libraries):
    """A run of everything in ``libraries`` that has a goal."""
    about = {
        "processor": "a processor",
        "date": "2026-01-31T10:00:00+00:00",
        "versions": {"normkit": "0.1.0"} | dict.fromkeys(libraries, "1.0"),
        "devices": dict.fromkeys(libraries, "cpu"),
        "kernels": {name: {"built": True, "instruction_set": "x86-64-v3"} for name in libraries},
    }
    found = [goal_row(goal, figure) for goal in goals.GOALS if goal.library in libraries]
    return report.Report(about, report.GOALS, rows=found, complete=True)


EVERY = ("numpy", "torch", "tensorflow", "jax")


def test_goals_have_one_table_in_80_columns():
    from rich.console import Console

    out = io.StringIO()
    table.show(Console(file=out, width=80), made(1.02, *EVERY))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()
    assert sum(line.count("✓") + line.count("✗") == 2 for line in lines) == len(goals.GOALS)
    assert "GN32 56x56 fwd kernel 1.02 s 1.02 0.98 1.02 ≤ 1 ✗ ≤ 1.05 ✓" in [" ".join(line.split()) for line in lines]
    assert any(line.startswith("jax, jax.jit") for line in lines)


def test_goals_in_markdown():
    """A line for each, the library's name before its own, then the machine and the summary."""
    text = goal_table.markdown(made(1.02, *EVERY))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(EVERY) + len(goals.GOALS)
    assert {line.count("|") for line in lines} == {11}
    assert "| GN32 56x56 | fwd | 1.02 s | 1.02 | 0.98 | 1.02 s | 1.02 | 1.02× | ≤ 1 ✗ | ≤ 1.05 ✓ |" in lines
    assert "| **torch** | | | | | native | | | | |" in lines
    assert "\na processor, 2 threads, kernels x86-64-v3; normkit 0.1.0, numpy 1.0, torch 1.0, " in text
    assert f"of {len(goals.GOALS)} reached" in text


def test_what_was_saved_is_shown_again(tmp_path):
    found = made(1.02, "torch")
    found.complete = False
    (tmp_path / "a.json").write_text(json.dumps(found.json()), "utf-8")
    again = _bench.loaded(str(tmp_path / "a.json"))
    assert again == found
    assert found.json()["rows"][0] | {"goal": "≤ 1.1", "goal_met": True, "limit": "≤ 1.15"} == found.json()["rows"][0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": {"name": "normkit-check", "version": 1}}'])
def test_what_something_else_has_written_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"was not written by this version's `normkit bench --json`"):
        _bench.loaded(str(tmp_path / "a.json"))
    with pytest.raises(ValueError, match=r"Cannot read .*no\.json': No such file"):
        _bench.loaded(str(tmp_path / "no.json"))


@pytest.fixture
def processes(monkeypatch):
    """What each process is called with; it saves its library's rows, and ends as ``ends`` says."""
    called, ends = [], {}

    def run(command, **options):
        called.append(command[4:-2])
        name = command[command.index("--backend") + 1]
        found = made(1.02, name)
        end = ends.get(name, 0)
        found.complete = end == 0
        Path(command[-1]).write_text(json.dumps(found.json()), "utf-8")
        if isinstance(end, BaseException):
            raise end
        return SimpleNamespace(returncode=end)

    monkeypatch.setattr(_bench, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    monkeypatch.setattr(rows, "names", lambda names: list(names))
    return called, ends


def started(*names, threads=(), kind=report.GOALS, **options):
    """A run, and what it saved."""
    saved = []
    given = {"dtypes": ("float32",), "modes": (), "named": ("LN", "RMS"), "seconds": 0.5, "quick": False} | options
    found = _bench.run(names, threads=threads, kind=kind, save=saved.append, console=None, **given)
    return found, saved


def test_each_library_has_a_process_of_its_own(processes):
    """With the options of the call; the figures come together."""
    found, saved = started("numpy", "torch")
    words = ["bench", "--dtype", "float32", "--workload", "LN", "--workload", "RMS", "--goals", "--seconds", "0.5"]
    assert processes[0] == [[*words, "--backend", name, "--threads", "2"] for name in ("numpy", "torch")]
    assert {row.library for row in found.rows} == {"numpy", "torch"}
    assert found.machine["kernels"].keys() == {"numpy", "torch"}
    assert [s["complete"] for s in saved] == [False, False, True]


def test_each_number_of_threads_has_a_process_of_its_own(processes):
    started("numpy", threads=(1, 2), kind=report.WORKLOADS, quick=True)
    assert [call[-4:] for call in processes[0]] == [["--backend", "numpy", "--threads", n] for n in "12"]
    assert all("--quick" in call and "--goals" not in call for call in processes[0])


def test_a_process_that_dies_takes_no_other_along(processes):
    processes[1]["numpy"] = -11
    found, saved = started("numpy", "torch")
    assert found.died == {"numpy, --threads 2": "its process ended with status -11"}
    assert {row.library for row in found.rows} == {"numpy", "torch"}
    assert saved[-1]["died"] == found.died
    assert saved[-1]["complete"] is False


def test_an_interrupted_run_has_saved_what_it_had(processes):
    """Also of the process that was at work."""
    processes[1]["torch"] = KeyboardInterrupt()
    saved = []
    with pytest.raises(KeyboardInterrupt):
        _bench.run(
            ("numpy", "torch", "jax"), threads=(), dtypes=(), modes=(), named=(), kind=report.GOALS, console=None,
            save=saved.append,
        )  # fmt: skip
    assert {row["library"] for row in saved[-1]["rows"]} == {"numpy", "torch"}
    assert saved[-1]["complete"] is False


def test_a_call_that_a_process_refuses_is_a_wrong_call(processes):
    """The process has said why."""
    processes[1]["numpy"] = 2
    with pytest.raises(SystemExit) as end:
        started("numpy", "torch")
    assert end.value.code == 2
    assert len(processes[0]) == 1


def test_goals_run_what_has_a_goal_and_nothing_else():
    found = report.run(["numpy"], kind=report.GOALS, named=["4x64"], seconds=0.01)
    assert [(row.workload, row.direction) for row in found.rows] == [("LN 4x64", "forward")]
    assert not (found.calls or found.alternations or found.pages)


def test_goals_are_of_two_threads():
    with pytest.raises(ValueError, match=r"--goals are for 2 threads; received --threads 1\."):
        started("numpy", threads=(1,))
    with pytest.raises(ValueError, match="ask for one"):
        _bench.kind(goals=True, sweep=True)
    one = dataclasses.replace(made(1.02, "torch").rows[0], threads=1)
    assert one.goal is None
    with pytest.raises(ValueError, match="there are none here"):
        _bench.markdown(report.Report({}, rows=[one]))
