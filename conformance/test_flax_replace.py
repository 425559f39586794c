"""normkit.replace and normkit.restore on flax.nnx's models: what is swapped, what is left and why, what stays."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normkit as nk
import normkit.flax as nf
from normkit.conformance.tolerances import tolerance, units


class Renamed(nnx.LayerNorm):
    """A layer norm by another name."""

    def extra(self):
        return "kept"


class OwnCall(nnx.BatchNorm):
    """A batch norm that doubles."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return 2 * super().__call__(x, use_running_average, mask=mask)


class MyNorm(nnx.Module):
    """Nobody knows this one."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(4))


class Block(nnx.Module):
    """A norm before and after."""

    def __init__(self, rngs):
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.norms = nnx.List([Renamed(4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)])

    def __call__(self, x):
        return self.norms[1](jnp.tanh(self.norms[0](self.norm(x))))


class Net(nnx.Module):
    """One of each of Flax's norms, one of them under two names."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.stem = nnx.Sequential(nnx.BatchNorm(4, momentum=0.9, rngs=rngs))
        self.block = Block(rngs)
        self.instance = self.again = nnx.InstanceNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.again(self.block(self.instance(jnp.tanh(self.stem(self.conv(x))))))
        return self.head((jnp.tanh(x) ** 2).mean((1, 2)))


NAMES = ["stem.layers.0", "block.norm", "block.norms.0", "block.norms.1", "instance"]


def x(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(4, 6, 6, 3)), "float32")


def types(model):
    return {path: type(module) for path, module in nnx.iter_modules(model)}


def near(found, reference):
    limit = tolerance("native", "float32")
    error = units(np.asarray(found, "f8"), np.asarray(reference, "f8"), "float32")
    assert error <= limit.units, f"{error:.3g} units apart: {limit.reason}"


@nnx.jit
def train(model, optimizer, x):
    loss, gradients = nnx.value_and_grad(lambda m: ((m(x) - 1) ** 2).mean())(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def gradients_of(model, x):
    return nnx.grad(lambda m, x: (m(x) ** 3).sum(), argnums=(0, 1))(model, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_and_gradients_before_and_after(training):
    before, after = Net(), Net()
    assert [layer.name for layer in nk.replace(after).changed] == NAMES
    for model in (before, after):
        model.train() if training else model.eval()
    near(after(x()), before(x()))
    for found, reference in zip(*(jax.tree.leaves(gradients_of(m, x())) for m in (after, before)), strict=True):
        # A shift before a centred layer has no gradient, but for roundings.
        if abs(reference).max() > 1e-5:
            near(found, reference)
    for found, reference in zip(*(jax.tree.leaves(nnx.state(m)) for m in (after, before)), strict=True):
        near(found, reference)


def test_layers_and_variables_stay_the_objects_that_they_are():
    model = Net()
    modules = [module for _, module in nnx.iter_modules(model)]
    held = [value for _, value in nnx.iter_graph(model) if isinstance(value, nnx.Variable)]
    nk.replace(model)
    assert all(a is b for a, (_, b) in zip(modules, nnx.iter_modules(model), strict=True))
    now = [value for _, value in nnx.iter_graph(model) if isinstance(value, nnx.Variable)]
    assert all(a is b for a, b in zip(held, now, strict=True))
    layer = model.block.norm
    assert isinstance(layer, nnx.GroupNorm) and isinstance(layer, nf.GroupNorm)
    assert isinstance(model.block.norms[0], Renamed) and model.block.norms[0].extra() == "kept"
    assert model.instance is model.again


def test_training_goes_on_with_the_same_optimizer():
    """Three steps, replaced, three, restored, three: as nine; what was compiled is compiled anew."""
    model, reference = Net(), Net()
    optimizers = [nnx.Optimizer(m, optax.sgd(0.02, momentum=0.9), wrt=nnx.Param) for m in (model, reference)]
    for k in range(9):
        train(reference, optimizers[1], x(k))
    changes = {3: nk.replace, 6: nk.restore}
    for k in range(9):
        if k in changes:
            changes[k](model)
        train(model, optimizers[0], x(k))
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, reference)), strict=True):
        # Each step is a gradient within 32 units (4e-6); the steps after it amplify that.
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not np.allclose(model.head.kernel[...], Net().head.kernel[...], rtol=1e-2)


def test_a_compiled_step_sees_the_change(monkeypatch):
    model, optimizer = Net(), None
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    train(model, optimizer, x())
    nk.replace(model)
    calls = []
    original = nf.BatchNorm.__call__
    monkeypatch.setattr(
        type(model.stem.layers[0]), "__call__", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    train(model, optimizer, x())
    assert calls


def test_restore_undoes_it_exactly():
    model = Net()
    before, y = types(model), Net()(x())
    done = nk.replace(model)
    assert types(model) != before
    undone = nk.restore(model)
    assert types(model) == before
    assert [layer[:2] for layer in undone.changed] == [layer[:2] for layer in done.changed]
    assert (model(x()) == y).all()
    with pytest.raises(ValueError, match="restore found no layer in Net"):
        nk.restore(model)


def test_report():
    model = Net()
    report = nk.replace(model)
    assert (report.model, report.done, report.left) == ("Net", "replaced", ())
    assert report.changed[-1][:4] == ("instance", "flax.nnx.InstanceNorm", "", ("again",))
    text = repr(report).splitlines()
    assert text[0] == "Net: 5 norm layers replaced, 0 left" and "        instance = again" in text
    again = nk.replace(model)
    assert not again.changed and {layer.reason for layer in again.left} == {"it was replaced before"}


LEFT = {
    "its own call": (
        lambda: OwnCall(4, rngs=nnx.Rngs(0)),
        "a subclass of flax.nnx.BatchNorm with a __call__ of its own",
    ),
    "unknown": (MyNorm, "normkit does not know this class"),
    "weight norm": (
        lambda: nnx.WeightNorm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
        "normkit has no weight norm",
    ),
    "several axes": (lambda: nnx.BatchNorm(6, axis=(1, 2), rngs=nnx.Rngs(0)), "axis=(1, 2): it has several axes"),
    "ours": (lambda: nf.LayerNorm(4, rngs=nnx.Rngs(0)), "it is normkit's already"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_and_why(case):
    build, reason = LEFT[case]
    model = nnx.Dict(a=build(), b=nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    kind = type(model.a)
    report = nk.replace(model)
    assert [layer.name for layer in report.changed] == ["b"]
    assert [layer.name for layer in report.left] == ["a"] and reason in report.left[0].reason
    nk.restore(model)
    assert type(model.a) is kind


def test_models_that_are_refused():
    with pytest.raises(ValueError, match="replace found no norm layer in Linear, which has 1 layer"):
        nk.replace(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))

    @nnx.jit
    def inside(model):
        nk.replace(model)

    with pytest.raises(ValueError, match="replace comes before a model is traced; received a Net within jit"):
        inside(Net())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "clone", "merge"])
def test_a_copy_of_a_replaced_model(how):
    model = Net()
    nk.replace(model)
    if how == "merge":
        twin = nnx.merge(*nnx.split(model))
    else:
        copies = {"deepcopy": copy.deepcopy, "clone": nnx.clone, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
        twin = copies[how](model)
    assert types(twin) == types(model)
    assert (twin(x()) == model(x())).all()
    nk.restore(twin)
    assert type(twin.block.norms[0]) is Renamed and type(model.block.norms[0]) is not Renamed
