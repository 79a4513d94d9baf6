"""The network of lv_vit; facts and sources in ``lv_vit``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]  # where timm 1.0.9 has it
from torch import Tensor, nn

from spaces.errors import UserMistake
from spaces.layers.embed import PatchEmbedding
from spaces.layers.token_slimming import TokenSlimming, scaled
from spaces.vision._lv_vit_published import HEAD_DIM

__all__ = ["SHARES", "STRIDES", "ConvStem", "LVViT", "LVViTBlock", "PatchStem"]

_EPS = 1e-5
STRIDES = {"4c": (2, 2, 2, 2), "6c": (2, 1, 1, 2, 2, 2)}
SHARES = {"4c": (8, 4, 2, 1), "6c": (8, 8, 8, 4, 2, 1)}
"""Widths of the stem's convolutions: the model's, divided by these."""


class ConvStem(nn.Module):
    """3x3 convolutions with batch norms, GELU after all but the last; an image becomes tokens row by row.

    Letters: B batch, C channels of the image, E width, T tokens.

    Args:
        channels: C.
        size: height and width of the image in pixels.
        dim: E, divisible by 8.
        kind: ``4c`` or ``6c``, the number of convolutions.
        reduction: pixels per side of a token, a power of two up to 16; strides beyond it are 1.

    Attributes:
        grid: rows and columns of tokens.
    """

    def __init__(self, channels: int, size: tuple[int, int], dim: int, kind: str, reduction: int = 16):
        super().__init__()
        self._config = {
            "channels": channels,
            "size": list(size),
            "dim": dim,
            "kind": kind,
            "reduction": reduction,
        }
        self.grid = (-(-size[0] // reduction), -(-size[1] // reduction))
        self.depth = len(STRIDES[kind])
        for number, (stride, share) in enumerate(zip(STRIDES[kind], SHARES[kind], strict=True), 1):
            step = stride if reduction > 1 else 1
            reduction //= step
            width = dim // share
            self.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, step, padding=1, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(width))
            channels = width
        self.act = nn.GELU()

    def config(self) -> dict[str, Any]:
        """Arguments that make a stem of the same shape."""
        return dict(self._config)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, T, E)."""
        x = image
        for number in range(1, self.depth + 1):
            x = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x))
            if number < self.depth:
                x = self.act(x)
        return x.flatten(2).transpose(1, 2)


class PatchStem(PatchEmbedding):
    """One linear map per patch, as in a plain vision transformer; arguments as of ``PatchEmbedding``."""

    def __init__(self, channels: int, size: tuple[int, int], patch: tuple[int, int], dim: int):
        super().__init__(channels, size, patch, dim)
        self._config = {"channels": channels, "size": list(size), "patch": list(patch), "dim": dim}

    def config(self) -> dict[str, Any]:
        """Arguments that make a stem of the same shape."""
        return dict(self._config)


