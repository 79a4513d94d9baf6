"""The image classifier of efficient_transformer; facts and sources in ``efficient_transformer``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from spaces.attention import Attention, make_attention
from spaces.attention.cosformer import cosformer_macs
from spaces.attention.relative import relative_macs
from spaces.attention.softmax import softmax_macs
from spaces.errors import SpaceError
from spaces.layers.embed import PatchEmbedding, grid_waves
from spaces.parameters import Architecture
from spaces.sequence._efficient_transformer_published import CIFAR_DEPTH, CIFAR_EMBED, SMALL_DEPTH
from spaces.signature import ImageSignature, Signature

__all__ = [
    "RELATIVE_LENGTH",
    "EncoderLayer",
    "ImageTransformer",
    "LayerSpec",
    "build_image",
    "core_macs",
    "count_macs",
    "image_plan",
    "self_attention",
]

DROP_PATH = 0.1  # of the deepest layer that a space knows; grows linearly from 0 at the first
FFN_DROPOUT = 0.1  # of the CIFAR-10 scales at the widest embedding; shrinks with the width
RELATIVE_LENGTH = 14
HEAD_DIM = 64  # of the CIFAR-10 scales
GRID = 14  # of the CIFAR-10 scales: 16 pixels a patch at 224
EPS = 1e-3  # smallest denominator of cosFormer in the supernet; the paper on cosFormer itself uses 1e-6


@dataclass(frozen=True)
class LayerSpec:
    """One encoder layer.

    Args:
        heads: number of attention heads.
        ffn: width of the feed-forward part.
        attention: "softmax", "cosformer", "cosformer_causal", "relative" or any mechanism of ``spaces.attention``.
        drop_path: probability to skip the layer for a sample while training, in [0, 1).
    """

    heads: int
    ffn: int
    attention: str
    drop_path: float = 0.0


def self_attention(
    kind: str, dim: int, heads: int, *, head_dim: int, relative_length: int, **options: Any
) -> Attention:
    """The mechanism that a value of an attention parameter stands for.

    ``kind`` is a name of ``spaces.attention``, or "cosformer_causal": the causal form in an encoder, as in the
    official classifier. ``options`` are those of ``base.Attention``.
    """
    if kind == "cosformer_causal":
        return make_attention(
            "cosformer", dim, heads, head_dim=head_dim, eps=EPS, **(options | {"causal": True})
        )
    if kind == "cosformer":
        options["eps"] = EPS
    elif kind == "relative":
        options["distance"] = relative_length
    return make_attention(kind, dim, heads, head_dim=head_dim, **options)


class EncoderLayer(nn.Module):
    """Pre-norm layer: x + Attention(LN x), then x + FFN(LN x), ReLU inside."""

    def __init__(self, dim: int, spec: LayerSpec, *, head_dim: int, relative_length: int, ffn_dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = self_attention(
            spec.attention, dim, spec.heads, head_dim=head_dim, relative_length=relative_length
        )
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = Mlp(dim, spec.ffn, act_layer=nn.ReLU, drop=(ffn_dropout, 0.0))
        self.drop_path = DropPath(spec.drop_path) if spec.drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, E) -> (B, N, E); the last rows * columns tokens lie on ``grid``."""
        x = x + self.drop_path(self.attention(self.attention_norm(x), grid=grid))
        return x + self.drop_path(self.ffn(self.ffn_norm(x)))  # type: ignore[no-any-return]


