"""Softmax attention (Vaswani et al. 2017), delegated to PyTorch's fused kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spaces.attention import register_attention
from spaces.attention.base import Attention
from spaces.layers.projection import HeadProjection, merge_heads

__all__ = ["SoftmaxAttention", "attend", "softmax_macs", "softmax_reference", "visible_keys"]


def visible_keys(queries: int, keys: int, causal: bool, key_padding_mask: Tensor | None) -> Tensor | None:
    """Which key each query may see: bool, broadcastable to (B, 1, ``queries``, ``keys``); None where all are seen.

    A mask for causality alone is left to the kernel where it has one, so None is also returned without padding.
    """
    if key_padding_mask is None:
        return None
    visible = ~key_padding_mask[:, None, None, :]
    if causal:
        visible = visible & torch.ones(queries, keys, dtype=torch.bool, device=visible.device).tril()
    return visible


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ / sqrt(D) + bias) v: (B, H, N, D), (B, H, M, D), (B, H, M, D) -> (B, H, N, D).

    Args:
        q, k, v: queries, keys, values.
        causal: query i sees keys up to i only.
        key_padding_mask: (B, M), True where a key is padding. A query that sees no key at all gets zeros.
        bias: (B, H, N, M), added to the scores.
        dropout: probability on the weights, in [0, 1).
    """
    visible = visible_keys(q.shape[-2], k.shape[-2], causal, key_padding_mask)
    if visible is None and bias is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    if visible is None and causal:
        visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    blind = None
    if visible is not None and key_padding_mask is not None:
        # a row without a single key is NaN in some kernels and in their gradients: let it see all, then blank it
        blind = ~visible.any(-1, keepdim=True)
        visible = visible | blind
    if bias is None:
        mask = visible
    else:
        mask = bias if visible is None else bias.masked_fill(~visible, -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out if blind is None else out.masked_fill(blind, 0.0)


def softmax_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_padding_mask: Tensor | None = None
) -> Tensor:
    """The formula written out, with the arguments of ``attend``; for tests and for reading."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, N, M)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None, :]
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp().masked_fill(hidden, 0.0)
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)


def softmax_macs(queries: int, keys: int, head_dim: int, *, causal: bool = False) -> int:
    """Multiply-adds of one head: scores and weighted values, all keys counted (kernels differ in what they skip)."""
    return 2 * queries * keys * head_dim


@register_attention("softmax")
class SoftmaxAttention(Attention):
    """Multi-head softmax attention. Arguments: see ``base.Attention``; ``max_length`` makes no difference."""

    def __init__(
        self, dim: int, num_heads: int, *, kdim: int | None = None, bias: bool = True, **options: Any
    ):
        super().__init__(dim, num_heads, kdim=kdim, bias=bias, **options)
        self.in_proj = HeadProjection(dim, num_heads, self.head_dim, kdim=kdim, bias=bias)
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=bias)

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
        dropout = self.dropout if self.training else 0.0
        heads = attend(q, k, v, causal=self.causal, key_padding_mask=key_padding_mask, dropout=dropout)
        return self.out_proj(merge_heads(heads))  # type: ignore[no-any-return]  # (B, N, C)
