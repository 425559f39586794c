"""How far normkit and native layers are from the definitions and from each other: for `normkit check` and the tests."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

import normkit as nk
from normkit.backends import kernels
from normkit.conformance import inputs, natives, oracle
from normkit.conformance.cases import SITES, Case
from normkit.conformance.inputs import Input
from normkit.conformance.libraries import Library, first
from normkit.conformance.libraries import library as library_named
from normkit.conformance.tolerances import Tolerance, judged, tolerance, units

Array = Any
QUANTITIES = ("forward", "gradient", "running")
STEPS = 10
MOMENTUM = 0.9


@dataclass(frozen=True)
class Measurement:
    """Errors in units of the dtype (see :func:`tolerances.units`); ``nan`` where there is nothing to measure."""

    library: str
    layer: str
    dtype: str
    quantity: str
    input: str
    layout: str
    native: str
    error: float
    native_error: float
    distance: float
    tolerance: Tolerance
    #: Why there are no native figures.
    reason: str = ""
    #: What served normkit: "kernel", "plain" or "mixed" (see :meth:`kernels.Served.path`).
    path: str = ""

    @property
    def passed(self) -> bool:
        """Whether normkit is within the tolerance."""
        return self.error <= self.tolerance.units


def arrays(
    library: Library, case: Case, values: dict[str, np.ndarray], dtype: str, params: str = ""
) -> dict[str, Array]:
    """The numbers of a case as a library's arrays: x and dy in the case's layout, statistics as wide as they get."""

    def made(name: str, value: np.ndarray) -> Array:
        if name == "mask":
            return library.array(value, "bool")
        if name in ("mean", "var"):
            return library.array(value, inputs.stats_dtype(dtype))
        laid = name in ("x", "dy")
        return library.array(value, dtype if laid else params or dtype, case.layout if laid else "contiguous")

    return {name: made(name, value) for name, value in values.items()}


def call(case: Case, module: ModuleType, given: dict[str, Array]) -> Any:
    """``module``'s function for the case's layer, on these arrays."""
    return case.call(_function(case, module), given)


def gradients(
    library: Library, case: Case, module: ModuleType, given: dict[str, Array]
) -> tuple[Any, dict[str, Array]]:
    """What the function returns, and the gradients by name, taken in the library's own way."""
    args, options = case.arguments(given)
    out, found = library.vjp(_function(case, module), args, options, given["dy"])
    positions = {i: name for name in case.names for i, a in enumerate(args) if a is given[name]}
    return out, {positions[i]: gradient for i, gradient in found.items()}


def _function(case: Case, module: ModuleType) -> Callable:
    function = getattr(module, case.layer)
    if case.masked and "mask" not in inspect.signature(function).parameters:
        raise natives.Unsupported(f"{module.NAME} has no mask in {case.layer}")
    return function


def gradient_error(
    reference: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    found: dict[str, np.ndarray],
    dtype: str,
    params: str = "",
) -> tuple[float, str]:
    """The largest error of gradients by name, and whose it is; the reference is the oracle's, with scales."""
    values, scales = reference

    def error(name: str) -> float:
        kind, share = _unit(name, dtype, params)
        return share * units(found[name], values[name], kind, scales[name])

    return max(((error(name), name) for name in found), default=(0.0, ""))


def _unit(name: str, dtype: str, params: str = "") -> tuple[str, float]:
    """The dtype of a gradient, and what one of its units is worth in a case of ``dtype``.

    A gradient of another dtype than x (of statistics, of wide parameters) is held to its own tolerance.
    """
    stats = inputs.stats_dtype(dtype)
    kind = {"x": dtype, "mean": stats, "var": stats}.get(name, params or dtype)
    return kind, tolerance("gradient", dtype).units / tolerance("gradient", kind).units


def forward(
    library: Library, case: Case, x: Input | np.ndarray, dtype: str, name: str = "", natives_too: bool = True
) -> list[Measurement]:
    """y of normkit and of each native layer."""
    values = inputs.operands(case, x, dtype)
    given = arrays(library, case, values, dtype)
    reference = oracle.forward(case.layer, values, case.options)
    before = kernels.served()
    own = library.numpy(first(call(case, nk, given)))
    path = kernels.served().since(before).path(forward=1)

    def figures(module: ModuleType) -> tuple[float, float]:
        y = library.numpy(first(call(case, module, given)))
        return units(y, reference, dtype), apart(y, own, reference, dtype)

    error = units(own, reference, dtype)
    return _rows(library, case, "forward", name or str(x), dtype, error, path, figures if natives_too else None)


