"""The clock's habits, and what the table says of contenders that are broken or not there."""

import gc
import json

import pytest

import normkit as nk
from normkit.bench import table, timing
from normkit.bench.workloads import DIRECTIONS, WORKLOADS
from normkit.conformance.libraries import Missing

SMALL = [w for w in WORKLOADS if w.small][:1]


def test_contenders_take_turns_without_garbage_collection():
    """A B A B ..., as often as asked, and collection is as before afterwards."""
    turns, collecting = [], []

    def contender(name):
        def thunk():
            turns.append(name)
            collecting.append(gc.isenabled())

        return thunk

    times = timing.interleaved({"a": contender("a"), "b": contender("b")}, seconds=0, rounds=3)
    assert [len(sample) for sample in times.values()] == [3, 3]
    timed = [name for name, enabled in zip(turns, collecting, strict=True) if not enabled]
    changes = [name for i, name in enumerate(timed) if i == 0 or timed[i - 1] != name]
    assert changes == ["a", "b"] * 3
    assert gc.isenabled()


def test_a_result_outlives_the_clock():
    """Freeing it is nobody's time: it happens after the device was waited for."""
    events = []

    class Result:
        def __del__(self):
            events.append("freed")

    timing._turn(Result, lambda: events.append("waited"), 1)
    assert events == ["waited", "waited", "freed"]


def test_ratios_are_taken_within_a_round():
    """A machine that slows down from round to round changes no ratio."""
    assert timing.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == timing.Spread(2.0, 2.0, 2.0)
    assert timing.ratio([3.0], [1.0], divisor=1.5) == timing.Spread(2.0, 2.0, 2.0)
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == timing.Spread(3.0, 2.0, 4.0)


def test_report_is_saved_with_versions(tmp_path):
    """Rows for each direction, the cost of a call for each layer, and where all comes from."""
    report = table.run(["numpy"], workloads=SMALL, seconds=0.01)
    assert not report.broken
    assert [row.direction for row in report.rows] == list(DIRECTIONS)
    report.save(tmp_path / "bench.json")
    saved = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert saved["machine"]["versions"].keys() == {"normkit", "numpy"}
    assert saved["machine"]["devices"] == {"numpy": "cpu"}
    assert saved["rows"][0]["speedup"].keys() == {"median", "low", "high"}
    assert {call["layer"] for call in saved["calls"]} == {
        "layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_train"
    }  # fmt: skip
    assert len(report.tables()) == 2 and len(report.summary()) == 1


def test_what_raises_is_a_broken_row(monkeypatch):
    """The others are timed nevertheless."""

    def broken(*args, **options):
        raise RuntimeError("first line\nno kernel")

    monkeypatch.setattr(nk, SMALL[0].layer, broken)
    (job,) = table.jobs(table.chosen(["numpy"]), workloads=SMALL)
    (row,) = table.measure(job, ["forward"], 0.01)
    assert row.error == "RuntimeError: no kernel"
    assert row.time is row.speedup is row.to_floor is None
    assert row.native_time is not None


def test_libraries_that_cannot_be_timed_are_refused(monkeypatch):
    """Unknown names and missing libraries."""
    with pytest.raises(ValueError, match=r"no benchmark of 'strict'; there are: numpy, torch"):
        table.run(["strict"])
    monkeypatch.setattr(table.libraries, "installed", lambda name: False)
    with pytest.raises(Missing, match="jax was asked for"):
        table.run(["jax"])
