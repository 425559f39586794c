"""How long normkit takes, next to the native layers and to a copy of the same bytes."""
