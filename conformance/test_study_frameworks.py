"""The study in every framework: a seed is the same arrays there, and a step of training the same numbers."""

import numpy as np
import pytest

from normkit.study import engine, runner
from normkit.study.lab import Lab

STEPS = 3
NETS = {
    "plain": engine.mlp,
    "batch": lambda: engine.mlp("batch"),
    "linf": lambda: engine.mlp("linf"),
    "convolutions": lambda: engine.conv("group", channels=(8, None, 8)),
}


def seen(framework, net):
    """Initial parameters, batches and losses, with those of the library as NumPy arrays."""
    lab = Lab(framework, 1, "float64")
    params = {name: lab.numpy(a) for name, a in lab.init(net).items()}
    batches = [tuple(map(lab.numpy, pair)) for pair in lab.batches(16, STEPS)]
    return params, batches, lab.train(net, 0.05, STEPS, batch=16).loss


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_seed_is_the_same_everywhere(library, net):
    if library.name not in runner.FRAMEWORKS:
        pytest.skip(f"the study does not run in {library.name}")
    net = net()
    params, batches, losses = seen(library.name, net)
    expected, same, there = seen("numpy", net)
    assert params.keys() == expected.keys()
    assert all((params[name] == a).all() for name, a in expected.items())
    for pair, other in zip(batches, same, strict=True):
        assert all((a == b).all() for a, b in zip(pair, other, strict=True))
    # Sums in another order, through nine layers and three steps.
    np.testing.assert_allclose(losses, there, rtol=1e-12)


def test_what_runs_in_every_framework_is_in_float64():
    """In float32 nets part by rounding within some steps, and an accuracy by a point."""
    assert {e.dtype for e in runner.experiments().values() if e.frameworks} == {"float64"}
