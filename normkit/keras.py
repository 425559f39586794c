"""Drop-in layers for Keras 3, on TensorFlow, torch or JAX: those of keras.layers, with normkit's numbers.

Examples
--------
>>> import keras
>>> import normkit.keras as nkk
>>> norm = nkk.LayerNormalization(epsilon=1e-5)
>>> y = norm(keras.ops.convert_to_tensor([[1.0, 2.0, 3.0, 4.0]]))
>>> keras.ops.convert_to_numpy(y).round(3)
array([[-1.342, -0.447,  0.447,  1.342]], dtype=float32)
>>> isinstance(norm, keras.layers.LayerNormalization)
True
"""

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
