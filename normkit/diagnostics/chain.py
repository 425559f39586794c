"""Small networks for libraries without gradients: layers with a vjp, one after the other, and losses with theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normkit._dispatch import describe
from normkit._layer import namespace

Array = Any
Pullback = Callable[[Array], tuple[Array, dict[str, Array]]]

#: The attributes of a layer that are its parameters, where it has them.
_PARAMETERS = ("weight", "bias")


class Dense:
    """``y = x @ weight.T + bias`` along the last axis; weight (outputs, inputs), as torch.nn.Linear; bias or None."""

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        self.weight, self.bias = weight, bias

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """y, and the function from dy to dx and the parameters' gradients."""
        xp = namespace(x)
        y = xp.matmul(x, self.weight.T)

        def pullback(dy: Array) -> tuple[Array, dict[str, Array]]:
            flat = xp.reshape(dy, (-1, dy.shape[-1]))
            gradients = {"weight": xp.matmul(flat.T, xp.reshape(x, (-1, x.shape[-1])))}
            if self.bias is not None:
                gradients["bias"] = xp.sum(flat, axis=0)
            return xp.matmul(dy, self.weight), gradients

        return (y if self.bias is None else y + self.bias), pullback


class Conv:
    """A 2-D convolution of x (samples, channels, height, width), no padding, stride 1.

    ``weight`` is (outputs, inputs, height, width), as of torch.nn.Conv2d; bias or None.
    """

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        self.weight, self.bias = weight, bias

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """y, and the function from dy to dx and the parameters' gradients."""
        xp = namespace(x)
        y = _correlate(xp, x, self.weight)

        def pullback(dy: Array) -> tuple[Array, dict[str, Array]]:
            height, width = self.weight.shape[2:]
            turned = xp.permute_dims(xp.flip(self.weight, axis=(2, 3)), (1, 0, 2, 3))
            dx = _correlate(xp, _padded(xp, dy, height - 1, width - 1), turned)
            weight = _correlate(xp, xp.permute_dims(x, (1, 0, 2, 3)), xp.permute_dims(dy, (1, 0, 2, 3)))
            gradients = {"weight": xp.permute_dims(weight, (1, 0, 2, 3))}
            if self.bias is not None:
                gradients["bias"] = xp.sum(dy, axis=(0, 2, 3))
            return dx, gradients

        return (y if self.bias is None else y + xp.reshape(self.bias, (-1, 1, 1))), pullback


class Activation:
    """One of "relu", "sigmoid" and "tanh", number by number."""

    def __init__(self, kind: str) -> None:
        if kind not in ("relu", "sigmoid", "tanh"):
            raise ValueError(f"kind must be 'relu', 'sigmoid' or 'tanh'; received {kind!r}.")
        self.kind = kind

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """y, and the function from dy to dx."""
        xp = namespace(x)
        if self.kind == "relu":
            y = xp.where(x > 0, x, xp.zeros_like(x))
            return y, lambda dy: (xp.where(x > 0, dy, xp.zeros_like(dy)), {})
        if self.kind == "tanh":
            y = xp.tanh(x)
            return y, lambda dy: (dy * (1 - y * y), {})
        y = (xp.tanh(x * 0.5) + 1) * 0.5
        return y, lambda dy: (dy * y * (1 - y), {})


