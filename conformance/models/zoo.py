"""Models of timm, torchvision and transformers: how each is built and called, and which norm layers are in it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """A model, its input, and what replace and fold find in it."""

    name: str
    build: Callable[[], nn.Module]
    #: Shape of what it is called with; of token ids where it has two axes.
    shape: tuple[int, ...]
    #: The norm layers by class, all of which are replaced.
    norms: dict[str, int]
    #: The tensors of an output that a loss is made of.
    output: Callable[[Any], Tensor] = lambda y: y
    #: How many batch norms fold; the rest is left.
    folds: int | None = None
    #: How far ten steps in float64 may end from where they end unreplaced, as a share of the way: roundings, amplified.
    exact: float = 1e-9
    #: The length of those steps.
    rate: float = 1e-3

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, the same each time, with norms that are no identity and without what is random in training."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.build()
        numbers = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, a in model.named_parameters():
                # An affine part or a bias; a scale of zero at the end of a block would hide the block.
                if a.dim() == 1:
                    centre = 1.0 if name.endswith("weight") else 0.0
                    a.copy_(centre + torch.randn(a.shape, generator=numbers) / 8)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.to(dtype)

    def x(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some input."""
        numbers = torch.Generator().manual_seed(seed)
        if len(self.shape) == 2:
            return torch.randint(0, 50, self.shape, generator=numbers)
        return torch.randn(self.shape, generator=numbers).to(dtype)

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output as one tensor."""
        return self.output(model(x))


def _declare() -> None:
    """Let torchvision be imported where its compiled operators were built for another PyTorch: no model here has one.

    Their shapes are registered on import, for which two must be known.
    """
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _held.append(operators)


_held: list[Any] = []


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10)

    return build


def _torchvision(path: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        found: Any = models
        for part in path.split("."):
            found = getattr(found, part)
        return found(weights=None, **options)

    return build


class _Flow(nn.Module):
    """raft_small on a picture and its mirror image, one refinement."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.optical_flow import _utils, raft

        grid = _utils.make_coords_grid
        # Float32 as it is, in a model of whatever dtype.
        raft.make_coords_grid = lambda *args: grid(*args).to(torch.get_default_dtype())
        self.raft = raft.raft_small(weights=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.raft(x, x.flip(-1), 1)[0]


def _transformers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        return getattr(transformers, f"{kind}Model")(config)

    return build


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}

MODELS = (
    Model("timm test_resnet", _timm("test_resnet"), (4, 3, 64, 64), {"torch.nn.BatchNorm2d": 15}, folds=15),
    Model(
        "timm test_convnext", _timm("test_convnext"), (2, 3, 64, 64), {"timm.LayerNorm2d": 5, "timm.LayerNorm": 9}
    ),
    Model("timm test_vit", _timm("test_vit"), (2, 3, 160, 160), {"timm.LayerNorm": 13}),
    Model("timm test_efficientnet_gn", _timm("test_efficientnet_gn"), (2, 3, 64, 64), {"timm.GroupNormAct": 13}),
    Model("timm test_efficientnet_ln", _timm("test_efficientnet_ln"), (2, 3, 64, 64), {"timm.LayerNormAct2d": 13}),
    Model(
        "timm test_efficientnet", _timm("test_efficientnet"), (4, 3, 64, 64), {"timm.BatchNormAct2d": 13}, folds=13
    ),
    Model(
        "r3d_18", _torchvision("video.r3d_18", num_classes=10), (6, 3, 2, 16, 16), {"torch.nn.BatchNorm3d": 20},
        folds=20,
    ),
    Model("raft_small", _Flow, (1, 3, 128, 128), {"torch.nn.InstanceNorm2d": 21}, rate=1e-6),
    Model(
        "deeplabv3_mobilenet_v3_large",
        _torchvision("segmentation.deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=5),
        (4, 3, 48, 48),
        {"torch.nn.BatchNorm2d": 53},
        lambda y: y["out"],
        53,
    ),
    Model(
        "transformers Bert", _transformers("Bert", **_SMALL), (3, 12), {"torch.nn.LayerNorm": 5},
        lambda y: y.last_hidden_state,
    ),
    Model(
        "transformers Llama", _transformers("Llama", **_SMALL), (3, 12), {"transformers.LlamaRMSNorm": 5},
        lambda y: y.last_hidden_state, exact=1e-5,  # its norm is computed in float32, whatever it gets
    ),
    Model(
        "transformers MobileNetV2", _transformers("MobileNetV2", depth_multiplier=0.35), (4, 3, 64, 64),
        {"torch.nn.BatchNorm2d": 52}, lambda y: y.last_hidden_state, 52,
        exact=1e-4, rate=1e-5,  # 52 norms of as few as 16 values: a step makes ten of one rounding
    ),
)  # fmt: skip

#: What test_resnet_pair.py builds in Keras as well.
RESNET = Model(
    "resnet18", _torchvision("resnet18", num_classes=10), (8, 3, 64, 64), {"torch.nn.BatchNorm2d": 20}, folds=20
)

_declare()
