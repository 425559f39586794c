"""normkit.convert without any framework: the record, its rules, arrays by name, files, and what is refused."""

import json
import os
from functools import partial

import ml_dtypes
import numpy as np
import pytest

import normkit as nk
from normkit._convert import ConversionError, Momentum, Norm
from normkit._convert.conversion import convert_file, layers_json
from normkit._convert.framework import FRAMEWORKS, framework
from normkit._convert.rules import RULES
from normkit.conformance.norm_layers import RECORDS, REFUSED, axis_in

SETTINGS = {"eps": 1e-3, "momentum": 0.03}


def state(prefix="bn", dtype=np.float32, channels=3):
    """What torch's state dict has of a batch norm."""
    rng = np.random.default_rng(0)
    names = ("weight", "bias", "running_mean", "running_var")
    arrays = {f"{prefix}.{name}": rng.random(channels).astype(dtype) for name in names}
    return {**arrays, f"{prefix}.num_batches_tracked": np.asarray(7)}


def rules(result):
    return {applied.rule for applied in result.rules}


@pytest.mark.parametrize("value", [0.0, 3e-4, 0.003, 0.01, 0.1, 0.25, 0.3, 0.9, 0.97, 0.99, 0.999, 0.9997, 1.0])
def test_momentum_there_and_back(value):
    other = Momentum(value, "new").of("old")
    assert Momentum(other, "old").of("new") == value
    assert other == pytest.approx(1 - value, abs=1e-16)


def test_momentum_is_the_decimal_complement():
    assert Momentum(0.9, "old").of("new") == 0.1 != 1 - 0.9
    assert Momentum(None, "new").of("old") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("batchnorm", (3,), (1,), 1e-5), "There is no norm layer 'batchnorm'"),
        (("layer_norm", (3,), (-1,), -1.0), "eps must be a finite number >= 0; received -1.0."),
        (("layer_norm", (3,), (-1,), float("nan")), "eps must be a finite number"),
        (("group_norm", (3,), (1,), 1e-5), "num_groups belongs to group_norm"),
        (("layer_norm", (3,), (-1,), 1e-5, np.ones(4)), "weight must have shape (3,); received shape (4,)."),
    ],
)
def test_a_record_checks_itself(arguments, message):
    with pytest.raises(ConversionError) as caught:
        Norm(*arguments)
    assert message in str(caught.value)


def test_groups_and_statistics_are_checked():
    with pytest.raises(ConversionError, match="6 channels do not divide into 4 groups"):
        Norm("group_norm", (6,), (1,), 1e-5, num_groups=4)
    with pytest.raises(ConversionError, match="There is a running variance and no running mean"):
        Norm("batch_norm", (3,), (1,), 1e-5, var=np.ones(3))


def test_torch_to_keras_by_name():
    arrays = state()
    result = nk.convert(arrays, "keras", framework="torch", settings={"bn": SETTINGS})
    assert list(result.natives) == ["bn"]
    native = result.natives["bn"]
    assert native.layer == "BatchNormalization"
    assert (native.settings["epsilon"], native.settings["momentum"], native.settings["axis"]) == (1e-3, 0.97, 1)
    pairs = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    assert result.arrays().keys() == {f"bn/{key}" for key in pairs}
    for key, name in pairs.items():
        np.testing.assert_array_equal(result.arrays()[f"bn/{key}"], arrays[f"bn.{name}"])
    assert rules(result) == {"eps-default", "momentum-sense", "runvar-bias", "state-names"}
    assert "momentum-sense: momentum 0.03 is 0.97 in keras (bn)" in str(result)
    json.dumps(result.json())


