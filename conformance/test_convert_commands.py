"""The commands `normkit convert` and `normkit inspect` on files of arrays: what they write, print and refuse."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click")

from normkit import cli

FROM_TORCH = ("convert", "in.npz", "out.npz", "--from", "torch", "--to", "keras")
SAID = (*FROM_TORCH, "--eps", "1e-3", "--momentum", "0.1")


def arrays():
    """What torch's state dict has of a batch norm, a layer norm and a convolution."""
    rng = np.random.default_rng(0)
    names = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "ln.weight", "ln.bias", "conv.bias")
    return {name: rng.random(4, np.float32) for name in names} | {"conv.weight": rng.random((4, 3, 3, 3), np.float32)}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A folder with in.npz in it, and a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")  # put back when the command has set another
    np.savez("in.npz", **arrays())


def there():
    """What is in the folder."""
    return {entry.name: entry.is_file() and entry.stat().st_size for entry in os.scandir()}


def test_there_and_back(capsys):
    assert cli.run([*SAID, "--json", "report.json"]) == 0
    out = capsys.readouterr().out
    assert "torch → keras: 1 batch_norm" in out
    assert "momentum-sense  momentum 0.1 is 0.9 in keras" in out
    assert "left out, 4 arrays: conv.bias, conv.weight, ln.bias and 1 more" in out
    assert "of these, 2 may be norm layers, which --settings can say: ln.bias, ln.weight" in out
    report = json.loads(Path("report.json").read_text())
    assert report["layers"]["bn"] == {
        "layer": "BatchNormalization", "axis": 1, "epsilon": 1e-3, "center": True, "scale": True, "momentum": 0.9,
    }  # fmt: skip
    assert cli.run(["convert", "out.npz", "back.npz", "--to", "torch"]) == 0  # the file says the rest
    with np.load("back.npz") as file:
        for name, value in arrays().items():
            if name.startswith("bn."):
                np.testing.assert_array_equal(file[name], value, name)


def test_settings_say_what_arrays_do_not(capsys):
    settings = {"bn": {"eps": 1e-3, "momentum": 0.1}, "l*": {"layer": "LayerNorm", "eps": 1e-6}}
    Path("settings.json").write_text(json.dumps(settings))
    Path("names.json").write_text(json.dumps({"ln": "block/ln"}))
    assert cli.run([*FROM_TORCH, "--settings", "settings.json", "--names", "names.json"]) == 0
    assert "torch → keras: 1 batch_norm, 1 layer_norm" in capsys.readouterr().out
    with np.load("out.npz") as file:
        np.testing.assert_array_equal(file["block/ln/gamma"], arrays()["ln.weight"])


def test_a_key_that_is_missing_or_too_many(capsys):
    found = arrays()
    np.savez("in.npz", **{name: value for name, value in found.items() if name != "bn.running_var"})
    before = there()
    assert cli.run(SAID) == 2
    assert capsys.readouterr().err == "normkit convert: bn: There is a running mean and no running variance.\n"
    assert there() == before
    np.savez("in.npz", **{name: value for name, value in found.items() if name != "bn.bias"})
    assert cli.run(SAID) == 0
    assert "there is a weight and no bias" in capsys.readouterr().out
    np.savez("in.npz", **found, **{"bn.running_std": found["bn.bias"]})
    assert cli.run([*SAID, "--overwrite"]) == 0
    assert "left out, 5 arrays: bn.running_std" in capsys.readouterr().out


