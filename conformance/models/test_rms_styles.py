"""RMS norms of transformers in bfloat16, element by element by their style."""

import importlib

import pytest
import torch

import normkit as nk
from normkit.styles import STYLES

LAYERS = {"llama": "LlamaRMSNorm", "gemma": "GemmaRMSNorm", "olmo2": "Olmo2RMSNorm", "t5": "T5LayerNorm"}


@pytest.mark.parametrize("style", LAYERS)
def test_bfloat16(style):
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{style}.modeling_{style}")
    torch.manual_seed(0)
    theirs = getattr(module, LAYERS[style])(512, eps=1e-6).to(torch.bfloat16)
    theirs.weight.data.uniform_(0.5, 1.5)
    x = (torch.randn(64, 512) * 3).bfloat16()
    ours = {}
    for name in ("llama", "olmo2", "gemma"):
        cast, offset = STYLES[name]
        ours[cast, offset] = nk.rms_norm(x, theirs.weight, eps=1e-6, cast=cast, weight_offset=offset)
    y = theirs(x)
    # A sum in another order may leave one in tens of thousands on the other side of the middle between two numbers.
    assert (ours.pop(STYLES[style]) != y).float().mean() < 1e-3
    assert all((other != y).float().mean() > 0.1 for other in ours.values())
