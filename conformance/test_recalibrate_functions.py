"""normkit.recalibrate on models that hold no state (linen, haiku, equinox): a new state, and nothing is changed."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normkit as nk
from normkit.conformance.norm_layers import importing

with importing():
    import equinox as eqx
    import haiku as hk
    from flax import linen

#: What the statistics of the whole data set in float64 are met to.
EXACT = 1e-6
#: And where they are those of what layers before computed in float32.
FLOAT32 = 2e-5
SIZES = (16, 16, 5)


def data():
    """Batches that differ in mean and spread; the last is short."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(n, 6, 6, 3)) * (k + 1) + 3 * k).astype("f4") for k, n in enumerate(SIZES)]


def met(mean, var, x, exact=EXACT):
    """Whether statistics are those of all values of x, channels last, the variance biased."""
    x = np.asarray(x, "f8").reshape(-1, x.shape[-1])
    assert (abs(np.ravel(mean) - x.mean(0)) <= exact * (x.std(0) + abs(x.mean(0)))).all()
    assert (abs(np.ravel(var) - x.var(0)) <= exact * x.var(0)).all()


class Linen:
    """Two batch norms in flax.linen, dropout between."""

    class Net(linen.Module):
        """The first is told by its argument what mode it is in, the second in the call."""

        between: Any = None

        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train, name="one")(x)
            y = linen.relu(linen.Conv(4, (3, 3))(x))
            x = linen.Dropout(0.5, deterministic=not train)(y)
            return y if self.between else linen.BatchNorm(name="two")(x, use_running_average=not train)

    def __init__(self):
        self.variables = self.Net().init(jax.random.key(0), data()[0], False)
        self.model = self.Net(), self.variables

    @staticmethod
    def call(model, x, train=False):
        return model(x, train=train)

    @staticmethod
    def statistics(state, name):
        return tuple(state["batch_stats"][name].values())

    def between(self, state, x):
        return self.Net(between=True).apply(state, x, False)

    def runs(self, state, x):
        return self.Net().apply(state, x, False), self.Net().apply(state, x, True, mutable=True, rngs=rngs())


def rngs():
    return {"dropout": jax.random.key(1)}


class Haiku:
    """The same in haiku, whose dropout is a function."""

    @staticmethod
    def net(x, is_training, between=False):
        x = hk.BatchNorm(True, True, 0.9, name="one")(x, is_training)
        x = jax.nn.relu(hk.Conv2D(4, 3)(x))
        return x if between else hk.BatchNorm(True, True, 0.9, name="two")(x, is_training, test_local_stats=True)

    def __init__(self):
        self.transformed = hk.transform_with_state(self.net)
        self.params, self.state = self.transformed.init(jax.random.key(0), data()[0], True)
        self.model = self.transformed, self.params, self.state

    @staticmethod
    def call(model, x, train=False):
        return model(x, is_training=train)

    @staticmethod
    def statistics(state, name):
        return tuple(state[f"{name}/~/{k}_ema"]["average"] for k in ("mean", "var"))

    def between(self, state, x):
        return self.transformed.apply(self.params, state, None, x, False, True)[0]

    def runs(self, state, x):
        """Also on, from there: the averages go on from what they are."""
        y, after = self.transformed.apply(self.params, state, None, x, True)
        for k, now in enumerate(self.statistics(after, "one")):
            new = (x.mean((0, 1, 2)), x.var((0, 1, 2)))[k]
            old = np.ravel(self.statistics(state, "one")[k])
            assert np.allclose(np.ravel(now), 0.9 * old + 0.1 * new, rtol=1e-4)
        return y


class Equinox:
    """The same in equinox, which takes one sample, channels first."""

    class Net(eqx.Module):
        """With a norm that is shared, and a layer that is no norm."""

        one: eqx.nn.BatchNorm
        two: eqx.nn.BatchNorm
        conv: eqx.nn.Conv2d
        drop: eqx.nn.Dropout

        def __init__(self, mode):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.one, self.two = (eqx.nn.BatchNorm(n, "batch", mode=mode, momentum=0.9) for n in (3, 4))
            self.conv = eqx.nn.Conv2d(3, 4, 3, padding=1, key=jax.random.key(0))
            self.drop = eqx.nn.Dropout(0.5)

        def __call__(self, x, state, key=None, between=False):
            x, state = self.one(x.transpose(2, 0, 1), state)
            x = self.drop(jax.nn.relu(self.conv(x)), key=key)
            x, state = (x, state) if between else self.two(x, state)
            return x.transpose(1, 2, 0), state

    def __init__(self, mode="batch"):
        self.model = self.net, self.state = eqx.nn.make_with_state(self.Net)(mode)

    @staticmethod
    def call(model, x, train=False):
        return model(x, key=None)

    def statistics(self, state, name):
        layer = getattr(self.net, name)
        return state.get(layer.ema_state_index if layer.mode == "ema" else layer.batch_state_index)

    def mapped(self, net, state, **options):
        return jax.vmap(functools.partial(net, **options), axis_name="batch", in_axes=(0, None), out_axes=(0, None))

    def between(self, state, x):
        net = eqx.nn.inference_mode(self.net)
        return self.mapped(net, state, between=True)(x, state)[0]

    def runs(self, state, x):
        return self.mapped(eqx.nn.inference_mode(self.net), state)(x, state)[0]


