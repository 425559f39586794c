"""normkit.inspect on whole models of the frameworks: what depends on the mode and the memory that they are in."""

import torch

import normkit as nk
from normkit.conformance.norm_models import Small, keras_net, net, onnx_small, small


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
