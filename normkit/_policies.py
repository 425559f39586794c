"""What batch norms do with single values, empty batches and statistics that are not finite; what of them follows what.

The layers of every library share it: arguments of the same names, which can be set later too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from . import _validate as check
from . import _values as values
from . import functional
from ._dispatch import backend_of
from ._layer import TrainsAffine
from .backends import Backend
from .core import running
from .core.moments import is_number
from .core.normalize import BatchStats
from .core.plan import product

Array = Any


class Policies(NamedTuple):
    """The settings of one layer. What is None follows the layer's mode; ``single_value=None`` counts like any other."""

    single_value: str | None = "raise"
    empty_batch: str = "keep"
    nonfinite: str = "propagate"
    use_batch_stats: bool | None = None
    update_stats: bool | None = None

    def modes(self, training: bool) -> tuple[bool, bool]:
        """Whether the batch's statistics are used, and whether the running ones are updated."""
        used = training if self.use_batch_stats is None else self.use_batch_stats
        return used, (training and used) if self.update_stats is None else self.update_stats


#: Nothing was set.
USUAL = Policies()

CHOICES = {
    "single_value": ("raise", "running", "zero"),
    "empty_batch": ("keep", "raise"),
    "nonfinite": ("propagate", "skip", "raise"),
    "use_batch_stats": (None, True, False),
    "update_stats": (None, True, False),
}

#: What a layer can be told, and what it is told where nothing is said.
SETTINGS: dict[str, Any] = {**USUAL._asdict(), "train_affine": True}


def setting(name: str) -> Any:
    """A property of :class:`Policed` classes, checked when it is set."""

    def get(self: Any) -> Any:
        return getattr(self._policies, name)

    def set_(self: Any, value: Any) -> None:
        self._set_policies(**{name: value})

    return property(get, set_)


class Policed(TrainsAffine):
    """A layer that has policies. It holds some of its own where they are not those of its class."""

    _policies = USUAL

    single_value = setting("single_value")
    empty_batch = setting("empty_batch")
    nonfinite = setting("nonfinite")
    use_batch_stats = setting("use_batch_stats")
    update_stats = setting("update_stats")

    def _set_policies(self, **settings: Any) -> None:
        usual = type(self)._policies
        policies = checked(self._policies._replace(**settings), usual)
        if policies == usual:
            # An equal one is the same, which is quicker to see.
            policies = usual
        if policies is not self._policies:
            self._policies = policies


def with_settings(original: Any, settings: dict[str, Any]) -> inspect.Signature:
    """The signature of a class's ``__init__``, with settings by name after its arguments."""
    theirs = inspect.signature(original.__init__)
    parameters = list(theirs.parameters.values())
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    ours = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in settings.items()]
    return theirs.replace(parameters=[*(p for p in parameters if p not in rest), *ours, *rest])


def policed(cls: Any) -> Any:
    """Give a class what :class:`Policed` has, where another base would make its objects unlike."""
    for name, value in (vars(TrainsAffine) | vars(Policed)).items():
        if not name.startswith("__") and name not in vars(cls):
            setattr(cls, name, value)
    return cls


def checked(policies: Policies, usual: Policies) -> Policies:
    """Policies that are choices, or a library's usual ones."""
    for name, value, default in zip(Policies._fields, policies, usual, strict=True):
        if value is not default:
            check.choice(name, value, CHOICES[name])
    return policies


def batch_norm(
    policies: Policies,
    training: bool,
    run: Callable,
    train: Callable,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    *,
    axis: int,
    eps: float,
    everywhere: bool = False,
    shared: bool = False,
    **valid: Array | None,
) -> tuple[Array, BatchStats | None, Any]:
    """Batch norm in a layer: y, the batch's statistics where they are to be merged, and the pullback.

    ``run`` calls the functions, and ``train`` is the one that normalizes by the batch: ``everywhere``, if a mask says
    no more than what statistics are taken over; ``shared``, if the batch is not x alone.
    """
    used, updated = policies.modes(training)
    policy = policies.single_value
    options = {"axis": axis, "eps": eps, **({} if everywhere else valid)}
    single: bool | None = False
    if used and (policy == "running" or (everywhere and policy is not None)):
        single = None if shared else _single(x, axis, **valid)
    if not used or (single and policy == "running"):
        y, pullback = run(functional.batch_norm, x, mean, var, weight, bias, **options)
        if used or not updated:
            return y, None, pullback
        x = backend_of("x", x).constant(x)
        return y, train(x, axis=axis, eps=eps, single_value="zero", **valid)[1], pullback
    refused = "raise" if policy == "raise" else "zero"
    (y, stats), pullback = run(train, x, weight, bias, axis=axis, eps=eps, single_value=refused, **valid)
    if single is not False and not is_number(stats.count):
        if policy != "running":
            xp = backend_of("x", x).namespace(x)
            x, mean, var = xp.zeros_like(x), xp.zeros_like(mean), xp.ones_like(var)
        y, pullback = _chosen(run, x, mean, var, weight, bias, stats.count, y, pullback, **options)
    return y, stats if updated else None, pullback


def merged(
    owner: str,
    backend: Backend,
    old: tuple,
    stats: BatchStats,
    momentum: float | None,
    unbiased: bool,
    policies: Policies,
) -> tuple[Array, Array, Array | int]:
    """Running mean, variance and number of batches with those of a batch, as ``owner``'s policies have it."""
    policy = policies.single_value
    fewest = 2 if unbiased or policy is not None else 1
    if type(stats.count) is not int or stats.count < fewest:
        if policies.empty_batch == "raise":
            values.elements(owner, backend, stats)
        if policy == "raise" or (policy is None and unbiased):
            values.several_counted(backend, stats, policy)
    if policies.nonfinite == "raise":
        values.finite(owner, backend, stats, fewest)
    (mean, var, seen), finite = old, policies.nonfinite == "skip"
    return running.update(
        backend.namespace(mean), mean, var, seen, stats, momentum, unbiased, fewest=fewest, finite=finite
    )


def _single(x: Array, axis: int, **valid: Array | None) -> bool | None:
    """Whether x has one value per channel; None where that is not known, or of each channel another matter."""
    shape = backend_of("x", x).shape(x)
    size = product(shape)
    if size == shape[axis]:
        return True
    return None if size is None or any(a is not None for a in valid.values()) else False


def _chosen(
    run: Callable,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    count: Array,
    y: Array,
    pullback: Callable | None,
    **options: Any,
) -> tuple[Array, Callable | None]:
    """Channels of one value, or none, by these statistics; y and the pullback of the others."""
    backend = backend_of("x", x)
    xp = backend.namespace(x)
    lone = count <= 1
    if backend.at_hand(lone) and not bool(xp.any(lone)):
        return y, pullback
    # Where they are not wanted they may be anything, and 0 times their gradient would not be 0.
    mean, var = xp.where(lone, mean, xp.zeros_like(mean)), xp.where(lone, var, xp.ones_like(var))
    other, back = run(functional.batch_norm, x, mean, var, weight, bias, **options)
    if len(lone.shape):
        lone = xp.reshape(lone, (-1, *(1 for _ in range(len(x.shape) - options["axis"] % len(x.shape) - 1))))

    def both(dy: Array) -> tuple[Array, ...]:
        none = xp.zeros_like(dy)
        assert pullback is not None
        ours, (dx, _, _, *rest) = pullback(xp.where(lone, none, dy)), back(xp.where(lone, dy, none))
        return tuple(a + b for a, b in zip(ours, (dx, *rest), strict=True))

    return xp.where(lone, other, y), None if pullback is None else both
