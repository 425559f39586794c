"""The batch norms of dm-haiku."""
