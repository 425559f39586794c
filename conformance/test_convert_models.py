"""normkit.convert and normkit.inspect on whole models of the frameworks, and what of them is refused."""

import copy
import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normkit as nk
from normkit import cli
from normkit._convert import ConversionError
from normkit.conformance.norm_layers import importing
from normkit.conformance.tolerances import tolerance, units

with importing():
    import equinox
    import flax.linen
    import jax
    import keras
    import onnx
    import onnxruntime
    import tf_keras
    from flax import nnx

X = np.random.default_rng(0).normal(1.0, 2.0, (4, 3, 9, 9)).astype(np.float32)
#: Two norm layers that see what another one made, each as far off as native layers may be.
LIMIT = 2 * tolerance("native", "float32").units


class Net(nn.Module):
    """A convolutional network with a batch, a group and a layer norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.gn = nn.GroupNorm(4, 8, eps=1e-4)
        self.head = nn.Linear(8, 5)
        self.ln = nn.LayerNorm(5)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        x = self.gn(self.conv2(x)).relu()
        return self.ln(self.head(x.mean((2, 3))))


def net(steps=3):
    """The network in inference, with parameters and statistics of its own."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for _ in range(steps):
            model(torch.from_numpy(X) * 2 + 1)
    return model.eval()


def keras_net(top=keras):
    """The same network in Keras 3 or tf_keras, channels last, with all its defaults."""
    layers = top.layers
    x = inputs = top.Input((9, 9, 3))
    for name, norm in (("", layers.BatchNormalization(name="bn")), ("2", layers.GroupNormalization(4, name="gn"))):
        x = layers.ReLU()(norm(layers.Conv2D(8, 3, name=f"conv{name}")(x)))
    x = layers.Dense(5, name="head")(layers.GlobalAveragePooling2D()(x))
    return top.Model(inputs, layers.LayerNormalization(name="ln")(x))


def with_convolutions(model, source):
    """Convolutions and the linear layer, which normkit does not convert, carried over by hand."""
    for name in ("conv", "conv2"):
        weight, bias = (p.detach().numpy() for p in getattr(source, name).parameters())
        model.get_layer(name).set_weights([weight.transpose(2, 3, 1, 0), bias])
    model.get_layer("head").set_weights([source.head.weight.detach().numpy().T, source.head.bias.detach().numpy()])
    return model


def ran(model, x=X):
    """What a PyTorch model makes of x."""
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def state(model):
    """A copy of a PyTorch model's state."""
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


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


class Small(nnx.Module):
    """A batch norm below a name, and a layer norm, in nnx."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.block = nnx.Dict(bn=nnx.BatchNorm(3, rngs=rngs))
        self.ln = nnx.LayerNorm(9, rngs=rngs)

    def __call__(self, x):
        y = self.block.bn(x.transpose(0, 2, 3, 1), use_running_average=True)
        return self.ln(y.transpose(0, 3, 1, 2))


class SmallEquinox(equinox.Module):
    """The same in equinox."""

    block: dict
    ln: equinox.nn.LayerNorm

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.block = {"bn": equinox.nn.BatchNorm(3, "batch", mode="batch")}
        self.ln = equinox.nn.LayerNorm(9)

    def __call__(self, x, state):
        x, state = self.block["bn"](x, state, inference=True)
        return jax.vmap(jax.vmap(self.ln))(x), state


def small(seed=0):
    """The same in PyTorch, with numbers of its own."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"block": nn.ModuleDict({"bn": nn.BatchNorm2d(3, 1e-3)}), "ln": nn.LayerNorm(9, 1e-4)})
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    model.forward = lambda x: model["ln"](model["block"]["bn"](x))
    return model.eval()


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


def graph(*nodes, **constants):
    """An ONNX model of nodes and constants, from x to y."""
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (None, 3, 9, 9)) for name in "xy")
    made = [helper.make_node(op, inputs, outputs, name=name, **said) for op, inputs, outputs, name, said in nodes]
    arrays = [onnx.numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()]
    return helper.make_model(
        helper.make_graph(made, "g", [x], [y], arrays), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


def onnx_small():
    """The same in ONNX."""
    one = dict.fromkeys(("w", "b", "m", "v"), np.ones(3)) | dict.fromkeys(("lw", "lb"), np.ones(9))
    return graph(
        ("BatchNormalization", ["x", "w", "b", "m", "v"], ["h"], "block.bn", {}),
        ("LayerNormalization", ["h", "lw", "lb"], ["y"], "ln", {"axis": -1}),
        **one,
    )


def test_into_a_graph_of_onnx_and_back():
    model = nk.convert(small(), onnx_small()).model
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert units(session.run(None, {"x": X})[0], ran(small()), "float32") <= LIMIT
    back = nk.convert(model, small(seed=1)).model
    for name, value in state(small()).items():
        if not name.endswith("tracked"):
            np.testing.assert_array_equal(state(back)[name], value, name)
    assert (back["block"]["bn"].eps, back["ln"].eps) == (1e-3, 1e-4)


def test_onnx_group_norm_18_has_a_scale_per_group():
    node = ("GroupNormalization", ["x", "w", "b"], ["y"], "gn", {"num_groups": 2})
    model = graph(node, w=[1.0, 2.0], b=[3.0, 4.0])
    model.opset_import[0].version = 18
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 6
    result = nk.convert(model, "torch")
    assert result.arrays()["gn.weight"].tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert "onnx-gn18" in {applied.rule for applied in result.rules}


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


def lazy():
    """A layer that has not seen its x."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.LazyBatchNorm2d()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: nn.Linear(3, 3), "The source has no norm layers."),
        (lambda: nn.BatchNorm2d(3, device="meta"), "A tensor on the meta device has no values."),
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
    ids=str,
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


def found(model):
    """The ids of what is found, by layer."""
    return [(f.layer, f.id) for f in nk.inspect(model).findings]


def test_a_healthy_model_has_no_findings():
    assert found(net()) == found(net().train()) == []
    with_convolutions(model := keras_net(), net())
    nk.convert(net(), model)
    assert found(model) == []


def test_group_norm_in_a_channels_last_model():
    assert found(net().to(memory_format=torch.channels_last)) == [("gn", "group-norm-channels-last")]
    model = net().to(memory_format=torch.channels_last)
    nk.replace(model)
    assert found(model) == []


def test_frozen_statistics():
    model = net().train()
    model.bn.eval()
    assert found(model) == [("bn", "statistics-frozen")]
    assert found(model.eval()) == []
    model = keras_net()
    nk.convert(net(), model)
    model.get_layer("bn").trainable = False
    assert found(model) == [("bn", "statistics-frozen")]
    model.trainable = False
    assert found(model) == []


def test_statistics_that_move_where_nothing_else_does():
    model = net().train()
    model.bn.requires_grad_(False)
    assert found(model) == [("bn", "statistics-not-frozen")]
    model.bn.eval()
    assert found(model) == [("bn", "statistics-frozen")]


def test_half_precision():
    assert found(net().half()) == [("bn", "half-statistics")]
    assert found(net().bfloat16()) == [("bn", "half-statistics")]


def test_every_kind_of_model_is_inspected():
    for model in (small(), Small(), onnx_small(), nk.convert(small(), "keras", ndim=4).layers["ln"]):
        rows = nk.inspect(model).rows
        assert all(row.eps for row in rows)
        assert len(rows) in (1, 2)
