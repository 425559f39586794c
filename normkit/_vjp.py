"""The gradients of the functions, also where no framework takes them: each is entered by the module that has it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import _validate as check
from ._calls import Call

Array = Any

#: What :func:`vjp` takes, and what checks and plans it.
BINDERS: dict[Callable, Callable[..., Call]] = {}

#: The same for functions of more than one plan: each with its own vjp.
COMPOSED: dict[Callable, Callable[..., tuple[Any, Callable]]] = {}


def vjp(fn: Callable, *args: Any, **kwargs: Any) -> tuple[Any, Callable[[Array], tuple[Array, ...]]]:
    """The value of one of these functions, and the function that takes gradients back through it.

    For libraries without automatic differentiation (NumPy, CuPy, any array API library); it serves the others too.

    Parameters
    ----------
    fn : one of normkit's functions of x: ``layer_norm``, ``batch_norm_train``, ``lp_layer_norm`` and so on, or a
        ``functools.partial`` of one
    *args, **kwargs : its arguments

    Returns
    -------
    y : what ``fn(*args, **kwargs)`` returns
    pullback : ``pullback(dy)``, with dy of y's shape, floating-point, returns a tuple with one gradient for each array
        argument that was given, in the order of fn's signature (a mask has none)

    Raises
    ------
    TypeError
        fn is another function.
    ValueError
        dy has another shape than y.

    Examples
    --------
    >>> import numpy as np
    >>> import normkit as nk
    >>> x = np.asarray([[1, 2, 4]], dtype=np.float64)
    >>> y, pullback = nk.vjp(nk.layer_norm, x, np.ones(3))
    >>> dx, dweight = pullback(np.asarray([[1.0, 2.0, 3.0]]))
    >>> dx.round(3), dweight.round(3)
    (array([[-0.115,  0.172, -0.057]]), array([-1.069, -0.535,  4.009]))
    """
    if isinstance(fn, functools.partial):
        return vjp(fn.func, *fn.args, *args, **{**fn.keywords, **kwargs})
    known = callable(fn)  # what is not need not have a hash
    if known and fn in COMPOSED:
        return COMPOSED[fn](*args, **kwargs)
    binder = BINDERS.get(fn) if known else None
    if binder is None:
        names = ", ".join(f.__name__ for f in (*BINDERS, *COMPOSED) if f.__name__ != "renormalized")
        raise TypeError(f"fn must be one of {names}; received {fn!r}.")
    backend, plan, operands = binder(*args, **kwargs)
    y, stats, gradients = backend.vjp(plan, operands)
    order = ("x", "mean", "var", "weight", "bias")
    given = tuple(name for name in order if getattr(operands, name) is not None)

    def pullback(dy: Array) -> tuple[Array, ...]:
        check.companion(backend, operands.x, "dy", dy, tuple(backend.shape(operands.x)))
        found = gradients(dy)
        return tuple(getattr(found, name) for name in given)

    return (y if stats is None else (y, stats)), pullback
