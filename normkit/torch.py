"""Drop-in layers for PyTorch: those of torch.nn, with normkit's numbers; and relatives of batch norm."""

from normkit.backends.torch.batch_variants import (
    BackwardGradientNorm,
    GhostBatchNorm,
    LpNorm,
    NoisyBatchNorm,
    StopGradientBatchNorm,
)
from normkit.backends.torch.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    FrozenBatchNorm2d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LayerNorm2d,
    RMSNorm,
    count_once,
)

__all__ = [
    "BackwardGradientNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FrozenBatchNorm2d",
    "GhostBatchNorm",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "LpNorm",
    "NoisyBatchNorm",
    "RMSNorm",
    "StopGradientBatchNorm",
    "count_once",
]
