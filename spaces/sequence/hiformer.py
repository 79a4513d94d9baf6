"""Hiformer: transformers over the features of a sample, for click-through rates, each feature with weights of its own.

Paper: Gui, Wang, Yin, Jin, Kula, Xu, Hong, Chi, "Hiformer: Heterogeneous Feature Interactions Learning with
Transformers for Recommender Systems", 2023, arXiv 2311.05884.
Code: none of the authors'. A third-party version, Songcheng-Ren/UniRank, commit
be133c28faf72151b6385d24a17d20de0a00fdc3, Apache-2.0 (read, not copied), can be loaded by ``load_unirank``; it differs
from the paper: composite low-rank queries, one rank, no map after the heads, all tokens kept to the end.

Every categorical field is a token, the dense numbers are a few, and a learned token for each output ends the list;
the heads read these alone, so the last layer computes nothing else (``prune_last``: exact, and linear in the number
of features). A layer's keys and values come from one matrix for all tokens (``shared``, the ordinary transformer),
one for each (``heterogeneous``), or one for all tokens together (``composite``, the Hiformer layer), which may be
factors of a low rank from the start (``composite_low_rank``).

What the paper does not settle, and what is taken here:
- queries are those of the single tokens: its text has composite ones, its numbers of parameters do not;
- the place of the norms is a parameter; as published variants carry ``pre``, none is counted in the paper's figures;
- the paper's numbers contain 0.631 million parameters outside of the layers, of unknown shape. Those inside agree
  exactly; dense part and heads here are small ones of our own;
- the widths of its shared-weight transformers are not known; ``transformer_*`` have those of the others.

The scale "small" is ours, for data that fit a laptop; its ranks are shares of the rank at which two factors cost as
much as the full matrix, so that they fit any number of features. In "google_play", ranks are numbers as in the paper,
and must be cheaper than the full matrix with its 31 categorical fields.
This module is free of torch until a model is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spaces.parameters import Architecture, Choice, Constraint, Int, Parameter, Scalar, When
from spaces.registry import register_space
from spaces.signature import Signature
from spaces.space import SearchSpace

if TYPE_CHECKING:
    from spaces.sequence._hiformer_network import FeatureTokens, Hiformer, InteractionLayer
    from spaces.sequence._hiformer_official import (
        UniRankBlocks,
        load_formula_attention,
        load_formula_ffn,
        load_unirank,
    )
    from spaces.sequence._hiformer_plan import InteractionSpec, count_interaction, count_macs, hiformer_plan

__all__ = [
    "FeatureTokens",
    "Hiformer",
    "InteractionLayer",
    "InteractionSpec",
    "UniRankBlocks",
    "count_interaction",
    "count_macs",
    "hiformer_plan",
    "load_formula_attention",
    "load_formula_ffn",
    "load_unirank",
]

_HOMES = {
    "_hiformer_network": ("FeatureTokens", "Hiformer", "InteractionLayer"),
    "_hiformer_official": ("UniRankBlocks", "load_formula_attention", "load_formula_ffn", "load_unirank"),
    "_hiformer_plan": ("InteractionSpec", "count_interaction", "count_macs", "hiformer_plan"),
}

KINDS = ("shared", "heterogeneous", "composite", "composite_low_rank")
DEPTH = 3
SHARES = (0.25, 0.5, 0.125, 0.0625)
KEY_RANKS = (128, 32, 64, 256)
VALUE_RANKS = (1024, 128, 256, 512)
FIELDS = 31
"""Categorical fields of the paper's data."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"spaces.sequence.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _reaches(index: int) -> When:
    """The layer number ``index`` exists."""
    return lambda architecture: bool(architecture["depth"] >= index)


def _is_inner(index: int) -> When:
    """The layer is there and not the last: the last one's feed-forward part is for the task tokens alone."""
    return lambda architecture: bool(architecture["depth"] > index)


def _is_low_rank(index: int) -> When:
    def condition(architecture: Mapping[str, Any]) -> bool:
        deep = bool(architecture["depth"] >= index)
        return deep and architecture[f"layer{index}.kind"] == "composite_low_rank"

    return condition


def _layers(key_ranks: Sequence[Scalar], value_ranks: Sequence[Scalar]) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for index in range(1, DEPTH + 1):
        layer = f"layer{index}"
        parameters |= {
            f"{layer}.kind": Choice(KINDS, when=_reaches(index)),
            f"{layer}.key_rank": Choice(key_ranks, when=_is_low_rank(index)),
            f"{layer}.value_rank": Choice(value_ranks, when=_is_low_rank(index)),
            f"{layer}.ffn_ratio": Choice((4, 3, 2), when=_reaches(index)),
        }
        if index < DEPTH:
            parameters[f"{layer}.ffn"] = Choice(("per_token", "shared"), when=_is_inner(index))
    return parameters