ALL = {"linen": Linen, "haiku": Haiku, "equinox": Equinox, "equinox ema": functools.partial(Equinox, "ema")}


@pytest.fixture(params=ALL)
def case(request):
    return ALL[request.param]()


def held(case):
    return [np.asarray(a) for a in jax.tree.leaves(case.model[1:]) if hasattr(a, "dtype")]


@pytest.mark.parametrize("train", [False, True])
def test_sequential_is_one_pass_over_all_data_at_once(case, train):
    """Whatever mode the model is asked to be in."""
    before = held(case)
    call = functools.partial(case.call, train=train)
    report = nk.recalibrate(case.model, data(), call=call, sequential=True)
    whole = np.concatenate(data())
    met(*case.statistics(report.state, "one"), whole)
    met(*case.statistics(report.state, "two"), case.between(report.state, whole), FLOAT32)
    case.runs(report.state, whole)
    assert sorted(gap.name for gap in report.layers) == ["one", "two"] and report.batches == 3 and not report.left
    assert next(gap for gap in report.layers if gap.name == "one").count == sum(SIZES) * 36
    assert jax.tree.structure(report.state) == jax.tree.structure(case.model[-1])
    assert all((a == b).all() for a, b in zip(held(case), before, strict=True))
    model = (*case.model[:-1], report.state)
    gaps = nk.statistics_gap(model, data(), call=call, sequential=True)
    assert max(gap.size for gap in gaps.layers) < FLOAT32 and gaps.state is None


def test_norms_normalize_by_the_batch(case):
    """In one pass, what the second norm gets is what it gets in training: not one model's inference."""
    report = nk.recalibrate(case.model, data(), call=case.call)
    met(*case.statistics(report.state, "one"), np.concatenate(data()))
    between = []
    for x in data():
        alone = nk.recalibrate(case.model, [x], call=case.call).state
        between.append(np.asarray(case.between(alone, x)))
    met(*case.statistics(report.state, "two"), np.concatenate(between), FLOAT32)


def test_a_batch_norm_by_itself_takes_an_axis_and_a_mask():
    x = data()[0]
    for axis, shape in ((1, (6,)), ((1, -1), (6, 3))):
        module = linen.BatchNorm(axis=axis, use_running_average=False)
        state = nk.recalibrate((module, module.init(jax.random.key(0), x)), [x[:9], x[9:]]).state["batch_stats"]
        axes = tuple({0, 2, 3} - {a % 4 for a in np.atleast_1d(axis)})
        assert state["mean"].shape == shape
        assert np.allclose(state["mean"], x.mean(axes, "f8"), atol=EXACT)
        assert np.allclose(state["var"], x.var(axes, "f8"), rtol=EXACT)
    module = linen.BatchNorm(use_running_average=False)
    mask = np.arange(6)[:, None] < 4  # of the third axis
    variables = module.init(jax.random.key(0), x)
    report = nk.recalibrate((module, variables), [x], call=lambda m, b: m(b, mask=mask))
    met(report.state["batch_stats"]["mean"], report.state["batch_stats"]["var"], x[:, :, :4])
    assert report.layers[0].count == 16 * 6 * 4


def test_channels_first_and_no_rng_in_haiku():
    def net(x):
        return hk.BatchNorm(True, True, 0.9, data_format="NC...")(x, is_training=True)

    transformed, x = hk.without_apply_rng(hk.transform_with_state(net)), data()[0]
    params, state = transformed.init(jax.random.key(0), x)
    assert all(a.shape == (1, 6, 1, 1) for a in jax.tree.leaves(params))
    new = nk.recalibrate((transformed, params, state), [x]).state
    met(*Haiku.statistics(new, "batch_norm"), np.moveaxis(x, 1, -1))
    assert new["batch_norm/~/mean_ema"]["average"].shape == (1, 6, 1, 1)


