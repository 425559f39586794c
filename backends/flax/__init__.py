"""The layers of flax.nnx."""
