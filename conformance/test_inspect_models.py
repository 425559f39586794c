"""normkit.inspect on whole models of the frameworks: what depends on the mode and the memory that they are in."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import normkit as nk
from normkit._convert import ConversionError
from normkit._convert.framework import FRAMEWORKS
from normkit.conformance.norm_models import Small, SmallEquinox, keras_net, net, onnx_small, small


def found(model):
    """The ids of what is found, by layer."""
    return [(f.layer, f.id) for f in nk.inspect(model).findings]


def test_a_healthy_model_has_no_findings():
    assert found(net()) == found(net().train()) == []
    assert found(nk.convert(net(), keras_net()).model) == []


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


WRONG = {
    "momentum-sense": {"momentum": 0.99},
    "statistics-never-move": {"momentum": 0.0},
    "negative-variance": {"var": -1.0},
    "zero-variance": {"var": 0.0},
    "nonfinite-statistics": {"var": np.inf},
    "nonfinite-parameters": {"weight": np.nan},
    "initial-statistics": {"initial": True},
}


#: Decay rates below 1 alone, and no negative variances.
CANNOT = {("haiku", "statistics-never-move"), ("normkit", "negative-variance")}


@pytest.mark.parametrize(("to", "finding"), [(to, f) for to in FRAMEWORKS for f in WRONG if (to, f) not in CANNOT])
def test_what_looks_wrong_in_one_framework_does_in_each(to, finding):
    """By way of a layer that is converted."""

    def layer(momentum=0.1, var=2.0, weight=1.0, initial=False):
        source = torch.nn.BatchNorm2d(3, momentum=momentum).eval()
        if not initial:
            source.running_mean.fill_(0.5)
            source.running_var[1] = var
        source.weight.data[0] = weight
        return source

    def ids(source):
        made = nk.convert(source, to, ndim=4)
        if to == "haiku":
            ((name, native),) = made.natives.items()
            settings = {name or "batch_norm": {"layer": native.layer, **native.settings}}
            return [f.id for f in nk.inspect(made.arrays(), framework=to, settings=settings).findings]
        return [f.id for f in nk.inspect(made.layer).findings]

    assert ids(layer()) == []
    assert ids(layer(**WRONG[finding])) == [finding]


def test_a_layer_of_equinox_that_saw_no_batch():
    for mode in ("ema", "batch"):
        layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(3, "batch", mode=mode)
        assert found((layer, state)) == [("", "initial-statistics")]


def test_frozen_statistics_of_models_in_jax():
    model = Small()
    model.block.bn.mean.set_value(jnp.ones(3))
    model.drop = nnx.Dropout(0.5)
    assert found(model) == []
    model.block.bn.eval()
    assert found(model) == [("block.bn", "statistics-frozen")]
    model.eval()
    assert found(model) == []

    model, state = equinox.nn.make_with_state(SmallEquinox)()
    index = model.block["bn"].batch_state_index
    state = state.set(index, (jnp.ones(3), jnp.ones(3)))
    model = {"norms": model, "drop": equinox.nn.Dropout(0.5)}
    norms = lambda tree: tree["norms"].block["bn"].inference  # noqa: E731
    assert found((Held(model), state)) == []
    frozen = equinox.tree_at(norms, model, True)
    assert found((Held(frozen), state)) == [("model.norms.block.bn", "statistics-frozen")]
    assert found((equinox.nn.inference_mode(Held(frozen)), state)) == []


class Held(equinox.Module):
    """A model around others."""

    model: dict


def test_a_model_without_norms_says_so():
    for model in (
        torch.nn.Linear(2, 2),
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
        equinox.nn.Linear(2, 2, key=jax.random.key(0)),
    ):
        report = nk.inspect(model)
        assert str(report) == f"{report.framework}: no norm layer was found" and not report.findings


def test_an_exported_model_has_no_layers():
    program = torch.export.export(torch.nn.BatchNorm2d(3).eval(), (torch.ones(2, 3, 4, 4),))
    with pytest.raises(ConversionError, match="made of operators, not of layers"):
        nk.inspect(program.module())
    with pytest.raises(ConversionError, match="received ExportedProgram"):
        nk.inspect(program)
    with pytest.raises(ValueError, match="restore found no layer in ExportedProgram"):
        nk.restore(program)