def gradient(
    library: Library, case: Case, x: Input | np.ndarray, dtype: str, name: str = "", natives_too: bool = True
) -> list[Measurement]:
    """Gradients of normkit and of each native layer: the worst of x's and the parameters'."""
    values = inputs.operands(case, x, dtype)
    given = arrays(library, case, values, dtype)
    reference = oracle.vjp_and_scales(case.layer, values, values["dy"], case.options)

    def taken(module: ModuleType) -> dict[str, np.ndarray]:
        return {k: library.numpy(g) for k, g in gradients(library, case, module, given)[1].items()}

    before = kernels.served()
    own = taken(nk)
    path = kernels.served().since(before).path(forward=1, backward=1)

    def figures(module: ModuleType) -> tuple[float, float]:
        found = taken(module)
        return gradient_error(reference, found, dtype)[0], max(from_own(k, g) for k, g in found.items())

    def from_own(name: str, theirs: np.ndarray) -> float:
        kind, share = _unit(name, dtype)
        return share * apart(theirs, own[name], own[name], kind, reference[1][name])

    error = gradient_error(reference, own, dtype)[0]
    return _rows(library, case, "gradient", name or str(x), dtype, error, path, figures if natives_too else None)


def running(library: Library, case: Case, x: Input, dtype: str) -> list[Measurement]:
    """Running statistics after ten batches, in each native convention: the worse of mean and variance.

    The mean is compared with the largest |x|: near zero it has the roundings of what it is the mean of.
    """
    kind = inputs.stats_dtype(dtype)
    axis = case.options.get("axis", 1)
    values = [inputs.operands(dataclasses.replace(case, id=f"{case.id} {k}"), x, dtype)["x"] for k in range(STEPS)]
    steps = [library.array(v, dtype, case.layout) for v in values]
    channels, largest = case.param_shape, np.abs(values).max()

    def reference(unbiased: bool) -> tuple[np.ndarray, np.ndarray]:
        start = np.zeros(channels), np.ones(channels)
        return oracle.running_statistics(values, *start, axis=axis, momentum=MOMENTUM, unbiased=unbiased)[:2]

    def own(unbiased: bool) -> list[np.ndarray]:
        stats = nk.RunningStats(library.array(np.zeros(channels), kind), library.array(np.ones(channels), kind))
        for step in steps:
            stats = stats.update(nk.batch_norm_train(step, axis=axis)[1], momentum=MOMENTUM, unbiased=unbiased)
        return [library.numpy(stats.mean), library.numpy(stats.var)]

    def error(pair, unbiased: bool) -> float:
        (mean, var), (right_mean, right_var) = pair, reference(unbiased)
        return max(units(mean, right_mean, kind, largest), units(var, right_var, kind))

    def figures(module: ModuleType) -> tuple[float, float]:
        unbiased = module.CONVENTION.unbiased
        pair = [library.numpy(a) for a in module.running_statistics(steps, kind, axis=axis, momentum=MOMENTUM)]
        mine, right = own(unbiased), reference(unbiased)
        scales = largest, None
        far = [apart(a, b, r, kind, s) for a, b, r, s in zip(pair, mine, right, scales, strict=True)]
        return error(pair, unbiased), max(far)

    before = kernels.served()
    worst = max(error(own(unbiased), unbiased) for unbiased in (True, False))
    path = kernels.served().since(before).path(forward=2 * STEPS)
    return _rows(library, case, "running", str(x), dtype, worst, path, figures)


def sites(library: Library, layouts: Iterable[str] = ("contiguous", "channels_last")) -> Iterator[Case]:
    """The cases that inputs are tried at: every layer with and without parameters, in each of the library's layouts."""
    for case in SITES[library.channel_axis].values():
        for layout in layouts:
            if layout in library.layouts and (layout == "contiguous" or len(case.shape) == 4):
                # A bias hides what small inputs lose; RMS norm has none in the native layers.
                with_params = "weight" if case.layer == "rms_norm" else "both"
                for affine in (with_params, "none"):
                    yield dataclasses.replace(case, layout=layout, affine=affine)


