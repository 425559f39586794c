"""The batch norms of a flax.linen module, found among its variables and met when it is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from flax import linen

from normkit.backends.jax.functions import Average, Function, FunctionRecalibrates, described

_STATS = "batch_stats"


class _Applied(Function):
    """A module with its variables."""

    def __init__(self, module: linen.Module, variables: Mapping) -> None:
        found = _averages(variables.get(_STATS, {}))
        super().__init__(type(module).__name__, {"/".join(path): average for path, average in found})
        self.module, self.variables = module, variables

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module, in inference whatever it is asked."""
        with linen.intercept_methods(self._between):
            return self.module.apply(self.variables, *args, mutable=[_STATS], **kwargs)[0]

    def _between(self, own: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return own(*args, **kwargs)
        if isinstance(module, linen.Dropout):
            return next(iter((*args, *kwargs.values())))
        name = "/".join(module.path)
        average = self.averages.get(name)
        if average is None or not isinstance(module, linen.BatchNorm):
            if isinstance(module, linen.BatchNorm):
                raise ValueError(f"The variables have no running statistics of {name or 'the module'}.")
            if average is not None:
                average.kind, average.reason = type(module), "normkit does not know this class"
            return own(*args, **kwargs)
        average.kind = type(module)
        if type(module).__call__ is not linen.BatchNorm.__call__:
            average.reason = "it is a subclass with a __call__ of its own"
            return own(*args, **kwargs)
        x: Any = args[0] if args else kwargs["x"]
        axis = (module.axis,) if isinstance(module.axis, int) else module.axis
        average.called(x, tuple(sorted(a % x.ndim for a in axis)), module.epsilon, kwargs.get("mask"))
        for key, value in zip(("mean", "var"), average.stored(), strict=True):
            module.put_variable(_STATS, key, value)
        asked = module.use_running_average
        # It may be said by the module or in the call, and not by both.
        object.__setattr__(module, "use_running_average", None)
        try:
            return own(x, use_running_average=True)
        finally:
            object.__setattr__(module, "use_running_average", asked)


class LinenModels(FunctionRecalibrates):
    """``(module, variables)`` of flax.linen, for :func:`normkit.recalibrate`."""

    def opened(self, model: Any) -> _Applied:
        """Both, which are there."""
        if len(model) != 2 or not isinstance(model[1], Mapping):
            raise TypeError(f"A model of linen comes as (module, variables); received {described(model)}.")
        return _Applied(*model)

    def state(self, model: _Applied) -> dict:
        """The variables, with new statistics."""
        new = {path: average.stored() for path, average in model.averages.items()}
        return {**model.variables, _STATS: _with(model.variables[_STATS], new)}


def _averages(stats: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Average]]:
    """Where there is a mean with a variance of its shape."""
    if not isinstance(stats, Mapping):
        return
    mean, var = (cast(Any, stats.get(key)) for key in ("mean", "var"))
    if hasattr(mean, "shape") and hasattr(var, "shape") and mean.shape == var.shape:
        yield path, Average(linen.BatchNorm, mean, var)
    for key, value in stats.items():
        yield from _averages(value, (*path, key))


def _with(stats: Any, new: Mapping[str, tuple[Any, Any]], path: tuple[str, ...] = ()) -> Any:
    """The statistics, with new ones at the paths."""
    if not isinstance(stats, Mapping):
        return stats
    own = dict(zip(("mean", "var"), new.get("/".join(path), ()), strict=False))
    return {key: own.get(key, _with(value, new, (*path, key))) for key, value in stats.items()}
