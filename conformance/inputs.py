"""Named inputs, synthetic and real, and the numbers of a case: float64 arrays of what a dtype holds exactly."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from normkit.conformance import oracle
from normkit.conformance.cases import AFFINE, Case

Array = np.ndarray
Make = Callable[[np.random.Generator, tuple[int, ...], tuple[int, ...]], Array]


@dataclass(frozen=True)
class Input:
    """Numbers for x: ``make(rng, view, over)``, where the elements of ``view`` along ``over`` share a statistic."""

    name: str
    make: Make
    ladder: str = ""
    finite: bool = True

    def __str__(self) -> str:
        return self.name


#: Raw tabular columns as they stand in files: (name, lowest, highest, step).
COLUMNS = (
    ("Unix time", 1.7e9, 1.7e9 + 86400, 1.0),
    ("UTM northing", 5.0e6 - 1e3, 5.0e6 + 1e3, 0.01),
    ("pressure", 101325.0 - 500, 101325.0 + 500, 0.1),
    ("year", 2015, 2024, 1.0),
    ("kelvin", 282.0, 298.0, 0.01),
    ("latitude", 47.55, 47.65, 1e-5),
)


def rounded(values: Array, dtype: str) -> Array:
    """``values`` rounded to ``dtype``, as float64."""
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            bits = np.asarray(values, np.float32).view(np.uint32)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            return np.where(np.isnan(values), np.nan, bits.view(np.float32).astype(np.float64))
        return np.asarray(values, dtype).astype(np.float64)


def operands(case: Case, x: Input | Array, dtype: str, *, params: str | None = None) -> dict[str, Array]:
    """The arrays of a case, with ``dy``, and ``mask`` where there is one; ``params``: the parameters' dtype if not x's.

    Statistics that are given are those of x itself, in float32 for narrower x.
    """
    rng = np.random.default_rng(zlib.crc32(f"{case.id} {x if isinstance(x, Input) else ''}".encode()))
    sets = case.sets
    if isinstance(x, Input):
        x = x.make(rng, sets.view, sets.over).reshape(case.shape)
    values = {"x": rounded(x, dtype)}
    params = params or dtype
    if "weight" in AFFINE[case.affine]:
        values["weight"] = rounded(rng.uniform(0.5, 1.5, case.param_shape), params)
    if "bias" in AFFINE[case.affine]:
        values["bias"] = rounded(rng.normal(size=case.param_shape), params)
    if case.layer == "batch_norm":
        wide = stats_dtype(dtype)
        stats = oracle.batch_statistics(values["x"], axis=case.options.get("axis", 1))
        values |= {"mean": rounded(stats.mean, wide), "var": rounded(stats.var + (stats.count < 2), wide)}
    if case.masked:
        values["mask"] = rng.random(case.shape) > 0.3
    values["dy"] = rounded(rng.normal(size=case.shape), dtype)
    return values


def stats_dtype(dtype: str) -> str:
    """The dtype of statistics for an x of ``dtype``."""
    return "float64" if dtype == "float64" else "float32"


def holds(dtype: str, values: dict[str, Array]) -> bool:
    """Whether ``dtype`` holds x, and the statistics' dtype holds them, without overflow or losing x to zero."""
    x = values["x"]
    finite = all(np.isfinite(v).all() for v in values.values())
    return finite and (x.size == 0 or np.abs(x).max() >= np.finfo("float16" if dtype == "float16" else "float32").tiny)


def _like_sets(values: Array, view: tuple[int, ...], over: tuple[int, ...]) -> Array:
    """``values``, repeated to one for each set, shaped to broadcast over the sets."""
    kept = [1 if a in over else n for a, n in enumerate(view)]
    return np.resize(values, kept)


def normal(offset: float = 0.0, scale: float = 1.0) -> Make:
    """Normally distributed numbers around ``offset``, both times ``scale``."""
    return lambda rng, view, over: (rng.normal(size=view) + offset) * scale