class ImageTransformer(nn.Module):
    """Transformer encoder over patches with an attention mechanism of its own in each layer.

    Patches, a class token in front, all times sqrt(E), learned positions, pre-norm layers, LayerNorm, the mean over
    the patch tokens (the class token only feeds them), linear head.

    Letters: B batch, E width, T patches, N = T + 1.

    Args:
        signature: size and channels of the images, number of classes.
        patch: height and width of a patch in pixels.
        dim: E.
        layers: one spec per layer, first layer first.
        head_dim: width of a head, so that heads times it is the width of queries, keys and values.
        relative_length: clip of the distances in "relative" layers.
        ffn_dropout: probability after the ReLU, in [0, 1).
        wave_positions: leave the tokens as they are and start the learned positions as waves over the grid. The
            paper's tokens are about a hundred times its first positions, which takes far longer to learn from.
    """

    def __init__(
        self,
        signature: ImageSignature,
        *,
        patch: tuple[int, int],
        dim: int,
        layers: Sequence[LayerSpec],
        head_dim: int,
        relative_length: int = RELATIVE_LENGTH,
        ffn_dropout: float = 0.0,
        wave_positions: bool = False,
    ):
        super().__init__()
        self.wave_positions = wave_positions
        self.patches = PatchEmbedding(signature.channels, (signature.height, signature.width), patch, dim)
        tokens = math.prod(self.patches.grid) + 1
        self.scale = 1.0 if wave_positions else math.sqrt(dim)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, tokens, dim))
        self.layers = nn.ModuleList(
            EncoderLayer(
                dim, spec, head_dim=head_dim, relative_length=relative_length, ffn_dropout=ffn_dropout
            )
            for spec in layers
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, signature.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform for linear maps with zero bias; truncated normal 0.02 or waves for the tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        if self.wave_positions:
            with torch.no_grad():
                self.positions[:, 1:] = grid_waves(self.patches.grid, self.positions.shape[-1])

    def forward(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, classes) logits."""
        x = self.patches(image)  # (B, T, E)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, N, E)
        x = x * self.scale + self.positions
        for layer in self.layers:
            x = layer(x, self.patches.grid)
        return self.head(self.norm(x[:, 1:]).mean(1))  # type: ignore[no-any-return]


def core_macs(
    kind: str, queries: int, keys: int, head_dim: int, *, relative_length: int, causal: bool = False
) -> int:
    """Multiply-adds of one head between the projections, for a value of an attention parameter.

    Raises:
        SpaceError: no closed form is known for ``kind``.
    """
    if kind == "softmax":
        return softmax_macs(queries, keys, head_dim)
    if kind == "relative":
        return relative_macs(queries, keys, head_dim, distance=relative_length)
    if kind in ("cosformer", "cosformer_causal"):
        return cosformer_macs(queries, keys, head_dim, causal=causal or kind == "cosformer_causal")
    raise SpaceError(
        f"attention={kind!r} has no closed form of its multiply-adds; count them on the built model"
    )


def _official_core_macs(kind: str, tokens: int, head_dim: int) -> int:
    if kind == "relative":
        return 3 * tokens * tokens * head_dim
    if kind == "cosformer_causal":
        return tokens * 2 * head_dim * (head_dim + 1)
    return core_macs(kind, tokens, tokens, head_dim, relative_length=0)


def count_macs(
    signature: ImageSignature,
    *,
    patch: tuple[int, int],
    dim: int,
    layers: Sequence[LayerSpec],
    head_dim: int,
    relative_length: int = RELATIVE_LENGTH,
    official: bool = False,
) -> int:
    """Multiply-adds of the products of one image in closed form; arguments as of ``ImageTransformer``.

    Args:
        official: count as the published figures were taken: causal cosFormer as its last contraction alone,
            relative positions as a product of every query with a row for every key. Otherwise what this
            code does, which is what ``torch.utils.flop_counter`` finds on meta tensors.
    """
    rows, columns = -(-signature.height // patch[0]), -(-signature.width // patch[1])
    tokens = rows * columns + 1
    macs = rows * columns * signature.channels * math.prod(patch) * dim + dim * signature.classes
    for spec in layers:
        if official:
            core = _official_core_macs(spec.attention, tokens, head_dim)
        else:
            core = core_macs(spec.attention, tokens, tokens, head_dim, relative_length=relative_length)
        macs += tokens * dim * (4 * spec.heads * head_dim + 2 * spec.ffn) + spec.heads * core
    return macs


def image_plan(architecture: Mapping[str, Any], signature: ImageSignature) -> dict[str, Any]:
    """Arguments of ``ImageTransformer`` and of ``count_macs`` for an architecture of any image scale.

    Scale "small" names the number of patches per side; the CIFAR-10 scales have patches of 16 pixels at 224 and of
    about a 14th of a side otherwise.
    """
    sides = (signature.height, signature.width)
    if "grid" in architecture:
        patch = tuple(-(-side // int(architecture["grid"])) for side in sides)
        deepest, head_dim = SMALL_DEPTH, int(architecture["head_dim"])
    else:
        patch = tuple(max(1, round(side / GRID)) for side in sides)
        deepest, head_dim = max(CIFAR_DEPTH), HEAD_DIM
    return {
        "patch": patch,
        "dim": int(architecture["embed"]),
        "layers": [
            _layer_spec(architecture, index, DROP_PATH * (index - 1) / (deepest - 1))
            for index in range(1, int(architecture["depth"]) + 1)
        ],
        "head_dim": head_dim,
        "relative_length": RELATIVE_LENGTH,
    }


def _layer_spec(architecture: Mapping[str, Any], index: int, drop_path: float) -> LayerSpec:
    layer = f"layer{index}"
    ratio = architecture.get(f"{layer}.ffn_ratio")
    return LayerSpec(
        heads=int(architecture[f"{layer}.heads"]),
        ffn=int(architecture[f"{layer}.ffn"]) if ratio is None else int(architecture["embed"]) * int(ratio),
        attention=str(architecture[f"{layer}.attention"]),
        drop_path=drop_path,
    )


def build_image(architecture: Architecture, signature: Signature) -> ImageTransformer:
    """The classifier that an architecture of any image scale stands for.

    Raises:
        SpaceError: the signature is not one of images.
    """
    if not isinstance(signature, ImageSignature):
        raise SpaceError(
            f"this scale of efficient_transformer is for images, but the task is {signature.task}; "
            "use efficient_transformer:small_translation"
        )
    small = "grid" in architecture
    plan = image_plan(architecture, signature)
    dropout = 0.0 if small else FFN_DROPOUT * plan["dim"] / max(CIFAR_EMBED)
    return ImageTransformer(signature, ffn_dropout=dropout, wave_positions=small, **plan)
