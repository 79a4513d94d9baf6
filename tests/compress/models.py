"""Small models and data for the tests of compression."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["CLASSES", "batches", "set_fused", "small_vit", "steepened"]

CLASSES = 5
SHAPE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "num_classes": CLASSES,
}


def small_vit(seed: int = 0, *, distilled: bool = False, **options: Any) -> nn.Module:
    """17 tokens of width 48; every bias, scale and token has a value, so that a wrong slice shows."""
    torch.manual_seed(seed)
    cls = VisionTransformerDistilled if distilled else VisionTransformer
    return steepened(cls(**{**SHAPE, **options}), seed)


def steepened(model: nn.Module, seed: int = 0) -> nn.Module:
    """Initial weights are so small that attention is nearly uniform; larger ones make mistakes visible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def set_fused(model: nn.Module, fused: bool) -> None:
    """Which of timm's two attention paths runs."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def batches(count: int = 4, size: int = 8, *, seed: int = 0, image: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Images whose class is where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        images = torch.randn(size, 3, image, image, generator=generator)
        images += labels[:, None, None, None] - CLASSES / 2
        made.append((images, labels))
    return made