def test_a_shared_layer_and_a_sequence_in_equinox():
    class Twice(eqx.Module):
        """Its norm is there once, and called twice."""

        shared: eqx.nn.Shared

        def __init__(self):
            norms = 2 * [eqx.nn.BatchNorm(3, "batch", mode="batch")]
            self.shared = eqx.nn.Shared(norms, lambda norms: norms[1], lambda norms: norms[0])

        def __call__(self, x, state):
            norms = self.shared()
            x, state = norms[0](x, state)
            return norms[1](x + 1, state)

    x = data()[0][:, 0, 0]
    report = nk.recalibrate(eqx.nn.make_with_state(Twice)(), [x])
    assert len(report.layers) == 1 and report.layers[0].count == 2 * len(x)
    sequential = eqx.nn.make_with_state(eqx.nn.Sequential)([eqx.nn.BatchNorm(3, "b", mode="batch")])
    assert nk.recalibrate(sequential, [x]).layers[0].name == "layers.0"


class Own(linen.BatchNorm):
    """A batch norm that does nothing."""

    @linen.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        super().__call__(x, True)
        return x


class Mine(linen.Module):
    """No batch norm, and keeps what looks like one's statistics."""

    @linen.compact
    def __call__(self, x):
        self.variable("batch_stats", "mean", jnp.zeros, (3,))
        self.variable("batch_stats", "var", jnp.ones, (3,))
        return x


def test_unknown_and_unreached_ones_are_left():
    class Net(linen.Module):
        """One of each."""

        @linen.compact
        def __call__(self, x, idle=False):
            x = Mine(name="mine")(Own(name="own")(x))
            return linen.BatchNorm(True, name="idle")(x) if idle else linen.BatchNorm(True, name="bn")(x)

    variables = Net().init(jax.random.key(0), data()[0])
    variables["batch_stats"]["idle"] = Net().init(jax.random.key(0), data()[0], True)["batch_stats"]["idle"]
    report = nk.recalibrate((Net(), variables), data())
    assert {layer.name: (layer.kind.rpartition(".")[2], layer.reason) for layer in report.left} == {
        "own": ("Own", "it is a subclass with a __call__ of its own"),
        "mine": ("Mine", "normkit does not know this class"),
        "idle": ("BatchNorm", "no batch reached it"),
    }
    for name in ("own", "mine", "idle"):
        old, new = variables["batch_stats"][name], report.state["batch_stats"][name]
        assert all((old[key] == new[key]).all() for key in ("mean", "var"))


class Jitted(linen.Module):
    """A model that compiles its own call."""

    @linen.jit
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(True, name="bn")(x)


def applied(module, **changes):
    return module, {**module.init(jax.random.key(0), data()[0]), **changes}


def nan():
    batches = data()
    batches[1][0] = np.nan
    return batches


BN = functools.partial(applied, linen.BatchNorm(True))
SHAPES = {"mean": jax.ShapeDtypeStruct((3,), "f4"), "var": jax.ShapeDtypeStruct((3,), "f4")}
BAD = {
    "no batches": (BN, list, ValueError, "{} received no batches"),
    "not finite": (BN, nan, ValueError, "batch 2 brings the model values whose mean or variance is not finite"),
    "no norm": (lambda: applied(linen.Dense(3)), data, ValueError, "{} found no batch norm in Dense"),
    "compiled": (lambda: applied(Jitted()), data, ValueError, "BatchNorm gets what has no numbers yet"),
    "no variables": (lambda: linen.BatchNorm(True), data, TypeError, r"\(linen module, variables\), .*; received"),
    "bad variables": (lambda: (linen.BatchNorm(True), 3), data, TypeError, r"\(module, variables\); received \(Batch"),
    "a part": (lambda: Haiku().model[:2], data, TypeError, r"\(transformed, params, state\); received \(Transformed"),
    "no state": (lambda: (Equinox().net, 3), data, TypeError, r"\(model, state\); received \(Net, int\)"),
    "shapes": (lambda: BN(batch_stats=SHAPES), data, ValueError, "{} needs numbers; .* are shapes alone"),
    "lost": (
        lambda: (Linen.Net(), {**Linen().variables, "batch_stats": {"two": {k: jnp.ones(4) for k in ("mean", "var")}}}),
        lambda: [{"x": data()[0], "train": True}],
        ValueError,
        "The variables have no running statistics of one",
    ),
}


@pytest.mark.parametrize("function", [nk.recalibrate, nk.statistics_gap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case, function):
    build, batches, error, text = BAD[case]
    with pytest.raises(error, match=text.format(function.__name__)) as caught:
        function(build(), batches())
    assert "\n" not in str(caught.value)
