"""From an architecture of vanillanet to its network and its cost; facts and sources in ``vanillanet``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spaces.errors import SpaceError
from spaces.parameters import Architecture
from spaces.signature import ImageSignature, Signature
from spaces.vision._vanillanet_network import VanillaNet

__all__ = ["build", "count_macs", "plan"]

_RESOLUTIONS = (4, 8, 16, 32)
_PATCH = 4


def plan(
    architecture: Mapping[str, Any], signature: ImageSignature, *, form: str | None = None
) -> dict[str, Any]:
    """Arguments of ``VanillaNet`` for an architecture of either scale.

    Args:
        architecture: of a space of vanillanet.
        signature: of the images. On small ones the patches of the stem have 2x2 pixels, or 1, so that every
            pooling finds a map to halve.
        form: None: ``deep`` with deep training, else ``plain``. The published sizes count ``merged``.

    Raises:
        SpaceError: the images are too small even so.
    """
    dims, strides = [int(architecture["width"])], []
    for resolution in _RESOLUTIONS:
        for number in range(int(architecture[f"blocks{resolution}"])):
            shrinks = number == 0 and resolution > _PATCH
            dims.append(dims[-1] * (2 if shrinks else 1))
            strides.append(2 if shrinks else 1)
    adaptive = bool(architecture.get("adaptive_pool", False))
    halvings, sides = strides.count(2), (signature.height, signature.width)
    patch = next((p for p in (4, 2, 1) if min(sides) // p >= 2**halvings), None)
    if patch is None:
        raise SpaceError(
            f"vanillanet: {halvings} poolings need images of at least {2**halvings} pixels per side, not "
            f"{signature.height}x{signature.width}"
        )
    overlaps = adaptive and patch == _PATCH
    stride, padding = (patch - 1, 1) if overlaps else (patch, 0)
    return {
        "channels": signature.channels,
        "classes": signature.classes,
        "dims": dims,
        "strides": strides,
        "terms": int(architecture["terms"]),
        "dropout": 0.05 if "adaptive_pool" in architecture else 0.0,  # as published
        "patch": patch,
        "stem_stride": stride,
        "stem_padding": padding,
        "pools": _ceilings(strides, sides, patch, stride, padding) if adaptive else None,
        "form": form or ("deep" if architecture["deep_training"] else "plain"),
    }


def build(architecture: Architecture, signature: Signature) -> VanillaNet:
    """The classifier that an architecture stands for.

    Raises:
        SpaceError: the signature is not one of images, or of too small ones.
    """
    if not isinstance(signature, ImageSignature):
        raise SpaceError(f"vanillanet is for images, but the task is {signature.task}")
    return VanillaNet(**plan(architecture, signature))


def count_macs(
    size: Sequence[int],
    *,
    channels: int = 3,
    classes: int = 1000,
    dims: Sequence[int],
    strides: Sequence[int],
    terms: int = 3,
    patch: int = 4,
    stem_stride: int | None = None,
    stem_padding: int = 0,
    pools: Sequence[Sequence[int] | None] | None = None,
    form: str = "deep",
    **_: Any,
) -> int:
    """Multiply-adds of the convolutions for one image of ``size`` (height, width); arguments as of ``VanillaNet``."""
    doubled = form == "deep"
    rows, columns = (_stem_side(side, patch, stem_stride or patch, stem_padding) for side in size)
    window = (2 * terms + 1) ** 2
    macs = rows * columns * dims[0] * (channels * patch**2 + window + (dims[0] if doubled else 0))
    for number, stride in enumerate(strides):
        before, after = dims[number], dims[number + 1]
        macs += rows * columns * before * (after + (before if doubled else 0))
        if stride == 2:
            pool = pools[number] if pools is not None else None
            rows, columns = pool or (rows // 2, columns // 2)
        macs += rows * columns * after * window
    return macs + dims[-1] * classes + (classes**2 if doubled else 0)


def _stem_side(side: int, patch: int, stride: int, padding: int) -> int:
    return (side + 2 * padding - patch) // stride + 1


def _ceilings(
    strides: Sequence[int], sides: Sequence[int], patch: int, stride: int, padding: int
) -> list[tuple[int, int] | None]:
    """Half the map, rounded up, as in the published network with adaptive pooling (75, 38, 19, 10)."""
    rows, columns = (_stem_side(side, patch, stride, padding) for side in sides)
    pools: list[tuple[int, int] | None] = []
    for step in strides:
        if step == 2:
            rows, columns = -(-rows // 2), -(-columns // 2)
        pools.append((rows, columns) if step == 2 else None)
    return pools
