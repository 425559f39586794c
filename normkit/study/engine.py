"""Small nets without a framework: layers that know their gradients, in array API calls, with normkit's norms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normkit.study import norms

Array = Any
Params = dict[str, Array]
#: dy and the dictionary that gradients of parameters go into -> dx.
Back = Callable[[Array, Params], Array]


@dataclass
class Pass:
    """One pass over a net: what it computes with, what it is given, what it leaves behind."""

    xp: Any
    #: In place of the batch's statistics, by norm: inference.
    known: Mapping[str, norms.Statistics] | None = None
    #: (scale, shift) after a norm, by norm.
    noise: Mapping[str, tuple[Array, Array]] | None = None
    #: The batch's statistics, inputs of nonlinearities, and gradients with respect to them.
    statistics: dict[str, norms.Statistics] = field(default_factory=dict)
    inputs: Params = field(default_factory=dict)
    gradients: Params = field(default_factory=dict)


class Layer:
    """A name, initial parameters (NumPy, float64) and a pass."""

    name: str

    def init(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Initial parameters by full name."""
        return {}

    def __call__(self, run: Pass, params: Params, x: Array) -> tuple[Array, Back]:
        """Y, and the function that takes gradients back."""
        raise NotImplementedError


class Dense(Layer):
    """x @ weight + bias; ``gain`` times Glorot's spread, or He's."""

    def __init__(self, name: str, n_in: int, n_out: int, *, bias: bool = True, gain: float = 1.0, he: bool = False):
        self.name, self.shape, self.bias = name, (n_in, n_out), bias
        self.std = gain * math.sqrt(2 / n_in if he else 2 / (n_in + n_out))

    def init(self, rng):
        found = {f"{self.name}.weight": rng.normal(0, self.std, self.shape)}
        return found | ({f"{self.name}.bias": np.zeros(self.shape[1])} if self.bias else {})

    def __call__(self, run, params, x):
        xp, weight = run.xp, params[f"{self.name}.weight"]
        y = x @ weight
        if self.bias:
            y = y + params[f"{self.name}.bias"]

        def back(dy, grads):
            grads[f"{self.name}.weight"] = xp.matrix_transpose(x) @ dy
            if self.bias:
                grads[f"{self.name}.bias"] = xp.sum(dy, axis=0)
            return dy @ xp.matrix_transpose(weight)

        return y, back


class Norm(Layer):
    """A norm by its name in ``norms``, with weight 1 and bias 0; "noise" is none but the noise."""

    def __init__(self, name: str, n: int, kind: str):
        self.name, self.n, self.kind = name, n, kind

    def init(self, rng):
        if self.kind in ("noise", "backward"):
            return {}
        return {f"{self.name}.weight": np.ones(self.n), f"{self.name}.bias": np.zeros(self.n)}

    def __call__(self, run, params, x):
        if self.kind == "backward":
            return x, lambda dy, grads: _unit(run.xp, dy)
        y, pullback = x, None
        if self.kind != "noise":
            y, pullback = self._normalize(run, x, params[f"{self.name}.weight"], params[f"{self.name}.bias"])
        scale = None
        if run.noise and self.name in run.noise:
            scale, shift = run.noise[self.name]
            y = y * scale + shift

        def back(dy, grads):
            if scale is not None:
                dy = dy * scale
            if pullback is None:
                return dy
            dx, grads[f"{self.name}.weight"], grads[f"{self.name}.bias"] = pullback(dy)
            return dx

        return y, back

    def _normalize(self, run, x, weight, bias):
        if self.kind in norms.SAMPLEWISE:
            return norms.SAMPLEWISE[self.kind](x, weight, bias)[:2]
        if run.known is not None:
            return norms.given(x, weight, bias, run.known[self.name])
        y, pullback, run.statistics[self.name] = norms.BATCHWISE[self.kind](x, weight, bias)
        return y, pullback


def _unit(xp: Any, dy: Array) -> Array:
    """Every sample's gradient with a root mean square of 1 over its units: backward gradient normalization."""
    n = dy.shape[1]
    square = xp.sum(dy * dy, axis=1, keepdims=True)
    return dy * (math.sqrt(n) / xp.sqrt(square + 1e-30))


