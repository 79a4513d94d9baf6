"""Token slimming: learned, soft merging of tokens, and the reverse module that a training needs.

Paper: Zong, Li, Song, Wang, Qiao, Leng, Liu, "Self-slimmed Vision Transformer", ECCV 2022, arXiv 2111.12624,
sections 3.2 (token slimming module) and 3.3 (reverse token slimming module).
Code: Sense-X/SiT, commit f5778084c45c93f2121685989fa35f930f7e8c54, Apache-2.0 (read, not copied).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from spaces.errors import UserMistake

__all__ = ["ReverseTokenSlimming", "TokenSlimming", "kept_tokens", "scaled", "slimming_macs"]


def kept_tokens(tokens: int, keep: float, stages: int) -> tuple[int, ...]:
    """Tokens that are left after each of ``stages`` slimmings: ``int(tokens * keep**s)``, but at least one.

    >>> kept_tokens(196, 0.5, 3)
    (98, 49, 24)
    """
    return tuple(max(1, int(tokens * keep**stage)) for stage in range(1, stages + 1))


def scaled(width: int, ratio: float) -> int:
    """``int(width * ratio)``, also where the ratio is the rounded quotient of two whole numbers."""
    return int(width * ratio + 1e-6)


def slimming_macs(tokens: int, kept: int, dim: int, hidden: int) -> int:
    """Multiply-adds of one ``TokenSlimming`` for one sample."""
    return tokens * dim * hidden + tokens * hidden * kept + kept * tokens * dim


class TokenSlimming(nn.Module):
    """Turns N tokens into ``tokens`` convex mixtures of all of them; prefix tokens pass by.

    Each token names, by a small network of its own, how much it wants to be in each of the ``tokens`` slots; a softmax
    over the tokens makes that the weights of a mean. The tokens themselves are mixed, not their normalised form.

    Letters: B batch, N tokens, K = ``tokens``, P = ``prefix``, C = ``dim``, H = ``hidden``.

    Args:
        dim: C, width of a token.
        tokens: K, at least 1. N may differ from call to call.
        ratio: H = int(C * ratio) where ``hidden`` is not given; above 0.
        hidden: H, at least 1.
        prefix: P, number of tokens in front (class, distillation, register tokens) that are neither read nor changed.

    Raises:
        UserMistake: ``tokens`` or H below 1, or ``prefix`` below 0.
    """

    def __init__(
        self, dim: int, tokens: int, *, ratio: float = 0.5, hidden: int | None = None, prefix: int = 0
    ):
        super().__init__()
        hidden = scaled(dim, ratio) if hidden is None else hidden
        for name, value, least in (("tokens", tokens, 1), ("hidden width", hidden, 1), ("prefix", prefix, 0)):
            if value < least:
                raise UserMistake(f"token slimming: {name} {value} must be at least {least}")
        self.tokens = tokens
        self.prefix = prefix
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, tokens)
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def config(self) -> dict[str, Any]:
        """Arguments that make a module of the same shape."""
        return {
            "dim": self.fc1.in_features,
            "tokens": self.tokens,
            "hidden": self.fc1.out_features,
            "prefix": self.prefix,
        }

    def weights(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, N): for each slot its share of each token, positive, summing to 1 over N."""
        logits: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))  # (B, N, K)
        return (logits * self.scale).softmax(dim=1).transpose(1, 2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, P + N, C) -> (B, P + K, C).

        Called like a block of timm. Masks are of the tokens before the slimming, so that there can be none.

        Raises:
            ValueError: there is a mask.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("a model with token slimming takes no attention mask")
        if not self.prefix:
            return self.weights(x) @ x
        patches = x[:, self.prefix :]
        return torch.cat((x[:, : self.prefix], self.weights(patches) @ patches), dim=1)


class ReverseTokenSlimming(nn.Module):
    """Expands K slimmed tokens to N again, so that they can be compared with a teacher's; for training only.

    Letters: B batch, K = ``tokens``, N = ``recovered``, C = ``dim``.

    Args:
        dim: C.
        tokens: K.
        recovered: N.
        ratio: hidden widths over N and over C where ``hidden`` is not given; above 0.
        hidden: the two hidden widths.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        recovered: int,
        *,
        ratio: float = 4.0,
        hidden: tuple[int, int] | None = None,
    ):
        super().__init__()
        over_tokens, over_width = hidden or (scaled(recovered, ratio), scaled(dim, ratio))
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp1 = Mlp(tokens, over_tokens, recovered)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp2 = Mlp(dim, over_width, dim)

    def expand(self, x: Tensor) -> Tensor:
        """(B, K, C) -> (B, N, C), every channel alike and on its own."""
        return self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, C) -> (B, N, C)."""
        y = self.expand(x)
        return y + self.mlp2(self.norm2(y))  # type: ignore[no-any-return]
