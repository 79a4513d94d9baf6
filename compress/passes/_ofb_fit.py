"""Which attentions and MLPs of unknown classes the search may narrow: found out by trying."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from compress.passes._ofb_sites import AttentionSite, find_sites, why_no_embedding
from compress.passes._ofb_supernet import Dimensions
from compress.passes.base import Context
from compress.probing import fit, is_known

__all__ = ["fitted_dimensions"]


def fitted_dimensions(model: nn.Module, wanted: Dimensions, context: Context) -> Dimensions:
    """``wanted`` without what would not be exact; attentions that only timm's class can follow become timm's, in place.

    An attention that cannot lose channels may still lose heads. Where one part cannot have a narrower embedding, none
    has; that is reported. Nor has a model whose output is the embedding, even with the original's options.
    """
    sites, _ = find_sites(model)
    attentions = [site for site in sites if isinstance(site, AttentionSite)]
    mlps = [site.name for site in sites if not isinstance(site, AttentionSite)]
    refused, whole, replaced = dict[str, str](), set[str](), list[str]()
    for shared_norm in (False, True):
        names = [site.name for site in attentions if site.whole_heads == shared_norm]
        kinds = _kinds(wanted, channels=not shared_norm)
        if names and kinds:
            found = fit(model, names, (), kinds, context.example)
            replaced += found.replaced
            heads_only = _heads_only(model, found.reasons, kinds, context.example)
            whole |= heads_only
            refused |= {name: reason for name, reason in found.reasons.items() if name not in heads_only}
    refused |= {
        site.name: "has another scale than one over the root of its head width, which the search takes for granted"
        for site in attentions
        if site.name not in refused and _odd_scale(site.holder(model), site.head_dim)
    }
    if wanted.mlp:
        refused |= fit(model, (), mlps, {"hidden"}, context.example).reasons
    reason = why_no_embedding(model)
    if wanted.embedding and wanted.official_options and reason:
        context.report(f"ofb: not searched: embedding: {reason}")
        wanted = replace(wanted, embedding=False)
    if wanted.embedding and not reason:
        narrow = fit(model, [site.name for site in attentions], mlps, {"embedding"}, context.example)
        replaced += narrow.replaced
        for name, reason in list(narrow.reasons.items())[:1]:
            context.report(f"ofb: not searched: embedding: {name} {reason}")
            wanted = replace(wanted, embedding=False)
    if replaced:
        context.report(f"{', '.join(replaced)}: timm's Attention now, which computes the same")
    return replace(wanted, refused=refused, whole_heads=frozenset(whole))


def _kinds(wanted: Dimensions, *, channels: bool) -> set[str]:
    chosen = {"heads": wanted.heads, "channels": wanted.channels and channels}
    return {name for name, yes in chosen.items() if yes}


def _heads_only(
    model: nn.Module, reasons: dict[str, str], kinds: set[str], example: Sequence[Tensor]
) -> set[str]:
    """Which of the attentions that cannot lose heads and channels can lose heads."""
    if not reasons or kinds != {"heads", "channels"}:
        return set()
    return reasons.keys() - fit(model, list(reasons), (), {"heads"}, example).reasons.keys()


def _odd_scale(attention: Any, dim: int) -> bool:
    if is_known(attention) or not hasattr(attention, "scale"):
        return False
    return not math.isclose(float(attention.scale), dim**-0.5, rel_tol=1e-4)
