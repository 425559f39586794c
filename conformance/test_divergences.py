"""The table of divergences: one vocabulary, and for each id a demonstration whose outcome is as the table says."""

import dataclasses
import importlib.util
import json
import os
import warnings

import click
import numpy as np
import pytest
from click.testing import CliRunner

from normkit import _divergences
from normkit._convert.rules import RULES
from normkit.conformance.differences import DIFFERENCES
from normkit.conformance.divergences import DIVERGENCES, GROUPS, demonstration
from normkit.conformance.divergences.frameworks import MODULES

KERAS = os.environ.get("KERAS_BACKEND", "tensorflow")


def test_ids_are_one_vocabulary():
    assert len(DIVERGENCES) == sum(map(len, GROUPS.values()))
    assert set(RULES) <= set(DIVERGENCES)
    for difference in DIFFERENCES:
        assert difference.reason and difference.link


def test_every_row_says_what_it_is():
    for d in DIVERGENCES.values():
        assert d.title and d.explanation and d.links and (d.sides or d.unseen)
        assert not d.explanation.endswith(".") and all(link.startswith("https://") for link in d.links.values())
        labels = [label for side in d.sides for label in side.by]
        assert len(labels) == len(set(labels))


@pytest.fixture(scope="module")
def recipes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a framework says on import is its own affair
        return demonstration.recipes()


def test_every_id_has_a_demonstration_or_a_reason(recipes):
    assert set(recipes) == {d.id for d in DIVERGENCES.values() if not d.unseen}


@pytest.mark.parametrize("id", [d.id for d in DIVERGENCES.values() if not d.unseen])
def test_a_demonstration_shows_what_the_table_says(recipes, id):
    """Strict: frameworks on one side agree, those on two differ, normkit does what its argument says."""
    shown = recipes[id].run()
    assert not shown.surprises(), shown.verdict()
    labels = {o.label for o in shown.outcomes}
    assert len(labels) == len(shown.outcomes)
    offered = {side.argument for side in DIVERGENCES[id].sides if side.argument}
    assert {o.argument for o in shown.outcomes if o.own} == offered
    for outcome in shown.outcomes:
        if outcome.absent and not outcome.own and importlib.util.find_spec(module(outcome)):
            assert " here" in outcome.absent or module(outcome) == "transformers", outcome
        if outcome.absent and outcome.own:
            assert "No module named" in outcome.absent, outcome
    assert shown.verdict().endswith(".")
    json.dumps(shown.json(), allow_nan=False)


def module(outcome):
    return MODULES.get(outcome.label.partition(" ")[0], "nothing at all")


def demonstrated(id="momentum-sense", **values):
    """Of made-up numbers."""
    outcomes = [demonstration.Outcome(label, np.asarray(value)) for label, value in values.items()]
    return demonstration.Demonstration(DIVERGENCES[id], "x", "mean", 1e-3, None, outcomes)


def test_what_is_not_as_the_table_says_is_seen():
    own = {"normkit update_rate": 9.0, "normkit momentum": 1.0}
    assert not demonstrated(torch=9.0, Keras=1.0, **own).surprises()
    assert demonstrated(torch=9.0, Keras=1.0).verdict() == "torch gives 9; Keras gives 1."
    assert demonstrated(torch=1.0, Keras=1.0, **own).surprises() == [
        "normkit update_rate is said to be like torch, and gives 9.",
        "Keras (the old statistics) is like torch (the new statistics).",
    ]
    assert demonstrated(torch=9.0, Keras=2.0, Flax=1.0).surprises() == ["Flax is said to be like Keras, and gives 1."]
    raising = demonstrated(torch=9.0)
    raising.outcomes.append(demonstration.Outcome("Keras", "raises", message="TypeError: no"))
    assert raising.surprises() == ["Keras (the old statistics) raises TypeError: no"]


def command(monkeypatch, *args, width="80"):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("KERAS_BACKEND", KERAS)  # the command chooses another
    return CliRunner().invoke(_divergences.divergences, args, standalone_mode=False)


@pytest.mark.parametrize("width", ["80", "200"])
def test_the_table_has_every_row(monkeypatch, width):
    done = command(monkeypatch, width=width)
    assert done.exception is None and done.return_value == 0
    firsts = [line.split()[0] for line in done.output.splitlines() if line[:1].strip()]
    assert set(DIVERGENCES) <= set(firsts)
    assert max(map(len, done.output.splitlines())) <= int(width)


def test_an_unknown_id_is_one_sentence_with_the_nearest(monkeypatch):
    error = command(monkeypatch, "momentum-sens").exception
    assert isinstance(error, click.UsageError)
    assert error.message.startswith("There is no divergence 'momentum-sens'; the nearest: momentum-sense, momentum-")


def test_one_is_shown_side_by_side(monkeypatch, tmp_path, recipes):
    done = command(monkeypatch, "runvar-bias", "--run", "--json", str(tmp_path / "o.json"))
    assert (done.exception, done.return_value) == (None, 0), done.output
    lines = [line.split() for line in done.output.splitlines()]
    for label in ("torch", "Keras", "Flax", "ONNX"):
        (line,) = [line for line in lines if line[:1] == [label] and line[1] in ("4", "8", "not")]
        assert (line[1] != "not") == bool(importlib.util.find_spec(MODULES[label]))
    assert ["normkit,", "unbiased=True", "8", "n", "-", "1"] in lines
    found = json.loads((tmp_path / "o.json").read_text("utf-8"))
    assert found["schema"] == {"name": "normkit-divergences", "version": 1}
    (row,) = found["divergences"]
    assert row["demonstration"]["verdict"] == recipes["runvar-bias"].run().verdict()
    own = {o["column"]: o["value"] for o in row["demonstration"]["outcomes"] if o["column"].startswith("normkit")}
    assert own == {"normkit unbiased=True": [8.0], "normkit unbiased=False": [4.0]}


def test_a_surprise_is_exit_status_1(monkeypatch, recipes):
    columns = [(f"normkit unbiased={unbiased}", lambda: 4.0) for unbiased in (True, False)]
    wrong = dataclasses.replace(recipes["runvar-bias"], columns=lambda: iter(columns))
    monkeypatch.setitem(recipes, "runvar-bias", wrong)
    done = command(monkeypatch, "runvar-bias", "--run")
    assert (
        done.return_value == 1 and "✗ normkit unbiased=False (n) is like normkit unbiased=True (n - 1)." in done.output
    )
