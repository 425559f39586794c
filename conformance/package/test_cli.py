"""The command `normkit`: exit status, table, JSON, and what it says of a wrong call."""

import html
import json
import subprocess
import sys

import pytest

import normkit
from normkit import _check, _info, _table
from normkit.backends import kernels
from normkit.conformance.package.command import hiding, normkit_command, sitecustomize

pytest.importorskip("click")

#: A NumPy backend that is wrong by one part in a thousand, put in place by an interpreter as it starts.
BROKEN = """
from normkit.backends.numpy import backend
apply = backend.NumpyBackend.apply
def broken(self, plan, operands):
    y, stats = apply(self, plan, operands)
    return y * y.dtype.type(1.001), stats
backend.NumpyBackend.apply = broken
"""
RAISES = """
from normkit.backends.numpy import backend
def raises(self, plan, operands):
    raise RuntimeError("no arithmetic today")
backend.NumpyBackend.apply = raises
"""
DIES = """
import os
from normkit.backends.numpy import backend
backend.NumpyBackend.apply = lambda self, plan, operands: os._exit(7)
"""


#: What kernels say of themselves.
BUILT = {
    "mode": "1",
    "built": True,
    "kernels": ("rows",),
    "instruction_set": "x86-64-v3",
    "instruction_sets": ["x86-64-v3", "x86-64-v2"],
    "threads_of": "own",
    "threads": 2,
    "hugepages": True,
}
#: Importing them takes longer than all else here.
FRAMEWORKS = ("array_api_strict", "cupy", "jax", "tensorflow", "torch")


