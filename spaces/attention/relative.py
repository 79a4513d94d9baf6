"""Softmax attention with relative position keys (Shaw et al. 2018), one table for all heads of a layer.

As in the supernet of OpenNLPLab/mixFormer (c1c57c5e435b188a9e9120b995e4e7aaeaf0462b): positions enter the keys only.
There the table is as wide as the embedding and its first ``head_dim`` columns are used; here it has just those.

Deviation: the official module multiplies each query with a (N, M, D) table; here with the 2R+1 distinct rows, and the
products are picked by distance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from spaces.attention import register_attention
from spaces.attention.base import Attention
from spaces.attention.softmax import attend
from spaces.errors import UserMistake
from spaces.layers.projection import HeadProjection, merge_heads

__all__ = ["RelativeAttention", "relative_attend", "relative_macs", "relative_reference"]

DISTANCE = 14  # R of the classifier; 8 in translation


def _rows(queries: int, keys: int, distance: int, device: torch.device) -> Tensor:
    """(N, M): row of the table for query i and key j, clip(j - i, -R, R) + R."""
    offsets = torch.arange(keys, device=device) - torch.arange(queries, device=device).unsqueeze(-1)
    return offsets.clamp_(-distance, distance).add_(distance)


def relative_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q_i · (k_j + r_(j-i)) / sqrt(D)) v: (B, H, N, D), (B, H, M, D), (B, H, M, D) -> (B, H, N, D).

    Args:
        q, k, v: queries, keys, values.
        table: (2R+1, D); row R + d belongs to the distance d = j - i, clipped to [-R, R].
        causal: query i sees keys up to i only.
        key_padding_mask: (B, M), True where a key is padding. A query that sees no key at all gets zeros.
        dropout: probability on the weights, in [0, 1).
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[-2]
    rows = _rows(queries, keys, table.shape[0] // 2, q.device)
    by_distance = (q / math.sqrt(width)) @ table.to(q.dtype).transpose(0, 1)  # (B, H, N, 2R+1)
    bias = by_distance.gather(-1, rows.expand(batch, heads, queries, keys))  # (B, H, N, M)
    # under autocast products are narrower than their factors, and the kernel wants one type
    return attend(
        q, k, v, causal=causal, key_padding_mask=key_padding_mask, bias=bias.to(q.dtype), dropout=dropout
    )


def relative_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """The formula written out, with the arguments of ``relative_attend``; for tests and for reading."""
    rows = _rows(q.shape[-2], k.shape[-2], table.shape[0] // 2, q.device)
    shifted = k.unsqueeze(-3) + table[rows]  # (B, H, N, M, D)
    scores = (q.unsqueeze(-2) * shifted).sum(-1) / math.sqrt(q.shape[-1])  # (B, H, N, M)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None, :]
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp().masked_fill(hidden, 0.0)
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)


def relative_macs(
    queries: int, keys: int, head_dim: int, *, causal: bool = False, distance: int = DISTANCE
) -> int:
    """Multiply-adds of one head: softmax attention, and each query with the 2R+1 rows of the table."""
    return 2 * queries * keys * head_dim + queries * (2 * distance + 1) * head_dim


@register_attention("relative")
class RelativeAttention(Attention):
    """Multi-head softmax attention that knows the clipped distance of query and key along the sequence.

    Args:
        dim, num_heads, kdim, bias, options: see ``base.Attention``; ``max_length`` makes no difference.
        distance: R, at least 1; farther positions share the outermost rows of the table.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kdim: int | None = None,
        bias: bool = True,
        distance: int = DISTANCE,
        **options: Any,
    ):
        super().__init__(dim, num_heads, kdim=kdim, bias=bias, **options)
        if distance < 1:
            raise UserMistake(
                f"relative: distance={distance} must be at least 1; the classifier uses {DISTANCE}"
            )
        self.distance = distance
        self.in_proj = HeadProjection(dim, num_heads, self.head_dim, kdim=kdim, bias=bias)
        self.position_keys = nn.Parameter(torch.empty(2 * distance + 1, self.head_dim))
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=bias)
        nn.init.xavier_uniform_(self.position_keys)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        q, k, v = self.in_proj(query, key, value)
        heads = relative_attend(
            q,
            k,
            v,
            self.position_keys,
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out_proj(merge_heads(heads))  # type: ignore[no-any-return]  # (B, N, C)