class Flatten:
    """All axes but the first as one."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """y, and the function from dy to dx."""
        xp = namespace(x)
        return xp.reshape(x, (x.shape[0], -1)), lambda dy: (xp.reshape(dy, x.shape), {})


def cross_entropy(outputs: Array, labels: Array) -> tuple[float, Array]:
    """The mean over samples of ``log(sum(exp(outputs))) - outputs[label]``, in nats, and its gradient.

    Outputs are (samples, classes), labels integers of shape (samples,).

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> loss, gradient = diagnostics.cross_entropy(np.asarray([[0.0, 0.0]]), np.asarray([1]))
    >>> round(float(loss), 3), gradient
    (0.693, array([[ 0.5, -0.5]]))
    """
    xp = namespace(outputs)
    raised = xp.exp(outputs - xp.max(outputs, axis=1, keepdims=True))
    total = xp.sum(raised, axis=1, keepdims=True)
    hit = xp.astype(labels[:, None] == xp.arange(outputs.shape[1])[None, :], outputs.dtype)
    log = outputs - xp.max(outputs, axis=1, keepdims=True) - xp.log(total)
    return -float(xp.sum(hit * log)) / outputs.shape[0], (raised / total - hit) / outputs.shape[0]


def mean_squared_error(outputs: Array, targets: Array) -> tuple[float, Array]:
    """``mean((outputs - targets)**2)``, and its gradient.

    Examples
    --------
    >>> import numpy as np
    >>> from normkit import diagnostics
    >>> diagnostics.mean_squared_error(np.asarray([1.0, 3.0]), np.asarray([1.0, 1.0]))
    (2.0, array([0., 2.]))
    """
    xp = namespace(outputs)
    apart, count = outputs - targets, 1
    for length in outputs.shape:
        count *= length
    return float(xp.sum(apart * apart)) / count, apart * (2 / count)


class Chain:
    """Layers one after the other, as a pure function of their parameters: each call works on copies of them.

    A layer is anything with ``vjp(x) -> y, pullback`` and ``pullback(dy) -> dx, {name: gradient}`` whose parameters are
    its attributes ``weight`` and ``bias``: those of normkit and of this module.
    """

    def __init__(self, layers: Sequence[Any] | Mapping[str, Any]) -> None:
        named = layers.items() if isinstance(layers, Mapping) else ((str(i), v) for i, v in enumerate(layers))
        self.layers = dict(named)
        for name, layer in self.layers.items():
            if not callable(getattr(layer, "vjp", None)):
                raise TypeError(f"Layers of a chain have a method vjp; layer {name} is {describe(layer)}.")
        if not self.parameters():
            raise ValueError("objective found no parameters in the chain: none of its layers has a weight or bias.")

    def parameters(self) -> dict[str, Array]:
        """The arrays that the layers hold, by ``layer.name``; copies."""
        found = {}
        for name, layer in self.layers.items():
            for kind in _PARAMETERS:
                if getattr(layer, kind, None) is not None:
                    a = getattr(layer, kind)
                    found[f"{name}.{kind}"] = namespace(a).astype(a, a.dtype, copy=True)
        return found

    def value_and_grad(self, loss: Callable, x: Array, y: Any, training: bool | None) -> Callable:
        """The function from parameters to the loss and its gradients."""

        def run(params: dict[str, Array]) -> tuple[float, dict[str, Array]]:
            gradients: dict[str, Array] = {}
            out, pullbacks = x, []
            for name, layer in self.layers.items():
                layer = copy.copy(layer)
                for kind in _PARAMETERS:
                    if f"{name}.{kind}" in params:
                        setattr(layer, kind, params[f"{name}.{kind}"])
                if training is not None and hasattr(layer, "training"):
                    layer.training = training
                out, pullback = layer.vjp(out)
                pullbacks.append((name, pullback))
            got = loss(out, y)
            if not isinstance(got, tuple) or len(got) != 2:
                raise TypeError(
                    "loss of a chain must return (its value, its gradient with respect to the outputs); it returned "
                    f"{describe(got)}."
                )
            value, dy = got
            for name, pullback in reversed(pullbacks):
                dy, found = pullback(dy)
                gradients.update({f"{name}.{kind}": gradient for kind, gradient in found.items()})
            return value, {name: gradients[name] for name in params}

        return run


def _padded(xp: Any, x: Array, height: int, width: int) -> Array:
    """Zeros around the last two axes."""
    for axis, n in ((2, height), (3, width)):
        if n:
            shape = (*x.shape[:axis], n, *x.shape[axis + 1 :])
            zeros = xp.zeros(shape, dtype=x.dtype, device=x.device)
            x = xp.concat([zeros, x, zeros], axis=axis)
    return x


def _correlate(xp: Any, x: Array, weight: Array) -> Array:
    """``y[n, o, i, j] = Σ x[n, c, i + k, j + l] weight[o, c, k, l]``: a product of matrices for each tap."""
    height, width = weight.shape[2:]
    rows, columns = x.shape[2] - height + 1, x.shape[3] - width + 1
    last = xp.permute_dims(x, (0, 2, 3, 1))
    taps = (
        xp.matmul(last[:, k : k + rows, m : m + columns, :], weight[:, :, k, m].T)
        for k in range(height)
        for m in range(width)
    )
    y = next(taps)
    for tap in taps:
        y = y + tap
    return xp.permute_dims(y, (0, 3, 1, 2))
