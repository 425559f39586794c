"""The batch norms of equinox."""