def sweep(name: str, dtypes: Iterable[str] = ("float32",), *, quick: bool = False) -> Iterator[Measurement]:
    """Everything `normkit check` looks at in one library, one measurement after another."""
    library = library_named(name)
    with library.session():
        for dtype in dtypes:
            if dtype not in library.dtypes or not judged(dtype):
                continue
            for case in sites(library, library.layouts[:1] if quick else library.layouts):
                for x in _chosen(quick):
                    yield from _at(library, case, x, dtype)
            if not quick:
                for label, case, values in inputs.real_cases(library.channel_axis):
                    yield from forward(library, case, values, dtype, label)
                    yield from gradient(library, case, values, dtype, label)


def worst(measurements: Iterable[Measurement]) -> list[Measurement]:
    """The measurement with the largest error of each library, layer, dtype, quantity and native.

    ``native_error`` and ``distance`` are those of the input on which the native layer is furthest from float64.
    """
    rows: dict[tuple, list[Measurement]] = {}
    for m in measurements:
        rows.setdefault((m.library, m.layer, m.dtype, m.quantity, m.native), []).append(m)

    def merged(group: list[Measurement]) -> Measurement:
        top = max(group, key=lambda m: m.error)
        compared = [m for m in group if not np.isnan(m.native_error)]
        if not compared:
            return top
        off = max(compared, key=lambda m: m.native_error)
        return dataclasses.replace(top, native_error=off.native_error, distance=off.distance, reason="")

    return [merged(group) for group in rows.values()]


def _chosen(quick: bool) -> list[Input]:
    names = ("normal", "offset 1e4", "offset 1e6", "scale 1e-18", "scale 1e25", "constant", "tabular columns")
    return [x for x in inputs.INPUTS if x.finite and (not quick or x.name in names)]


def _at(library: Library, case: Case, x: Input, dtype: str) -> Iterator[Measurement]:
    if not inputs.holds(dtype, inputs.operands(case, x, dtype)):
        return
    yield from forward(library, case, x, dtype)
    yield from gradient(library, case, x, dtype)
    if case.layer == "batch_norm_train" and case.affine == "none" and _storable(case, x, dtype):
        yield from running(library, case, x, dtype)


def _storable(case: Case, x: Input, dtype: str) -> bool:
    """Whether the statistics' dtype holds the variance."""
    return inputs.holds(dtype, inputs.operands(dataclasses.replace(case, layer="batch_norm"), x, dtype))


def apart(a: np.ndarray, b: np.ndarray, reference: np.ndarray, dtype: str, scale: np.ndarray | None = None) -> float:
    """How far a and b are from each other, in units of the reference's size; infinite where only one is finite."""
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    scale = np.abs(reference[np.isfinite(reference)]).max(initial=0) if scale is None else scale
    return units(a, np.where(np.isfinite(b), b, a), dtype, scale)


def _rows(
    library: Library,
    case: Case,
    quantity: str,
    input_name: str,
    dtype: str,
    error: float,
    path: str,
    figures: Callable[[ModuleType], tuple[float, float]] | None,
) -> list[Measurement]:
    kind = inputs.stats_dtype(dtype) if quantity == "running" else dtype
    limit = tolerance(quantity, kind, "" if path == "kernel" else library.name, input_name)

    def row(native: str, native_error: float, distance: float, reason: str = "") -> Measurement:
        place = (library.name, case.layer, dtype, quantity, input_name, case.layout)
        return Measurement(*place, native, error, native_error, distance, limit, reason, path)

    if figures is None:
        return [row("", np.nan, np.nan, "not asked for")]
    rows = []
    for module in natives.of(library.name):
        try:
            with natives.quiet():
                rows.append(row(module.NAME, *figures(module)))
        except natives.Unsupported as unsupported:
            rows.append(row(module.NAME, np.nan, np.nan, str(unsupported)))
    return rows or [row("", np.nan, np.nan, "the library has no layers of its own")]
