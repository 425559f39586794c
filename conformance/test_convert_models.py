"""normkit.convert on whole models of the frameworks, and what of them is refused."""

import copy
import io
import itertools
import json
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from torch import nn

import normkit as nk
import normkit.flax
import normkit.keras
import normkit.torch
from normkit import cli
from normkit._convert import ConversionError
from normkit.conformance.norm_layers import importing
from normkit.conformance.norm_models import (
    LIMIT,
    Small,
    SmallEquinox,
    X,
    graph,
    keras_net,
    net,
    onnx_small,
    ran,
    small,
    state,
    with_convolutions,
)
from normkit.conformance.tolerances import units

with importing():
    import equinox
    import flax.linen
    import jax
    import keras
    import onnx
    import onnxruntime
    import tf_keras
    from flax import nnx


@pytest.mark.parametrize("top", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_torch_and_keras_compute_the_same(top):
    source, target = net(), with_convolutions(keras_net(top), net())
    x = X.transpose(0, 2, 3, 1)
    before = np.asarray(target(x, training=False))
    result = nk.convert(source, target)
    assert result.model is target
    assert units(before, ran(source), "float32") > 1e3 * LIMIT
    assert units(np.asarray(target(x, training=False)), ran(source), "float32") <= LIMIT
    assert (target.get_layer("bn").epsilon, target.get_layer("bn").momentum) == (1e-3, 0.7)
    expected = {"eps-default", "gn-order", "momentum-sense", "state-names"}
    fused = {"runvar-bias-rank"} if top is tf_keras else {"runvar-bias"}
    assert {applied.rule for applied in result.rules} == expected | fused
    back = nk.convert(target, copy.deepcopy(net(steps=0))).model
    for name, value in state(source).items():
        if name.startswith(("bn.", "gn.", "ln.")) and not name.endswith("tracked"):
            np.testing.assert_array_equal(state(back)[name], value, name)
    assert (back.bn.eps, back.bn.momentum, back.gn.eps) == (1e-3, 0.3, 1e-4)


@pytest.mark.parametrize("top", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_layers_of_keras_are_named_by_the_layers_they_are_within(top):
    def inner():
        x = top.Input((4, 3))
        return top.Model(x, top.layers.LayerNormalization(name="norm")(x), name=f"block{next(count)}")

    count, shared = itertools.count(), top.layers.LayerNormalization(name="shared")
    x = top.Input((4, 3))
    once = shared(inner()(x))
    model = top.Model(x, shared(inner()(once)), name="functional")
    assert [row.name for row in nk.inspect(model).rows] == ["block0/norm", "shared", "block1/norm"]
    model = top.Sequential([top.Input((4, 3)), inner(), top.layers.LayerNormalization(name="last")])
    assert [row.name for row in nk.inspect(model).rows] == ["block2/norm", "last"]
    assert [row.name for row in nk.inspect(model.layers[-1]).rows] == [""]


def test_keras_forgets_the_function_that_it_compiled():
    target, x = with_convolutions(keras_net(), net()), X.transpose(0, 2, 3, 1)
    target.predict(x, verbose=0)
    nk.convert(net(), target)
    assert units(target.predict(x, verbose=0), ran(net()), "float32") <= LIMIT


@pytest.mark.parametrize("trained", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_training_goes_on_with_the_same_running_statistics(trained):
    """One step after the conversion: momentum is in the right sense. Variances are biased in one of the two."""
    source, target = net(), with_convolutions(keras_net(trained), net())
    nk.convert(source, target)
    ran(source.train())
    target(X.transpose(0, 2, 3, 1), training=True)
    mean, var = target.get_layer("bn").get_weights()[2:]
    assert units(mean, source.bn.running_mean.numpy(), "float32", np.abs(mean).max() + 1) <= LIMIT
    n = 4 * 7 * 7
    share = 0.3 / n if trained is keras else 1e-5  # how far n and n - 1 can take them apart
    np.testing.assert_allclose(var, source.bn.running_var.numpy(), rtol=2 * share)


def test_into_a_model_of_nnx_and_back():
    model = nk.convert(small(), Small()).model
    assert units(np.asarray(model(X)), ran(small()), "float32") <= LIMIT
    back = nk.convert(model, small(seed=1)).model
    for name, value in state(small()).items():
        np.testing.assert_array_equal(state(back)[name], value, name)


@pytest.mark.filterwarnings("ignore")
def test_into_a_model_of_equinox_and_back():
    made = equinox.nn.make_with_state(SmallEquinox)()
    model, held = nk.convert(small(), made).model
    assert made[1].get(made[0].block["bn"].batch_counter) == 0
    y = jax.vmap(lambda x: model(x, held)[0], axis_name="batch")(X)
    assert units(np.asarray(y), ran(small()), "float32") <= LIMIT
    back = nk.convert((model, held), small(seed=1)).model
    for name, value in state(small()).items():
        if not name.endswith("tracked"):
            np.testing.assert_array_equal(state(back)[name], value, name)
    assert nk.convert((model, held), "keras", ndim=4).norms["block/bn"].eps == 1e-3
    with pytest.raises(ConversionError, match="keeps its statistics in a State"):
        nk.convert(model, "torch")


def test_into_a_graph_of_onnx_and_back():
    model = nk.convert(small(), onnx_small()).model
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert units(session.run(None, {"x": X})[0], ran(small()), "float32") <= LIMIT
    back = nk.convert(model, small(seed=1)).model
    for name, value in state(small()).items():
        if not name.endswith("tracked"):
            np.testing.assert_array_equal(state(back)[name], value, name)
    assert (back["block"]["bn"].eps, back["ln"].eps) == (1e-3, 1e-4)


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("/a/bn/BatchNormalization", "a.bn"),
        ("/a/a.0/a.0.1/b/b.0/BatchNormalization", "a.0.1.b.0"),
        ("/BatchNormalization", "/BatchNormalization"),
        ("node_bn", "node_bn"),
        ("", "y"),
    ],
)
def test_names_of_onnx_are_those_of_modules(node, name):
    model = graph(("BatchNormalization", ["x", *"wbmv"], ["y"], node, {}), **dict.fromkeys("wbmv", np.ones(3)))
    assert [row.name for row in nk.inspect(model).rows] == [name]


def test_onnx_layers_that_are_called_twice_or_named_alike():
    nodes = [("LayerNormalization", [a, *"wb"], [c], f"/ln/{c}", {}) for a, c in (("x", "h"), ("h", "i"))]
    other = ("LayerNormalization", ["i", "w", "c"], ["y"], "/ln/other", {})
    model = graph(*nodes, other, **dict.fromkeys("wbc", np.ones(9)))
    assert [row.name for row in nk.inspect(model).rows] == ["ln", "/ln/other"]
    layers = {"ln": nn.LayerNorm(9, 1e-3), "other": nn.LayerNorm(9, 1e-4)}
    for value, layer in enumerate(layers.values()):
        nn.init.constant_(layer.weight, value)
    nk.convert(nn.ModuleDict(layers), model, names={"other": "/ln/other"})
    assert [node.attribute[0].f for node in model.graph.node] == [np.float32(1e-3), np.float32(1e-3), np.float32(1e-4)]
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert [values[node.input[1]].tolist() for node in model.graph.node] == [[0.0] * 9, [0.0] * 9, [1.0] * 9]
    onnx.checker.check_model(model)


def test_onnx_group_norm_18_has_a_scale_per_group():
    node = ("GroupNormalization", ["x", "w", "b"], ["y"], "gn", {"num_groups": 2})
    model = graph(node, w=[1.0, 2.0], b=[3.0, 4.0])
    model.opset_import[0].version = 18
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 6
    result = nk.convert(model, "torch")
    assert result.arrays()["gn.weight"].tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert "onnx-gn18" in {applied.rule for applied in result.rules}


class Normed(nn.Module):
    """A group norm between a convolution and something else."""

    def __init__(self, affine, then):
        super().__init__()
        self.conv, self.gn, self.then = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4, affine=affine), then
        for p in self.parameters():
            nn.init.uniform_(p, 0.5, 1.5)

    def forward(self, x):
        return self.then(self.gn(self.conv(x)))


