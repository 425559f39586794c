"""One normalization library for every array: NumPy, CuPy, PyTorch, TensorFlow, JAX and any array API library."""

from ._replace import replace, restore
from .core.normalize import BatchStats
from .functional import batch_norm, batch_norm_train, group_norm, instance_norm, layer_norm, rms_norm, vjp
from .layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from .stats import RunningStats

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
    "group_norm",
    "instance_norm",
    "layer_norm",
    "replace",
    "restore",
    "rms_norm",
    "vjp",
]


def __getattr__(name: str) -> object:
    """The modules of drop-in layers, each of which imports its framework, when they are first asked for."""
    if name == "torch":
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
