"""VanillaNet: plain networks of a few wide layers, each a 1x1 convolution, a max-pool and a series activation.

Paper: Chen, Wang, Guo, Tao, "VanillaNet: the Power of Minimalism in Deep Learning", NeurIPS 2023, arXiv 2305.12972.
Code: huawei-noah/VanillaNet, commit 6aaf7311d8cadddcec9db7595f071bfda6c480f4, MIT (read, not copied); official files,
of training or merged, are loaded by ``load_vanillanet``.

Deep training: each layer is trained as two convolutions whose activation in between fades to the identity
(``identity_share``, ``VanillaNet.set_identity``); ``VanillaNet.merge`` then makes one of them. A new network, as the
original's, starts with the identity, so a training that leaves it alone is one of doubled linear layers; the pass
``activation_pruning`` of ``compress`` sets the shares epoch by epoch and merges.

Deviations:
- the modules have other names, one forward pass serves all forms; loading renames the keys;
- on small images the stem's patches have 2x2 pixels or 1, so that every pooling finds a map to halve;
- adaptive pooling sizes follow from the image, half of the map rounded up; at 224 they are the published ones;
- without deep training there is no batch norm behind the classifier, which is then a single layer.

Published parameters are those of the form ``merged``, and its multiply-adds those of ``plain`` and ``merged``. Latency
follows depth and is for GPUs: the authors advise against CPUs.
This module is free of torch until a model is built.
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

from spaces.errors import UserMistake
from spaces.parameters import Architecture, Choice, Int
from spaces.registry import register_space
from spaces.signature import Signature
from spaces.space import SearchSpace

if TYPE_CHECKING:
    from spaces.vision._vanillanet_network import VanillaBlock, VanillaNet
    from spaces.vision._vanillanet_official import (
        convert_vanillanet_state,
        load_series_activation,
        load_vanilla_block,
        load_vanillanet,
    )
    from spaces.vision._vanillanet_plan import count_macs, plan

__all__ = [
    "SCHEDULES",
    "VanillaBlock",
    "VanillaNet",
    "convert_vanillanet_state",
    "count_macs",
    "identity_share",
    "load_series_activation",
    "load_vanilla_block",
    "load_vanillanet",
    "plan",
]

_HOMES = {
    "_vanillanet_network": ("VanillaBlock", "VanillaNet"),
    "_vanillanet_plan": ("count_macs", "plan"),
    "_vanillanet_official": (
        "convert_vanillanet_state",
        "load_series_activation",
        "load_vanilla_block",
        "load_vanillanet",
    ),
}

SCHEDULES = ("linear", "cosine")

_DEPTHS = {
    "vanillanet_5": (0, 1, 1, 1),
    "vanillanet_6": (0, 1, 1, 2),
    "vanillanet_7": (1, 1, 1, 2),
    **{f"vanillanet_{6 + middle}": (1, 1, middle, 2) for middle in range(2, 8)},
}
"""Blocks at a quarter, an eighth, a sixteenth and a thirty-second of the image's resolution."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"spaces.vision.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def identity_share(epoch: float, decay_epochs: float, schedule: str = "linear") -> float:
    """How much of an activation is the identity in an epoch, counted from 0: A'(x) = (1 - share) A(x) + share x.

    Args:
        epoch: at least 0; the share is set before it and stays for it.
        decay_epochs: the first epoch with a share of 1, at least 0. Published: 100 of 300.
        schedule: ``linear`` (the published one) or ``cosine``.

    Raises:
        UserMistake: an argument out of its range.

    >>> identity_share(0, 100), identity_share(25, 100), identity_share(150, 100)
    (0.0, 0.25, 1.0)
    """
    if epoch < 0 or decay_epochs < 0:
        raise UserMistake(f"identity share: epoch={epoch} and decay_epochs={decay_epochs} must be at least 0")
    if schedule not in SCHEDULES:
        raise UserMistake(f"identity share: schedule={schedule!r} must be one of {', '.join(SCHEDULES)}")
    if epoch >= decay_epochs:
        return 1.0
    done = epoch / decay_epochs
    return done if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))


def _build(architecture: Architecture, signature: Signature) -> VanillaNet:
    from spaces.vision._vanillanet_plan import build

    return build(architecture, signature)


def _architecture(width: int, depths: tuple[int, int, int, int], **others: Any) -> Architecture:
    blocks = {f"blocks{2 ** (place + 2)}": count for place, count in enumerate(depths)}
    return {"width": width, **blocks, "terms": 3, **others, "deep_training": False}


@register_space("vanillanet", scale="small")
def _small() -> SearchSpace:
    published = {
        "plain": _architecture(32, (0, 1, 1, 1)),
        "deep": _architecture(32, (0, 1, 1, 1)) | {"deep_training": True},
    }
    return SearchSpace(
        "vanillanet:small",
        {
            "width": Choice((32, 16, 48, 64)),
            "blocks4": Int(0, 2),
            "blocks8": Int(1, 3),
            "blocks16": Int(1, 3),
            "blocks32": Int(0, 2, default=1),
            "terms": Int(0, 4, default=3),
            "deep_training": Choice((False, True)),
        },
        build=_build,
        task="image_classification",
        published=published,
        baseline="plain",
        description="Small VanillaNets for images of 8 to 64 pixels.",
    )


@register_space("vanillanet", scale="imagenet")
def _imagenet() -> SearchSpace:
    published = {name: _architecture(512, depths, adaptive_pool=False) for name, depths in _DEPTHS.items()}
    wide = _architecture(768, _DEPTHS["vanillanet_13"], adaptive_pool=False)
    published |= {
        "vanillanet_13_x1_5": wide,
        "vanillanet_13_x1_5_ada_pool": wide | {"adaptive_pool": True},
    }
    return SearchSpace(
        "vanillanet:imagenet",
        {
            "width": Int(64, 768, step=64, default=512),
            "blocks4": Int(0, 2),
            "blocks8": Int(1, 3),
            "blocks16": Int(1, 9),
            "blocks32": Int(1, 3),
            "terms": Int(0, 4, default=3),
            "adaptive_pool": Choice((False, True)),
            "deep_training": Choice((False, True)),
        },
        build=_build,
        task="image_classification",
        published=published,
        baseline="vanillanet_6",
        description="VanillaNets of the paper: width, depth at each resolution, series activation, pooling.",
    )
