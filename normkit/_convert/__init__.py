"""Norm-layer state: moved between frameworks (``normkit.convert``) and looked at (``normkit.inspect``)."""

from .conversion import Conversion, convert
from .inspection import Finding, Inspection, inspect
from .record import ConversionError, Momentum, Norm

__all__ = ["Conversion", "ConversionError", "Finding", "Inspection", "Momentum", "Norm", "convert", "inspect"]
