"""Query, key and value maps of an attention mechanism, split into heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spaces.errors import UserMistake
from spaces.layers._slicing import Index, checked_positions, slice_weights

__all__ = ["HeadProjection", "merge_heads"]

_FUSED, _APART = (("fused", 3),), (("query", 1), ("key", 1), ("value", 1))


class HeadProjection(nn.Module):
    """The three linear maps in front of an attention mechanism.

    Letters: B batch, N query length, M key length, C width, H heads, D head width.

    Without ``kdim`` and ``vdim`` the maps are one matrix ``fused`` (3*H*D, C), rows of the query first, then key,
    then value: one product in self-attention. With either they are three matrices ``query``, ``key``, ``value``.

    Args:
        dim: C, width of the query.
        num_heads: H.
        head_dim: D.
        kdim: width of the key where it is a sequence of its own.
        vdim: width of the value; ``None`` means ``kdim``.
        bias: whether the maps carry a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.inner_dim = num_heads * head_dim
        self.is_fused = kdim is None and vdim is None
        if self.is_fused:
            self.fused = nn.Linear(dim, 3 * self.inner_dim, bias=bias)
        else:
            kdim = kdim or dim
            self.query = nn.Linear(dim, self.inner_dim, bias=bias)
            self.key = nn.Linear(kdim, self.inner_dim, bias=bias)
            self.value = nn.Linear(vdim or kdim, self.inner_dim, bias=bias)

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C), (B, M, kdim), (B, M, vdim) -> (B, H, N, D), (B, H, M, D), (B, H, M, D).

        ``key`` defaults to ``query`` and ``value`` to ``key``.
        """
        key = query if key is None else key
        value = key if value is None else value
        if self.is_fused and key is query and value is query:
            heads = self.fused(query).view(*query.shape[:2], 3, self.num_heads, -1)  # (B, N, 3, H, D)
            q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if self.is_fused:
            parts = self._fused_apart(query, key, value)
        else:
            parts = (self.query(query), self.key(key), self.value(value))
        q, k, v = (part.view(*part.shape[:2], self.num_heads, -1).transpose(1, 2) for part in parts)
        return q, k, v

    def _fused_apart(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wq, wk, wv = self.fused.weight.chunk(3)
        bq, bk, bv = (None, None, None) if self.fused.bias is None else self.fused.bias.chunk(3)
        return F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)

    def maps_by_head(self) -> list[tuple[nn.Linear, Tensor]]:
        """Each linear map with the rows that make each head: (parts, H, D), three parts in the fused map, else one.

        Raises:
            UserMistake: a map is no plain ``nn.Linear`` any more (factorised, quantised).
        """
        found = []
        for name, parts in _FUSED if self.is_fused else _APART:
            layer = self.get_submodule(name)
            if type(layer) is not nn.Linear:
                raise UserMistake(
                    f"HeadProjection: {name} must be a plain nn.Linear, but is {type(layer).__name__}"
                )
            found.append((layer, torch.arange(layer.out_features).view(parts, self.num_heads, -1)))
        return found

    def keep_heads(self, index: Index) -> None:
        """Leave only the heads ``index`` (positions in [0, H), in the order wanted), in place.

        Raises:
            UserMistake: no such positions, or a map is no plain ``nn.Linear``; then nothing is changed.
        """
        heads = checked_positions(index, self.num_heads, "in_proj: heads")
        for layer, rows in self.maps_by_head():
            slice_weights(layer, outputs=rows[:, heads].flatten())
        self.inner_dim = self.inner_dim // self.num_heads * len(heads)
        self.num_heads = len(heads)


def merge_heads(heads: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H*D)."""
    return heads.transpose(1, 2).flatten(2)