BN, STATS = {"layer": "BatchNorm2d", **SETTINGS}, {"running_mean": 3, "running_var": 3}
WEIGHT, BOTH = {"weight": 3}, {"weight": 3, "bias": 3}
KERAS = {"gamma": 3, "beta": 3, "moving_mean": 3, "moving_variance": 3}
GROUP = {"layer": "GroupNorm", "num_groups": 1, "eps": 1e-5}
#: By rule: from and to where it applies, the layer's settings and arrays, and options.
APPLIES = {
    "affine-pair": ("torch", "equinox", BN, {**WEIGHT, **STATS}, {}),
    "axis-layout": ("torch", "keras", BN, STATS, {"axis": -1}),
    "axis-param-shape": ("torch", "haiku", BN, STATS, {"ndim": 4}),
    "cast-point": ("torch", "keras", {"layer": "LlamaRMSNorm", "eps": 1e-5}, WEIGHT, {}),
    "config-legacy": ("tf_keras", "keras", {"axis": [3], "epsilon": 1e-3, "momentum": 0.9}, KERAS, {}),
    "debias": ("torch", "haiku", BN, STATS, {"ndim": 4}),
    "eps-default": ("torch", "keras", BN, STATS, {}),
    "eps-none": ("torch", "keras", {"layer": "RMSNorm", "eps": None}, WEIGHT, {}),
    "eqx-default-mode": ("torch", "equinox", BN, {**BOTH, **STATS}, {}),
    "freeze-semantics": ("torch", "keras", {**BN, "requires_grad": False}, {**BOTH, **STATS}, {}),
    "gn-instance": ("torch", "keras", {"layer": "InstanceNorm2d", "eps": 1e-5}, BOTH, {}),
    "gn-order": ("torch", "keras", GROUP, BOTH, {}),
    "momentum-none": ("torch", "torch", {**BN, "layer": "InstanceNorm2d", "momentum": None}, STATS, {}),
    "momentum-sense": ("torch", "keras", BN, STATS, {}),
    "onnx-gn-body": ("torch", "onnx", GROUP, BOTH, {"ndim": 4}),
    "renorm-state": ("tf_keras", "keras", {"epsilon": 1e-3, "momentum": 0.9}, {**KERAS, "moving_stddev": 3}, {}),
    "runvar-bias": ("torch", "keras", BN, STATS, {}),
    "runvar-bias-rank": ("torch", "tf_keras", BN, STATS, {}),
    "state-names": ("keras", "torch", {"epsilon": 1e-3, "momentum": 0.9, "axis": 1}, KERAS, {}),
    "sync-stats": ("torch", "keras", {**BN, "layer": "SyncBatchNorm"}, STATS, {}),
    "weight-offset": ("torch", "keras", {"layer": "GemmaRMSNorm", "eps": 1e-5}, WEIGHT, {}),
}
#: These need a model: test_convert_models.py; or a layer of normkit's, which was told more than others can be.
OF_MODELS = {"onnx-gn18", "subclass"}
OF_LAYERS = {"single_value": "single-value", "empty_batch": "empty-batch", "nonfinite": "nan-propagation"}


@pytest.mark.parametrize("rule", sorted(RULES.keys() - OF_MODELS - {*OF_LAYERS.values()}))
def test_a_rule_that_applies_is_told(rule):
    source, to, settings, shapes, options = APPLIES[rule]
    arrays = {f"n{framework(source).separator}{key}": np.full(n, 0.5, np.float32) for key, n in shapes.items()}
    result = nk.convert(arrays, to, framework=source, settings={"n": settings}, **options)
    assert rule in rules(result)
    assert all(a.text and not a.text.endswith(".") for a in result.rules)


def test_rules_that_do_not_apply_are_not_told():
    """From normkit's batch norm to one of the same conventions."""
    settings = {"layer": "BatchNorm", "eps": 1e-3, "momentum": 0.9, "unbiased": False, "axis": -1}
    arrays = {f"n.{key}": np.full(3, 0.5, np.float32) for key in (*BOTH, *STATS)}
    result = nk.convert(arrays, "keras", framework="normkit", settings={"n": settings})
    assert rules(result) == {"eps-default"}


def test_order_and_position_do_not_matter():
    arrays = {**state("a"), **state("b")}
    arrays = {key: value + ord(key[0]) if value.ndim else value for key, value in arrays.items()}
    backwards = dict(reversed(arrays.items()))
    options = {"framework": "torch", "defaults": True}
    first, second = (nk.convert(given, "keras", **options).arrays() for given in (arrays, backwards))
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key])
    assert (first["b/gamma"] - first["a/gamma"] > 0).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", [n for n in FRAMEWORKS if framework(n).has_files])
