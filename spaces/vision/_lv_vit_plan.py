"""From an architecture of lv_vit to its network and its cost; facts and sources in ``lv_vit``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spaces.errors import SpaceError
from spaces.layers.token_slimming import kept_tokens, scaled, slimming_macs
from spaces.parameters import Architecture
from spaces.signature import ImageSignature, Signature
from spaces.vision._lv_vit_network import SHARES, STRIDES, LVViT
from spaces.vision._lv_vit_published import HEAD_DIM

__all__ = ["build", "count_macs", "plan", "stem_reduction"]

_GRID = 7  # fewer patches per side than that are not worth a transformer


def stem_reduction(signature: ImageSignature) -> int:
    """Pixels per side of a patch: 16, and on small images the power of two that leaves a grid of 7 or more."""
    side = min(signature.height, signature.width)
    return min(16, 1 << max(0, (side // _GRID).bit_length() - 1))


def plan(architecture: Mapping[str, Any], signature: ImageSignature) -> dict[str, Any]:
    """Arguments of ``LVViT`` for an architecture of either scale."""
    dim, depth = int(architecture["dim"]), int(architecture["depth"])
    reduction = stem_reduction(signature)
    patches = -(-signature.height // reduction) * -(-signature.width // reduction)
    stages = int(architecture["slimmings"])
    published = "head_dim" not in architecture
    return {
        "channels": signature.channels,
        "size": (signature.height, signature.width),
        "classes": signature.classes,
        "dim": dim,
        "depth": depth,
        "heads": dim // int(architecture.get("head_dim", HEAD_DIM)),
        "mlp_ratio": float(architecture.get("mlp_ratio", 3)),
        "stem": str(architecture["stem"]),
        "reduction": reduction,
        "skip_division": float(architecture["skip_division"]),
        # the published rates: 0 for the narrowest, 0.3 for the widest
        "drop_path": {320: 0.0, 768: 0.3}.get(dim, 0.1) if published else 0.0,
        "slim_after": tuple(int(architecture[f"slim{number}.after"]) for number in range(1, stages + 1)),
        "tokens": kept_tokens(patches, float(architecture.get("keep", 1)), stages),
        "slim_ratio": float(architecture.get("slim_ratio", 0.5)),
        # part of every published file and count, although only token labelling uses it
        "aux_head": published,
    }


def build(architecture: Architecture, signature: Signature) -> LVViT:
    """The classifier that an architecture stands for.

    Raises:
        SpaceError: the signature is not one of images.
    """
    if not isinstance(signature, ImageSignature):
        raise SpaceError(f"lv_vit is for images, but the task is {signature.task}")
    return LVViT(**plan(architecture, signature))


def count_macs(
    *,
    channels: int = 3,
    size: Sequence[int] = (224, 224),
    classes: int = 1000,
    dim: int = 384,
    depth: int = 16,
    mlp_ratio: float = 3.0,
    stem: str = "4c",
    reduction: int = 16,
    slim_after: Sequence[int] = (),
    tokens: Sequence[int] = (),
    slim_ratio: float = 0.5,
    **_: Any,
) -> int:
    """Multiply-adds of one image in closed form; arguments as of ``LVViT``."""
    rows, columns = int(size[0]), int(size[1])
    macs, left = 0, reduction
    if stem == "patch":
        macs += -(-rows // reduction) * -(-columns // reduction) * channels * reduction**2 * dim
    else:
        for stride, share in zip(STRIDES[stem], SHARES[stem], strict=True):
            step = stride if left > 1 else 1
            left //= step
            rows, columns = -(-rows // step), -(-columns // step)
            macs += rows * columns * 9 * channels * (dim // share)
            channels = dim // share
    patches = -(-int(size[0]) // reduction) * -(-int(size[1]) // reduction)
    kept, hidden = dict(zip(slim_after, tokens, strict=True)), scaled(dim, mlp_ratio)
    for number in range(1, depth + 1):
        length = patches + 1
        macs += length * dim * (4 * dim + 2 * hidden) + 2 * length**2 * dim
        if number in kept:
            macs += slimming_macs(patches, kept[number], dim, scaled(dim, slim_ratio))
            patches = kept[number]
    return macs + dim * classes
