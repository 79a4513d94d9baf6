"""Token merging (ToMe): after each attention the most similar tokens are averaged into one.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023: bipartite soft matching (section 3, appendix D)
on the keys, proportional attention (equation 1), class and distillation token protected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Matching", "TokenMergingBlocks", "match_tokens"]


class Matching:
    """Which tokens are merged into which: made by ``match_tokens``.

    Args:
        kept: (B, K, 1) positions among the even tokens that stay.
        gone: (B, r, 1) positions among the even tokens that are merged away.
        into: (B, r, 1) positions among the odd tokens that they are merged into.
        prefix: number of leading tokens that are protected.
    """

    def __init__(self, kept: Tensor, gone: Tensor, into: Tensor, prefix: int):
        self.kept, self.gone, self.into, self.prefix = kept, gone, into, prefix

    def sum(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N - r, C): merged tokens are added up; the prefix stays in front, in its order."""
        even, odd = x[:, ::2], x[:, 1::2]
        width = x.shape[-1]
        kept = even.gather(1, self.kept.expand(-1, -1, width))
        gone = even.gather(1, self.gone.expand(-1, -1, width))
        odd = odd.scatter_add(1, self.into.expand(-1, -1, width), gone)
        first, second = (self.prefix + 1) // 2, self.prefix // 2
        head = []
        for place in range(self.prefix):
            source = odd if place % 2 else kept
            head.append(source[:, place // 2 : place // 2 + 1])
        return torch.cat([*head, kept[:, first:], odd[:, second:]], dim=1)


def match_tokens(metric: Tensor, r: int, prefix: int) -> Matching | None:
    """Bipartite soft matching: even tokens look for the most similar odd token; the ``r`` best pairs are merged.

    Args:
        metric: (B, N, D), compared by cosine.
        r: pairs to merge; at most half of the tokens that are not protected are.
        prefix: leading tokens that are neither merged away nor merged into.

    Returns:
        None when nothing is to be merged.
    """
    tokens = metric.shape[1]
    r = min(r, (tokens - prefix) // 2)
    if r <= 0:
        return None
    with torch.no_grad():
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        first, second = (prefix + 1) // 2, prefix // 2
        rows = torch.arange(scores.shape[1], device=scores.device)[:, None] < first
        columns = torch.arange(scores.shape[2], device=scores.device)[None, :] < second
        scores = scores.masked_fill(columns, -torch.inf).masked_fill(rows, -torch.inf)
        best, partner = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        kept, gone = order[:, r:], order[:, :r]
        into = partner[..., None].gather(1, gone)
        if prefix:
            kept = kept.sort(dim=1)[0]
    return Matching(kept, gone, into, prefix)


class TokenMergingBlocks(nn.Sequential):
    """Transformer blocks that merge tokens between attention and MLP; takes the place of ``blocks`` of timm.

    Members without an ``attn`` (token slimming, for instance) are called as they are, and sizes start anew after
    them; one that computes only the class token merges nothing.

    Args:
        amounts: how many tokens each block merges away, at least 0; blocks beyond the list merge none.
        prefix: number of protected leading tokens (class, distillation, registers).
        proportional: whether attention counts a merged token as often as it has parts (equation 1).
        blocks: the members; left out where they are put in by name afterwards.
    """

    def __init__(
        self,
        amounts: Sequence[int] = (),
        prefix: int = 1,
        proportional: bool = True,
        blocks: Sequence[nn.Module] = (),
    ):
        super().__init__(*blocks)
        self.amounts, self.prefix, self.proportional = tuple(amounts), prefix, proportional

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again; the members are put in by name."""
        return {"amounts": list(self.amounts), "prefix": self.prefix, "proportional": self.proportional}

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, fewer, C)."""
        size: Tensor | None = None
        number = 0
        for block in self:
            if not hasattr(block, "attn"):
                x, size = block(x), None
                continue
            amount = self.amounts[number] if number < len(self.amounts) else 0
            number += 1
            bias = size.log().transpose(1, 2)[:, None] if self.proportional and size is not None else None
            if type(block).__name__ == "ClassTokenBlock":
                x, size = block(x, attn_mask=bias), None
            else:
                x, size = self._block(block, x, size, bias, amount)
        return x

    def _block(
        self, block: Any, x: Tensor, size: Tensor | None, bias: Tensor | None, amount: int
    ) -> tuple[Tensor, Tensor | None]:
        attended, keys = _attend(block.attn, block.norm1(x), bias)
        x = x + block.drop_path1(block.ls1(attended))
        matching = match_tokens(keys, amount, self.prefix)
        if matching is not None:
            size = torch.ones_like(x[..., :1]) if size is None else size
            x, size = matching.sum(x * size), matching.sum(size)
            x = x / size
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size


def _attend(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of timm with ``bias`` (B, 1, 1, N) on the keys; also the mean of the keys over heads, (B, N, D)."""
    batch, tokens, _ = x.shape
    heads = attn.num_heads
    head_dim = attn.qkv.out_features // (3 * heads)
    q, k, v = attn.qkv(x).reshape(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    drop = attn.attn_drop.p if attn.training else 0.0
    scale = None if getattr(attn, "fused_attn", False) else float(attn.scale)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=scale)
    out = attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(batch, tokens, heads * head_dim)))
    return out, k.mean(1)
