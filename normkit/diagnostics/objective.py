"""The one thing that diagnostics ask of a model: its loss and gradients on a fixed batch, as a pure function."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from normkit import _validate as check
from normkit._batches import Call, bar, call_with
from normkit._dispatch import backend_of, describe
from normkit.backends.models import Differentiates, models_of

from . import _vectors as vectors
from .chain import Chain

Array = Any
Params = Mapping[str, Array]


class Objective(Protocol):
    """A loss and its gradients, of parameters by name, on one fixed batch.

    Pure: the same parameters give the same numbers, and nothing else is changed. ``jax.value_and_grad(f)`` is one, of a
    loss that takes a dict of arrays; :func:`objective` makes one of a model.
    """

    def __call__(self, params: Params, /) -> tuple[Any, Params]:
        """The loss, a number or an array of one, and a gradient for each parameter under its name."""


class ModelObjective:
    """What :func:`objective` makes: an :class:`Objective` that knows the model's parameters."""

    def __init__(self, name: str, read: Callable[[], dict[str, Array]], value_and_grad: Callable) -> None:
        self._name, self._read, self._value_and_grad = name, read, value_and_grad

    @property
    def params(self) -> dict[str, Array]:
        """Copies of the model's parameters as they are now, by name, in the order of the model."""
        return self._read()

    def __call__(self, params: Params, /) -> tuple[float, dict[str, Array]]:
        """The loss and its gradients with these parameters in the place of the model's."""
        own = self._read()
        _same_keys(f"params of this {self._name}", params, own)
        for name, a in params.items():
            alike(f"params[{name!r}]", a, own[name], "the model's")
        loss, gradients = self._value_and_grad(dict(params))
        return float(loss), {name: gradients[name] for name in params}

    def __repr__(self) -> str:
        own = self.params
        count = sum(math.prod(a.shape) for a in own.values())
        return f"objective of {self._name}: {len(own)} parameters, {count} numbers"


def objective(
    model: Any,
    loss: Callable[[Any, Any], Any],
    x: Any,
    y: Any = None,
    *,
    training: bool | None = True,
    seed: int = 0,
    call: Call | None = None,
) -> ModelObjective:
    """A model on one batch as a pure function of its parameters.

    Parameters
    ----------
    model : a torch.nn.Module, a keras.Layer, a flax.nnx.Module; or a list (or dict by name) of normkit's layers and
        those of :mod:`normkit.diagnostics.chain`, for libraries without gradients of their own
    loss : ``loss(model(x), y)``, one number in the model's framework; for a list of layers, that number and its
        gradient with respect to the first argument
    x : what the model is called with: a mapping is passed by name, of a tuple or list the first element
    y : what the loss gets beside the outputs
    training : put every module in its training mode, so that batch norms normalize by the batch; False: in inference
        mode; None: leave each as it is (in Keras, where layers have none: inference)
    seed : what dropout draws from in torch, the same in every call; elsewhere it is the model's own generators, which
        stay where they are
    call : ``call(model, x)``, for a model that is called in another way

    Returns
    -------
    ModelObjective
        ``objective(params) -> loss, gradients``; ``objective.params`` are the model's own now. The model's parameters,
        running statistics, modes and generators are untouched by it, also where the model raises.

    Raises
    ------
    TypeError
        model is nothing of that, or loss cannot be called.
    ValueError
        The model is not built, compiled, scripted, exported or quantized, or has no parameters.

    Notes
    -----
    =========  ============================  ================================  =================================
    here       torch                         Keras                             Flax (nnx)
    =========  ============================  ================================  =================================
    pure       torch.func.functional_call    stateless_call                    nnx.split, nnx.merge
    params     named_parameters that         trainable_variables, by path      nnx.Param, by path
               require gradients
    training   Module.training               training=                         deterministic,
                                                                               use_running_average
    =========  ============================  ================================  =================================

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> from normkit import diagnostics
    >>> model = {"dense": diagnostics.Dense(np.eye(2), None), "norm": nk.BatchNorm(2, dtype="float64")}
    >>> x, y = np.asarray([[1.0, 2.0], [3.0, 8.0]]), np.asarray([0, 1])
    >>> objective = diagnostics.objective(model, diagnostics.cross_entropy, x, y)
    >>> loss, gradients = objective(objective.params)
    >>> round(float(loss), 3), list(gradients)
    (0.693, ['dense.weight', 'norm.weight', 'norm.bias'])
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function of the model's outputs and y; received {describe(loss)}.")
    called = call or call_with
    if isinstance(model, (list, tuple, Mapping)):
        chain = Chain(model)
        return ModelObjective("chain", chain.parameters, chain.value_and_grad(loss, x, y, training))
    framework = models_of(model)
    if not isinstance(framework, Differentiates):
        raise TypeError(
            "objective takes a torch.nn.Module, a keras.Layer, a flax.nnx.Module or a list of layers; received "
            f"{describe(model)}."
        )
    framework.refuse(model, "objective")
    name = type(model).__name__
    if not framework.parameters(model):
        raise ValueError(f"objective found no parameters in this {name}: build it, or let some require gradients.")
    run = framework.value_and_grad(
        model, lambda outputs: _one_number(loss(outputs, y)), lambda m: called(m, x), training, seed
    )
    return ModelObjective(name, lambda: framework.parameters(model), run)


def _one_number(loss: Any) -> Any:
    """What the user's loss returned, which can be differentiated."""
    shape = getattr(loss, "shape", None)
    if shape is None or math.prod(shape) != 1:
        what = describe(loss) if shape is None else f"an array of the shape {tuple(shape)}"
        raise ValueError(f"loss must return one number, as an array of the model's framework; it returned {what}.")
    return loss