def _variant(base: Architecture, kinds: Sequence[str], key_rank: Scalar, value_rank: Scalar) -> Architecture:
    """Layers of these kinds; feed-forward parts of the single tokens except after shared attention."""
    architecture: Architecture = {**base, "depth": len(kinds)}
    for index, kind in enumerate(kinds, 1):
        layer = f"layer{index}"
        architecture[f"{layer}.kind"] = kind
        if kind == "composite_low_rank":
            architecture |= {f"{layer}.key_rank": key_rank, f"{layer}.value_rank": value_rank}
        architecture[f"{layer}.ffn_ratio"] = 4
        if index < len(kinds):
            architecture[f"{layer}.ffn"] = "shared" if kind == "shared" else "per_token"
    return architecture


def _build(architecture: Architecture, signature: Signature) -> Hiformer:
    from spaces.sequence._hiformer_network import build_hiformer

    return build_hiformer(architecture, signature)


@register_space("hiformer", scale="small")
def _small() -> SearchSpace:
    base: Architecture = {
        "embed": 32,
        "heads": 4,
        "key_dim": 8,
        "value_dim": 16,
        "dense_tokens": 2,
        "norm": "pre",
    }
    kinds = {
        "transformer_1layer": ("shared",),
        "heteroatt_1layer": ("heterogeneous",),
        "hiformer_1layer": ("composite",),
        "hiformer_1layer_low_rank": ("composite_low_rank",),
        "transformer_2layer": ("shared", "shared"),
        "heteroatt_2layer": ("heterogeneous", "heterogeneous"),
    }
    return SearchSpace(
        "hiformer:small",
        {
            "embed": Choice((32, 16, 64)),
            "heads": Choice((4, 2, 1)),
            "key_dim": Choice((8, 4, 16)),
            "value_dim": Choice((16, 8, 32)),
            "dense_tokens": Int(1, 4, default=2),
            "norm": Choice(("pre", "post")),
            "depth": Int(1, DEPTH),
            **_layers(SHARES, SHARES),
        },
        build=_build,
        task="click_through_rate",
        published={name: _variant(base, value, SHARES[0], SHARES[0]) for name, value in kinds.items()},
        baseline="transformer_1layer",
        description="Hiformers for tables of some ten features, the kind of interaction chosen per layer.",
    )


@register_space("hiformer", scale="google_play")
def _google_play() -> SearchSpace:
    base: Architecture = {
        "embed": 128,
        "heads": 4,
        "key_dim": 16,
        "value_dim": 64,
        "dense_tokens": 6,
        "norm": "pre",
        "prune_last": True,
    }
    kinds = {
        "transformer_1layer": ("shared",),
        "transformer_2layer": ("shared",) * 2,
        "transformer_3layer": ("shared",) * 3,
        "heteroatt_1layer_pruned": ("heterogeneous",),
        "heteroatt_2layer": ("heterogeneous",) * 2,
        "hiformer_1layer_no_lowrank": ("composite",),
        "hiformer_1layer_lowrank_rk128_rv1024": ("composite_low_rank",),
    }
    return SearchSpace(
        "hiformer:google_play",
        {
            "embed": Choice((128, 64, 32)),
            "heads": Choice((4, 2, 1)),
            "key_dim": Choice((16, 8, 32)),
            "value_dim": Choice((64, 32, 16)),
            "dense_tokens": Int(2, 8, default=6),
            "norm": Choice(("pre", "post")),
            "prune_last": Choice((True, False)),
            "depth": Int(1, DEPTH),
            **_layers(KEY_RANKS, VALUE_RANKS),
        },
        build=_build,
        task="click_through_rate",
        published={
            name: _variant(base, value, KEY_RANKS[0], VALUE_RANKS[0]) for name, value in kinds.items()
        },
        baseline="transformer_1layer",
        constraints=[
            Constraint(
                f"cheaper_{part}_rank{index}",
                _cheaper(index, part),
                f"layer{index}.{part}_rank must be below the rank at which two factors cost as much as one matrix",
            )
            for index in range(1, DEPTH + 1)
            for part in ("key", "value")
        ],
        description="The paper's ranges, for the 31 categorical and 30 dense features of its data.",
    )


def _cheaper(index: int, part: str) -> Callable[[Mapping[str, Any]], bool]:
    is_low_rank = _is_low_rank(index)

    def predicate(architecture: Mapping[str, Any]) -> bool:
        if not is_low_rank(architecture):
            return True
        tokens = FIELDS + architecture["dense_tokens"] + 1
        dim, width = architecture["embed"], architecture["heads"] * architecture[f"{part}_dim"]
        rank = architecture[f"layer{index}.{part}_rank"]
        return bool(rank * (dim + width) < tokens * dim * width)

    return predicate