def exported(model, x, fold=True):
    """A graph as PyTorch's exporter of old writes it, with or without folding constants."""
    file, preserve = io.BytesIO(), torch.onnx.TrainingMode.PRESERVE
    options = {"dynamo": False, "do_constant_folding": fold, "training": preserve}
    torch.onnx.export(model.eval(), (torch.from_numpy(x),), file, **options)
    return onnx.load_from_string(file.getvalue())


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "then",
    [lambda y: y, lambda y: y * 0.5, lambda y: y + 1, lambda y: y * torch.arange(4.0)],
    ids=["y", "y/2", "y+1", "yw"],
)
@pytest.mark.filterwarnings("ignore")
def test_group_norms_that_torch_exports(then, affine, fold):
    source, x = Normed(affine, then), X[:, :, :, :6]
    model = exported(source, x, fold)
    back = nk.convert(model, "torch").layers
    assert list(back) == ["gn"]
    for name, value in state(source.gn).items():
        np.testing.assert_array_equal(back["gn"].state_dict()[name], value)
    other = Normed(affine, then)
    other.conv.load_state_dict(source.conv.state_dict())
    other.gn.eps = 0.5
    nk.convert(other, model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {model.graph.input[0].name: x})
    assert units(y, ran(other, x), "float32") <= LIMIT
    used = {name for node in model.graph.node for name in node.input}
    assert {t.name for t in model.graph.initializer} <= used


