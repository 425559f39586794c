"""normkit.flax against flax.nnx: arguments, values, statistics, masks, devices, and what nnx does to a module."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normkit.flax as nf
from normkit.backends.flax.layers import OURS
from normkit.conformance.tolerances import tolerance, units


class Site(NamedTuple):
    """A layer of Flax, its features, the shape of its inputs, and its arguments."""

    kind: str
    features: int
    shape: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012

    def pair(self, **options):
        """Ours and Flax's with an exact variance, with the same parameters, which are no identity."""
        options = {**self.options, **options, "rngs": nnx.Rngs(0)}
        made = [getattr(nf, self.kind)(self.features, **options)]
        made.append(getattr(nnx, self.kind)(self.features, **options, use_fast_variance=False))
        values = np.random.default_rng(0)
        state = jax.tree.map(lambda a: jnp.asarray(abs(values.normal(size=a.shape)) + 0.1, a.dtype), nnx.state(made[1]))
        for layer in made:
            nnx.update(layer, state)
        return made


SITES = (
    Site("BatchNorm", 6, (9, 6)),
    Site("BatchNorm", 6, (3, 5, 7, 6), {"momentum": 0.9, "use_bias": False}),
    Site("BatchNorm", 6, (3, 6, 5), {"axis": 1, "epsilon": 1e-3, "use_scale": False}),
    Site("LayerNorm", 7, (3, 5, 7)),
    Site("LayerNorm", 7, (3, 5, 7), {"reduction_axes": (1, 2), "use_bias": False}),
    Site("LayerNorm", 35, (3, 5, 7), {"reduction_axes": (1, 2), "feature_axes": (1, 2)}),
    Site("LayerNorm", 5, (3, 5, 7), {"reduction_axes": -1, "feature_axes": 1}),
    Site("RMSNorm", 7, (3, 5, 7)),
    Site("RMSNorm", 7, (3, 5, 7), {"reduction_axes": (1, 2), "epsilon": 1e-3}),
    Site("GroupNorm", 6, (2, 5, 7, 6), {"num_groups": 3}),
    Site("GroupNorm", 6, (4, 6), {"num_groups": None, "group_size": 3, "use_scale": False}),
    Site("InstanceNorm", 6, (2, 5, 7, 6)),
    Site("InstanceNorm", 6, (2, 6, 5), {"feature_axes": 1, "use_bias": False}),
)
sites = pytest.mark.parametrize("site", SITES, ids=str)
KINDS = tuple(dict.fromkeys(site.kind for site in SITES))


def numbers(*shape, seed=0, spread=2.0, offset=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * spread + offset, "float32")


def f8(a):
    return np.asarray(a).astype("f8")


def close(found, reference, quantity="native", scale=None, dtype="float32"):
    limit = tolerance(quantity, dtype)
    error = units(f8(found), f8(reference), dtype, scale)
    assert error <= limit.units, f"{error:.3g} units off: {limit.reason}"


def called(layer, x, dy, **options):
    """``y``, its gradients for x and the parameters, and the state after the call."""

    @jax.jit
    def run(x, state):
        def loss(x, params):
            module = nnx.merge(graph, params, rest, copy=True)
            y = module(x, **options)
            return jnp.sum(y * dy), (y, nnx.state(module))

        graph, params, rest = nnx.split(nnx.merge(definition, state), nnx.Param, ...)
        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    definition, state = nnx.split(layer)
    gradients, (y, after) = run(x, state)
    return y, jax.tree.leaves(gradients), after


def agree(ours, theirs, x, dy, **options):
    (y, found, state), (y0, found0, state0) = (called(layer, x, dy, **options) for layer in (ours, theirs))
    close(y, y0)
    for gradient, reference in zip(found, found0, strict=True):
        close(gradient, reference)
    assert jax.tree.structure(state) == jax.tree.structure(state0)
    for value, reference in zip(jax.tree.leaves(state), jax.tree.leaves(state0), strict=True):
        close(value, reference, "running")


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_and_types_are_flaxs(kind):
    ours, theirs = getattr(nf, kind), getattr(nnx, kind)
    parameters = inspect.signature(ours).parameters
    assert {n: p for n, p in parameters.items() if n not in OURS} == dict(inspect.signature(theirs).parameters)
    assert issubclass(ours, theirs) and ours is not theirs
    assert list(inspect.signature(ours.__call__).parameters) == list(inspect.signature(theirs.__call__).parameters)