def _mixed_scales(rng, view, over):
    return rng.normal(size=view) * _like_sets(10.0 ** np.linspace(-25, 25, 11), view, over)


def _mixed_offsets(rng, view, over):
    return rng.normal(size=view) + _like_sets(np.array([0, -1e2, 1e4, -1e6, 3.0]), view, over)


def _constant(rng, view, over):
    return np.broadcast_to(_like_sets(np.array([0.0, 3.3, -1234.567, 1e5, 1e-20, 7e18, -0.1]), view, over), view)


def _near_constant(rng, view, over):
    """A constant with one element of each set moved by one part in ten thousand."""
    x = np.array(np.broadcast_to(_like_sets(np.array([3.3, -1234.567, 1e5, -0.1]), view, over), view))
    x[tuple(slice(0, 1) if a in over else slice(None) for a in range(len(view)))] *= 1 + 1e-4
    return x


def _nan(rng, view, over):
    """One NaN, in the last set."""
    x = rng.normal(size=view)
    x[(-1,) * len(view)] = np.nan
    return x


def _tabular(rng, view, over):
    low, high, step = (_like_sets(np.array([c[i] for c in COLUMNS]), view, over) for i in (1, 2, 3))
    return low + np.floor(rng.random(view) * (high - low) / step) * step


INPUTS = (
    Input("normal", normal()),
    *(Input(f"offset 1e{k}", normal(offset=10.0**k), ladder="offset") for k in range(1, 7)),
    *(Input(f"scale 1e{k}", normal(scale=10.0**k), ladder="scale") for k in (-30, -18, -9, -3, 3, 9, 18, 25, 30)),
    Input("offset 1e4, scale 1e-20", normal(offset=1e4, scale=1e-20), ladder="scale"),
    Input("offset 1e4, scale 1e25", normal(offset=1e4, scale=1e25), ladder="scale"),
    Input("offset 10, scale 1e36", normal(offset=10.0, scale=1e36), ladder="scale"),
    Input("mixed scales", _mixed_scales, ladder="scale"),
    Input("mixed offsets", _mixed_offsets, ladder="offset"),
    Input("constant", _constant, ladder="constant"),
    Input("near-constant", _near_constant, ladder="constant"),
    Input("tabular columns", _tabular, ladder="real"),
    Input("NaN in one set", _nan, finite=False),
)

BY_NAME = {i.name: i for i in INPUTS}


def photographs(step: int = 4) -> Array | None:
    """Every ``step``-th pixel of scikit-learn's photographs, (2, height, width, 3); None without it or Pillow."""
    try:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    except ImportError:
        return None
    return np.stack(images)[:, ::step, ::step].astype(np.float64)


def digits() -> Array | None:
    """scikit-learn's digits as (1797, 64), some of whose columns are constant; None where it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return None
    return load_digits().data


def real_cases(axis: int = 1) -> list[tuple[str, Case, Array]]:
    """Every layer on real numbers, channels at ``axis`` 1 or last: (name, case, x)."""
    found = []
    images, pixels = photographs(), digits()
    if images is not None:
        x = images if axis == -1 else np.ascontiguousarray(np.moveaxis(images, -1, 1))
        rows = {
            "layer_norm": {"axis": (1, 2, 3)},
            "rms_norm": {"axis": (1, 2, 3)},
            "group_norm": {"num_groups": 1, "axis": axis},
        }
        for layer in ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_train"):
            options = rows.get(layer, {"axis": axis})
            found.append(("photographs", Case(f"{layer}-photographs", layer, x.shape, options), x))
    if pixels is not None:
        for layer in ("layer_norm", "rms_norm", "batch_norm", "batch_norm_train"):
            options = {} if layer in ("layer_norm", "rms_norm") else {"axis": axis}
            found.append(("digits", Case(f"{layer}-digits", layer, pixels.shape, options), pixels))
    return found
