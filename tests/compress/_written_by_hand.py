"""Vision transformers as people write them themselves, with attentions that use the same names in different ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.passes.base import Context

__all__ = [
    "ATTENTIONS",
    "EXAMPLE",
    "DepthwiseMlp",
    "HandwrittenViT",
    "LateDropout",
    "NormalisedMlp",
    "Plain",
    "WithWeights",
    "context",
    "half_zeroed",
    "handwritten",
]

WIDTH, HEADS, SIDE = 24, 3, 16
EXAMPLE = (torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)),)


class Plain(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.set_scale((width // heads) ** -0.5)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def set_scale(self, scale: float) -> None:
        self.scale: Any = scale

    def scale_of(self, q: Tensor, width: int) -> Any:
        return self.scale

    def parts(self, x: Tensor) -> Any:
        rows = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        return rows.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.parts(x)
        weights = (q @ k.transpose(-2, -1) * self.scale_of(q, x.shape[2])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Scaling(Plain):
    def set_scale(self, scale: float) -> None:
        self.scaling = scale

    def scale_of(self, q: Tensor, width: int) -> Any:
        return self.scaling


class ScaleOfWidth(Plain):
    def scale_of(self, q: Tensor, width: int) -> Any:
        return (width // self.num_heads) ** -0.5


class Fused(Plain):
    def set_scale(self, scale: float) -> None:
        pass

    def forward(self, x: Tensor) -> Any:
        return self.proj(functional.scaled_dot_product_attention(*self.parts(x)).transpose(1, 2).flatten(2))


class HeadFirst(Plain):
    def parts(self, x: Tensor) -> Any:
        rows = self.qkv(x).reshape(*x.shape[:2], self.num_heads, 3, -1)
        return rows.permute(3, 0, 2, 1, 4).unbind(0)


class Classic(Plain):
    """As in DeiT, MAE and DINO: the width of a head is that of a token over the number of heads."""

    def parts(self, x: Tensor) -> Any:
        batch, tokens, width = x.shape
        rows = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        return rows.permute(2, 0, 3, 1, 4).unbind(0)


class WithWeights(Classic):
    """Hands out its weights too, as in DINO: no attention of timm can take its place."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x.mean()


class LateDropout(Classic):
    """Acts in training as no module of it tells."""

    def forward(self, x: Tensor) -> Any:
        return functional.dropout(super().forward(x), 0.2, self.training)


ATTENTIONS: dict[str, type[Plain]] = {
    one.__name__: one for one in (Plain, Fused, Scaling, ScaleOfWidth, HeadFirst, Classic)
}


class PlainMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class NormalisedMlp(PlainMlp):
    """Hidden units that depend on each other, under a name of which nothing is known."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(functional.normalize(self.act(self.fc1(x)), dim=-1))
        return result


class DepthwiseMlp(PlainMlp):
    def __init__(self, width: int):
        super().__init__(width)
        self.mix = nn.Conv1d(4 * width, 4 * width, 3, padding=1, groups=4 * width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(self.fc1(x).transpose(1, 2)).transpose(1, 2)
        result: Tensor = self.fc2(self.act(hidden))
        return result


class Block(nn.Module):
    def __init__(self, attention: type[Plain], mlp: type[PlainMlp]):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), attention(WIDTH, HEADS)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), mlp(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attn(self.norm1(x))
        x = x + (attended[0] if isinstance(attended, tuple) else attended)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class HandwrittenViT(nn.Module):
    def __init__(self, attention: type[Plain] = Classic, mlp: type[PlainMlp] = PlainMlp):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.ModuleList([Block(attention, mlp) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # type: ignore[operator]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x)[:, 0])
        return result


def handwritten(attention: type[Plain] = Classic, mlp: type[PlainMlp] = PlainMlp) -> Any:
    """Weights are large, so that a wrong scale or order shows."""
    torch.manual_seed(0)
    model = HandwrittenViT(attention, mlp)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 4  # type: ignore[union-attr, operator]
    return model.eval()


def half_zeroed(model: Any) -> Any:
    """The upper half of the channels of every head at zero: a cut to the half has to be exact.

    Both orders of qkv keep channels last, so that the same rows are meant.
    """
    with torch.no_grad():
        for block in model.blocks:
            qkv, proj, half = block.attn.qkv, block.attn.proj, WIDTH // HEADS // 2
            qkv.weight.view(3, HEADS, -1, WIDTH)[:, :, half:] = 0
            qkv.bias.view(3, HEADS, -1)[:, :, half:] = 0
            proj.weight.view(WIDTH, HEADS, -1)[:, :, half:] = 0
    return model


def context(**changes: Any) -> Context:
    generator = torch.Generator().manual_seed(1)
    train = [
        (torch.randn(6, 3, SIDE, SIDE, generator=generator), torch.randint(5, (6,), generator=generator))
        for _ in range(2)
    ]
    return Context(**{"example": EXAMPLE, "train": train, "epochs": 1, **changes})
