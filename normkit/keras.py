"""Drop-in layers for Keras 3, on TensorFlow, torch or JAX: those of keras.layers, with normkit's numbers."""

from normkit.backends.keras.layers import (
    BatchNormalization,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    RMSNormalization,
)

__all__ = [
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
]
