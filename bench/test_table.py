"""The clock's habits, what a row says of contenders that are broken or not there, what is saved, drawn and printed."""

import collections
import contextlib
import dataclasses
import functools
import gc
import io
import json

import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.bench import effects, goals, plot, report, rows, table, timing
from normkit.bench.timing import Spread
from normkit.bench.workloads import DIRECTIONS, WORKLOADS, swept
from normkit.conformance.libraries import LIBRARIES, Missing

SMALL = [w for w in WORKLOADS if w.small][:1]
MACHINE = {
    "versions": {"torch": "2.13.0+cpu"},
    "devices": {"torch": "cpu"},
    "kernels": {"torch": {"built": True, "instruction_set": "x86-64-v4"}},
    "processor": "a processor",
    "date": "2026-01-31T10:00:00+00:00",
}


def row(**given):
    """A row of PyTorch's batch norm, as good as its goal."""
    one = Spread(1.0, 0.9, 1.1)
    place = {"library": "torch", "workload": "BN train 56x56 NHWC", "layer": "batch_norm_train", "layout": "NHWC"}
    place |= {"shape": (32, 64, 56, 56), "dtype": "bfloat16", "direction": "forward", "mode": "eager"}
    times = dict.fromkeys(("copy_time", "time", "plain_time", "native_time", "speedup", "gain", "to_floor"), one)
    return rows.Row(**(place | times | {"native": "torch", "path": "kernel", "threads": 2} | given))


def printed(found, width=80):
    """What `normkit bench` prints of a report."""
    from rich.console import Console

    out = io.StringIO()
    table.show(Console(file=out, width=width), found)
    return out.getvalue()


def test_contenders_take_turns_without_garbage_collection():
    """A B C, then B C A, as often as asked, and collection is as before afterwards."""
    turns, collecting = [], []

    def contender(name):
        def thunk():
            turns.append(name)
            collecting.append(gc.isenabled())

        return thunk

    times = timing.interleaved({name: contender(name) for name in "abc"}, seconds=0, rounds=3)
    assert [len(sample) for sample in times.values()] == [3, 3, 3]
    timed = [name for name, enabled in zip(turns, collecting, strict=True) if not enabled]
    changes = [name for i, name in enumerate(timed) if i == 0 or timed[i - 1] != name]
    assert "".join(changes) == "abcbcacab"
    assert gc.isenabled()


def test_all_make_as_many_calls_in_a_turn(monkeypatch):
    """As the fastest needs: a copy made ten times finds its data in the caches, a layer called once does not."""
    needed, made = {"slow": 1, "quick": 7, "quicker": 10}, collections.Counter()
    thunks = {name: functools.partial(made.update, [name]) for name in needed}
    monkeypatch.setattr(timing, "_warmed", lambda thunk, _: needed[thunk.args[0][0]])
    timing.interleaved(thunks, seconds=0, rounds=3)
    assert made == dict.fromkeys(needed, 3 * 10)


def test_a_result_outlives_the_clock():
    """Freeing it is nobody's time: it happens after the device was waited for."""
    events = []

    class Result:
        def __del__(self):
            events.append("freed")

    timing._turn(Result, lambda: events.append("waited"), 1)
    assert events == ["waited", "waited", "freed"]


def test_a_result_outlives_no_other_call():
    """The memory of one call is there for the next, as in any loop that keeps nothing."""
    events = []

    class Result:
        def __init__(self):
            events.append("made")

        def __del__(self):
            events.append("freed")

    timing._turn(Result, lambda: None, 3)
    assert events == ["made", "freed"] * 3


def test_the_plain_path_takes_no_turns_with_native_layers(monkeypatch):
    """What it gives back to the system, they would ask for again."""
    (job,) = rows.jobs(rows.chosen(["numpy"]), workloads=SMALL)
    groups, turns = [], timing.interleaved

    def interleaved(thunks, *arguments, **options):
        groups.append([*thunks])
        return turns(thunks, *arguments, **options)

    monkeypatch.setattr(timing, "interleaved", interleaved)
    served = iter([kernels.Served(), kernels.Served(1, 0)])
    monkeypatch.setattr(kernels, "served", lambda: next(served))
    (found,) = rows.measure(job, ["forward"], 0.01)
    assert groups == [["normkit", "textbook", "copy", "bare"], ["normkit", "plain", "copy"]]
    assert found.plain_time and found.native_time


