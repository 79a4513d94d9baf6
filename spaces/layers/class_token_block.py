"""A last transformer block that computes only the tokens which the classifier reads."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ClassTokenBlock"]

_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


class ClassTokenBlock(nn.Module):
    """A pre-norm block with queries for the first tokens only; (B, N, C) -> (B, queries, C).

    Its parts have the names that a block of timm has (``norm1``, ``attn`` with ``qkv`` and ``proj``, ...). Exact: the
    tokens that come out are those that the whole block would give.

    Args:
        queries: number of leading tokens that are computed, at least 1.
    """

    reads_weights: ClassVar[tuple[str, ...]] = ("attn.qkv",)
    """Layers whose weights are used without calling them: these must stay plain Linear layers."""

    def __init__(self, queries: int = 1):
        super().__init__()
        self.queries = queries
        self.norm1: Any
        self.norm2: Any
        self.attn: Any
        self.mlp: Any

    @classmethod
    def of(cls, block: nn.Module, queries: int) -> ClassTokenBlock:
        """The same parts as those of ``block``, not copied."""
        made = cls(queries)
        for name in _PARTS:
            part = getattr(block, name, None)
            if isinstance(part, nn.Module):
                made.add_module(name, part)
        return made.train(block.training)

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again; the parts are put in by name."""
        return {"queries": self.queries}

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, C), ``attn_mask`` added to the scores of the keys, (B, 1, 1, N) -> (B, queries, C)."""
        if is_causal:
            raise ValueError(
                "ClassTokenBlock: the class token comes first, so causal attention would see only itself"
            )
        kept = x[:, : self.queries]
        kept = kept + self._through(
            "drop_path1", self._through("ls1", self._attend(self.norm1(x), attn_mask))
        )
        return kept + self._through("drop_path2", self._through("ls2", self.mlp(self.norm2(kept))))

    def _through(self, name: str, x: Tensor) -> Tensor:
        part = self._modules.get(name)
        return x if part is None else part(x)

    def _attend(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        attn = self.attn
        batch, tokens, _ = x.shape
        heads, weight, bias = attn.num_heads, attn.qkv.weight, attn.qkv.bias
        width = weight.shape[0] // 3
        head_dim = width // heads
        first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
        q = functional.linear(x[:, : self.queries], weight[:width], first)
        q = q.reshape(batch, self.queries, heads, head_dim).transpose(1, 2)
        kv = functional.linear(x, weight[width:], rest)
        k, v = kv.reshape(batch, tokens, 2, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        drop = attn.attn_drop.p if self.training and hasattr(attn, "attn_drop") else 0.0
        scale = None if getattr(attn, "fused_attn", False) else float(getattr(attn, "scale", head_dim**-0.5))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=drop, scale=scale
        )
        made: Tensor = attn.proj(out.transpose(1, 2).reshape(batch, self.queries, width))
        return attn.proj_drop(made) if hasattr(attn, "proj_drop") else made