def test_arrays_there_and_back_are_bits(name, dtype):
    arrays = state("block.bn", dtype)
    there = nk.convert(arrays, name, framework="torch", settings={"block.bn": SETTINGS}, ndim=4)
    settings = {
        key: {"layer": native.layer, **native.settings} for key, native in there.natives.items()
    }  # as a file holds them
    back = nk.convert(there.arrays(), "torch", framework=name, settings=settings)
    for key, value in back.arrays().items():
        if key.endswith("tracked"):
            continue  # only torch and normkit count batches
        assert value.dtype == arrays[key].dtype
        np.testing.assert_array_equal(value, arrays[key], key)
    assert back.norms["block.bn"].eps == 1e-3
    assert back.natives["block.bn"].settings["momentum"] == 0.03


def test_a_count_rescales_the_variance_and_says_so():
    arrays = state()
    plain = nk.convert(arrays, "keras", framework="torch", defaults=True)
    scaled = nk.convert(arrays, "keras", framework="torch", defaults=True, count=10)
    np.testing.assert_array_equal(plain.arrays()["bn/moving_variance"], arrays["bn.running_var"])
    expected = (arrays["bn.running_var"].astype(np.float64) * 0.9).astype(np.float32)
    np.testing.assert_array_equal(scaled.arrays()["bn/moving_variance"], expected)
    assert "the stored variance is multiplied by 9 / 10, as asked" in str(scaled)
    same = nk.convert(scaled.arrays(), "linen", framework="keras", defaults=True, count=10)
    np.testing.assert_array_equal(same.arrays()["batch_stats/bn/var"], expected)


def test_tf_keras_divides_by_n_minus_1_where_it_is_fused():
    arrays = nk.convert(state(), "tf_keras", framework="torch", defaults=True).arrays()
    for ndim, variance in ((4, "unbiased"), (2, "biased")):
        settings = {"bn": {"ndim": ndim, "axis": -1}}
        result = nk.convert(arrays, "keras", framework="tf_keras", defaults=True, settings=settings)
        assert result.norms["bn"].variance == variance
        assert ("runvar-bias" in rules(result)) is (variance == "unbiased")
        assert "runvar-bias-rank" in rules(result)


def test_an_offset_is_added_once():
    weight = np.asarray([0.0, 0.5, -0.25], np.float32)
    settings = {"norm": {"layer": "GemmaRMSNorm", "eps": 1e-6}}
    result = nk.convert({"norm.weight": weight}, "keras", framework="torch", settings=settings)
    np.testing.assert_array_equal(result.arrays()["norm/scale"], weight + 1)
    assert "weight-offset" in rules(result)
    kept = nk.convert({"norm.weight": weight}, "normkit", framework="torch", settings=settings)
    assert kept.natives["norm"].settings["weight_offset"] == 1.0
    np.testing.assert_array_equal(kept.arrays()["norm.weight"], weight)
    assert "weight-offset" not in rules(kept)


def test_the_cast_point_is_told():
    settings = {"norm": {"layer": "LlamaRMSNorm", "variance_epsilon": 1e-6}}
    result = nk.convert({"norm.weight": np.ones(3, np.float32)}, "linen", framework="torch", settings=settings)
    assert "cast-point" in rules(result)
    assert result.norms["norm"].cast == "input"


def test_normkit_keeps_the_cast_point():
    settings = {"norm": {"layer": "LlamaRMSNorm", "variance_epsilon": 1e-6}}
    weight = np.arange(3, dtype=np.float32)
    kept = nk.convert({"norm.weight": weight}, "normkit", framework="torch", settings=settings)
    assert kept.natives["norm"].settings["cast"] == "input" and "cast-point" not in rules(kept)
    layer = nk.RMSNorm(3, style="llama")
    layer.load_state_dict({"weight": weight})
    back = nk.convert(layer, "keras")
    assert back.norms[""].cast == "input" and "cast-point" in rules(back)
    nk.convert(layer, other := nk.RMSNorm(3))
    assert other.cast == "output" and np.array_equal(other.weight, weight)


def test_an_eps_of_none_is_a_number():
    settings = {"norm": {"layer": "RMSNorm", "eps": None}}
    for dtype, eps in ((np.float32, 2.0**-23), (ml_dtypes.bfloat16, 2.0**-23), (np.float64, 2.0**-52)):
        result = nk.convert({"norm.weight": np.ones(3, dtype)}, "keras", framework="torch", settings=settings)
        assert result.norms["norm"].eps == eps
        assert "eps-none" in rules(result)