class Act(Layer):
    """A nonlinearity: "relu", "tanh", "sigmoid" or "linear". Where statistics and gradients are looked at."""

    def __init__(self, name: str, kind: str = "relu"):
        self.name, self.kind = name, kind

    def __call__(self, run, params, x):
        xp = run.xp
        run.inputs[self.name] = x
        if self.kind == "relu":
            zero = xp.zeros_like(x)
            y = xp.maximum(x, zero)
        elif self.kind == "tanh":
            y = xp.tanh(x)
        elif self.kind == "sigmoid":
            y = 0.5 + 0.5 * xp.tanh(0.5 * x)
        else:
            y = x

        def back(dy, grads):
            if self.kind == "relu":
                dy = xp.where(x > zero, dy, xp.zeros_like(dy))
            elif self.kind == "tanh":
                dy = dy * (1.0 - y * y)
            elif self.kind == "sigmoid":
                dy = dy * y * (1.0 - y)
            run.gradients[self.name] = dy
            return dy

        return y, back


class Conv(Layer):
    """3 x 3 convolution of (N, H, W, C) with zeros around, as one matrix product; He's spread."""

    def __init__(self, name: str, n_in: int, n_out: int, gain: float = 1.0):
        self.name, self.shape = name, (9 * n_in, n_out)
        self.std = gain * math.sqrt(2 / (9 * n_in))

    def init(self, rng):
        return {
            f"{self.name}.weight": rng.normal(0, self.std, self.shape),
            f"{self.name}.bias": np.zeros(self.shape[1]),
        }

    def __call__(self, run, params, x):
        xp, weight = run.xp, params[f"{self.name}.weight"]
        n, h, w, c = x.shape
        edged = _edged(xp, x)
        windows = [edged[:, i : i + h, j : j + w] for i, j in _PLACES]
        columns = xp.reshape(xp.concat(windows, axis=3), (n * h * w, 9 * c))
        y = xp.reshape(columns @ weight + params[f"{self.name}.bias"], (n, h, w, self.shape[1]))

        def back(dy, grads):
            flat = xp.reshape(dy, (n * h * w, self.shape[1]))
            grads[f"{self.name}.weight"] = xp.matrix_transpose(columns) @ flat
            grads[f"{self.name}.bias"] = xp.sum(flat, axis=0)
            parts = xp.reshape(flat @ xp.matrix_transpose(weight), (n, h, w, 9 * c))
            # Each part goes back where it came from: the window on the opposite side.
            edged = _edged(xp, parts)
            return sum(
                edged[:, 2 - i : 2 - i + h, 2 - j : 2 - j + w, k * c : (k + 1) * c] for k, (i, j) in enumerate(_PLACES)
            )

        return y, back


_PLACES = tuple(itertools.product(range(3), range(3)))


def _edged(xp: Any, x: Array) -> Array:
    """x with one zero more on each side of axes 1 and 2."""
    zero = xp.zeros_like(x[:, :1])
    x = xp.concat([zero, x, zero], axis=1)
    zero = xp.zeros_like(x[:, :, :1])
    return xp.concat([zero, x, zero], axis=2)


