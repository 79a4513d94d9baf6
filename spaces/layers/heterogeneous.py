"""Attention and feed-forward parts that treat every token of a fixed list of tokens in its own way.

Source: Gui et al., "Hiformer: Heterogeneous Feature Interactions Learning with Transformers for Recommender Systems",
2023, arXiv 2311.05884, sections on heterogeneous attention, on the Hiformer layer and on model efficiency.

Letters: B batch, L tokens, T tokens that ask (the last ones), C width, H heads, K width of a head's queries and keys,
V width of a head's values.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spaces.layers.low_rank import LowRankLinear

__all__ = [
    "KINDS",
    "CompositeLinear",
    "HeterogeneousAttention",
    "Kind",
    "TokenFeedForward",
    "TokenLinear",
    "break_even_rank",
]

Kind = Literal["shared", "heterogeneous", "composite", "composite_low_rank"]
KINDS: tuple[Kind, ...] = ("shared", "heterogeneous", "composite", "composite_low_rank")


def break_even_rank(inputs: int, outputs: int) -> float:
    """The rank at which two factors cost as much as the full matrix; cheaper below."""
    return inputs * outputs / (inputs + outputs)


class TokenLinear(nn.Module):
    """A linear map of its own for every token: (B, L, in) -> (B, L, out), as one grouped product.

    Args:
        tokens: L.
        in_features, out_features: widths.
        bias: whether the maps carry a bias.
    """

    def __init__(self, tokens: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.tokens, self.in_features, self.out_features = tokens, in_features, out_features
        self.weight = nn.Parameter(torch.empty(tokens, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(tokens, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights that keep the variance, zero biases."""
        bound = math.sqrt(3 / self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, in) -> (B, L, out)."""
        out = torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows them."""
        bias = self.bias is not None
        return f"tokens={self.tokens}, in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


class CompositeLinear(nn.Module):
    """Every output token from all input tokens together: (B, L, C) -> (B, T, out), without bias.

    ``map`` takes the tokens one after the other and gives the outputs one after the other. It is an ordinary linear
    layer, so that whatever works on such layers finds it, or two thin ones.

    Args:
        tokens: L.
        dim: C.
        outputs: T.
        out_features: width of an output token.
        rank: of the factors that are trained in place of the full matrix, at least 1; ``None`` for the full matrix.
    """

    map: nn.Linear | LowRankLinear

    def __init__(self, tokens: int, dim: int, outputs: int, out_features: int, rank: int | None = None):
        super().__init__()
        self.outputs = outputs
        if rank is None:
            self.map = nn.Linear(tokens * dim, outputs * out_features, bias=False)
        else:
            self.map = LowRankLinear(tokens * dim, outputs * out_features, rank, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, T, out)."""
        return self.map(x.flatten(1)).unflatten(1, (self.outputs, -1))  # type: ignore[no-any-return]


class TokenFeedForward(nn.Module):
    """GELU(x W1 + b1) W2 + b2 with weights of its own for every token, or the same for all.

    Args:
        tokens: L.
        dim: width of inputs and outputs.
        hidden: width inside.
        out_features: width of outputs where it is another than ``dim``.
        shared: one pair of maps for all tokens.
    """

    def __init__(
        self, tokens: int, dim: int, hidden: int, out_features: int | None = None, *, shared: bool = False
    ):
        super().__init__()
        out_features = out_features or dim
        self.fc1: nn.Module
        self.fc2: nn.Module
        if shared:
            self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out_features)
        else:
            self.fc1, self.fc2 = TokenLinear(tokens, dim, hidden), TokenLinear(tokens, hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, dim) -> (B, L, out_features)."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class HeterogeneousAttention(nn.Module):
    """Softmax attention over a fixed list of tokens, projected in one of four ways.

    ``shared``: one matrix for all tokens, the ordinary attention. ``heterogeneous``: a matrix for every token.
    ``composite``: keys and values of all tokens from all tokens, by one matrix each (the Hiformer layer).
    ``composite_low_rank``: the same through factors with one rank over all heads. None has a bias. A token cannot be
    left out and the list cannot grow: where another feature joins, it is another model.

    Args:
        tokens: L.
        dim: C.
        heads: H.
        key_dim: K. Neither it nor V depends on C and H.
        value_dim: V.
        kind: how keys and values are projected.
        queries: T, the number of tokens at the end that ask; all by default. The others only answer.
        key_rank, value_rank: for ``composite_low_rank``.
        query_kind: how queries are projected; by default ``shared`` where ``kind`` is, else ``heterogeneous``. The
            paper's text has composite queries as well, its numbers of parameters do not.
        query_rank: for a ``composite_low_rank`` query.
        project_out: whether a map from H*V to C follows, of every token or shared as the queries are; without it
            H*V must be C.

    Raises:
        ValueError: a rank that is missing or without use, more queries than tokens, or widths that do not fit.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        kind: Kind = "heterogeneous",
        queries: int | None = None,
        key_rank: int | None = None,
        value_rank: int | None = None,
        query_kind: Kind | None = None,
        query_rank: int | None = None,
        project_out: bool = True,
    ):
        super().__init__()
        self.queries = tokens if queries is None else queries
        if not 1 <= self.queries <= tokens:
            raise ValueError(f"queries={queries} must lie in 1..{tokens}, the number of tokens")
        if not project_out and heads * value_dim != dim:
            raise ValueError(
                f"heads={heads} times value_dim={value_dim} must be dim={dim} without project_out"
            )
        self.heads, self.kind = heads, kind
        self.query_kind: Kind = query_kind or ("shared" if kind == "shared" else "heterogeneous")
        self.query = _projection(
            self.query_kind, tokens, self.queries, dim, heads * key_dim, ("query_rank", query_rank)
        )
        self.key = _projection(kind, tokens, tokens, dim, heads * key_dim, ("key_rank", key_rank))
        self.value = _projection(kind, tokens, tokens, dim, heads * value_dim, ("value_rank", value_rank))
        self.out: nn.Module = nn.Identity()
        if project_out and self.query_kind == "shared":
            self.out = nn.Linear(heads * value_dim, dim, bias=False)
        elif project_out:
            self.out = TokenLinear(self.queries, heads * value_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, T, C), for the last T tokens."""
        asking = x[:, -self.queries :]
        q = self.query(x if self.query_kind.startswith("composite") else asking)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, self.key(x), self.value(x))
        )
        heads = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, V)
        return self.out(heads.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _projection(
    kind: Kind, tokens: int, outputs: int, dim: int, out_features: int, rank: tuple[str, int | None]
) -> nn.Module:
    name, size = rank
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if (kind == "composite_low_rank") != (size is not None):
        raise ValueError(
            f"{name}={size!r} must be given for composite_low_rank and for nothing else, not {kind}"
        )
    if kind == "shared":
        return nn.Linear(dim, out_features, bias=False)
    if kind == "heterogeneous":
        return TokenLinear(outputs, dim, out_features, bias=False)
    return CompositeLinear(tokens, dim, outputs, out_features, size)