@pytest.mark.parametrize(
    ("site", "average"), [(s, False) for s in SITES] + [(s, True) for s in SITES if s.kind == "BatchNorm"], ids=str
)
def test_values_and_gradients(site, average):
    options = {"use_running_average": average} if site.kind == "BatchNorm" else {}
    agree(*site.pair(), numbers(*site.shape), numbers(*site.shape, seed=1, offset=0), **options)


@sites
def test_masks(site):
    """As Flax has them: statistics are of the unmasked elements, and y is computed everywhere."""
    mask = np.random.default_rng(2).random(site.shape) < 0.6
    if site.kind == "GroupNorm":
        mask = np.broadcast_to(mask[..., :1], site.shape).copy()
    mask[:, 0], mask[0] = True, True
    agree(*site.pair(), numbers(*site.shape), numbers(*site.shape, seed=1, offset=0), mask=jnp.asarray(mask))


@pytest.mark.parametrize("site", [SITES[i] for i in (1, 9, 11)], ids=str)
def test_a_mask_broadcasts(site):
    """Along channels too, which Flax's GroupNorm does not take."""
    layer = site.pair()[0]
    x = numbers(*site.shape)
    mask = np.arange(np.prod(site.shape[:-1])).reshape(*site.shape[:-1], 1) % 3 < 2
    y = layer(x, mask=jnp.asarray(mask))
    close(y, site.pair()[0](x, mask=jnp.broadcast_to(mask, site.shape)))
    assert abs(f8(y) - f8(site.pair()[0](x))).max() > 1e-2


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0, 1.0])
def test_ten_steps_of_running_statistics(momentum):
    ours, theirs = Site("BatchNorm", 6, (3, 5, 6), {"momentum": momentum}).pair()
    for k in range(10):
        x = numbers(3, 5, 6, seed=k)
        ours(x), theirs(x)
    close(ours.mean[...], theirs.mean[...], "running", np.asarray(8.0))
    close(ours.var[...], theirs.var[...], "running")


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("site", [SITES[i] for i in (1, 3, 9, 11)], ids=str)
def test_far_from_zero(site, offset):
    """What Flax's default is out of tolerance on; so this is not what Flax computes."""
    ours = site.pair()[0]
    theirs = getattr(nnx, site.kind)(site.features, **site.options, rngs=nnx.Rngs(0))
    nnx.update(theirs, nnx.state(ours))
    x = numbers(*site.shape, offset=offset)
    exact = f8(x).reshape(2, 5, 7, 3, 2) if site.kind == "GroupNorm" else f8(x)
    axes = {"BatchNorm": (0, 1, 2), "LayerNorm": (2,), "GroupNorm": (1, 2, 4), "InstanceNorm": (1, 2)}[site.kind]
    keep = {"axis": axes, "keepdims": True}
    reference = ((exact - exact.mean(**keep)) / np.sqrt(exact.var(**keep) + ours.epsilon)).reshape(x.shape)
    reference = reference * f8(ours.scale[...]) + (0 if ours.bias is None else f8(ours.bias[...]))
    close(ours(x), reference, "forward")
    assert units(f8(theirs(x)), reference, "float32") > tolerance("forward", "float32").units


def test_group_norm_with_two_axes_of_samples():
    """Flax repeats statistics along axis 1, wherever the channels are."""
    layer = Site("GroupNorm", 6, (2, 3, 5, 6), {"num_groups": 3, "reduction_axes": (2, 3)}).pair()[0]
    x = numbers(2, 3, 5, 6)
    flat = Site("GroupNorm", 6, (6, 5, 6), {"num_groups": 3}).pair()[0]
    close(layer(x), flat(x.reshape(6, 5, 6)).reshape(x.shape), "cross")