def test_haiku_gives_its_average_not_its_hidden_sum():
    average, hidden = (np.asarray(values, np.float32).reshape(1, 1, 1, 2) for values in ([1.0, 2.0], [0.1, 0.2]))
    parts = {"average": average, "hidden": hidden, "counter": np.asarray(10, np.int32)}
    params = {"bn": {"scale": np.ones_like(average), "offset": np.zeros_like(average)}}
    source = params, {"bn/~/mean_ema": parts, "bn/~/var_ema": parts}
    settings = {"bn": {"eps": 1e-5, "decay_rate": 0.99}}
    result = nk.convert(source, "torch", framework="haiku", settings=settings, axis=1)
    np.testing.assert_array_equal(result.arrays()["bn.running_mean"], [1.0, 2.0])
    assert int(result.arrays()["bn.num_batches_tracked"]) == 10
    assert rules(result) >= {"debias", "axis-param-shape", "axis-layout"}


def test_haiku_gets_a_counter_that_debiases_no_more():
    result = nk.convert(state(), "haiku", framework="torch", settings={"bn": SETTINGS}, ndim=4)
    counter = result.arrays()["state/bn/~/mean_ema/counter"]
    assert np.float32(1) - np.float32(0.97) ** counter.astype(np.float32) == 1
    np.testing.assert_array_equal(*(result.arrays()[f"state/bn/~/var_ema/{n}"] for n in ("hidden", "average")))
    assert result.arrays()["params/bn/scale"].shape == (1, 3, 1, 1)