@pytest.mark.filterwarnings("ignore")
def test_a_group_norm_of_one_channel_has_parameters():
    layer, x = nn.GroupNorm(1, 1), X[:, :1]
    nn.init.constant_(layer.weight, 3.0)
    (arrays,) = (native.arrays for native in nk.convert(exported(layer, x), "torch").natives.values())
    assert (arrays["weight"].tolist(), arrays["bias"].tolist()) == ([3.0], [0.0])


def test_onnx_keeps_constants_that_a_branch_uses():
    model = graph(
        ("LayerNormalization", ["x", "w"], ["h"], "ln", {}), ("If", ["c"], ["y"], "if", {}), w=np.ones(9), c=1
    )
    branch = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["z"])], "b", [], [])
    model.graph.node[1].attribute.append(onnx.helper.make_attribute("then_branch", branch))
    source = nn.LayerNorm(9, bias=False)
    nn.init.constant_(source.weight, 3.0)
    nk.convert(source, model)
    values = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer}
    assert (values["w"], values["ln.Scale"]) == ([1.0] * 9, [3.0] * 9)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=str)
def test_a_graph_of_onnx_is_made_for_one_rank(layer):
    with pytest.raises(ConversionError, match="ONNX's graphs are made for one rank of x: give ndim"):
        _ = nk.convert(layer, "onnx").layer
    onnx.checker.check_model(nk.convert(layer, "onnx", ndim=3).layer)


def test_onnx_parameters_that_are_computed_are_refused():
    node = ("LayerNormalization", ["x", "x"], ["y"], "ln", {})
    with pytest.raises(ConversionError, match="ln: 'x' is computed, not a constant"):
        nk.convert(graph(node), "torch")


@pytest.mark.parametrize("renorm", [False, True])
def test_tf_keras_of_old(renorm):
    layer = tf_keras.layers.BatchNormalization(axis=[3], renorm=renorm, epsilon=2e-3)
    layer.build((None, 9, 9, 3))
    result = nk.convert(layer, "keras")
    assert {a.rule for a in result.rules} >= {"config-legacy", *(["renorm-state"] if renorm else [])}
    assert (result.layer.axis, result.layer.epsilon) == (3, 2e-3)


def test_shared_layers_are_written_once():
    shared = nn.BatchNorm2d(3, eps=1e-4)
    result = nk.convert(nn.Sequential(shared, nn.ReLU(), shared), "keras", ndim=4)
    assert list(result.natives) == ["0"]


def test_a_compiled_model_is_the_one_within():
    model = nk.convert(*(torch.compile(small(seed), backend="eager") for seed in (0, 1))).model
    np.testing.assert_array_equal(model.state_dict()["_orig_mod.ln.weight"], state(small())["ln.weight"])


