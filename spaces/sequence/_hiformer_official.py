"""Weights in the layouts of others: the paper's formulas written as tensors, and UniRank's blocks.

Letters: B batch, L tokens, C width, H heads, K width of a head's queries and keys, V width of a head's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spaces.errors import UserMistake
from spaces.layers.heterogeneous import HeterogeneousAttention, Kind, TokenFeedForward
from spaces.sequence._hiformer_network import InteractionLayer
from spaces.sequence._hiformer_plan import InteractionSpec

__all__ = ["UniRankBlocks", "load_formula_attention", "load_formula_ffn", "load_unirank"]


def load_formula_attention(
    state: Mapping[str, Tensor], kind: Kind = "heterogeneous", *, queries: int | None = None
) -> HeterogeneousAttention:
    """Attention with the matrices of the paper's formulas.

    Args:
        state: ``Q`` (L, H, C, K), ``O`` (L, H*V, C) and, by ``kind``: ``K`` (L, H, C, K) and ``V`` (L, H, C, V);
            ``K_composite`` (L*C, L*H*K) and ``V_composite``; or ``K_left`` (L*C, rank) and ``K_right`` (L*H*K, rank),
            likewise ``V_*``.
        kind: ``heterogeneous``, ``composite`` or ``composite_low_rank``.
        queries: number of tokens at the end that ask; all by default.

    Raises:
        UserMistake: a tensor is missing, has another shape, or ``kind`` is another.
    """
    if kind not in ("heterogeneous", "composite", "composite_low_rank"):
        raise UserMistake(
            f"kind={kind!r} must be heterogeneous, composite or composite_low_rank: the formulas have no shared matrix"
        )
    tokens, heads, dim, key_dim = _get(state, "Q").shape
    value_dim = _get(state, "O").shape[1] // heads
    ranks: dict[str, Any] = (
        {"key_rank": _get(state, "K_left").shape[1], "value_rank": _get(state, "V_left").shape[1]}
        if kind == "composite_low_rank"
        else {}
    )
    attention = HeterogeneousAttention(
        tokens, dim, heads, key_dim, value_dim, kind=kind, queries=queries, **ranks
    )
    attention.to(_get(state, "Q").dtype)
    asking = slice(tokens - attention.queries, tokens)
    own = {"query.weight": _by_token(_get(state, "Q")[asking]), "out.weight": _get(state, "O")[asking]}
    for name, letter in (("key", "K"), ("value", "V")):
        if kind == "heterogeneous":
            own[f"{name}.weight"] = _by_token(_get(state, letter))
        elif kind == "composite":
            own[f"{name}.map.weight"] = _get(state, f"{letter}_composite").T
        else:
            own[f"{name}.map.down.weight"] = _get(state, f"{letter}_left").T
            own[f"{name}.map.up.weight"] = _get(state, f"{letter}_right")
    _fill(attention, own)
    return attention.eval()


def load_formula_ffn(state: Mapping[str, Tensor], *, queries: int | None = None) -> TokenFeedForward:
    """The feed-forward part of the last ``queries`` tokens (all by default).

    Args:
        state: ``W1`` (L, C, F), ``b1`` (L, F), ``W2`` (L, F, C), ``b2`` (L, C).

    Raises:
        UserMistake: a tensor is missing or has another shape.
    """
    tokens, dim, hidden = _get(state, "W1").shape
    first = 0 if queries is None else tokens - queries
    ffn = TokenFeedForward(tokens - first, dim, hidden).to(_get(state, "W1").dtype)
    names = {"fc1.weight": "W1", "fc1.bias": "b1", "fc2.weight": "W2", "fc2.bias": "b2"}
    _fill(ffn, {own: _get(state, name)[first:] for own, name in names.items()})
    return ffn.eval()


class UniRankBlocks(nn.Module):
    """Interaction layers over given tokens: (B, L, C) -> (B, L, C)."""

    def __init__(self, layers: list[InteractionLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        for layer in self.layers:
            x = layer(x)
        return x


def load_unirank(state: Mapping[str, Tensor], num_heads: int) -> UniRankBlocks:
    """UniRank's ``HiFormerBlocks``: pre-norm, composite low-rank queries, keys and values, no map after the heads.

    Args:
        state: its ``state_dict``; keys may start with a prefix, as ``unified_interaction_layers.``.
        num_heads: H, which no weight tells.

    Raises:
        UserMistake: a tensor is missing or has another shape, or the width is no multiple of ``num_heads``.
    """
    state = _without_prefix(state)
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("mixer_layers.")), default=-1)
    if not depth:
        raise UserMistake(
            "state holds no 'mixer_layers.0.*'; give the state dict of UniRank's HiFormerBlocks"
        )
    tokens, dim, hidden = _get(state, "pffn_layers.0.W1").shape
    if num_heads < 1 or dim % num_heads:
        raise UserMistake(f"num_heads={num_heads} must divide the width {dim} of these weights")
    layers = [_unirank_layer(state, number, tokens, dim, hidden, num_heads) for number in range(depth)]
    return UniRankBlocks(layers).eval()


def _unirank_layer(
    state: Mapping[str, Tensor], number: int, tokens: int, dim: int, hidden: int, heads: int
) -> InteractionLayer:
    mixer, ffn = f"mixer_layers.{number}", f"pffn_layers.{number}"
    rank = {letter: len(_get(state, f"{mixer}.W_{letter}.down_proj.weight")) for letter in "qkv"}
    spec = InteractionSpec(
        kind="composite_low_rank",
        ffn=hidden,
        key_rank=rank["k"],
        value_rank=rank["v"],
        query_kind="composite_low_rank",
        query_rank=rank["q"],
        project_out=False,
    )
    layer = InteractionLayer(tokens, tokens, dim, heads, dim // heads, dim // heads, spec, "pre")
    own: dict[str, Tensor] = {}
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        for half in ("down", "up"):
            own[f"attention.{name}.map.{half}.weight"] = _get(state, f"{mixer}.W_{letter}.{half}_proj.weight")
    for part, theirs in (("weight", "W"), ("bias", "b")):
        own |= {f"ffn.fc{map_}.{part}": _get(state, f"{ffn}.{theirs}{map_}") for map_ in (1, 2)}
        own[f"attention_norm.{part}"] = _get(state, f"mixer_norms.{number}.{part}")
        own[f"ffn_norm.{part}"] = _get(state, f"pffn_norms.{number}.{part}")
    _fill(layer, own)
    return layer


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = next((key.partition("mixer_layers.")[0] for key in state if "mixer_layers." in key), "")
    return {key.removeprefix(found): value for key, value in state.items() if key.startswith(found)}


def _by_token(weight: Tensor) -> Tensor:
    """(L, H, C, K) -> (L, C, H*K)."""
    return weight.transpose(1, 2).flatten(2)


def _get(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UserMistake(f"state has no tensor {name!r}; it holds {', '.join(sorted(state)) or 'nothing'}")
    return state[name]


def _fill(module: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Copies ``own`` into the parameters, all of which it must name."""
    parameters = dict(module.named_parameters())
    if parameters.keys() != own.keys():
        raise UserMistake(f"weights for {sorted(parameters.keys() ^ own.keys())} do not fit")
    with torch.no_grad():
        for name, value in own.items():
            if parameters[name].shape != value.shape:
                raise UserMistake(
                    f"weights for {name}: shape {tuple(value.shape)} must be {tuple(parameters[name].shape)}"
                )
            parameters[name].copy_(value)