#: Channels at two axes, in linen.
SEVERAL = {
    "source": {"batch_stats/bn/mean": np.ones((3, 2)), "batch_stats/bn/var": np.ones((3, 2))},
    "framework": "linen",
    "settings": {"bn": {"layer": "BatchNorm", "axis": (1, 3), "epsilon": 1e-5, "momentum": 0.9}},
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "caffe"}, "There is no framework 'caffe'; there are: keras, "),
        ({"framework": "caffe"}, "There is no framework 'caffe'"),
        ({"framework": None}, "a mapping of arrays with framework=NAME"),
        ({"settings": None}, "bn: eps of BatchNorm is not known, and arrays do not say it: give eps"),
        ({"settings": {"bn": {"eps": 1e-5}}}, "bn: momentum of BatchNorm is not known"),
        ({"settings": {"bn": SETTINGS, "ln": {"eps": 1e-5}}}, "settings name 'ln', and no layer with arrays"),
        ({"settings": {"bn": {**SETTINGS, "momentum": 1.5}}}, "bn: momentum must be in [0, 1]; received 1.5."),
        ({"settings": {"bn": {**SETTINGS, "momentum": None}}}, "bn: momentum=None averages all batches, which keras"),
        ({"names": {"nb": "x"}}, "names has 'nb', and the source has: bn."),
        ({"to": "haiku"}, "bn: haiku's parameters have the rank of x: give ndim."),
        ({"to": "equinox", "axis": -1}, "bn: equinox has the channels at axis 1, this batch_norm at axis -1"),
        ({"count": 1}, "bn: count must be at least 2 values per channel and batch; received 1."),
        ({"count": "3"}, "count must be a positive integer; received str '3'."),
        ({"ndim": "4"}, "ndim must be a positive integer; received str '4'."),
        ({"ndim": -4, "to": "haiku"}, "ndim must be a positive integer; received -4."),
        ({"ndim": 1}, "bn: axis must be in [-1, 0] for x of rank 1; received 1."),
        ({"ndim": 6, "to": "torch"}, "bn: torch's BatchNorm takes x of rank 2 to 5; received rank 6."),
        ({"ndim": 4, "axis": 9, "to": "haiku"}, "bn: axis must be in [-4, 3] for x of rank 4; received 9."),
        ({"axis": "1"}, "axis must be an integer; received str '1'."),
        ({"axis": (1,)}, "axis must be an integer; received tuple."),
        ({"eps": "1", "momentum": 0.1, "settings": None}, "bn: eps must be a number; received str '1'."),
        ({"settings": {"bn": {**SETTINGS, "eps": None}}}, "bn: eps must be a number; received None."),
        ({"settings": {"bn": {**SETTINGS, "num_features": "3"}}}, "bn: num_features must be a positive integer"),
        ({"source": {"conv.weight": np.ones((2, 2))}}, "it belongs to no norm layer"),
        ({"source": {"ln.weight": np.ones(2)}, "settings": None}, "nothing says which layer it is: give settings."),
        ({"source": {}, "settings": None}, "The source has no norm layers."),
        ({"source": state() | {"bn.running_var": np.ones(4)}}, "bn: var must have shape (3,); received shape (4,)."),
        ({"source": {"bn.running_mean": np.ones(3)}}, "bn: There is a running mean and no running variance."),
        ({"framework": "equinox"}, "equinox saves arrays by position, not by name"),
        (SEVERAL, "bn: batch norm over several channel axes exists in flax only: (1, 3)."),
    ],
    ids=str,
)
def test_refusals_are_one_sentence(options, message):
    given = {"source": state(), "to": "keras", "framework": "torch", "settings": {"bn": SETTINGS}, **options}
    if "conv.weight" in given["source"]:
        given["settings"] = None
    source, to = given.pop("source"), given.pop("to")
    with pytest.raises(ConversionError) as caught:
        nk.convert(source, to, **given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


#: What is wrong with settings themselves.
WRONG = [
    (3, "settings must hold each layer's arguments under its name; received 3."),
    ({"bn": 3}, "settings must hold each layer's arguments under its name; received {'bn': 3}."),
    ({"bn": {"layer": "BatchNrm"}}, "bn: torch has no norm layer 'BatchNrm'; it has: BatchNorm1d, BatchNorm2d, "),
    ({"bn": {"layer": 3}}, "bn: torch has no norm layer 3; it has: "),
    ({"bn": {"layer": ["BatchNorm"]}}, "bn: torch has no norm layer ['BatchNorm']; it has: "),
    ({"b*": {"epsilon": 0.1}}, "b*: torch's norm layers have no 'epsilon'; they have: num_features, "),
    ({"bn": {"eps": "1e-3"}}, "bn: eps must be a number; received str '1e-3'."),
    ({"bn": {"eps": [1]}}, "bn: eps must be a number; received list."),
    ({"bn": {"eps": True}}, "bn: eps must be a number; received True."),
    ({"bn": {"momentum": "a"}}, "bn: momentum must be a number; received str 'a'."),
    ({"bn": {"num_groups": "2"}}, "bn: num_groups must be an integer; received str '2'."),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_wrong_settings_are_refused_wherever_they_are_given(settings, message):
    for call in (partial(nk.convert, to="keras", defaults=True), nk.inspect):
        with pytest.raises(ConversionError) as caught:
            call(state(), framework="torch", settings=settings)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in FRAMEWORKS if framework(n).has_files])
def test_settings_may_have_whatever_is_written(name):
    for record, norm in RECORDS.items():
        if (name, record) not in REFUSED:
            axis = axis_in(name, norm)
            norm = norm if axis is None else norm.but(axis=(axis,), trainable=False)
            native = framework(name).write(norm, lambda rule, text: None)
            framework(name).validate(layers_json({"n": native})["n"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"layer": "LayerNorm", "axis": 9, "param_axis": 9},
            "ln: Parameters of shape (3, 1) are not those of axis (9,).",
        ),
        (
            {"layer": "LayerNorm", "axis": []},
            "ln: Axes are whole numbers of one sign, in ascending order; received [].",
        ),
    ],
    ids=str,
)
def test_axes_that_parameters_have_not(settings, message):
    arrays = {"params/ln/scale": np.ones((3, 1), np.float32)}
    with pytest.raises(ConversionError) as caught:
        nk.convert(arrays, "keras", framework="haiku", settings={"ln": {"eps": 1e-5, **settings}})
    assert str(caught.value) == message


#: What normkit's batch norm is told beyond others, and what of it they need not be.
TOLD = [{"use_batch_stats": True, "update_stats": False}, {"virtual_batch_size": 2}, {"r_max": 3.0, "d_max": 5.0}]
MINOR = [{"single_value": "zero", "empty_batch": "raise", "nonfinite": "skip"}, {"train_affine": False}]


