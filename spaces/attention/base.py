"""The one call signature of every attention mechanism."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from spaces.errors import UserMistake
from spaces.layers._slicing import Index, checked_positions, slice_weights
from spaces.layers.projection import HeadProjection

__all__ = ["Attention"]


class Attention(nn.Module, ABC):
    """Multi-head attention from ``query`` to ``key``/``value``.

    Heads can be taken out where they do not depend on each other, ``in_proj`` (HeadProjection) makes them and
    ``out_proj`` (nn.Linear) reads them. A mechanism that holds more by head overrides ``keep_heads``; one that lays
    heads out in another way, ``head_columns`` and ``head_maps``. Compression tries mechanisms that it does not know.

    Letters: B batch, N query length, M key length, C width, H heads, D head width.

    Args:
        dim: C, width of the query and of the output.
        num_heads: H.
        head_dim: D; ``None`` means ``dim // num_heads`` (then ``dim`` must be divisible by ``num_heads``).
        kdim: width of key and value; ``None`` means ``dim``. Differs in cross-attention between widths.
        causal: position i sees positions up to i only.
        dropout: probability on the attention weights where the mechanism has any, in [0, 1).
        bias: whether the linear maps carry a bias.
        max_length: a length that is never exceeded, for mechanisms whose weights depend on the sequence
            length; fixing it makes a prefix give the same result whatever follows it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        kdim: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        max_length: int | None = None,
    ):
        super().__init__()
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"dim={dim} must be divisible by num_heads={num_heads}, or head_dim must be given"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim or dim // num_heads
        self.inner_dim = self.num_heads * self.head_dim
        self.kdim = kdim or dim
        self.causal = causal
        self.dropout = dropout
        self.max_length = max_length

    @abstractmethod
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """(B, N, C), (B, M, kdim), (B, M, kdim) -> (B, N, C).

        ``key`` defaults to ``query`` and ``value`` to ``key``. ``key_padding_mask`` (B, M) is True where a key
        is padding; a query whose keys are all padding gets the output of an all-zero value. ``grid`` (rows, columns)
        tells mechanisms that work in two dimensions how the last rows*columns tokens are laid out, row by row;
        tokens before them (class tokens) are not part of the grid. Mechanisms without a notion of space ignore it.
        """

    def head_maps(self) -> list[tuple[nn.Linear, Tensor]]:
        """The linear maps that make the heads, each with its rows by part (query, key, value) and head: (parts, H, D).

        Raises:
            UserMistake: there are none.
        """
        in_proj = getattr(self, "in_proj", None)
        if not isinstance(in_proj, HeadProjection):
            raise UserMistake(f"{type(self).__name__} has no in_proj (HeadProjection) that makes its heads")
        return in_proj.maps_by_head()

    def head_columns(self) -> Tensor:
        """Columns of ``out_proj`` that read each head, (H, n).

        Raises:
            UserMistake: nothing reads the heads one by one.
        """
        width = self._reader().in_features
        if width % self.num_heads:
            raise UserMistake(
                f"{type(self).__name__} has an out_proj of {width} inputs, "
                f"which num_heads={self.num_heads} does not divide"
            )
        return torch.arange(width).view(self.num_heads, -1)

    def keep_heads(self, index: Index) -> None:
        """Leave only the heads ``index`` (positions in [0, H), in the order wanted), in place.

        What remains computes what the whole computes with the other heads' columns of ``out_proj`` at zero.
        Parameters that are frozen stay so, types and devices too.

        Raises:
            UserMistake: no such positions, or the mechanism cannot lose heads; then nothing is changed.
        """
        heads = checked_positions(index, self.num_heads, f"{type(self).__name__}: heads")
        self.head_maps()  # may refuse, which must come before anything is cut
        columns = self.head_columns()
        # Heads need not lie one behind the other: what is left lies as the same number of heads lay before.
        order = columns[heads.sort().values].flatten().argsort()
        self.in_proj.keep_heads(heads)  # type: ignore[operator, union-attr]
        slice_weights(self._reader(), inputs=columns[heads].flatten()[order])
        self.num_heads = len(heads)
        self.inner_dim = self.num_heads * self.head_dim

    def _reader(self) -> nn.Linear:
        out_proj = getattr(self, "out_proj", None)
        if type(out_proj) is not nn.Linear:
            found = "nothing" if out_proj is None else type(out_proj).__name__
            raise UserMistake(
                f"{type(self).__name__} has no out_proj (a plain nn.Linear, but {found}) that reads heads one by one"
            )
        return out_proj