class ChannelNorm(nn.LayerNorm):
    """A layer norm of channels, under a name that nobody knows."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OddNorm(nn.LayerNorm):
    """What is no layer norm, though it derives from one."""

    def forward(self, x):
        return super().forward(x).sigmoid()


class BatchNormAndMore(nn.BatchNorm2d):
    """A batch norm with an activation."""

    def forward(self, x):
        return super().forward(x).relu()


def test_subclasses_are_tried_out():
    model = nn.Sequential(ChannelNorm(3), OddNorm(9), BatchNormAndMore(3))
    result = nk.convert(model, "keras", ndim=4)
    assert [(name, norm.kind, norm.axis) for name, norm in result.norms.items()] == [
        ("0", "layer_norm", (-3,)),
        ("2", "batch_norm", (1,)),
    ]
    assert [a.text for a in result.rules if a.rule == "subclass"] == [
        "ChannelNorm is read as LayerNorm2d",
        "BatchNormAndMore is read as BatchNorm2d",
    ]
    assert "a subclass of torch.nn.LayerNorm with a forward pass of its own" in result.left["1"]
    assert nk.inspect(model).unknown == ["1"]


class MyNorm(keras.layers.Layer):
    """A norm of Keras that nobody knows, with a parameter."""

    def build(self, input_shape):
        self.gamma = self.add_weight(name="gamma", shape=input_shape[-1:])

    def call(self, x):
        return x * self.gamma


class OurNorm(nnx.Module):
    """The same in nnx."""

    def __init__(self):
        self.scale = nnx.Param(np.ones(3, np.float32))


def test_what_looks_like_a_norm_layer_is_named():
    x = keras.Input((3,))
    model = keras.Model(x, keras.layers.LayerNormalization()(MyNorm(name="mine")(keras.layers.UnitNormalization()(x))))
    assert nk.inspect(model).unknown == ["mine"]
    result = nk.convert(model, "torch")
    assert len(result.natives) == 1
    assert result.left == {"mine": "it looks like a norm layer: normkit does not know MyNorm"}
    assert nk.inspect(nnx.List([OurNorm(), nnx.LayerNorm(3, rngs=nnx.Rngs(0))])).unknown == ["0"]


def lazy():
    """A layer that has not seen its x."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.LazyBatchNorm2d()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: nn.Linear(3, 3), "The source has no norm layers."),
        (lambda: nn.Sequential(nn.LayerNorm(3, device="meta")), "0: A tensor on the meta device has no values."),
        (lazy, "LazyBatchNorm2d has not seen its first x yet, and so has no arrays."),
        (lambda: torch.jit.script(nn.BatchNorm2d(3)), "A scripted module does not say what it is made of"),
        (lambda: torch.export.export(nn.ReLU(), (torch.ones(2),)), "received ExportedProgram."),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), "always has running statistics, and this one has none"),
        (lambda: nn.BatchNorm2d(3, momentum=None), "momentum=None averages all batches, which keras cannot do"),
        (lambda: nn.InstanceNorm2d(3, track_running_stats=True), "Running statistics of instance_norm exist in torch"),
        (lambda: keras.layers.BatchNormalization(name="b"), "Layer 'b' is not built: call the model once, or build()"),
        (lambda: equinox.nn.Linear(3, 3, key=jax.random.key(0)), "The source has no norm layers."),
        (lambda: (flax.linen.Dense(3), {}), "A linen module says its settings only when it runs"),
        (lambda: graph(("Relu", ["x"], ["y"], "r", {})), "The source has no norm layers."),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refusals_are_one_sentence(source, message):
    with pytest.raises(ConversionError) as caught:
        nk.convert(source(), "keras" if "keras" not in message or "cannot do" in message else "torch", ndim=4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_the_command_fills_a_model_of_keras(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")  # put back when the command has set another
    torch.save(net().state_dict(), "net.pt")
    torch.save(net(), "whole.pt")
    with_convolutions(keras_net(), net()).save("like.keras")
    settings = {
        "bn": {"eps": 1e-3, "momentum": 0.3},
        "gn": {"layer": "GroupNorm", "num_groups": 4, "eps": 1e-4},
        "ln": {"layer": "LayerNorm", "eps": 1e-5},
    }
    Path("settings.json").write_text(json.dumps(settings))
    command = ["convert", "net.pt", "out.keras", "--from", "torch", "--to", "keras", "--settings", "settings.json"]
    assert cli.run(command) == 2
    assert "say with --like FILE which one is to get the norm layers" in capsys.readouterr().err
    assert cli.run([*command, "--like", "like.keras"]) == 0
    assert "momentum 0.3 is 0.7 in keras" in capsys.readouterr().out
    y = keras.saving.load_model("out.keras")(X.transpose(0, 2, 3, 1), training=False)
    assert units(np.asarray(y), ran(net()), "float32") <= LIMIT
    assert cli.run(["inspect", "out.keras"]) == 0
    assert cli.run(["inspect", "like.keras"]) == 1
    assert "initial-statistics" in capsys.readouterr().out
    assert cli.run(["inspect", "whole.pt"]) == 2
    assert "whole.pt holds more than arrays: save the state_dict() of the model." in capsys.readouterr().err


BN = {f"bn.{name}": value for name, value in nn.BatchNorm2d(3).state_dict().items()}


@pytest.mark.parametrize(
    "saved",
    [
        {"epoch": 1, "model_state_dict": BN, "optimizer_state_dict": {"state": {0: {"a": torch.ones(3)}}}},
        {"net": BN, "best": torch.tensor(0.5)},
        {"state_dict": BN, "ema": BN},
        {"epoch": 1, "model": BN},
    ],
    ids=lambda saved: "-".join(saved),
)
def test_a_checkpoint_of_pytorch_is_unwrapped(saved, tmp_path):
    torch.save(saved, tmp_path / "net.pt")
    assert [row.name for row in nk.inspect(tmp_path / "net.pt").rows] == ["bn"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "net.pt is no file that torch.save has written.",
        ),
        (bytes(range(256)), "net.pt is no file that torch.save has written."),
        (b"", "net.pt is empty."),
        ({"net": BN, "ema": BN}, "net.pt holds several state dicts: net, ema: save one by itself."),
        ([1], "net.pt holds no state dict but list."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_checkpoint_of_pytorch(content, message, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "net.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ConversionError) as caught:
        nk.inspect(tmp_path / "net.pt")
    assert str(caught.value).endswith(message)


def of_normkit(kind, **switches):
    """A batch norm of normkit's for a framework, channels last where that has a choice."""
    if kind == "torch":
        return normkit.torch.BatchNorm2d(3, **switches)
    if kind == "nnx":
        return normkit.flax.BatchNorm(3, rngs=nnx.Rngs(0), **switches)
    layer = normkit.keras.BatchNormalization(**switches)
    layer.build((None, 9, 9, 3))
    return layer


@pytest.mark.parametrize("kind", ["torch", "keras", "nnx"])
def test_switches_of_normkits_layers_in_other_frameworks(kind):
    switches = {"use_batch_stats": True, "update_stats": False, "single_value": "zero", "train_affine": False}
    source = of_normkit(kind, **switches)
    filled = [nk.convert(source, of_normkit(to)).model for to in ("torch", "keras", "nnx")]
    for target in (nk.convert(source, "normkit").layer, *filled):
        assert {name: getattr(target, name) for name in switches} == switches
    for target in ("linen", nn.BatchNorm2d(3)):
        with pytest.raises(ConversionError, match="batch_norm with use_batch_stats=True and update_stats=False has no"):
            nk.convert(source, target, axis=-1)
    filled = nk.convert(of_normkit(kind), of_normkit(kind, **switches)).model
    assert repr(nk.convert(filled, "normkit").layer) == repr(nk.convert(of_normkit(kind), "normkit").layer)


def frozen(kind):
    """A batch norm that normalizes by its running statistics in training too."""
    rng = np.random.default_rng(5)
    mean, var = rng.normal(size=3).astype("f4"), rng.uniform(1, 2, size=3).astype("f4")
    if kind == "keras":
        layer = keras.layers.BatchNormalization()
        layer.build((None, 9, 9, 3))
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(var)
        layer.trainable = False
        return layer
    if kind == "torch":
        layer = frozen_by_class()
        layer.running_mean.copy_(torch.tensor(mean))
        layer.running_var.copy_(torch.tensor(var))
        return layer
    layer = nk.BatchNorm(3, axis=-1, eps=1e-3, use_batch_stats=False, train_affine=False)
    state = layer.state_dict()
    layer.load_state_dict({**state, "running_mean": mean, "running_var": var})
    return layer


def frozen_by_class():
    """What torchvision's detection models hold."""
    return normkit.torch.FrozenBatchNorm2d(3, eps=1e-3)


@pytest.mark.parametrize("kind", ["keras", "torch", "normkit"])
def test_a_frozen_batch_norm_stays_frozen(kind):
    """By its running statistics in training, too, wherever there is a layer that does; elsewhere a rule says so."""
    source = frozen(kind)
    x = np.random.default_rng(6).normal(size=(4, 5, 5, 3)).astype("f4")
    ours = nk.convert(source, "normkit", axis=-1).layer
    theirs = nk.convert(source, "keras", axis=-1, ndim=4).layer
    before = ours.running
    y = ours.train()(x)
    np.testing.assert_allclose(theirs(x, training=True).numpy(), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nk.batch_norm(x, before.mean, before.var, axis=-1, eps=1e-3), y, rtol=1e-6)
    np.testing.assert_array_equal(ours.running.mean, before.mean)
    for target, said in (("torch", True), ("nnx", True), ("onnx", False), (frozen_by_class(), False)):
        rules = nk.convert(source, target, **({} if isinstance(target, nn.Module) else {"axis": 1, "ndim": 4})).rules
        assert any("keep it in its inference mode" in rule.text for rule in rules) is said, target


def test_what_a_frozen_layer_was_told_comes_first():
    """trainable=False of a layer that is to use the batch freezes weight and bias alone; what was said stays said."""
    source = of_normkit("keras", use_batch_stats=True)
    source.trainable = False
    told = nk.convert(source, "normkit").layer
    assert (told.use_batch_stats, told.train_affine) == (True, False)
    source = nk.BatchNorm(3, use_batch_stats=False, update_stats=False, train_affine=False)
    assert repr(nk.convert(source, "normkit").layer) == repr(source)
    assert nk.convert(source, "keras", ndim=4).layer.trainable is False


def test_a_variant_of_batch_norm_keeps_its_virtual_batches():
    source = normkit.torch.GhostBatchNorm(3, 2)
    assert nk.convert(source, "normkit").layer.virtual_batch_size == 2
    with pytest.raises(ConversionError, match="virtual_batch_size=2 has no equivalent in torch"):
        nk.convert(source, "torch")


def unlike(change):
    """The network with another layer somewhere."""
    model = net()
    change(model)
    return model


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: unlike(lambda m: setattr(m, "bn", nn.Identity())), "the source has bn, which the target has not"),
        (lambda: unlike(lambda m: m.add_module("more", nn.LayerNorm(2))), "the target has more, which the source has"),
        (lambda: unlike(lambda m: setattr(m, "bn", nn.BatchNorm2d(9))), "bn has channels (8,), and bn has channels"),
        (lambda: unlike(lambda m: setattr(m, "gn", nn.GroupNorm(2, 8))), "gn has 4 groups, and gn has 2."),
        (lambda: unlike(lambda m: m.ln.half()), "weight of ln is float16, which cannot hold these values in float32"),
        (lambda: unlike(lambda m: setattr(m, "ln", nn.LayerNorm(5, bias=False))), "ln has no bias, which the source"),
        (lambda: unlike(lambda m: setattr(m, "gn", nn.BatchNorm2d(8))), "gn is group_norm, and gn is batch_norm."),
    ],
)
def test_a_model_that_does_not_fit_stays_as_it_was(target, message):
    model = target()
    before, settings = state(model), [(m.eps, getattr(m, "momentum", 0)) for m in model.children() if hasattr(m, "eps")]
    source = copy.deepcopy(net(steps=1))
    source.bn.eps = 0.5
    with pytest.raises(ConversionError) as caught:
        nk.convert(source, model)
    assert message in str(caught.value)
    for name, value in state(model).items():
        np.testing.assert_array_equal(value, before[name], name)
    assert settings == [(m.eps, getattr(m, "momentum", 0)) for m in model.children() if hasattr(m, "eps")]
