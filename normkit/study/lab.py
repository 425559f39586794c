"""Where an experiment is made: an array library, seeds, and what all experiments do (train a net, test it)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit._dispatch import backend_of
from normkit.conformance.libraries import library
from normkit.diagnostics import Objective
from normkit.study import data, norms
from normkit.study.engine import Net, Params, Pass

Array = Any
#: What compiles a training step of the library, where calling its operations one by one would take too long.
COMPILERS: dict[str, Callable[[Any], Callable]] = {
    "jax": lambda m: m.jit,
    "tensorflow": lambda m: m.function(autograph=False),
}


@dataclass
class History:
    """A training run: the loss of every step, the parameters at its end, and whether the loss became no number."""

    loss: np.ndarray
    params: Params
    diverged: bool


class Lab:
    """One array library, with a dtype, and one seed."""

    def __init__(self, framework: str = "numpy", seed: int = 0, dtype: str = "float32", quick: bool = False):
        self.library, self.seed, self.dtype, self.quick = library(framework), seed, dtype, quick
        self.framework = framework
        self.xp = backend_of("x", self.array(np.zeros(1))).namespace(self.array(np.zeros(1)))
        self._steps: dict[tuple, tuple[Net, Callable]] = {}

    def array(self, a: Any) -> Array:
        """An array of the library."""
        return self.library.array(np.asarray(a), self.dtype)

    def arrays(self, params: Mapping[str, Any]) -> Params:
        """Every parameter as an array of the library."""
        return {name: self.array(a) for name, a in params.items()}

    def numpy(self, a: Array) -> np.ndarray:
        """In float64."""
        return self.library.numpy(a)

    def compiled(self, function: Callable) -> Callable:
        """The function of arrays, compiled where the library needs that."""
        compiler = COMPILERS.get(self.framework)
        return compiler(importlib.import_module(self.framework))(function) if compiler else function

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers of this seed."""
        return np.random.default_rng([self.seed, *key])

    def init(self, net: Net) -> Params:
        """The net's initial parameters of this seed."""
        return self.arrays(net.init(self.seed))

    def value_and_grad(self, net: Net) -> Callable[..., tuple[Array, Params]]:
        """Params, x, t (and noise) -> loss and gradients, with the batch's statistics."""
        key = ("grad", id(net))
        if key not in self._steps:
            xp = self.xp

            def function(params, x, t, noise):
                return net.value_and_grad(Pass(xp, noise=noise), params, x, t)

            self._steps[key] = net, self.compiled(function)
        return self._steps[key][1]

    def objective(self, net: Net, x: Array, t: Array) -> Objective:
        """Loss and gradients on one batch as a function of the parameters alone."""
        function = self.value_and_grad(net)

        def objective(params):
            loss, grads = function(dict(params), x, t, {})
            return float(loss), grads

        return objective

    def batches(self, size: int, steps: int, key: int = 1) -> Iterator[tuple[Array, Array]]:
        """So many batches of the digits, epoch after epoch in another order."""
        split, rng = data.digits(), self.rng(key)
        n, order, at = len(split.x), np.empty(0, int), 0
        for _ in range(steps):
            if at + size > len(order):
                order, at = rng.permutation(n), 0
            rows = order[at : at + size]
            at += size
            yield self.array(split.x[rows]), self.array(split.t[rows])

    def train(
        self,
        net: Net,
        lr: float,
        steps: int = 300,
        *,
        batch: int = 128,
        params: Params | None = None,
        noise: Callable[[int, int], Mapping[str, tuple]] | None = None,
        watch: Callable[[int, Params, Array, Array], None] | None = None,
    ) -> History:
        """SGD on the digits; ``watch`` is called before each step, ``noise`` gives (scale, shift) by norm."""
        key = ("step", id(net))
        if key not in self._steps:
            xp = self.xp

            def step(params, x, t, lr, noise):
                loss, grads = net.value_and_grad(Pass(xp, noise=noise), params, x, t)
                return loss, {name: a - lr * grads[name] for name, a in params.items()}

            self._steps[key] = net, self.compiled(step)
        step = self._steps[key][1]
        params = self.init(net) if params is None else params
        rate, losses = self.array(lr), []
        with np.errstate(all="ignore"):
            for k, (x, t) in enumerate(self.batches(batch, steps)):
                if watch is not None:
                    watch(k, params, x, t)
                drawn = {} if noise is None else {n: tuple(map(self.array, p)) for n, p in noise(k, batch).items()}
                loss, new = step(params, x, t, rate, drawn)
                losses.append(float(loss))
                if not np.isfinite(losses[-1]) or losses[-1] > 1e4:
                    return History(np.array(losses), params, True)
                params = new
        return History(np.array(losses), params, False)

    def steps_to(self, losses: np.ndarray, target: float = 0.3) -> float:
        """Steps until the mean loss of five is below the target; one more than there were if it never is."""
        mean = np.convolve(losses, np.ones(5) / 5, "valid") if len(losses) >= 5 else losses
        below = np.flatnonzero(mean < target)
        return float(below[0] + 5 if len(below) else len(losses) + 1)

    def statistics(self, net: Net, params: Params, rows: Any = slice(None)) -> dict[str, norms.Statistics]:
        """Of the training set (or these rows of it) as one batch: the population's, layer by layer."""
        run = Pass(self.xp)
        net.forward(run, params, self.array(data.digits().x[rows]))
        return run.statistics

    def accuracy(self, net: Net, params: Params, known: Mapping[str, norms.Statistics] | None = None) -> float:
        """On the test set, with the training set's statistics or these."""
        split = data.digits()
        with np.errstate(all="ignore"):
            known = self.statistics(net, params) if known is None else known
            y, _ = net.forward(Pass(self.xp, known=known), params, self.array(split.x_test))
        y = self.numpy(y)
        return float((y.argmax(1) == split.labels_test).mean()) if np.isfinite(y).all() else 0.1
