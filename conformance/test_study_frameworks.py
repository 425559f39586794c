"""The study in every framework: a seed is the same arrays there, and a step of training the same numbers."""

import numpy as np
import pytest

from normkit.study import engine, runner
from normkit.study.lab import Lab

STEPS = 3
NETS = {
    "plain": engine.mlp,
    "batch": lambda: engine.mlp("batch"),
    # Not L-infinity: of two x that are nearly the largest, rounding decides which one the gradient goes to.
    "l1": lambda: engine.mlp("l1"),
    "convolutions": lambda: engine.conv("group", channels=(8, None, 8)),
}


def seen(framework, net):
    """Initial parameters, batches and losses, with those of the library as NumPy arrays."""
    lab = Lab(framework, seed=1)
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
    # Sums of float32 in another order, through nine layers and three steps.
    np.testing.assert_allclose(losses, there, rtol=1e-5)
