"""LV-ViT, plain or self-slimmed (SiT): vision transformers whose token count falls at learned slimmings.

Papers: Jiang, Hou, Yuan, Zhou, Shi, Jin, Wang, Feng, "All Tokens Matter: Token Labeling for Training Better Vision
Transformers", NeurIPS 2021, arXiv 2104.10858 (LV-ViT); Zong, Li, Song, Wang, Qiao, Leng, Liu, "Self-slimmed Vision
Transformer", ECCV 2022, arXiv 2111.12624 (SiT).
Code: Sense-X/SiT, commit f5778084c45c93f2121685989fa35f930f7e8c54, Apache-2.0 (read, not copied); official files of
both are loaded by ``load_lv_vit``.

Deviations:
- a slimming is one of the blocks, where the original keeps a list beside them: ``load_lv_vit`` renames the keys;
- reverse modules are no part of the network but of the training (``compress.passes.sit``);
- attention runs in PyTorch's fused kernels, in the type of its inputs; the original casts to float32 first;
- on images below 112 pixels the stem divides by less than 16, so that 7 or more patches per side are left;
- a slimming keeps at least one token, where ``int(tokens * keep**stage)`` would be none.

Scale "imagenet" is the sheet of published sizes, its models carry the frozen auxiliary head that the published counts
contain. Scale "small" is ours, for small images, without that head.
This module is free of torch until a model is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spaces.parameters import Architecture, Choice, Constraint, Int, Parameter, When
from spaces.registry import register_space
from spaces.signature import Signature
from spaces.space import SearchSpace
from spaces.vision import _lv_vit_published as published
from spaces.vision._lv_vit_published import HOSTS, SLIM_AFTER, slimmed

if TYPE_CHECKING:
    from spaces.vision._lv_vit_network import ConvStem, LVViT, LVViTBlock
    from spaces.vision._lv_vit_official import (
        convert_lv_vit_state,
        convert_token_slimming,
        load_lv_vit,
        load_reverse_module,
        load_reverse_modules,
        load_token_slimming,
    )
    from spaces.vision._lv_vit_plan import count_macs, plan

__all__ = [
    "HOSTS",
    "SLIM_AFTER",
    "ConvStem",
    "LVViT",
    "LVViTBlock",
    "convert_lv_vit_state",
    "convert_token_slimming",
    "count_macs",
    "load_lv_vit",
    "load_reverse_module",
    "load_reverse_modules",
    "load_token_slimming",
    "plan",
    "slimmed",
]

_HOMES = {
    "_lv_vit_network": ("ConvStem", "LVViT", "LVViTBlock"),
    "_lv_vit_plan": ("count_macs", "plan"),
    "_lv_vit_official": (
        "convert_lv_vit_state",
        "convert_token_slimming",
        "load_lv_vit",
        "load_reverse_module",
        "load_reverse_modules",
        "load_token_slimming",
    ),
}

SLIMMINGS = 4
"""Most slimmings in one network."""

SMALL_DEPTH = 6


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"spaces.vision.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _build(architecture: Architecture, signature: Signature) -> LVViT:
    from spaces.vision._lv_vit_plan import build

    return build(architecture, signature)


def _slims(count: int) -> When:
    """There are at least ``count`` slimmings."""
    return lambda architecture: bool(architecture["slimmings"] >= count)


def _slimming_parameters(most: int, deepest: int) -> dict[str, Parameter]:
    places = {
        f"slim{number}.after": Int(1, deepest - 1, default=number, when=_slims(number))
        for number in range(1, most + 1)
    }
    return {
        "slimmings": Int(0, most),
        **places,
        "keep": Choice(published.KEEP, when=_slims(1)),
        "slim_ratio": Choice(published.SLIM_RATIOS, when=_slims(1)),
    }


def _rises(number: int) -> Constraint:
    """Slimming ``number`` comes behind the one before it and in front of the last block."""

    def holds(architecture: Mapping[str, Any]) -> bool:
        if architecture["slimmings"] < number:
            return True
        place = architecture[f"slim{number}.after"]
        if place >= architecture["depth"]:
            return False
        return bool(number == 1 or architecture[f"slim{number - 1}.after"] < place)

    message = "slimmings come one behind the other, the last in front of the last block"
    return Constraint(f"slim{number}", holds, message)


@register_space("lv_vit", scale="small")
def _small() -> SearchSpace:
    plain: Architecture = {
        "stem": "4c",
        "dim": 96,
        "head_dim": 24,
        "depth": 4,
        "mlp_ratio": 3,
        "skip_division": 2,
    }
    return SearchSpace(
        "lv_vit:small",
        {
            "stem": Choice(published.STEMS),
            "dim": Choice((48, 96, 144, 192)),
            "head_dim": Choice((24, 16, 48)),
            "depth": Int(2, SMALL_DEPTH),
            "mlp_ratio": Choice((3, 1, 2, 4)),
            "skip_division": Choice((2, 1, 3)),
            **_slimming_parameters(2, SMALL_DEPTH),
        },
        build=_build,
        task="image_classification",
        published={"plain": slimmed(plain, ()), "slimmed": slimmed(plain, (1, 2))},
        baseline="plain",
        constraints=[_rises(number) for number in (1, 2)],
        description="Small LV-ViTs for images of 8 to 64 pixels, with up to two token slimmings.",
    )


@register_space("lv_vit", scale="imagenet")
def _imagenet() -> SearchSpace:
    return SearchSpace(
        "lv_vit:imagenet",
        {
            "stem": Choice(published.STEMS),
            "dim": Choice(published.DIMS),
            "depth": Choice(published.DEPTHS),
            "skip_division": Choice((2, 1, 3)),
            **_slimming_parameters(SLIMMINGS, max(published.DEPTHS)),
        },
        build=_build,
        task="image_classification",
        published=published.variants(),
        baseline="lv_vit_s",
        constraints=[_rises(number) for number in range(1, SLIMMINGS + 1)],
        description="LV-ViT and SiT of the papers: width, depth, stem, and where which share of the tokens stays.",
    )
