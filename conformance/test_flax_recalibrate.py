"""normkit.recalibrate and statistics_gap on flax.nnx models: the statistics of all data, and nothing else changed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normkit as nk

#: What the statistics of the whole data set in float64 are met to.
EXACT = 1e-6
#: And where they are those of what layers before computed in float32.
FLOAT32 = 2e-5
SIZES = (16, 16, 5)


class Net(nnx.Module):
    """Two batch norms in a list, and dropout between."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.norms = nnx.List([nnx.BatchNorm(3, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def between(self, x):
        return self.drop(jax.nn.relu(self.conv(self.norms[0](x))))

    def __call__(self, x, mask=None):
        return self.norms[1](self.between(x), mask=mask)


def data():
    """Batches that differ in mean and spread; the last is short."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(n, 6, 6, 3)) * (k + 1) + 3 * k, "f4") for k, n in enumerate(SIZES)]


def met(layer, x, exact=EXACT):
    x = np.moveaxis(np.asarray(x, "f8"), layer.axis, -1).reshape(-1, x.shape[layer.axis])
    mean, var = x.mean(0), x.var(0)
    assert (abs(np.asarray(layer.mean[...], "f8") - mean) <= exact * (np.sqrt(var) + abs(mean))).all()
    assert (abs(np.asarray(layer.var[...], "f8") - var) <= exact * var).all()


def state(model):
    found = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
    keys = {path for path, a in found.items() if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)}
    return {path: np.asarray(jax.random.key_data(a) if path in keys else a) for path, a in found.items()}


def changed(model, before):
    return {path for path, value in state(model).items() if not (value == before[path]).all()}


@pytest.mark.parametrize("replaced", [False, True])
def test_sequential_is_one_pass_over_all_data_at_once(replaced):
    """Dropout does nothing in it."""
    model = Net()
    if replaced:
        nk.replace(model)
    kinds = [type(layer) for layer in model.norms]
    report = nk.recalibrate(model, data(), sequential=True)
    whole = jnp.concatenate(data())
    met(model.norms[0], whole)
    assert report.layers[0][:3] == ("norms.0", "flax.nnx.BatchNorm", sum(SIZES) * 36) and report.batches == 3
    assert [type(layer) for layer in model.norms] == kinds
    assert max(gap.size for gap in nk.statistics_gap(model, data(), sequential=True).layers) < FLOAT32
    model.eval()
    met(model.norms[1], model.between(whole), FLOAT32)


def test_norms_normalize_by_the_batch():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    nk.recalibrate(model, data())
    assert (abs(model.layers[1].mean[...]) <= EXACT).all()
    # But for epsilon, each batch has the variance one.
    assert (abs(model.layers[1].var[...] - 1) <= 1e-4).all()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_else_changes(mode):
    model = Net()
    getattr(model, mode)()
    before, modes = state(model), [(m.use_running_average) for m in model.norms]
    gap = nk.statistics_gap(model, data())
    assert not changed(model, before) and not gap.closed and gap.layers[0].size > 0.5
    done = nk.recalibrate(model, data())
    assert done.layers == gap.layers and done.closed
    assert changed(model, before) == {("norms", k, name) for k in (0, 1) for name in ("mean", "var")}
    assert [m.use_running_average for m in model.norms] == modes and model.drop.deterministic is (mode == "eval")


def test_axis_mask_and_how_it_is_called():
    x = data()[0]
    layer = nnx.BatchNorm(6, axis=1, rngs=nnx.Rngs(0))
    nk.recalibrate(layer, [x])
    met(layer, x)
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    mask = jnp.arange(6)[:, None] < 4  # of the third axis
    report = nk.recalibrate(layer, [(x, mask)], call=lambda m, b: m(b[0], use_running_average=False, mask=b[1]))
    met(layer, x[:, :, :4])
    assert report.layers[0].count == 16 * 6 * 4


def test_bfloat16_statistics():
    """Measured in float64 and rounded once."""
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    for variable in (layer.mean, layer.var):
        variable.set_value(variable[...].astype("bfloat16"))
    x = data()[1]
    nk.recalibrate(layer, [x])
    exact = np.asarray(x, "f8").reshape(-1, 3).mean(0)
    assert layer.mean[...].dtype == jnp.bfloat16
    assert (np.asarray(layer.mean[...]) == np.asarray(jnp.asarray(exact, "f4").astype("bfloat16"))).all()


class OwnCall(nnx.BatchNorm):
    """A batch norm that does nothing."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return x


def test_unknown_and_unreached_ones_are_left():
    model = Net()
    model.own, model.idle = OwnCall(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    model.axes = nnx.BatchNorm(6, axis=(1, 2), rngs=nnx.Rngs(0))
    reasons = {layer.name: layer.reason for layer in nk.recalibrate(model, data()).left}
    assert reasons == {
        "axes": "axis=(1, 2): it has several axes of channels, with which flax does not run it either",
        "own": "it is a subclass with a __call__ of its own",
        "idle": "no batch reached it",
    }


class Compiled(Net):
    """A model that compiles its own call."""

    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


def nan():
    batches = data()
    return [batches[0], batches[1].at[0, 0].set(jnp.nan)]


BAD = {
    "no batches": (Net, list, "{} received no batches: there are none in this list"),
    "not finite": (Net, nan, "batch 2 brings layer 'norms.0' values whose mean or variance is not finite"),
    "no norm": (lambda: nnx.Dropout(0.5), nan, "{} found no batch norm in Dropout"),
    "compiled": (Compiled, data, "gets what has no numbers yet: the model compiles its own call"),
}


@pytest.mark.parametrize("function", [nk.recalibrate, nk.statistics_gap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_changes_nothing(case, function):
    build, batches, text = BAD[case]
    model = build()
    before, kinds = state(model), [type(layer) for layer in getattr(model, "norms", ())]
    with pytest.raises(ValueError, match=text.format(function.__name__)):
        function(model, batches())
    assert not changed(model, before) and [type(layer) for layer in getattr(model, "norms", ())] == kinds


def test_shapes_without_numbers():
    model = nnx.eval_shape(Net)
    with pytest.raises(ValueError, match="recalibrate needs numbers; this Net has only their shapes"):
        nk.recalibrate(model, data())