def layers_of(params: Iterable[str]) -> list[list[str]]:
    """Names of parameters, grouped by what stands before the last ``.`` or ``/``, in the order in which they come.

    Examples
    --------
    >>> from normkit import diagnostics
    >>> diagnostics.layers_of(["0.weight", "0.bias", "1.weight"])
    [['0.weight', '0.bias'], ['1.weight']]
    """
    groups: dict[str, list[str]] = {}
    for name in params:
        groups.setdefault(layer_name(name), []).append(name)
    return list(groups.values())


def layer_name(name: str) -> str:
    """What stands before the last ``.`` or ``/`` of a parameter's name, or all of it."""
    return re.sub(r"[./][^./]*$", "", name)


class Evaluations:
    """An objective that is held to what it must be, around some parameters.

    Made, it is called twice: what it gives has to be the same, finite, and complete.
    """

    def __init__(self, function: str, objective: Objective, params: Params) -> None:
        if not callable(objective):
            raise TypeError(
                f"{function} takes a function from parameters to (loss, gradients); received {describe(objective)}."
            )
        if not isinstance(params, Mapping) or not params:
            raise TypeError(f"{function} takes params as a dict from names to arrays; received {describe(params)}.")
        for name, a in params.items():
            if not vectors.floating(name, a):
                dtype = backend_of(name, a).dtype(a)
                raise TypeError(f"{function} takes floating-point parameters; {name} is {dtype}.")
        self.function, self.objective, self.params = function, objective, params
        start = time.perf_counter()
        self.loss, self.gradient = self(params)
        self.norm = vectors.norm(self.gradient)
        again, gradient = self(params)
        self.seconds = (time.perf_counter() - start) / 2
        # What a device adds in another order differs in the last digits.
        apart = vectors.norm(vectors.moved(self.gradient, -1.0, gradient))
        if abs(again - self.loss) > 1e-5 * abs(self.loss) or apart > 1e-3 * self.norm:
            raise ValueError(
                f"{function} needs a pure objective: two calls with the same parameters gave the losses "
                f"{self.loss:.9g} and {again:.9g} and gradients {apart:.3g} apart; fix the batch and seed what is "
                "random."
            )

    def __call__(self, params: Params, where: str = "") -> tuple[float, Params]:
        """The loss and gradients, which are finite."""
        loss, gradients = self.beyond(params)
        if not math.isfinite(loss):
            raise ValueError(f"{self.function} needs a finite loss; the objective returned {loss}{where}.")
        if not math.isfinite(vectors.norm(gradients)):
            raise ValueError(f"{self.function} needs finite gradients; the objective returned others{where}.")
        return loss, gradients

    def beyond(self, params: Params) -> tuple[float, Params]:
        """The loss and gradients, finite or not."""
        got = self.objective(params)
        if not isinstance(got, (tuple, list)) or len(got) != 2 or not isinstance(got[1], Mapping):
            raise TypeError(
                f"{self.function} takes an objective that returns (loss, gradients by name); it returned "
                f"{describe(got)}."
            )
        _same_keys("gradients of the objective", got[1], self.params)
        for name, a in got[1].items():
            if tuple(a.shape) != tuple(self.params[name].shape):
                raise ValueError(
                    f"{self.function} takes gradients of the parameters' shapes; that of {name} has "
                    f"{tuple(a.shape)} in place of {tuple(self.params[name].shape)}."
                )
        return float(got[0]), got[1]

    def needs_gradient(self, what: str) -> None:
        """Refuse a zero gradient."""
        if not self.norm:
            raise ValueError(f"{self.function} divides by the gradient's norm, and the gradient is zero: {what}.")

    @contextlib.contextmanager
    def steps(self, count: int, progress: bool | None) -> Iterator[Callable[[], None]]:
        """Progress over so many evaluations, shown unasked where they take more than a second."""
        shown = progress if progress is not None or count * self.seconds > 1 else False
        with bar(self.function, shown) as start:
            yield start(count)


def known(function: str, names: Sequence[str], params: Params) -> None:
    """Refuse names of parameters that do not exist."""
    for name in names:
        if name not in params:
            raise ValueError(f"{function} knows no parameter {name!r}; there are: {_some(params)}.")


def alike(name: str, a: Any, other: Any, of: str) -> None:
    """Refuse what cannot take the place of another array."""
    backend = backend_of(of, other)
    check.companion(backend, other, name, a, tuple(backend.shape(other)), of)


def _same_keys(what: str, received: Params, expected: Params) -> None:
    missing, extra = [k for k in expected if k not in received], [k for k in received if k not in expected]
    if missing or extra:
        said = [f"{_some(keys)} {word}" for keys, word in ((missing, "missing"), (extra, "unknown")) if keys]
        raise ValueError(f"{what} have other names than the parameters: {' and '.join(said)}.")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def steps_of(function: str, name: str, values: Any) -> Any:
    """Finite numbers along one axis, at least one."""
    import numpy as np

    try:
        steps = np.atleast_1d(np.asarray(values, "f8"))
    except (TypeError, ValueError):
        raise TypeError(f"{name} of {function} must be numbers; received {describe(values)}.") from None
    if steps.ndim != 1 or not steps.size or not np.isfinite(steps).all():
        raise ValueError(f"{name} of {function} must be finite numbers along one axis; received {values!r}.")
    return steps


__all__ = ["Evaluations", "ModelObjective", "Objective", "alike", "layer_name", "layers_of", "objective"]
