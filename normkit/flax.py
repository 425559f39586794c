"""Drop-in layers for Flax: those of flax.nnx, with normkit's numbers.

Examples
--------
>>> import numpy as np
>>> import jax.numpy as jnp
>>> import normkit.flax as nkf
>>> from flax import nnx
>>> norm = nkf.LayerNorm(4, rngs=nnx.Rngs(0))
>>> np.asarray(norm(jnp.asarray([[1.0, 2.0, 3.0, 4.0]]))).round(3)
array([[-1.342, -0.447,  0.447,  1.342]], dtype=float32)
>>> isinstance(norm, nnx.LayerNorm)
True
"""

from normkit.backends.flax.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]