@pytest.mark.parametrize("switches", [*TOLD, *MINOR], ids=str)
def test_normkits_switches_go_to_its_own_layers(switches):
    source, target = nk.BatchNorm(3, **switches), nk.BatchNorm(3, update_stats=True, virtual_batch_size=5)
    result = nk.convert(source, "normkit")
    assert {name: getattr(result.layer, name) for name in switches} == switches
    nk.convert(source, target)
    assert repr(target) == repr(result.layer) == repr(source)
    assert nk.inspect(source).rows == nk.inspect(nk.BatchNorm(3)).rows


@pytest.mark.parametrize("to", [name for name in FRAMEWORKS if name != "normkit"])
def test_normkits_switches_have_no_equivalent(to):
    axis = -1 if to == "nnx" else 1
    for switches in TOLD:
        with pytest.raises(ConversionError) as caught:
            nk.convert(nk.BatchNorm(3, axis=axis, **switches), to, ndim=4)
        said = " and ".join(f"{name}={value}" for name, value in switches.items())
        assert f"batch_norm with {said} has no equivalent in {framework(to).title or to}: set" in str(caught.value)
    for switches in MINOR:
        result = nk.convert(nk.BatchNorm(3, axis=axis, **switches), to, ndim=4)
        assert result.norms[""].trainable is switches.get("train_affine", True)
        left_out = {(rule.rule, rule.text) for rule in result.rules if rule.text.endswith("is left out")}
        told = {(OF_LAYERS[name], f"{name}={v!r} is left out") for name, v in switches.items() if name in OF_LAYERS}
        assert left_out == told


def test_a_report_has_no_functions():
    (told,) = nk.convert(nk.BatchNorm(3, r_max=abs), "normkit").json()["layers"].values()
    assert json.loads(json.dumps(told))["r_max"] == repr(abs)


def test_layers_that_are_not_trained():
    settings = {"bn": {**BN, "requires_grad": False}}
    assert nk.convert(state(), "normkit", framework="torch", settings=settings).layer.train_affine is False
    assert nk.convert(nk.LayerNorm(3, train_affine=False), "torch").natives[""].settings["requires_grad"] is False


def test_two_layers_of_one_name_are_refused():
    with pytest.raises(ConversionError, match="Several layers would have the name 'x'"):
        names = {"a": "x", "b": "x"}
        nk.convert({**state("a"), **state("b")}, "keras", framework="torch", defaults=True, names=names)


def test_into_a_layer_of_normkit():
    layer = nk.BatchNorm(3)
    result = nk.convert(state(), layer, framework="torch", settings={"bn": SETTINGS})
    assert result.model is layer
    assert (layer.eps, layer.momentum, layer.unbiased) == (1e-3, 0.97, True)
    np.testing.assert_array_equal(layer.running.var, state()["bn.running_var"])
    assert int(layer.running.num_batches) == 7


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nk.BatchNorm(4), "bn has channels (3,), and the target has channels (4,)."),
        (lambda: nk.LayerNorm(3), "bn is batch_norm, and the target is layer_norm."),
        (lambda: nk.BatchNorm(3, affine=False), "the target has no bias, weight, which the source has."),
        (lambda: nk.BatchNorm(3, dtype="float16"), "weight of the target is float16, which cannot hold these values"),
    ],
)
def test_a_target_that_does_not_fit_stays_as_it_was(layer, message):
    target = layer()
    before = target.state_dict()
    with pytest.raises(ConversionError) as caught:
        nk.convert(state(), target, framework="torch", settings={"bn": SETTINGS})
    assert message in str(caught.value)
    for key, value in target.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("to", ["keras", "linen", "haiku", "normkit"])