@pytest.mark.parametrize("case", ["empty", "masked"])
def test_a_batch_without_elements_moves_nothing(case):
    layer = SITES[0].pair()[0]
    before = [np.asarray(layer.mean[...]), np.asarray(layer.var[...])]
    n = 0 if case == "empty" else 4
    y = layer(numbers(n, 6), mask=jnp.zeros((n, 1), bool) if n else None)
    assert jnp.isfinite(y).all() and y.shape == (n, 6)
    assert (layer.mean[...] == before[0]).all() and (layer.var[...] == before[1]).all()


def test_modes():
    """train(), eval(), view, and the argument, which comes first; none at all is refused."""
    layer, x = SITES[0].pair()[0], numbers(9, 6)
    by_batch = layer(x)
    layer.eval()
    by_average = layer(x)
    assert (layer(x, use_running_average=False) == by_batch).all() and not (by_average == by_batch).all()
    layer.train()
    assert (layer(x) == by_batch).all()
    undecided = nf.BatchNorm(6, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="No `use_running_average` argument was provided to BatchNorm"):
        undecided(x)
    viewed = nnx.view(undecided, use_running_average=True)
    assert viewed(x).shape == x.shape


MISUSE = {
    "groups": (lambda: nf.GroupNorm(6, num_groups=4, rngs=nnx.Rngs(0)), "does not divide"),
    "samples": (lambda: nf.InstanceNorm(6, feature_axes=0, rngs=nnx.Rngs(0))(numbers(6, 2, 3)), "samples along axis 0"),
    "reduced": (
        lambda: nf.GroupNorm(6, num_groups=2, reduction_axes=(1,), rngs=nnx.Rngs(0))(numbers(2, 3, 6)),
        "reduces the last axis",
    ),
    "axes": (
        lambda: nf.BatchNorm(6, axis=(1, 2), rngs=nnx.Rngs(0))(numbers(4, 2, 3)),
        r"has its channels at one axis; received axis=\(1, 2\)",
    ),
    "channels": (lambda: nf.BatchNorm(6, rngs=nnx.Rngs(0))(numbers(2, 5)), r"must have shape \(5,\)"),
    "mask": (lambda: nf.BatchNorm(6, rngs=nnx.Rngs(0))(numbers(2, 6), mask=jnp.ones((3, 6), bool)), "must broadcast"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case):
    build, text = MISUSE[case]
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"dtype": jnp.float32, "param_dtype": jnp.bfloat16}])
@pytest.mark.parametrize("site", [SITES[i] for i in (1, 3, 4, 7, 9, 11)], ids=str)
def test_dtypes(site, options):
    """The result's dtype is Flax's, by promotion or as asked; statistics are those of float32."""
    ours, theirs = site.pair(**options)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        x = numbers(*site.shape).astype(dtype)
        y, y0 = ours(x), theirs(x)
        assert y.dtype == y0.dtype
        # Flax rounds parameters and the mean to the dtype, and what comes after them.
        narrow = jnp.bfloat16 in (dtype, *options.values()) or dtype == jnp.float16
        assert units(f8(y), f8(y0), "bfloat16" if narrow else "float32") <= (4 if narrow else 32)
    assert jax.tree.map(lambda a: a.dtype, nnx.state(ours)) == jax.tree.map(lambda a: a.dtype, nnx.state(theirs))


@pytest.mark.parametrize("site", [SITES[i] for i in (1, 3, 7, 9, 11)], ids=str)
def test_named_axes(site):
    """The statistics of all devices' elements, and their gradients: as of one array that holds them all."""
    if site.kind == "BatchNorm":
        whole = numbers(4, *site.shape)
        parts, axis = whole, 0
    else:
        # One axis of the reduced ones is split.
        whole = numbers(*site.shape[:-2], 8, site.shape[-1])
        axis = whole.ndim - 2
        parts = jnp.stack(jnp.split(whole, 2, axis))
    options = {"reduction_axes": (1, 2)} if site.kind in ("LayerNorm", "RMSNorm") else {}
    alone = site.pair(**options)[0]
    shared = site.pair(**options, axis_name="devices")[0]
    definition, state = nnx.split(shared)

    def split(x):
        return jax.vmap(lambda part: nnx.merge(definition, state, copy=True)(part), axis_name="devices")(x)

    def one(x):
        if site.kind == "BatchNorm":
            flat = x.reshape(-1, *site.shape[1:])
            return nnx.clone(alone)(flat).reshape(x.shape)
        return nnx.clone(alone)(x)

    y, back = jax.vjp(split, parts)
    y0, back0 = jax.vjp(one, whole)
    dy = numbers(*y.shape, seed=3, offset=0)

    def joined(a):
        return a if site.kind == "BatchNorm" else jnp.concatenate(list(a), axis)

    close(joined(y), y0)
    close(joined(back(dy)[0]), back0(joined(dy))[0])