class LVViTBlock(nn.Module):
    """Pre-norm block with both branches divided: x + Attention(LN x) / s, then x + MLP(LN x) / s.

    Names are those of timm's block, so that what reads or cuts one also knows the other.

    Args:
        dim: width.
        heads: number of heads.
        head_dim: width of a head; None: ``dim // heads``.
        hidden: width of the MLP.
        skip_division: s, above 0.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path: probability to skip a branch for a sample while training, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        head_dim: int | None = None,
        skip_division: float = 2.0,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.skip_division = float(skip_division)
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, heads, qkv_bias=qkv_bias)
        if head_dim is not None and head_dim != self.attn.head_dim:
            # set by hand: timm takes the width of a head since 1.0.23 only
            self.attn.head_dim, self.attn.attn_dim = head_dim, heads * head_dim
            self.attn.scale = head_dim**-0.5
            self.attn.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=qkv_bias)
            self.attn.proj = nn.Linear(heads * head_dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, hidden)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def config(self) -> dict[str, Any]:
        """Arguments that make a block of the same shape."""
        return {
            "dim": self.norm1.normalized_shape[0],
            "heads": self.attn.num_heads,
            "hidden": self.mlp.fc1.out_features,
            "head_dim": self.attn.qkv.out_features // (3 * self.attn.num_heads),
            "skip_division": self.skip_division,
            "qkv_bias": self.attn.qkv.bias is not None,
            "drop_path": getattr(self.drop_path1, "drop_prob", 0.0),
        }

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.drop_path1(self.attn(self.norm1(x))) / self.skip_division
        return x + self.drop_path2(self.mlp(self.norm2(x))) / self.skip_division  # type: ignore[no-any-return]


class LVViT(nn.Module):
    """Vision transformer with a convolutional stem, divided residuals and, where asked for, token slimming.

    ``blocks`` holds transformer blocks and slimmings in the order in which they run.

    Args:
        channels: of the images.
        size: height and width of the images in pixels.
        classes: number of classes.
        dim: width, divisible by ``heads`` and, with a stem of convolutions, by 8.
        depth: number of transformer blocks.
        heads: number of heads; None: one for 64 channels.
        mlp_ratio: width of the MLPs over ``dim``.
        stem: ``4c``, ``6c`` (convolutions) or ``patch`` (one linear map per patch).
        reduction: pixels per side of a patch; for the convolutions a power of two up to 16.
        skip_division: what both branches of a block are divided by.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path: of the last block; grows linearly from 0 at the first.
        slim_after: numbers of the blocks, from 1, that a slimming follows; rising, below ``depth``.
        tokens: how many patch tokens each slimming leaves.
        slim_ratio: hidden width of the slimmings over ``dim``.
        aux_head: add the classifier of single tokens that token labelling trained (``token_logits``), frozen.

    Raises:
        UserMistake: arguments that contradict each other.
    """

    num_prefix_tokens = 1
    global_pool = "token"

    def __init__(
        self,
        channels: int = 3,
        size: Sequence[int] = (224, 224),
        classes: int = 1000,
        *,
        dim: int = 384,
        depth: int = 16,
        heads: int | None = None,
        mlp_ratio: float = 3.0,
        stem: str = "4c",
        reduction: int = 16,
        skip_division: float = 2.0,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
        slim_after: Sequence[int] = (),
        tokens: Sequence[int] = (),
        slim_ratio: float = 0.5,
        aux_head: bool = False,
    ):
        super().__init__()
        heads = max(1, dim // HEAD_DIM) if heads is None else heads
        self._config = {
            "channels": channels,
            "size": list(size),
            "classes": classes,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "stem": stem,
            "reduction": reduction,
            "skip_division": skip_division,
            "qkv_bias": qkv_bias,
            "drop_path": drop_path,
            "slim_after": list(slim_after),
            "tokens": list(tokens),
            "slim_ratio": slim_ratio,
            "aux_head": aux_head,
        }
        _check(self._config)
        self.embed_dim = self.num_features = dim
        self.num_classes = classes
        place = (size[0], size[1])
        if stem == "patch":
            self.patch_embed: nn.Module = PatchStem(channels, place, (reduction, reduction), dim)
        else:
            self.patch_embed = ConvStem(channels, place, dim, stem, reduction)
        patches = -(-place[0] // reduction) * -(-place[1] // reduction)
        if any(later > earlier for earlier, later in zip([patches, *tokens], tokens, strict=False)):
            raise UserMistake(f"lv_vit: tokens={list(tokens)} must not rise, starting from {patches} patches")
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, patches + 1, dim))
        kept = dict(zip(slim_after, tokens, strict=True))
        blocks: list[nn.Module] = []
        for number in range(1, depth + 1):
            rate = drop_path * (number - 1) / max(1, depth - 1)
            hidden = scaled(dim, mlp_ratio)
            blocks.append(
                LVViTBlock(dim, heads, hidden, skip_division=skip_division, qkv_bias=qkv_bias, drop_path=rate)
            )
            if number in kept:
                blocks.append(TokenSlimming(dim, kept[number], ratio=slim_ratio, prefix=1))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.head = nn.Linear(dim, classes)
        if aux_head:
            self.aux_head = nn.Linear(dim, classes)
        self.reset_parameters()

    def config(self) -> dict[str, Any]:
        """Arguments that make a model with the same blocks and slimmings; widths cut since then are not among them."""
        after: list[int] = []
        slimmings = [block for block in self.blocks if isinstance(block, TokenSlimming)]
        depth = 0
        for block in self.blocks:
            if isinstance(block, TokenSlimming):
                after.append(depth)
            else:
                depth += 1
        found = {"depth": depth, "slim_after": after, "tokens": [block.tokens for block in slimmings]}
        if slimmings:
            first = slimmings[0].fc1
            found["slim_ratio"] = first.out_features / first.in_features
        return {**self._config, **found}

    def no_weight_decay(self) -> set[str]:
        """Parameters that a training should not decay."""
        return {"cls_token", "pos_embed"}

    def reset_parameters(self) -> None:
        """Truncated normal 0.02 for linear maps, class token and positions; zero biases, unit norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self._config["aux_head"]:
            self.aux_head.requires_grad_(False)

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, 1 + tokens left, dim), class token first, after the final norm."""
        x = self.patch_embed(image)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.norm(self.blocks(x))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, classes) logits."""
        return self.head(self.forward_features(image)[:, 0])  # type: ignore[no-any-return]

    def token_logits(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, tokens left, classes), by the auxiliary head.

        Raises:
            UserMistake: the model was made without one.
        """
        if not self._config["aux_head"]:
            raise UserMistake("lv_vit: token_logits needs a model with aux_head=True")
        return self.aux_head(self.forward_features(image)[:, 1:])  # type: ignore[no-any-return]


def _check(config: Mapping[str, Any]) -> None:
    stem, reduction, dim = config["stem"], config["reduction"], config["dim"]
    if stem not in ("patch", *STRIDES):
        raise UserMistake(f"lv_vit: stem={stem!r} must be one of 4c, 6c, patch")
    if stem != "patch" and (reduction not in (1, 2, 4, 8, 16) or dim % 8):
        raise UserMistake(
            f"lv_vit: stem={stem!r} needs reduction={reduction} to be 1, 2, 4, 8 or 16 "
            f"and dim={dim} to be divisible by 8"
        )
    if dim % config["heads"]:
        raise UserMistake(f"lv_vit: dim={dim} must be divisible by heads={config['heads']}")
    after, tokens = config["slim_after"], config["tokens"]
    rising = all(
        earlier < later for earlier, later in zip([0, *after], [*after, config["depth"]], strict=True)
    )
    if len(after) != len(tokens) or (after and not rising):
        raise UserMistake(
            f"lv_vit: slim_after={after} must rise within 1..{config['depth'] - 1}, "
            f"with one number in tokens={tokens} each"
        )