def test_files_there_and_back(to, suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    arrays = state() | {"conv.weight": np.ones((3, 2, 1, 1), np.float32)}
    np.savez(tmp_path / "in.npz", **arrays)
    middle, out = tmp_path / f"middle{suffix}", tmp_path / f"out{suffix}"
    there = convert_file(tmp_path / "in.npz", middle, to, framework="torch", settings={"bn": SETTINGS}, ndim=4)
    assert list(there.left) == ["conv.weight"]
    convert_file(middle, out, "torch")  # the file says what it is, and with which eps
    result = nk.convert(out, "torch")
    for key in ("weight", "bias", "running_mean", "running_var"):
        np.testing.assert_array_equal(result.arrays()[f"bn.{key}"], arrays[f"bn.{key}"])
    assert result.natives["bn"].settings["momentum"] == 0.03
    assert not [f for f in os.listdir(tmp_path) if f.startswith(".")]


def test_safetensors_hold_bfloat16_and_npz_does_not(tmp_path):
    pytest.importorskip("safetensors")
    arrays = state(dtype=ml_dtypes.bfloat16)
    result = nk.convert(arrays, "torch", framework="torch", defaults=True)
    from normkit._convert import files

    told = {"framework": "torch", "layers": {"bn": {"layer": "BatchNorm2d", **SETTINGS}}}
    files.write(tmp_path / "a.safetensors", told, result.arrays())
    again = nk.convert(tmp_path / "a.safetensors", "torch").arrays()
    assert again["bn.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(again["bn.weight"], arrays["bn.weight"])
    with pytest.raises(ConversionError, match=r"bn.weight is bfloat16, which .npz files do not hold"):
        files.write(tmp_path / "a.npz", told, result.arrays())
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]


@pytest.mark.parametrize("narrow", ["conv.weight", "bn.weight"])
def test_dtypes_that_numpy_has_not_are_no_trouble_elsewhere(narrow, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({**state(), narrow: np.ones(3, ml_dtypes.float8_e4m3fn)}, tmp_path / "a.safetensors")
    if narrow == "bn.weight":
        with pytest.raises(ConversionError, match="bn: weight is of a dtype that NumPy has not"):
            nk.convert(tmp_path / "a.safetensors", "keras", framework="torch", defaults=True)
    else:
        result = nk.convert(tmp_path / "a.safetensors", "keras", framework="torch", defaults=True)
        np.testing.assert_array_equal(result.arrays()["bn/gamma"], state()["bn.weight"])


def test_other_metadata_is_no_trouble(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file(state(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    result = nk.convert(tmp_path / "a.safetensors", "keras", framework="torch", eps=1e-3, momentum=0.1)
    assert (result.norms["bn"].eps, result.norms["bn"].momentum.of("old")) == (1e-3, 0.9)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.npz", b"nothing", "in.npz cannot be read"),
        ("in.npz", None, "There is no file"),
        ("in.bin", b"", "Files end in .safetensors, .npz"),
    ],
)
def test_what_is_no_file_of_arrays(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        nk.convert(tmp_path / name, "keras", framework="torch")


@pytest.mark.parametrize("broken", ["exists", "read-only", "no folder", "folder", "suffix"])
def test_an_output_that_cannot_be_written(broken, tmp_path, monkeypatch):
    np.savez(tmp_path / "in.npz", **state())
    out, options = tmp_path / "out.npz", {}
    if broken in ("exists", "read-only"):
        out.write_bytes(b"old")
    if broken == "read-only":
        out.chmod(0o444)
        monkeypatch.setattr(os, "access", lambda path, mode: path != out)  # as it is for all but root
        options = {"overwrite": True}
    if broken == "no folder":
        out = tmp_path / "no" / "out.npz"
    if broken == "folder":
        out.mkdir()
    if broken == "suffix":
        out = tmp_path / "out.bin"
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConversionError) as caught:
        convert_file(tmp_path / "in.npz", out, "keras", framework="torch", defaults=True, **options)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before
    if broken == "exists":
        assert out.read_bytes() == b"old"
        convert_file(tmp_path / "in.npz", out, "keras", framework="torch", defaults=True, overwrite=True)
        assert nk.convert(out, "torch", axis=1).natives["bn"].settings["momentum"] == 0.1


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_eps_is_written_whatever_the_defaults_are(to):
    result = nk.convert(state(), to, framework="torch", settings={"bn": {**SETTINGS, "eps": 3e-4}}, ndim=4)
    (native,) = result.natives.values()
    assert [value for name, value in native.settings.items() if name.startswith("eps")] == [3e-4]