def refused(words, *more, given=SAID):
    """A command and what it says."""
    return pytest.param([*given, *more], words, id=words[:40])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        refused("--to': 'caffe' is not one of 'keras', 'tf_keras', 'torch', ", "--to", "caffe"),
        refused("--from': 'pytorch' is not one of 'keras', 'tf_keras', 'torch', ", "--from", "pytorch"),
        refused("comes from: give --from NAME.", given=("convert", "in.npz", "out.npz", "--to", "keras")),
        refused("do not say it: give --eps, --momentum, --settings or --defaults (", given=FROM_TORCH),
        refused("bn: haiku's parameters have the rank of x: give --ndim.", "--to", "haiku"),
        refused("--ndim must be a positive integer; received -4.", "--ndim", "-4"),
        refused("--names has 'nb', and the source has: bn.", "--names", "names.json"),
        refused("--settings name 'nb', and no layer", "--settings", "settings.json"),
        refused("list.json must hold each layer's arguments under its name; received [3].", "--settings", "list.json"),
        refused("bn: momentum must be in [0, 1]; received 1.5.", "--momentum", "1.5"),
        refused("no.json cannot be read: No such file or directory.", "--settings", "no.json"),
        refused("broken.json is no JSON", "--settings", "broken.json"),
        refused("broken.json is no JSON", "--names", "broken.json"),
        refused("equinox saves arrays by position", "--to", "equinox"),
        refused("--like belongs to an output in .keras or .onnx", "--like", "in.npz"),
        refused("There is no file 'no.npz'.", given=("convert", "no.npz", "out.npz", "--to", "keras")),
        refused("There is no folder 'no' to write to.", given=(*SAID[:2], "no/out.npz", *SAID[3:])),
        refused("received 'out.bin'.", given=(*SAID[:2], "out.bin", *SAID[3:])),
        refused("'old.npz' exists: choose another name, or say --overwrite.", given=(*SAID[:2], "old.npz", *SAID[3:])),
        refused("'in.npz' is the input too", "--overwrite", given=(*SAID[:2], "in.npz", *SAID[3:])),
        refused("out.keras holds a whole model: say with --like", given=(*SAID[:2], "out.keras", *SAID[3:])),
        refused("There is no file 'no.npz'.", given=("inspect", "no.npz")),
        refused("old.npz cannot be read", given=("inspect", "old.npz")),
        refused("Files end in .safetensors, .npz", given=("inspect", "broken.json")),
    ],
)
def test_a_wrong_call_is_one_sentence_and_writes_nothing(command, words, capsys):
    Path("old.npz").write_text("old")
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[3]")
    Path("names.json").write_text('{"nb": "x"}')
    Path("settings.json").write_text('{"nb": {"eps": 1e-3}}')
    before = there()
    assert cli.run(command) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert (out, err.count("\n")) == ("", 1)
    assert there() == before


@pytest.mark.parametrize(
    ("told", "words"),
    [
        *(
            (told, 'must hold an object such as {"framework": "torch", "layers": {}}; received')
            for told in ("[]", '"x"', "3", "null", '{"framework": [1]}')
        ),
        ('{"framework": "torch", "layers": []}', "must hold each layer's arguments under its name; received []."),
        ('{"framework": "torch", "layers": {"bn": 3}}', "must hold each layer's arguments under its name; received"),
        ('{"framework": "torch", "layers": {"bn": {"eps": "1"}}}', "bn: eps must be a number; received str '1'."),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_what_a_foreign_file_tells_of_arrays(suffix, told, words, capsys):
    if suffix == "npz":
        Path("in.npz.json").write_text(told)
    else:
        pytest.importorskip("safetensors.numpy").save_file(arrays(), "in.safetensors", metadata={"normkit": told})
    for command in (["convert", f"in.{suffix}", "out.npz", "--to", "keras"], ["inspect", f"in.{suffix}"]):
        assert cli.run(command) == 2
        out, err = capsys.readouterr()
        assert words in err
        assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("read_only", ["out.npz", "out.npz.json", "."])
def test_what_is_read_only(read_only, monkeypatch, capsys):
    Path("out.npz").write_text("old")
    Path("out.npz.json").write_text("old")
    os.chmod(read_only, 0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path(read_only))  # as it is for all but root
    before = there()
    try:
        assert cli.run([*SAID, "--overwrite"]) == 2
        assert "read-only" in capsys.readouterr().err
        assert there() == before
    finally:
        os.chmod(read_only, 0o700)


def test_inspect(capsys):
    assert cli.run(["inspect", "in.npz", "--json", "report.json"]) == 0
    out = capsys.readouterr().out
    assert "torch: 1 norm layer" in out
    assert "2 arrays may be norm layers, which --settings can say" in out
    Path("settings.json").write_text(json.dumps({"bn": {"layer": "BatchNorm2d", "eps": 1e-5, "momentum": 0.99}}))
    assert cli.run(["inspect", "in.npz", "--settings", "settings.json", "--json", "report.json"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "momentum-sense: momentum 0.99 weights the new statistics: the last batch counts for 0.99." in out
    assert "Set momentum to 0.01" in out
    (finding,) = json.loads(Path("report.json").read_text())["findings"]
    assert finding.keys() == {"id", "layer", "reason", "fix"}


def test_inspect_of_a_file_without_norms(capsys):
    np.savez("conv.npz", **{"conv.weight": np.ones((2, 2))})
    assert cli.run(["inspect", "conv.npz", "--from", "torch"]) == 0
    assert capsys.readouterr().out.strip() == "torch: no norm layer was found"
    assert cli.run(["inspect", "conv.npz"]) == 2
    assert "conv.npz does not say which framework it comes from" in capsys.readouterr().err
