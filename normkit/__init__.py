"""One normalization library for every array: NumPy, CuPy, PyTorch, TensorFlow, JAX and any array API library."""

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
    "rms_norm",
    "vjp",
]