def test_named_axes_count_elements_and_move_statistics():
    """Devices with masks of different sizes weigh by their elements; running statistics are those of all."""
    site = Site("BatchNorm", 6, (5, 6), {"momentum": 0.0})
    shared, alone = site.pair(axis_name="devices")[0], site.pair()[0]
    x, mask = numbers(3, 5, 6), np.arange(15).reshape(3, 5, 1) < 7
    definition, state = nnx.split(shared)

    def run(part, mask):
        layer = nnx.merge(definition, state, copy=True)
        return layer(part, mask=mask), layer.mean[...], layer.var[...]

    y, mean, var = jax.vmap(run, axis_name="devices")(x, jnp.asarray(mask))
    y0 = alone(x.reshape(15, 6), mask=jnp.asarray(mask.reshape(15, 1)))
    close(y.reshape(15, 6), y0)
    close(mean, np.broadcast_to(alone.mean[...], (3, 6)), "running", np.asarray(4.0))
    close(var, np.broadcast_to(alone.var[...], (3, 6)), "running")


@sites
def test_state_both_ways(site):
    ours, theirs = site.pair()
    for source, target in ((ours, theirs), (theirs, ours)):
        nnx.update(source, jax.tree.map(lambda a: a * 1.5, nnx.state(source)))
        nnx.update(target, nnx.state(source))
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(source), nnx.state(target)))


def test_transformations():
    """split and merge, clone, deepcopy, jit, grad, vmap over models."""
    layer, x = SITES[0].pair()[0], numbers(9, 6)
    y = copy.deepcopy(layer)(x)
    for twin in (nnx.clone(layer), nnx.merge(*nnx.split(layer))):
        assert type(twin) is nf.BatchNorm
        close(nnx.jit(lambda m, x: m(x))(twin, x), y, "cross")
    twin = nnx.clone(layer)
    loss = nnx.jit(nnx.value_and_grad(lambda m: (m(x) ** 3).sum()))
    _, gradients = loss(twin)
    assert set(gradients) == {"scale", "bias"} and not (twin.mean[...] == layer.mean[...]).all()

    @functools.partial(nnx.vmap, in_axes=0, out_axes=0)
    def make(key):
        return nf.LayerNorm(6, rngs=nnx.Rngs(key))

    models = make(jax.random.split(jax.random.key(0), 3))
    ys = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(models, x)
    assert ys.shape == (3, 9, 6) and (ys[0] == ys[2]).all()


def test_nothing_that_flax_computes_with_is_called(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Flax computes")

    monkeypatch.setattr("flax.nnx.nn.normalization._compute_stats", refuse)
    monkeypatch.setattr("flax.nnx.nn.normalization._normalize", refuse)
    for site in SITES:
        ours, theirs = site.pair()
        ours(numbers(*site.shape))
        with pytest.raises(AssertionError, match="Flax computes"):
            theirs(numbers(*site.shape))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm"])
def test_arrays_that_do_not_fit(kind):
    layer = getattr(nf, kind)(4, rngs=nnx.Rngs(0), **({"num_groups": 2} if kind == "GroupNorm" else {}))
    with pytest.raises(ValueError, match=r"^weight must have shape \(6,\); received shape \(4,\)\.$"):
        layer(jnp.ones((2, 6)))
    with pytest.raises(ValueError, match=r"^x must have at least one axis; received an array of shape \(\)\.$"):
        layer(jnp.ones(()))