def test_ratios_are_taken_within_a_round():
    """A machine that slows down from round to round changes no ratio."""
    assert timing.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == timing.Spread(2.0, 2.0, 2.0)
    assert timing.ratio([3.0], [1.0], divisor=1.5) == timing.Spread(2.0, 2.0, 2.0)
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == timing.Spread(3.0, 2.0, 4.0)


def test_a_contender_runs_within_its_context():
    """Warm-up and turns; the others do not."""
    inside, seen = [], {"a": set(), "b": set()}

    @contextlib.contextmanager
    def context():
        inside.append(1)
        yield
        inside.pop()

    thunks = {name: lambda name=name: seen[name].add(len(inside)) for name in seen}
    timing.interleaved(thunks, within={"a": context}, seconds=0, rounds=2)
    assert seen == {"a": {1}, "b": {0}}


def test_report_is_saved_as_it_grows(tmp_path):
    """Rows for each direction, the cost of a call for each layer, and where all comes from."""
    saved = []
    found = report.run(["numpy"], workloads=SMALL, seconds=0.01, save=lambda r: saved.append(json.dumps(r.json())))
    assert not found.broken
    assert [r.direction for r in found.rows] == list(DIRECTIONS)
    first, last = json.loads(saved[0]), json.loads(saved[-1])
    assert (first["complete"], last["complete"]) == (False, True)
    assert last["machine"]["versions"].keys() == {"normkit", "numpy"}
    assert last["machine"]["devices"] == {"numpy": "cpu"}
    assert last["machine"]["kernels"]["numpy"]["mode"] == kernels.mode
    assert first["rows"][0]["speedup"].keys() == {"median", "low", "high"}
    assert report.Report.loaded(last) == dataclasses.replace(found, machine=last["machine"])


def test_what_is_served_by_kernels_is_compared_with_the_plain_path(monkeypatch):
    """A path is what the kernels' counters say, whatever the mode."""
    (job,) = rows.jobs(rows.chosen(["numpy"]), workloads=SMALL)
    served = {"forward": kernels.Served(1, 0), "backward": kernels.Served(0, 1), "both": kernels.Served(1, 0)}
    for direction, path in (("forward", "kernel"), ("backward", "kernel"), ("both", "mixed")):
        counts = iter([kernels.Served(), served[direction]])
        monkeypatch.setattr(kernels, "served", lambda counts=counts: next(counts))
        (found,) = rows.measure(job, [direction], 0.01)
        assert (found.path, found.error) == (path, "")
        assert found.plain_time and found.gain and found.plain_to_floor
    monkeypatch.setattr(kernels, "served", lambda: kernels.Served(7, 7))
    (found,) = rows.measure(job, ["both"], 0.01)
    assert (found.path, found.plain_time) == ("plain", None)


def test_what_raises_is_a_broken_row(monkeypatch):
    """The others are timed nevertheless."""

    def broken(*args, **options):
        raise RuntimeError("first line\nno kernel")

    monkeypatch.setattr(nk, SMALL[0].layer, broken)
    (job,) = rows.jobs(rows.chosen(["numpy"]), workloads=SMALL)
    (found,) = rows.measure(job, ["forward"], 0.01)
    assert found.error == "RuntimeError: no kernel"
    assert found.time is found.speedup is found.to_floor is None
    assert found.native_time is not None
    about = MACHINE | {"devices": {"numpy": "cpu"}, "kernels": {"numpy": {"built": False}}}
    said = printed(report.Report(about, rows=[found]))
    assert "broken: numpy eager: RuntimeError: no kernel (LN 4x64 fwd)" in " ".join(said.split())