def quick_check(folder, **variables):
    """A quick check of NumPy: what it printed, and its JSON."""
    done = normkit_command("check", "--quick", "--backend", "numpy", "--json", "out.json", cwd=folder, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [file.name for file in folder.iterdir()] == ["out.json"]
    return done, json.loads((folder / "out.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return quick_check(tmp_path_factory.mktemp("quick"))


def test_table(quick):
    lines = quick[0].stdout.splitlines()
    assert quick[0].stderr == ""
    assert lines[0].startswith("NumPy ")
    for layer in ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm eval", "batch_norm train"):
        assert sum(line[1:].startswith(f"{layer} ") for line in lines) == 1
    assert "✓ normkit is within tolerance everywhere" in quick[0].stdout


def test_a_pipe_has_no_colours_and_80_columns(quick):
    assert "\x1b" not in quick[0].stdout
    assert max(map(len, quick[0].stdout.splitlines())) == 80
    assert "…" not in quick[0].stdout


def test_json(quick):
    found = quick[1]
    assert found["schema"] == {"name": "normkit-check", "version": 2}
    assert found["passed"] is True
    assert found["machine"]["versions"]["normkit"] == normkit.__version__
    assert found["machine"]["devices"] == {"numpy": "cpu"}
    layers = {row["layer"] for row in found["rows"]}
    assert len(layers) == 6
    assert {row["quantity"] for row in found["rows"]} == {"forward", "gradient", "running"}
    assert len(found["measurements"]) > len(found["rows"])
    row = next(r for r in found["rows"] if r["layer"] == "layer_norm" and r["quantity"] == "forward")
    same = [m for m in found["measurements"] if m["layer"] == "layer_norm" and m["quantity"] == "forward"]
    assert row["error"] == max(m["error"] for m in same)
    assert row["native"] == "textbook"
    assert row["native_error"] > 1e6 > 2 == row["tolerance"] > row["error"]


def test_errors_and_distances_are_of_the_same_numbers(quick):
    """Native is as far from float64 as from normkit, but for what normkit is."""
    found = [{k: float(m[k]) for k in ("error", "native_error", "distance")} for m in quick[1]["measurements"]]
    assert len(found) > 100
    for m in found:
        assert m["native_error"] == float("inf") or m["native_error"] <= 1.001 * (m["distance"] + m["error"])


def test_the_table_shows_which_path_served(quick, tmp_path):
    """A dot before each line that kernels served, and none without them."""
    off = quick_check(tmp_path, NORMKIT_KERNELS="0")
    for (done, found), path in ((quick, "kernel" if kernels.info()["built"] else "plain"), (off, "plain")):
        assert {row["path"] for row in found["rows"]} == {path}
        assert {m["path"] for m in found["measurements"]} == {path}
        marked = [line for line in done.stdout.splitlines() if line.startswith(_table.PATHS["kernel"])]
        assert len(marked) == (8 if path == "kernel" else 0)  # seven lines and the legend


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (BROKEN, "out of tolerance in"),
        (RAISES, "NumPy could not be measured: RuntimeError: no arithmetic today"),
        (DIES, "NumPy could not be measured: its process ended with status 7"),
    ],
    ids=["wrong", "raises", "dies"],
)
def test_a_broken_backend_is_exit_status_1(code, message, tmp_path):
    site = sitecustomize(tmp_path, code)
    args = "--quick", "--backend", "numpy", "--json", "o.json", "--html", "o.html", "--no-speed"
    done = normkit_command("check", *args, cwd=tmp_path, site=site)
    assert done.returncode == 1, done.stderr
    assert message in done.stdout
    assert html.escape(message.removeprefix("out of ")) in (tmp_path / "o.html").read_text("utf-8")
    assert "✗ normkit" in done.stdout.splitlines()[-1]
    assert json.loads((tmp_path / "o.json").read_text("utf-8"))["passed"] is False


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["check", "--backend", "nothing"], "There is no library 'nothing'; there are: numpy, strict, torch, "),
        (["check", "--bakend", "numpy"], "No such option '--bakend'"),
        (["check", "--color", "pink"], "'pink' is not one of 'auto', 'always', 'never'"),
        (["check", "--json", "no/such/folder.json"], "--json cannot write 'no/such/folder.json': No such file"),
        (["check", "--json", "-"], "--json wants a file to write to; received '-', and standard output has the table."),
        (["check", "--json", "."], "--json wants a file to write to; received '.', which is none."),
        (["bench", "--backend", "nothing"], "There is no benchmark of 'nothing'; there are: numpy, torch, "),
        (["bench", "--goals", "--sweep"], "--goals and --sweep are two runs: ask for one."),
        (["bench", "--load", "no.json"], "Cannot read 'no.json': No such file or directory."),
        (["bench", "--load", "no.json", "--quick"], "--load times nothing: beside it there may be --plot"),
        (["bench", "--plot", "a.png"], "--plot draws a sweep: it wants --sweep."),
        (["bench", "--threads", "0"], "0 is not in the range x>=1"),
        (["chek"], "No such command 'chek'"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_one_sentence(args, message, tmp_path):
    done = normkit_command(*args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_missing_is_a_wrong_call(tmp_path):
    """Whatever is installed here, PyTorch is not where its module cannot be found."""
    done = normkit_command("check", "--backend", "torch", cwd=tmp_path, site=hiding(tmp_path, "torch"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("normkit check: torch was asked for, but torch is not installed")


def test_an_old_json_outlives_a_call_that_fails(tmp_path):
    (tmp_path / "o.json").write_text("old")
    done = normkit_command("check", "--backend", "nothing", "--json", "o.json", cwd=tmp_path)
    assert done.returncode == 2
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("o.json", "old")]


@pytest.mark.parametrize("name", ["click", "rich"])
def test_without_what_the_command_needs(name, tmp_path):
    done = normkit_command("check", cwd=tmp_path, site=hiding(tmp_path, name))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'normkit: the command needs {name}: python -m pip install "normkit[check]"\n'


@pytest.mark.parametrize(
    ("args", "variables", "coloured"),
    [
        (["--color", "always"], {"NO_COLOR": "1"}, True),
        (["--color", "never"], {"FORCE_COLOR": "1"}, False),
        ([], {"FORCE_COLOR": "1", "TERM": "xterm"}, True),
        ([], {}, False),
    ],
)
def test_colours(args, variables, coloured, tmp_path):
    done = normkit_command("info", *args, cwd=tmp_path, site=hiding(tmp_path, *FRAMEWORKS), **variables)
    assert done.returncode == 0, done.stderr
    assert ("\x1b[" in done.stdout) is coloured
    assert f"normkit {normkit.__version__}" in done.stdout.replace("\x1b[1;36m", "")
    assert "PyTorch" in done.stdout
    assert "not installed" in done.stdout


@pytest.mark.parametrize(
    ("units", "text"),
    [
        (0.0, "0"),
        (0.494, "0.49"),
        (1.118, "1.12"),
        (9.996, "10.0"),
        (99.96, "100"),
        (9999.6, "1.0e4"),
        (8388608.0, "8.4e6"),
        (4.7e30, "4.7e30"),
        (float("inf"), "inf"),
        (float("nan"), "–"),
    ],
)
def test_figures_fit_six_characters(units, text):
    assert _table.figure(units) == text
    assert len(text) <= 6


def test_every_library_has_a_title():
    from normkit.conformance.libraries import LIBRARIES

    assert _table.TITLES.keys() == LIBRARIES.keys()


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"mode": "1", "built": False, "reason": "They are not built."}, "none: They are not built."),
        (BUILT, "on (NORMKIT_KERNELS=1), x86-64-v3 (also x86-64-v2), 2 threads of its own, huge pages on, for rows"),
        (
            BUILT | {"mode": "require", "threads_of": "openmp", "threads": 1, "hugepages": False},
            (
                "required (NORMKIT_KERNELS=require), x86-64-v3 (also x86-64-v2), "
                "1 thread of the OpenMP runtime that is loaded, huge pages off, for rows"
            ),
        ),
    ],
)
def test_info_tells_of_the_kernels(told, text, monkeypatch):
    monkeypatch.setattr(kernels, "info", lambda: told)
    assert _info.kernels() == text


