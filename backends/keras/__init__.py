"""The Keras layers, on any of Keras's backends."""
