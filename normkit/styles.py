"""RMS norms by whose they are: where float16 and bfloat16 are rounded, and what the weight is a deviation from."""

from __future__ import annotations

from typing import NamedTuple


class Style(NamedTuple):
    """Two arguments of :func:`normkit.rms_norm`."""

    cast: str = "output"
    weight_offset: float = 0.0


_AT_ONCE, _BEFORE, _FROM_ONE = Style(), Style(cast="input"), Style(weight_offset=1.0)

#: Of frameworks, of ONNX, and of the models of transformers. What eps is, each model's configuration says.
STYLES = {
    **dict.fromkeys(("torch", "keras", "flax", "olmo2"), _AT_ONCE),
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "t5", "onnx"), _BEFORE),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), _FROM_ONE),
}
