"""One normalization library for every array: NumPy, CuPy, PyTorch, TensorFlow, JAX and any array API library."""

from typing import TYPE_CHECKING

try:
    from . import backends as _backends  # noqa: F401
except ImportError as error:
    if error.name != __name__:
        raise
    raise ImportError(
        f"normkit is imported from {__path__[0]}, its source tree, which lacks what installation puts there: run "
        f"Python in another folder, or install with pip install -e."
    ) from None
from ._vjp import vjp
from .core.normalize import BatchStats
from .functional import batch_norm, batch_norm_train, group_norm, instance_norm, layer_norm, rms_norm
from .layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from .lp_norms import lp_batch_norm_train, lp_layer_norm, normalize
from .stats import RunningStats
from .variants import batch_renorm_train, filter_response_norm, weight_standardization

if TYPE_CHECKING:
    from ._convert import convert, inspect
    from ._fold import fold
    from ._population import recalibrate, statistics_gap
    from ._replace import replace, restore

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchStats",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "RunningStats",
    "batch_norm",
    "batch_norm_train",
    "batch_renorm_train",
    "convert",
    "filter_response_norm",
    "fold",
    "group_norm",
    "inspect",
    "instance_norm",
    "layer_norm",
    "lp_batch_norm_train",
    "lp_layer_norm",
    "normalize",
    "recalibrate",
    "replace",
    "restore",
    "rms_norm",
    "statistics_gap",
    "vjp",
    "weight_standardization",
]

#: Where the names are that are loaded when they are first asked for.
_LAZY = {
    "convert": "._convert",
    "fold": "._fold",
    "inspect": "._convert",
    "recalibrate": "._population",
    "replace": "._replace",
    "restore": "._replace",
    "statistics_gap": "._population",
}
_MODULES = ("diagnostics", "flax", "keras", "torch")


def __dir__() -> list[str]:
    """The public names, also of what is not loaded yet."""
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> object:
    """What works on models and files, the diagnostics, and drop-in layers, whose modules import their frameworks."""
    import importlib

    if name in _MODULES:
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name not in ("flax", "jax", "keras", "torch"):
                raise
            missing = importlib.import_module(f"{__name__}.backends").MissingLibraryError
            message = f'normkit.{name} needs {error.name}, which is not installed: pip install "normkit[{name}]".'
            raise missing(message) from None
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
