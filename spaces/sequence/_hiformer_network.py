"""The network of hiformer; facts and sources in ``hiformer``.

Letters: B batch, I columns of ids, D dense numbers, L tokens, t task tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaces.errors import SpaceError
from spaces.layers.heterogeneous import HeterogeneousAttention, TokenFeedForward
from spaces.parameters import Architecture
from spaces.sequence._hiformer_plan import InteractionSpec, Norm, hiformer_plan
from spaces.signature import ClickThroughRateSignature, Signature

__all__ = ["FeatureTokens", "Hiformer", "InteractionLayer", "build_hiformer"]

_EMBEDDING_DEVIATION = 0.1  # far below the unit variance of the maps: rare ids stay near the unknown


class FeatureTokens(nn.Module):
    """One token for every categorical field, some for all dense numbers together, and the task tokens at the end.

    All fields share one table of rows, so that a sample is one lookup; a set of ids is their mean, and zero if empty.
    Ids beyond a field's vocabulary count as 0, as unknown ones do.

    Args:
        signature: fields, dense numbers and outputs.
        dim: C.
        dense_tokens: tokens that the dense numbers become; 0 where there are none.
    """

    def __init__(self, signature: ClickThroughRateSignature, dim: int, dense_tokens: int):
        super().__init__()
        self.widths = signature.widths
        self.dense_tokens = dense_tokens
        self.tokens = len(self.widths) + dense_tokens + signature.outputs
        self.table = nn.Embedding(sum(signature.vocabularies), dim)
        self.task_tokens = nn.Parameter(torch.empty(signature.outputs, dim))
        starts = [sum(signature.vocabularies[:field]) for field in range(len(self.widths))]
        offsets = [start for start, width in zip(starts, self.widths, strict=True) for _ in range(width)]
        sizes = [
            size
            for size, width in zip(signature.vocabularies, self.widths, strict=True)
            for _ in range(width)
        ]
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        self.offsets: Tensor
        self.sizes: Tensor
        if dense_tokens:
            self.dense = nn.Sequential(
                nn.Linear(signature.dense, dim), nn.GELU(), nn.Linear(dim, dense_tokens * dim)
            )

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        """(B, I) int64, (B, D) -> (B, L, C)."""
        # An id that is not in its field's vocabulary is unknown, and never another field's.
        ids = ids.masked_fill((ids < 0) | (ids >= self.sizes), 0)
        rows = self.table(ids + self.offsets)  # (B, I, C)
        parts = [rows] if set(self.widths) == {1} else self._fields(ids, rows)
        if self.dense_tokens:
            parts.append(self.dense(dense).unflatten(1, (self.dense_tokens, -1)))
        parts.append(self.task_tokens.to(rows.dtype).expand(len(ids), -1, -1))
        return torch.cat(parts, dim=1)

    def _fields(self, ids: Tensor, rows: Tensor) -> list[Tensor]:
        parts = []
        for width, some, theirs in zip(
            self.widths, ids.split(self.widths, 1), rows.split(self.widths, 1), strict=True
        ):
            if width > 1:
                there = (some != 0).to(rows.dtype)  # (B, width)
                count = there.sum(1, keepdim=True).clamp(min=1)
                theirs = (theirs * (there / count)[:, :, None]).sum(1, keepdim=True)
            parts.append(theirs)
        return parts


class InteractionLayer(nn.Module):
    """Attention and feed-forward part, each with a residual connection, for the last ``queries`` tokens.

    Args:
        tokens: L.
        queries: tokens that ask; the others only answer, and end here.
        dim, heads, key_dim, value_dim, norm: as of ``Hiformer``.
        spec: what kind of layer.
    """

    def __init__(
        self,
        tokens: int,
        queries: int,
        dim: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        spec: InteractionSpec,
        norm: Norm,
    ):
        super().__init__()
        self.norm, self.queries = norm, queries
        self.attention = HeterogeneousAttention(
            tokens,
            dim,
            heads,
            key_dim,
            value_dim,
            kind=spec.kind,
            queries=queries,
            key_rank=spec.key_rank,
            value_rank=spec.value_rank,
            query_kind=spec.query_kind,
            query_rank=spec.query_rank,
            project_out=spec.project_out,
        )
        self.ffn = TokenFeedForward(queries, dim, spec.ffn, shared=spec.shared_ffn)
        if norm != "none":
            self.attention_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, queries, C)."""
        asking = x[:, -self.queries :]
        if self.norm == "pre":
            x = asking + self.attention(self.attention_norm(x))
            return x + self.ffn(self.ffn_norm(x))  # type: ignore[no-any-return]
        x = asking + self.attention(x)
        if self.norm == "none":
            return x + self.ffn(x)  # type: ignore[no-any-return]
        x = self.attention_norm(x)
        return self.ffn_norm(x + self.ffn(x))  # type: ignore[no-any-return]


class Hiformer(nn.Module):
    """Embedded features and task tokens, interaction layers, and a small head on each task token.

    Args:
        signature: fields, dense numbers and outputs (t).
        dim: C.
        heads: of attention.
        key_dim, value_dim: widths of a head's queries and keys, and of its values; free of C.
        dense_tokens: tokens that the dense numbers become; 0 where the signature has none.
        layers: one spec per layer, first layer first.
        norm: ``pre`` (with one more norm at the end), ``post`` or ``none``.
        prune_last: compute nothing in the last layer that the heads do not read. The outputs are the same.
    """

    def __init__(
        self,
        signature: ClickThroughRateSignature,
        *,
        dim: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dense_tokens: int,
        layers: Sequence[InteractionSpec],
        norm: Norm = "pre",
        prune_last: bool = True,
    ):
        super().__init__()
        self.outputs = signature.outputs
        self.features = FeatureTokens(signature, dim, dense_tokens)
        tokens = self.features.tokens
        asking = [tokens] * (len(layers) - 1) + [self.outputs if prune_last else tokens]
        self.layers = nn.ModuleList(
            InteractionLayer(tokens, queries, dim, heads, key_dim, value_dim, spec, norm)
            for queries, spec in zip(asking, layers, strict=True)
        )
        self.final_norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        self.head = TokenFeedForward(self.outputs, dim, dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights that keep the variance, zero biases, small normal embeddings."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = math.sqrt(3 / module.in_features)
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.features.table.weight, std=_EMBEDDING_DEVIATION)
        nn.init.normal_(self.features.task_tokens, std=_EMBEDDING_DEVIATION)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        """(B, I) int64, (B, D) -> (B, t) logits."""
        x = self.features(ids, dense)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final_norm(x[:, -self.outputs :])).squeeze(2)  # type: ignore[no-any-return]


def build_hiformer(architecture: Architecture, signature: Signature) -> Hiformer:
    """The network that an architecture stands for.

    Raises:
        SpaceError: the signature is not one of click-through rates.
    """
    if not isinstance(signature, ClickThroughRateSignature):
        raise SpaceError(
            f"hiformer is for click-through rates, but the task is {signature.task}; use --task click_through_rate"
        )
    return Hiformer(signature, **hiformer_plan(architecture, signature))
