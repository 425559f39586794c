"""Policies and switches of ``normkit.flax.BatchNorm``: eager, under nnx.jit, and over devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normkit.flax as nf
from normkit.backends.flax.layers import OURS
from normkit.conformance import oracle
from normkit.conformance.misfits import refused

#: Channel 1 of 4 has one valid element, channel 3 none.
MASK = np.ones((5, 6, 4), bool)
MASK[..., (1, 3)] = False
MASK[2, 4, 1] = True
LONE = np.array([False, True, False, True])


def _layer(**settings):
    layer = nf.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0), **settings)
    values = np.random.default_rng(0).uniform(0.5, 2, (4, 4)).astype("f4")
    for variable, value in zip((layer.scale, layer.bias, layer.mean, layer.var), values, strict=True):
        variable[...] = jnp.asarray(value)
    return layer


def _known(layer):
    names = {"weight": layer.scale, "bias": layer.bias, "mean": layer.mean, "var": layer.var}
    return {name: np.asarray(v[...]) for name, v in names.items()}


def _merged(known, x, present, mask=None):
    mean, var, _ = oracle.batch_statistics(x, axis=-1, mask=mask)
    return [np.where(present, 0.9 * known[n] + 0.1 * a, known[n]) for n, a in (("mean", mean), ("var", var))]


def _assert_running(layer, mean, var):
    np.testing.assert_allclose(layer.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], var, rtol=1e-5)


CALLS = pytest.mark.parametrize("call", [lambda m, *a: m(a[0], mask=a[1]), nnx.jit(lambda m, x, mask: m(x, mask=mask))])


@CALLS
@pytest.mark.parametrize("policy", [None, "running", "zero", "raise"])
def test_one_value_per_channel(policy, call):
    layer, x = _layer(single_value=policy, use_running_average=False), np.arange(4.0, dtype="f4").reshape(1, 4)
    known = _known(layer)
    if policy == "raise":
        with pytest.raises(ValueError, match="batch_norm_train needs more than one value per channel"):
            call(layer, x, None)
        return
    wanted = oracle.batch_norm(x, **known) if policy == "running" else known["bias"][None]
    np.testing.assert_allclose(call(layer, x, None), wanted, rtol=1e-5, atol=1e-6)
    # As Flax does, where nothing else is said: the value counts, with a variance of zero.
    _assert_running(layer, *(_merged(known, x, True) if policy is None else (known["mean"], known["var"])))


@CALLS
@pytest.mark.parametrize("policy", ["running", "zero", "raise"])
def test_one_valid_value_of_a_channel(policy, call):
    layer = _layer(single_value=policy, nonfinite="skip", use_running_average=False)
    x = np.random.default_rng(0).normal(2, 1, MASK.shape).astype("f4")
    known = _known(layer)
    wanted = oracle.batch_norm(x, **known, axis=-1) if policy == "running" else np.broadcast_to(known["bias"], x.shape)
    wanted = wanted.copy()
    wanted[..., ~LONE] = oracle.batch_norm_train(x[..., ~LONE], known["weight"][~LONE], known["bias"][~LONE], axis=-1)[
        0
    ]
    np.testing.assert_allclose(call(layer, x, MASK), wanted, rtol=1e-5, atol=1e-5)
    _assert_running(layer, *_merged(known, x, ~LONE, MASK))
    known, present = _known(layer), np.array([False, False, True, False])
    x[0, 0, 0] = np.nan
    call(layer, x, MASK)
    _assert_running(layer, *_merged(known, x, present, MASK))


@pytest.mark.parametrize("policy", ["running", "zero"])
def test_over_devices(policy):
    """One value on each of two devices is two values; one on both together is one."""
    layer = _layer(single_value=policy, use_running_average=False, axis_name="devices")
    graph, state = nnx.split(layer)

    def step(state, x, mask):
        module = nnx.merge(graph, state)
        return module(x, mask=mask), nnx.to_pure_dict(nnx.state(module))

    step = jax.vmap(step, (None, 0, 0), (0, None), axis_name="devices")

    x, known = np.random.default_rng(0).normal(2, 1, (2, 1, 4)).astype("f4"), _known(layer)
    y, after = step(state, x, np.ones((2, 1, 4), bool))
    parameters = known["weight"], known["bias"]
    np.testing.assert_allclose(y, oracle.batch_norm_train(x, *parameters, axis=-1)[0], rtol=1e-4, atol=1e-5)
    nnx.update(layer, after)
    _assert_running(layer, *_merged(known, x, True))
    known, state = _known(layer), nnx.state(layer)
    mask = np.array([True, False]).reshape(2, 1, 1) & np.ones((2, 1, 4), bool)
    y, after = step(state, x, mask)
    wanted = oracle.batch_norm(x, **known, axis=-1) if policy == "running" else np.broadcast_to(known["bias"], x.shape)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    nnx.update(layer, after)
    _assert_running(layer, known["mean"], known["var"])


@pytest.mark.parametrize(
    ("mode", "use", "update"), [*itertools.product((None, True, False), (None, True, False), (None, True, False))]
)
def test_switches(mode, use, update):
    layer = _layer(use_running_average=mode, use_batch_stats=use, update_stats=update)
    x = np.random.default_rng(0).normal(2, 1, (5, 4)).astype("f4")
    known = _known(layer)
    if mode is None and use is None:
        with pytest.raises(ValueError, match="use_running_average"):
            layer(x)
        return
    training = use if mode is None else not mode
    by_batch = training if use is None else use
    counted = (training and by_batch) if update is None else update
    parameters = {n: known[n] for n in ("weight", "bias")}
    wanted = oracle.batch_norm_train(x, **parameters)[0] if by_batch else oracle.batch_norm(x, **known)
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-5, atol=1e-5)
    _assert_running(layer, *(_merged(known, x, True) if counted else (known["mean"], known["var"])))


def test_an_affine_part_that_is_not_trained():
    layer = _layer(use_running_average=False, train_affine=False)
    x = np.random.default_rng(0).normal(2, 1, (5, 4)).astype("f4")
    step = nnx.jit(nnx.grad(lambda m, x: (m(x) ** 3).sum()))
    assert not any(g.any() for g in jax.tree.leaves(step(layer, x)))
    layer.train_affine = True
    assert all(g.any() for g in jax.tree.leaves(step(layer, x)))


def test_state_and_settings():
    told = {"single_value": "zero", "empty_batch": "raise", "update_stats": False, "train_affine": False}
    layer = _layer(**told)
    assert {n: getattr(layer, n) for n in OURS} == {**OURS, **told}
    assert jax.tree.structure(nnx.state(layer)) == jax.tree.structure(nnx.state(_layer()))
    again = nnx.merge(*nnx.split(layer))
    assert again.single_value == "zero" and again.train_affine is False and nnx.clone(layer).update_stats is False


def test_refusals():
    x = np.ones((3, 4), "f4")
    x[0, 1] = np.nan
    text = (
        r'BatchNorm has nonfinite="raise"; received statistics that are not finite in 1 of 4 channels: look for the '
        r'first NaN or infinity before it, or set nonfinite="skip"\.'
    )
    layer = _layer(nonfinite="raise", use_running_average=False)
    refused(lambda: layer(x), ValueError, text)
    text = (
        r'BatchNorm with nonfinite="raise" looks at values, and a program that is being traced has none: set it to '
        r'"skip", or call it outside\.'
    )
    refused(lambda: nnx.jit(lambda m, x: m(x))(layer, x), ValueError, text)
    text = r"single_value must be 'raise', 'running' or 'zero'; received 'skip'\."
    refused(lambda: _layer(single_value="skip"), ValueError, text)
    text = r"train_affine must be True or False; received 1\."
    refused(lambda: _layer(train_affine=1), ValueError, text)


@pytest.mark.parametrize("axes", [None, (2,)])
@pytest.mark.parametrize("shape", [(5, 7), (6, 3), (5, 6, 4, 1)])
@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm", "RMSNorm", "InstanceNorm", "GroupNorm"])
def test_masks_that_do_not_fit(kind, shape, axes):
    options = {"num_groups": 2, "reduction_axes": axes} if kind == "GroupNorm" else {}
    if kind == "BatchNorm" and axes:
        options = {"axis_name": "devices"}
    layer = getattr(nf, kind)(4, rngs=nnx.Rngs(0), **options)
    text = rf"mask must broadcast to x of shape \(5, 6, 4\); received shape \({', '.join(map(str, shape))}\)\."
    refused(lambda: layer(jnp.ones((5, 6, 4)), mask=jnp.ones(shape, bool)), ValueError, text)
