"""Drop-in layers for Flax: those of flax.nnx, with normkit's numbers."""

from normkit.backends.flax.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]
