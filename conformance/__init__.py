"""What "the same as the framework" means: cases, oracle, tolerances, known differences, native layers and tests."""

__all__ = ["cases", "differences", "inputs", "libraries", "measure", "natives", "oracle", "tolerances"]
