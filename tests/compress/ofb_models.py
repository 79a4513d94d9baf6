"""Small models of every kind that OFB works on, and a search of some steps."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.optim import AdamW

from compress.passes._ofb_slicing import Slicer
from compress.passes._ofb_supernet import Supernet

__all__ = [
    "IMAGES",
    "MODELS",
    "TOLERANCE",
    "distilled",
    "noisy",
    "scatter_alpha",
    "swin",
    "train_a_little",
    "vit",
]

IMAGES = torch.linspace(-2, 2, 3 * 3 * 16 * 16).sin().reshape(3, 3, 16, 16)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def noisy(model: nn.Module) -> nn.Module:
    """No norm, bias or layer scale at a value that hides mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def vit(**changes: Any) -> Any:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return noisy(VisionTransformer(**{**sizes, **changes}))


def swin() -> Any:
    sizes = {"patch_size": 2, "window_size": 2, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
    return noisy(timm.create_model("swin_tiny_patch4_window7_224", img_size=16, num_classes=5, **sizes))


def distilled() -> Any:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return noisy(timm.create_model("deit_tiny_distilled_patch16_224", **sizes))


MODELS = {
    "vit": vit,
    "three heads": lambda: vit(num_heads=3, embed_dim=36),
    "average pooling": lambda: vit(global_pool="avg", class_token=False),
    "layer scale": lambda: vit(init_values=0.1, no_embed_class=True, reg_tokens=2),
    "qk norm": lambda: vit(qk_norm=True),
    "without biases": lambda: vit(qkv_bias=False, proj_bias=False),
    "distilled": distilled,
    "swin": swin,
}


def scatter_alpha(supernet: Supernet, strength: float = 3.0) -> None:
    with torch.no_grad():
        for gate in supernet.gates():
            gate.alpha.copy_(torch.randn_like(gate.alpha) * strength)


def train_a_little(supernet: Supernet, steps: int = 2) -> None:
    optimizer = AdamW([p for p in supernet.parameters() if p.requires_grad], lr=1e-3)
    supernet.train()
    supernet.schedule(0.4, 0.5)
    for step in range(steps):
        out = supernet(IMAGES)
        loss = sum(one.square().sum() for one in (out if isinstance(out, tuple) else (out,)))
        rebuilt = supernet.reconstruction(IMAGES)
        loss = loss if rebuilt is None else loss + rebuilt
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 2:
            scatter_alpha(supernet)
            supernet.compress(0.2, Slicer([optimizer]))
    supernet.compress(0.2, Slicer([optimizer]), force=True)
    supernet.eval()