def test_a_table_fits_80_columns():
    """Names, figures and goals as long as they get."""
    long = Spread(123.4, 0.1, 1234.0)
    many = [
        row(),
        row(time=long, to_floor=long, speedup=long, gain=long, native="keras"),
        row(dtype="float32", path="plain"),
    ]
    many += [row(workload="LN 8x768", layer="layer_norm", dtype="float32", direction=d, small=True) for d in DIRECTIONS]
    excess = effects.Alternation("tensorflow", "LN 256x768", "textbook", "kernel", long, long, long, long, 2)
    pages = effects.Pages("tensorflow", "LN 32768x1024", "existing", True, "torch", long, long, long, long, long)
    found = report.Report(MACHINE, rows=many, alternations=[excess], pages=[pages])
    for width in (80, 132):
        lines = printed(found, width).splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines)
    assert "≥ 0.91× ✓" in printed(found)
    sweep = printed(report.Report(MACHINE, report.SWEEP, rows=[row(), row(direction="backward", copy_time=long)]))
    assert max(map(len, sweep.splitlines())) <= 80
    assert "12 MB" in sweep and "…" not in sweep


def test_goals_are_of_rows_that_exist():
    """Each goal's workload is timed in its library, dtype and mode."""
    for goal in goals.GOALS:
        (workload,) = [w for w in WORKLOADS if w.name == goal.workload]
        assert goal.dtype in workload.dtypes
        assert goal.direction in DIRECTIONS
        assert goal.mode == "eager" or workload.compiled
        assert goal.mode in ("eager", *LIBRARIES[goal.library].modes)
    assert len(goals._BY_ROW) == len(goals.GOALS)


@pytest.mark.parametrize(
    ("given", "met"),
    [
        ({"to_floor": Spread(1.15, 1, 2)}, (True, True)),
        ({"to_floor": Spread(1.2, 1, 2)}, (False, True)),
        ({"to_floor": Spread(1.21, 1, 2)}, (False, False)),
        ({"workload": "LN 32768x1024", "speedup": Spread(2.9, 1, 3)}, (True, True)),
        ({"workload": "LN 32768x1024", "speedup": Spread(2.6, 1, 3)}, (False, True)),
        ({"workload": "LN 32768x1024", "speedup": Spread(2.4, 1, 3)}, (False, False)),
        ({"workload": "LN 32768x1024", "speedup": None}, (None, None)),
        ({"library": "numpy", "workload": "LN 4x64", "time": Spread(2e-6, 1, 1)}, (True, True)),
        ({"library": "numpy", "workload": "LN 4x64", "time": Spread(6e-6, 1, 1)}, (False, False)),
        ({"library": "tensorflow", "workload": "LN 8192x768", "native": "tf.nn"}, (None, None)),
        ({"workload": "LN 4x64"}, (None, None)),
        ({"threads": 1}, (None, None)),
    ],
)
def test_goals_are_met_by_figures_on_their_side(given, met):
    """At most, at least, or none; and of two threads only."""
    found = row(dtype="float32", **given)
    assert (found.met, found.within) == met


def test_summary_counts_goals_and_threads():
    """The mean is over the rows with a goal."""
    fast = Spread(4.0, 4.0, 4.0)
    found = report.Report(MACHINE, rows=[
        row(workload="BN train 56x56", speedup=fast),
        row(workload="LN 8192x768", to_floor=Spread(9.0, 9.0, 9.0), speedup=fast),
        row(workload="LN 65536x64", to_floor=Spread(1.5, 1.5, 1.5), speedup=fast),
        row(workload="IN 56x56"),
        row(workload="IN 56x56", threads=1, time=fast),
    ])  # fmt: skip
    said = " ".join(found.summary())
    assert "goals: 1 of 3 reached; limits: 2 of 3 kept" in said
    assert "geometric mean of the 3 rows with a goal: 4.00 times as fast as native (≥ 3 ✓); torch 4.00" in said
    assert "normkit is 4.00 times as fast with 2 threads as with 1" in said


def test_a_sweep_goes_from_1_kb_to_512_mb():
    """In powers of two, each layer."""
    for layer, smallest in (("layer_norm", 10), ("batch_norm_train", 12)):
        sizes = [4 * workload.elements for workload in swept() if workload.layer == layer]
        assert sizes == [1 << k for k in range(smallest, 30)]
    assert {w.name for w in swept(quick=True)} < {w.name for w in swept()}


