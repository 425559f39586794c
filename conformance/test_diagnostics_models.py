"""Diagnostics of one network with the same weights: the same numbers in every framework, and nothing is changed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import numpy as np
import pytest

import normkit as nk
from normkit import diagnostics
from normkit.conformance import diagnostic_models as models
from normkit.conformance.conftest import KERAS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
#: float32 against float64 on NumPy, as a share of the largest number of an array: met are 2e-6.
SAME = 1e-5
#: What is zero but for eps: of a cosine, 1; of a difference of losses, that of the losses.
SIZES = {"scale.radial": 1.0, "scale.spread": 2.8}
#: Of normkit's layers.
CHAINS = ("numpy", "strict")
#: The networks of a library.
MADE = {"numpy": ["numpy"], "strict": ["strict"], "torch": ["torch"], "tensorflow": [], "jax": ["flax"], "cupy": []}


def made(library):
    names = [name for name in MADE[library.name] if name in CHAINS or importlib.util.find_spec(name)]
    if library.name == KERAS and importlib.util.find_spec("keras"):
        names.append("keras")
    for name in names:
        if name in CHAINS:
            yield name, models.numpy("float32", library.xp)
        else:
            yield name, getattr(models, name)()


def figures(model):
    """All arrays of all results, by name."""
    objective, names = model.objective(), model.names
    params = {names[k]: model.array(k, a) for k, a in models.weights().items()}
    loss, gradients = objective(params)
    assert list(gradients) == list(params)
    updated = {name: a - 0.5 * gradients[name] for name, a in params.items()}
    along = {names[k]: model.array(k, a) for k, a in models.weights(seed=2).items()}
    weights = {names[k]: gradients[names[k]] for k in ("conv.weight", "dense.weight", "out.weight")}
    results = {
        "landscape": diagnostics.landscape(objective, params, [0.05, 0.1, 0.5, 1, 2]),
        "along": diagnostics.landscape(objective, params, [-0.2, 0.2], along),
        "shift": diagnostics.covariate_shift(
            objective, params, [[names[k] for k in layer] for layer in models.LAYERS], updated
        ),
        "flow": diagnostics.gradient_flow(weights),
        # Differences of float32 gradients, of which the first digits cancel: a radius that leaves six.
        "curvature": diagnostics.curvature(objective, params, k=4, radius=0.3),
        "scale": diagnostics.scale_response(objective, params, [names["dense.weight"]], [0.1, 2.0, 30.0]),
        "moved": diagnostics.activation_shift(model.x, model.x * 2, axis=model.axis),
    }
    found = {f"{kind}.{name}": a for kind, result in results.items() for name, a in result.arrays().items()}
    return {"loss": np.asarray(loss), **found}


@functools.cache
def reference():
    return figures(models.numpy())


def test_the_numbers_are_those_of_float64(library):
    for name, model in made(library):
        before = model.state()
        found, expected = figures(model), reference()
        assert found.keys() == expected.keys()
        for key, a in expected.items():
            apart = np.abs(found[key] - a).max() / SIZES.get(key, np.abs(a).max())
            assert apart <= SAME, f"{name}: {key} is {apart:.1e} off"
        _unchanged(model, before)


def test_parameters_come_in_the_models_order_and_are_copies(library):
    for _, model in made(library):
        objective = model.objective()
        params = objective.params
        assert list(params) == [model.names[k] for k in models.weights()]
        for k, a in models.weights().items():
            assert np.allclose(np.asarray(params[model.names[k]]), np.asarray(model.array(k, a)), rtol=1e-6)
        before = model.state()
        with contextlib.suppress(TypeError, ValueError):  # JAX's and TensorFlow's arrays refuse to be written to
            for a in params.values():
                a[...] = 0
        _unchanged(model, before)


def test_nothing_is_changed_where_it_fails(library):
    """The model is called, and then the loss raises."""
    for _, model in made(library):

        def fails(outputs, y):
            assert tuple(outputs.shape) == (models.SAMPLES, models.CLASSES)
            raise ZeroDivisionError("half-way")

        objective, before = model.objective(fails), model.state()
        with pytest.raises(ZeroDivisionError, match="half-way"):
            diagnostics.landscape(objective, objective.params, [0.1])
        _unchanged(model, before)


def test_statistics_gap_has_every_channel(library):
    """As in the summary: the worst of them."""
    for name, model in made(library):
        if name in CHAINS:
            continue
        before = model.state()
        found = nk.statistics_gap(model.model, [model.x])
        _unchanged(model, before)
        assert len(found.layers) == len(found.channels) == 2
        for gap in found.layers:
            channels = found.channels[gap.name]
            assert np.abs(channels.mean).max() == pytest.approx(gap.mean, rel=1e-12)
            assert (channels.var.min(), channels.var.max()) == pytest.approx(gap.var, rel=1e-12)
            assert (channels.kl > 0).all()


def test_training_or_not(library):
    """In inference the running statistics are used: the loss of a batch norm that knows only zeros and ones."""
    for name, model in made(library):
        objectives = [model.objective(training=mode) for mode in (True, False, None)]
        losses = [objective(objective.params)[0] for objective in objectives]
        assert losses[0] == pytest.approx(float(reference()["loss"]), rel=SAME), name
        assert abs(losses[1] - losses[0]) > 0.1, name
        # Of the layers, those of the chain are in training, and the models were made with eval().
        assert losses[2] == losses[name not in CHAINS], name
        if name not in CHAINS:
            # Statistics are those that the model has when it is called.
            nk.recalibrate(model.model, [model.x])
            assert abs(objectives[1](objectives[1].params)[0] - losses[1]) > 0.1, name


def test_a_loss_is_one_number(library):
    for name, model in made(library):
        objective, before = model.objective(lambda outputs, y: outputs), model.state()
        kind, text = (TypeError, "loss of a chain must return") if name in CHAINS else (ValueError, "one number, .*4")
        with pytest.raises(kind, match=text):
            objective(objective.params)
        _unchanged(model, before)


def test_dropout_draws_the_same_in_every_call(library):
    """And leaves the generators where they were."""
    for name, _ in made(library):
        if name in CHAINS:
            continue
        net, loss, x, state = getattr(models, f"{name}_dropout")()
        before, objective = state(), diagnostics.objective(net, loss, x)
        losses = [objective(objective.params)[0] for _ in range(3)]
        assert (
            losses[0]
            == losses[1]
            == losses[2]
            != diagnostics.objective(net, loss, x, training=False)(objective.params)[0]
        )
        for a, b in zip(before, state(), strict=True):
            assert np.array_equal(a, b)
        if name == "torch":
            other = diagnostics.objective(net, loss, x, seed=1)
            assert other(other.params)[0] != losses[0]


def test_a_function_of_jax_is_an_objective(library):
    if library.name != "jax":
        pytest.skip("only JAX has such functions")
    jax = library.xp
    matrix, start = np.diag([1.0, 2.0, 4.0]), np.array([3.0, 1.0, 1.0])
    objective = jax.value_and_grad(lambda p: p["w"] @ jax.numpy.asarray(matrix) @ p["w"] / 2)
    found = diagnostics.landscape(objective, {"w": jax.numpy.asarray(start)}, [0.1])
    assert found.change[0] == pytest.approx(0.1 * np.linalg.norm(matrix @ matrix @ start), rel=SAME)


def _unchanged(model, before):
    for a, b in zip(before, model.state(), strict=True):
        assert np.array_equal(a, b)