class Pool(Layer):
    """Means of 2 x 2 of (N, H, W, C)."""

    name = "pool"

    def __call__(self, run, params, x):
        xp = run.xp
        n, h, w, c = x.shape
        y = xp.sum(xp.reshape(x, (n, h // 2, 2, w // 2, 2, c)), axis=(2, 4)) * 0.25

        def back(dy, grads):
            dy = xp.reshape(dy * 0.25, (n, h // 2, 1, w // 2, 1, c))
            spread = xp.concat([xp.concat([dy, dy], axis=2)] * 2, axis=4)
            return xp.reshape(spread, (n, h, w, c))

        return y, back


class Reshape(Layer):
    """Another shape behind the batch axis."""

    name = "reshape"

    def __init__(self, *shape: int):
        self.shape = shape

    def __call__(self, run, params, x):
        before = tuple(x.shape)
        return run.xp.reshape(x, (before[0], *self.shape)), lambda dy, grads: run.xp.reshape(dy, before)


class Moved(Layer):
    """A norm of (N, H, W, C), which has channels at axis 1."""

    def __init__(self, norm: Norm):
        self.norm, self.name = norm, norm.name

    def init(self, rng):
        return self.norm.init(rng)

    def __call__(self, run, params, x):
        xp = run.xp
        y, inner = self.norm(run, params, xp.permute_dims(x, (0, 3, 1, 2)))

        def back(dy, grads):
            return xp.permute_dims(inner(xp.permute_dims(dy, (0, 3, 1, 2)), grads), (0, 2, 3, 1))

        return xp.permute_dims(y, (0, 2, 3, 1)), back


class Residual(Layer):
    """x + layers(x)."""

    name = "residual"

    def __init__(self, *layers: Layer):
        self.layers = layers

    def init(self, rng):
        return {name: value for layer in self.layers for name, value in layer.init(rng).items()}

    def __call__(self, run, params, x):
        y, inner = _chain(self.layers, run, params, x)
        return x + y, lambda dy, grads: dy + inner(dy, grads)


def _chain(layers: Sequence[Layer], run: Pass, params: Params, x: Array) -> tuple[Array, Back]:
    backs = []
    for layer in layers:
        x, back = layer(run, params, x)
        backs.append(back)

    def pullback(dy, grads):
        for back in reversed(backs):
            dy = back(dy, grads)
        return dy

    return x, pullback


class Net:
    """Layers one after the other, and a loss: "classes" (cross entropy, in nats) or "squares"."""

    def __init__(self, layers: Sequence[Layer], loss: str = "classes"):
        self.layers, self.loss = tuple(layers), loss

    def init(self, seed: int) -> dict[str, np.ndarray]:
        """Initial parameters, by name, in float64."""
        rng = np.random.default_rng(seed)
        return {name: value for layer in self.layers for name, value in layer.init(rng).items()}

    def forward(self, run: Pass, params: Params, x: Array) -> tuple[Array, Back]:
        """The last layer's y, and its pullback."""
        return _chain(self.layers, run, params, x)

    def value_and_grad(self, run: Pass, params: Params, x: Array, t: Array) -> tuple[Array, Params]:
        """The mean loss and its gradient by name."""
        xp = run.xp
        y, back = self.forward(run, params, x)
        m = x.shape[0]
        if self.loss == "squares":
            error = y - t
            loss, dy = xp.sum(error * error) / m, error * (2.0 / m)
        else:
            shifted = y - xp.max(y, axis=1, keepdims=True)
            exp = xp.exp(shifted)
            total = xp.sum(exp, axis=1, keepdims=True)
            loss = xp.sum(xp.log(total) - xp.sum(shifted * t, axis=1, keepdims=True)) / m
            dy = (exp / total - t) * (1.0 / m)
        grads: Params = {}
        back(dy, grads)
        return loss, {name: grads[name] for name in params}


def mlp(
    norm: str | None = None,
    *,
    sizes: Sequence[int] = (64,) * 9 + (10,),
    act: str = "relu",
    gain: float = 1.0,
    he: bool = False,
    loss: str = "classes",
) -> Net:
    """Dense layers with a norm before each nonlinearity; by default eight hidden layers of 64."""
    layers: list[Layer] = []
    for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes[:-1]), 1):
        layers.append(Dense(f"{k}", n_in, n_out, gain=gain, he=he))
        if norm is not None:
            layers.append(Norm(f"{k}.norm", n_out, norm))
        layers.append(Act(f"{k}.act", act))
    layers.append(Dense(f"{len(sizes) - 1}", sizes[-2], sizes[-1], gain=gain))
    return Net(layers, loss)


def conv(norm: str | None = None, *, channels: Sequence[int | None] = (16, 16, None, 32, 32, None, 64, 64)) -> Net:
    """Convolutions on the digits as 8 x 8 images, ``None`` a pool; then means over the image and one dense layer."""
    layers: list[Layer] = [Reshape(8, 8, 1)]
    n_in, side = 1, 8
    for k, n_out in enumerate(channels, 1):
        if n_out is None:
            layers.append(Pool())
            side //= 2
            continue
        layers.append(Conv(f"{k}", n_in, n_out))
        if norm is not None:
            layers.append(Moved(Norm(f"{k}.norm", n_out, norm)))
        layers.append(Act(f"{k}.act"))
        n_in = n_out
    layers += [Reshape(side * side * n_in), Dense("last", side * side * n_in, 10)]
    return Net(layers)
