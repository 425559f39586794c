"""RMS norms of transformers in bfloat16, element by element by their style, and whose gradient is nearer to float64."""

import importlib

import pytest
import torch

import normkit as nk
from normkit.styles import STYLES

LAYERS = {"llama": "LlamaRMSNorm", "gemma": "GemmaRMSNorm", "olmo2": "Olmo2RMSNorm", "t5": "T5LayerNorm"}


def _theirs(style):
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{style}.modeling_{style}")
    torch.manual_seed(0)
    layer = getattr(module, LAYERS[style])(512, eps=1e-6).to(torch.bfloat16)
    layer.weight.data.uniform_(0.5, 1.5)
    return layer, (torch.randn(64, 512) * 3).bfloat16()


@pytest.mark.parametrize("style", LAYERS)
def test_bfloat16(style):
    theirs, x = _theirs(style)
    ours = {}
    for name in ("llama", "olmo2", "gemma"):
        cast, offset = STYLES[name]
        ours[cast, offset] = nk.rms_norm(x, theirs.weight, eps=1e-6, cast=cast, weight_offset=offset)
    y = theirs(x)
    # A sum in another order may leave one in tens of thousands on the other side of the middle between two numbers.
    assert (ours.pop(STYLES[style]) != y).float().mean() < 1e-3
    assert all((other != y).float().mean() > 0.1 for other in ours.values())


@pytest.mark.parametrize("style", ["llama", "t5"])
def test_gradient_in_bfloat16(style):
    """Autograd rounds dy * weight once more on the way to theirs: where the two differ, ours is the nearer."""
    theirs, x = _theirs(style)
    dy = torch.randn(64, 512).bfloat16()
    inputs = x.requires_grad_(), theirs.weight
    found = torch.autograd.grad(nk.rms_norm(*inputs, eps=1e-6, cast=STYLES[style].cast), inputs, dy)
    others = torch.autograd.grad(theirs(x), inputs, dy)
    wide = [a.detach().double().requires_grad_() for a in inputs]
    exact = torch.autograd.grad(nk.rms_norm(*wide, eps=1e-6), wide, dy.double())
    of_x, of_weight = (
        [((a.double() - wanted).abs() / wanted.abs().amax(-1, keepdim=True)) for a in pair]
        for *pair, wanted in zip(found, others, exact, strict=True)
    )
    assert (found[0] != others[0]).float().mean() > 0.2
    # As above: a float32 on the other side of the middle.
    assert (of_x[0] > of_x[1]).float().mean() < 1e-3 and of_x[0].median() < 0.85 * of_x[1].median()
    assert of_x[0].max() < 0.75 * of_x[1].max()
    # The weight meets what was rounded before it in both, so that neither is nearer by as much.
    assert of_weight[0].median() < of_weight[1].median() and of_weight[0].max() <= of_weight[1].max()
