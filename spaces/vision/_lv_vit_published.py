"""The published sizes of LV-ViT and SiT as architectures; sources in ``lv_vit``. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from spaces.parameters import Architecture

__all__ = [
    "DEPTHS",
    "DIMS",
    "HEAD_DIM",
    "HOSTS",
    "KEEP",
    "SLIM_AFTER",
    "SLIM_RATIOS",
    "STEMS",
    "host",
    "slimmed",
    "variants",
]

DIMS = (320, 384, 512, 768)
DEPTHS = (14, 16, 20, 24)
STEMS = ("4c", "6c", "patch")
KEEP = (0.5, 0.25, 0.7, 0.9)
SLIM_RATIOS = (0.5, 0.25, 1.0)
HEAD_DIM = 64

HOSTS: Mapping[str, Architecture] = MappingProxyType(
    {
        "lv_vit_t": {"stem": "4c", "dim": 320, "depth": 14, "skip_division": 2},
        "lv_vit_s": {"stem": "4c", "dim": 384, "depth": 16, "skip_division": 2},
        "lv_vit_m": {"stem": "4c", "dim": 512, "depth": 20, "skip_division": 2},
        "lv_vit_l": {"stem": "6c", "dim": 768, "depth": 24, "skip_division": 3},
    }
)

SLIM_AFTER: Mapping[str, tuple[str, tuple[int, ...]]] = MappingProxyType(
    {
        "sit_t": ("lv_vit_t", (1, 2, 3)),
        "sit_xs": ("lv_vit_s", (1, 2, 3)),
        "sit_s": ("lv_vit_s", (9, 12, 14)),
        "sit_m": ("lv_vit_m", (10, 14, 17)),
        "sit_l": ("lv_vit_l", (10, 14, 17)),
    }
)
"""For each SiT its host and the numbers of the blocks, from 1, that a slimming follows; half the tokens stay each."""


def slimmed(
    architecture: Architecture, after: Sequence[int], *, keep: float = 0.5, ratio: float = 0.5
) -> Architecture:
    """``architecture`` with slimmings after the blocks ``after``."""
    slimming: Architecture = {"slimmings": len(after)}
    slimming |= {f"slim{number}.after": block for number, block in enumerate(after, 1)}
    if after:
        slimming |= {"keep": keep, "slim_ratio": ratio}
    return {**architecture, **slimming}


def host(name: str) -> Architecture:
    """An LV-ViT of the paper as an architecture without slimming."""
    return slimmed(HOSTS[name], ())


def variants() -> dict[str, Architecture]:
    """All published architectures by name."""
    hosts = {name: host(name) for name in HOSTS}
    return hosts | {name: slimmed(HOSTS[base], after) for name, (base, after) in SLIM_AFTER.items()}
