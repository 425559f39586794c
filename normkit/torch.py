"""Drop-in layers for PyTorch: those of torch.nn, with normkit's numbers; and relatives of batch norm.

Examples
--------
>>> import torch
>>> import normkit.torch as nkt
>>> norm = nkt.BatchNorm1d(2)
>>> norm(torch.tensor([[1.0, 10.0], [3.0, 20.0]])).detach().round(decimals=3)
tensor([[-1., -1.],
        [ 1.,  1.]])
>>> isinstance(norm, torch.nn.BatchNorm1d), norm.running_mean
(True, tensor([0.2000, 1.5000]))
"""

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
