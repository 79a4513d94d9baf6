"""Hosts for the sit pass, and data to recalibrate them on."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from compress.passes.base import Context
from spaces.layers.token_slimming import TokenSlimming
from spaces.vision.lv_vit import LVViT

__all__ = ["SIZE", "batches", "context", "deit", "lv_vit", "same_state", "slimmings"]


SIZE = 16


def deit(**options: Any) -> VisionTransformer:
    arguments = {
        "img_size": SIZE,
        "patch_size": 4,
        "num_classes": 5,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 2,
    }
    return VisionTransformer(**(arguments | options)).eval()


def lv_vit(**options: Any) -> LVViT:
    arguments: dict[str, Any] = {"size": (SIZE, SIZE), "classes": 5, "dim": 24, "depth": 4, "heads": 2}
    return LVViT(**(arguments | {"reduction": 4} | options)).eval()


def batches(count: int = 2, size: int = 6, channels: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, channels, SIZE, SIZE), torch.randint(5, (size,))) for _ in range(count)]


def context(**changes: Any) -> Context:
    return Context(example=(torch.zeros(1, 3, SIZE, SIZE),), train=batches()).with_changes(**changes)


def slimmings(model: nn.Module) -> list[TokenSlimming]:
    return [module for module in model.modules() if isinstance(module, TokenSlimming)]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
