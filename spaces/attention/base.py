"""The one call signature of every attention mechanism."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

__all__ = ["Attention"]


class Attention(nn.Module, ABC):
    """Multi-head attention from ``query`` to ``key``/``value``.

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
