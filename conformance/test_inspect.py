"""normkit.inspect: what it lists and what it warns of, on arrays by name and on normkit's layers."""

import json

import numpy as np
import pytest

import normkit as nk
from normkit._convert import ConversionError

GOOD = {
    "bn.weight": np.ones(3, np.float32),
    "bn.bias": np.zeros(3, np.float32),
    "bn.running_mean": np.asarray([0.5, -1.0, 2.0], np.float32),
    "bn.running_var": np.asarray([0.5, 1.0, 2.0], np.float32),
}
SETTINGS = {"bn": {"layer": "BatchNorm2d", "eps": 1e-5, "momentum": 0.1}}


def found(arrays=None, settings=SETTINGS, framework="torch"):
    """The ids of what is found."""
    report = nk.inspect({**GOOD, **(arrays or {})}, framework=framework, settings=settings)
    assert all(f.reason and f.fix and not f.fix.endswith(".") for f in report.findings)
    json.dumps(report.json())
    return [f.id for f in report.findings]


def of(**changes):
    return {"bn": {**SETTINGS["bn"], **changes}}


def test_a_healthy_layer():
    report = nk.inspect(GOOD, framework="torch", settings=SETTINGS)
    (row,) = report.rows
    assert (row.name, row.layer, row.lengths, row.eps, row.momentum) == ("bn", "BatchNorm2d", (3,), 1e-5, 0.1)
    assert (row.dtype, row.statistics) == ("float32", "float32")
    assert report.findings == []
    assert "bn: BatchNorm2d(3,), eps 1e-05, momentum 0.1" in str(report)


@pytest.mark.parametrize(
    ("arrays", "settings", "finding"),
    [
        ({}, of(momentum=0.99), "momentum-sense"),
        ({}, of(momentum=1.1), "momentum-range"),
        ({}, of(momentum=-0.1), "momentum-range"),
        ({}, of(momentum=0.0), "statistics-never-move"),
        ({}, of(layer="InstanceNorm2d", momentum=None), "statistics-never-move"),
        ({"bn.running_mean": np.ones(3, np.float16)}, SETTINGS, "half-statistics"),
        ({"bn.running_var": np.asarray([1.0, -1e-3, 2.0])}, SETTINGS, "negative-variance"),
        ({"bn.running_var": np.asarray([1.0, 0.0, 2.0])}, SETTINGS, "zero-variance"),
        ({"bn.running_var": np.asarray([1.0, np.inf, 2.0])}, SETTINGS, "nonfinite-statistics"),
        ({"bn.running_mean": np.asarray([1.0, np.nan, 2.0])}, SETTINGS, "nonfinite-statistics"),
        ({"bn.weight": np.asarray([1.0, np.nan, 2.0])}, SETTINGS, "nonfinite-parameters"),
        ({"bn.running_mean": np.zeros(3), "bn.running_var": np.ones(3)}, SETTINGS, "initial-statistics"),
        ({}, of(track_running_stats=False), "no-statistics"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_finding(arrays, settings, finding):
    assert found(arrays, settings) == [finding]


@pytest.mark.parametrize("momentum", [0.5, 0.1, 3e-4, None])
def test_a_usual_momentum_is_no_finding(momentum):
    assert found(settings=of(momentum=momentum)) == []


def test_the_sense_of_momentum_is_the_frameworks():
    arrays = nk.convert(GOOD, "keras", framework="torch", settings=SETTINGS).arrays()
    for momentum, findings in ((0.99, []), (0.1, ["momentum-sense"]), (1.0, ["statistics-never-move"])):
        settings = {"bn": {"layer": "BatchNormalization", "epsilon": 1e-3, "momentum": momentum}}
        assert [f.id for f in nk.inspect(arrays, framework="keras", settings=settings).findings] == findings
    report = nk.inspect(arrays, framework="keras", settings={"bn": {"epsilon": 1e-3, "momentum": 0.1}})
    assert "Set momentum to 0.9" in report.findings[0].fix


def test_mixed_eps_names_the_few():
    arrays = {key.replace("bn", name): value for name in "abc" for key, value in GOOD.items()}
    settings = {name: {**SETTINGS["bn"], "eps": 1e-3 if name == "b" else 1e-5} for name in "abc"}
    (finding,) = nk.inspect(arrays, framework="torch", settings=settings).findings
    assert (finding.id, finding.layer) == ("mixed-eps", "b")
    assert finding.reason == "eps is 0.001, and 1e-05 in 2 other BatchNorm2d"


def test_a_file_says_what_it_is_or_looks_like_it(tmp_path):
    np.savez(tmp_path / "a.npz", **GOOD, **{"ln.weight": np.ones(4), "ln.bias": np.ones(4)})
    report = nk.inspect(tmp_path / "a.npz")
    assert report.framework == "torch"
    assert [(r.name, r.eps) for r in report.rows] == [("bn", None)]
    assert report.unknown == ["ln.bias", "ln.weight"]
    np.savez(tmp_path / "b.npz", something=np.ones(3))
    with pytest.raises(ConversionError, match="does not say which framework it comes from"):
        nk.inspect(tmp_path / "b.npz")


def test_normkits_own_layers():
    layer = nk.BatchNorm(3, momentum=0.05)
    assert [f.id for f in nk.inspect(layer).findings] == ["momentum-sense", "initial-statistics"]


def test_what_is_no_model():
    with pytest.raises(ConversionError, match="received int"):
        nk.inspect(3)