@pytest.mark.parametrize(
    ("served", "calls", "path"),
    [
        ((0, 0), {"forward": 1}, "plain"),
        ((1, 0), {"forward": 1}, "kernel"),
        ((1, 0), {"forward": 2}, "mixed"),
        ((1, 0), {"forward": 1, "backward": 1}, "mixed"),
        ((3, 1), {"forward": 1, "backward": 1}, "kernel"),
        ((1, 0), {"backward": 1}, "mixed"),
    ],
)
def test_a_path_is_what_the_counters_say(served, calls, path):
    assert kernels.Served(*served).path(**calls) == path


def test_rows_take_the_worst_of_normkit_and_of_native():
    from normkit.conformance import measure
    from normkit.conformance.tolerances import tolerance

    def at(name, error, native_error, distance):
        limit = tolerance("forward", "float32")
        place = ("torch", "layer_norm", "float32", "forward", name, "contiguous", "torch")
        return measure.Measurement(*place, error, native_error, distance, limit)

    found = [
        at("normal", 1.0, 2.0, 3.0),
        at("offset 1e6", 1.5, 900.0, 1.0),
        at("digits", 0.5, float("nan"), float("nan")),
    ]
    (row,) = _check.Report(False, found).rows
    assert (row.error, row.input) == (1.5, "offset 1e6")
    assert (row.native_error, row.native_input, row.distance) == (900.0, "offset 1e6", 3.0)
    assert row.difference[0] == "const-mean-rounding"
    assert row.passed
    assert row.native_off


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NORMKIT_KERNELS": "foo"}, "NORMKIT_KERNELS must be 0, 1 or require; received 'foo'."),
        pytest.param(
            {"NORMKIT_ISA": "foo"}, "This processor cannot run the kernels for NORMKIT_ISA=foo.",
            marks=pytest.mark.skipif(not kernels.built, reason="no kernels are built"),
        ),
    ],
)  # fmt: skip
def test_an_environment_that_makes_no_sense(variables, words, tmp_path):
    done = normkit_command("info", cwd=tmp_path, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"normkit: {words}\n")


def test_a_mode_of_the_kernels_that_is_empty_is_none(tmp_path):
    empty, usual = (normkit_command("info", cwd=tmp_path, NORMKIT_KERNELS=mode) for mode in ("", "1"))
    assert (empty.returncode, empty.stdout) == (0, usual.stdout)


def test_no_number_is_cut(tmp_path):
    """A narrow terminal wraps lines; into a pipe tables are wide."""
    call = "check", "--quick", "--backend", "numpy"
    narrow, usual, piped = (normkit_command(*call, cwd=tmp_path, width=width).stdout for width in (40, 80, ""))
    assert narrow == usual and "…" not in usual
    assert max(map(len, piped.splitlines())) > 80 and "apart   native’s worst" in piped


def test_a_disk_that_is_full():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-P", "-m", "normkit", "--help"], stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, b"normkit: No space left on device\n")


def test_a_mode_that_the_library_has_not_is_a_wrong_call(tmp_path):
    args = "bench", "--quick", "--backend", "numpy", "--mode", "jax.jit", "--workload", "LN 8x768"
    done = normkit_command(*args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Nothing was timed: no workload fits these options in these libraries." in done.stderr
