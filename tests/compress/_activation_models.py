"""Small models with activations between layers that merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from compress.passes.base import Context

__all__ = ["IMAGE", "context", "conv_net", "deit", "settled"]


IMAGE = (torch.zeros(1, 3, 16, 16),)


def settled(model: nn.Module, seed: int = 0) -> Any:
    """Statistics and weights that are not those of a new model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator).to(value)
                value.copy_(noise + 0.5 if "var" in name else 0.8 * noise - 0.35)
    return model.eval()


def conv_net(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """3x3-bn-act-1x1-bn, an activation that has to stay, and a pair of linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        activation(),
        nn.Dropout(0.1),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        activation(),
        nn.Linear(16, 4),
    )


def deit(**options: Any) -> VisionTransformer:
    shape: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}
    return VisionTransformer(**(shape | {"num_classes": 4} | options)).eval()


def context(**changes: Any) -> Context:
    return Context(example=IMAGE).with_changes(**changes)