def test_a_sweep_leaves_out_what_does_not_fit(monkeypatch):
    """And says so."""
    monkeypatch.setattr(report.machine, "free_memory", lambda: 1 << 16)
    monkeypatch.setattr(report, "swept", lambda quick: swept()[:4])
    found = report.run(["numpy"], kind=report.SWEEP, seconds=0.001)
    assert [r.bytes for r in found.rows] == [1024, 1024, 2048, 2048]
    assert found.left_out.keys() == {"numpy LN 4x256 float32 eager", "numpy LN 8x256 float32 eager"}


@pytest.mark.parametrize("name", ["sweep.png", "sweep.svg"])
def test_a_sweep_is_drawn(name, tmp_path):
    """Every contender has its line."""
    pytest.importorskip("matplotlib")
    shapes = ((4, 256), (64, 256), (1024, 256))
    many = [
        row(layer=layer, shape=shape, dtype="float32", direction=direction, native_to_floor=Spread(3.0, 2.0, 4.0))
        for layer in plot.LAYERS
        for direction in ("forward", "backward")
        for shape in shapes
    ]
    about = MACHINE | {"processor": "a processor", "versions": {"normkit": "0", "torch": "2"}}
    plot.draw(report.Report(about, report.SWEEP, rows=many), str(tmp_path / name))
    assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize(("path", "message"), [("a.jpg", "ends in .png or .svg"), ("no/a.png", "no such folder")])
def test_a_picture_that_cannot_be_written_is_refused(path, message):
    """Before anything is measured."""
    with pytest.raises(ValueError, match=message):
        plot.check(path)


def test_alternation_takes_the_parts_from_the_pair(monkeypatch):
    """normkit, the plain path where there is one, and native; each pair runs both."""
    known = {"double": 1.0, "normkit": 2.0, "plain": 3.0, "textbook": 4.0}

    def interleaved(thunks, wait, *, within, **options):
        assert all(thunk() is not None for thunk in thunks.values())
        return {name: [known.get(name, 10.0)] * 3 for name in thunks}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    (engine,) = rows.chosen(["numpy"])
    found = {f.contender: f for f in effects.alternation(engine, 0.01)}
    assert found.keys() - {"plain"} == {"normkit", "textbook"}
    for name, f in found.items():
        assert f.excess == Spread(*[10.0 - known[name] - 1.0] * 3)
    assert found["textbook"].path == "native"


def test_pages_are_measured_in_processes_of_their_own(monkeypatch):
    """Each with the variables it is about; the figures come back."""
    seen = []
    line = json.dumps([{"native": "torch"} | {k: {"median": 1, "low": 1, "high": 1} for k in (
        "copy_time", "time", "native_time", "to_copy", "native_to_copy")}])  # fmt: skip

    class Done:
        returncode, stdout, stderr = 0, "noise\n" + line, ""

    def run(command, env, **options):
        seen.append((env.get("MALLOC_MMAP_MAX_"), env["NORMKIT_HUGEPAGES"]))
        return Done

    monkeypatch.setattr(effects.subprocess, "run", run)
    monkeypatch.setattr(effects.platform, "libc_ver", lambda: ("glibc", "2"))
    found = effects.pages("torch", 0.1)
    assert seen == [(None, "1"), (None, "0"), ("0", "1"), ("0", "0")]
    assert [(f.output, f.hugepages) for f in found] == [
        ("fresh", True), ("fresh", False), ("existing", True), ("existing", False)
    ]  # fmt: skip
    Done.returncode = 3
    with pytest.raises(effects.NotHere, match="ended with status 3"):
        effects.pages("torch", 0.1)


def test_libraries_that_cannot_be_timed_are_refused(monkeypatch):
    """Unknown names, missing libraries, devices that are not there."""
    with pytest.raises(ValueError, match=r"no benchmark of 'strict'; there are: numpy, torch"):
        report.run(["strict"])
    with pytest.raises(ValueError, match=r"numpy has no choice of device here; torch and jax have\. Received 'cuda'"):
        report.run(["numpy"], device="cuda")
    with pytest.raises(ValueError, match="No workload has 'nothing' in its name"):
        report.run(["numpy"], named=["nothing"])
    monkeypatch.setattr(rows.libraries, "installed", lambda name: False)
    with pytest.raises(Missing, match="jax was asked for"):
        report.run(["jax"])
