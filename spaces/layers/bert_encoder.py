"""The encoder of BERT: post-norm layers on embedded tokens, padded or without padding.

Source: Zhai et al., "ByteTransformer", IPDPS 2023, whose reference is the standard layer: exact GELU and LayerNorm with
eps 1e-5; its CUDA kernels compute the tanh form of GELU with eps 1e-6. Both are arguments here.

Letters: B sequences, S positions, T true tokens, C width.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from spaces.attention.softmax import SoftmaxAttention
from spaces.layers.padding_free import Packing, can_pack, packed_attention

__all__ = ["BertEncoder", "BertLayer", "PaddingFreeBertEncoder"]


class BertLayer(nn.Module):
    """h = LN(Attention(x) + x), then LN(FFN(h) + h).

    Args:
        dim: C.
        num_heads: of the attention; divides C.
        ffn: width of the feed-forward part.
        eps: of both LayerNorms.
        tanh_gelu: GELU in its tanh form.
        dropout: probability on the result of each part and on attention weights, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn: int,
        *,
        eps: float = 1e-5,
        tanh_gelu: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.attention = SoftmaxAttention(dim, num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, ffn)
        self.act = nn.GELU("tanh" if tanh_gelu else "none")
        self.fc2 = nn.Linear(ffn, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, S, C), padding (B, S), True where there is no token -> (B, S, C)."""
        return self._behind(x, self.attention(x, key_padding_mask=padding))

    def packed(self, x: Tensor, packing: Packing) -> Tensor:
        """The same on packed rows: (T, C) -> (T, C)."""
        return self._behind(x, packed_attention(self.attention, x, packing))

    def _behind(self, x: Tensor, attended: Tensor) -> Tensor:
        h = self.norm1(self.dropout(attended) + x)
        return self.norm2(self.dropout(self.fc2(self.act(self.fc1(h)))) + h)  # type: ignore[no-any-return]


class BertEncoder(nn.Module):
    """``depth`` layers; what comes out at padded positions is zero.

    Args:
        dim, num_heads, eps, tanh_gelu, dropout: see ``BertLayer``; the defaults are BERT-base.
        depth: number of layers.
        ffn: width of the feed-forward parts; ``None`` means 4 * ``dim``.
    """

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 12,
        depth: int = 12,
        *,
        ffn: int | None = None,
        eps: float = 1e-5,
        tanh_gelu: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            BertLayer(dim, num_heads, ffn or 4 * dim, eps=eps, tanh_gelu=tanh_gelu, dropout=dropout)
            for _ in range(depth)
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """x (B, S, C), padding (B, S) bool, True where there is no token -> (B, S, C)."""
        for layer in self.layers:
            x = layer(x, padding)
        return x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0.0)


class PaddingFreeBertEncoder(BertEncoder):
    """A ``BertEncoder`` that computes no padding; made by ``of``. Padding must be at the end of each sequence."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # the layers are put in by name
        self.layers: nn.ModuleList

    @classmethod
    def of(cls, encoder: BertEncoder) -> PaddingFreeBertEncoder:
        """With the layers of ``encoder``, which are not copied."""
        made = cls()
        made.add_module("layers", encoder.layers)
        return made.train(encoder.training)

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again; the layers are put in by name."""
        return {}

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """As of ``BertEncoder``. While a graph is recorded for export nothing is packed; results are the same.

        Raises:
            UserMistake: there is a token behind padding.
        """
        if padding is None or not can_pack():
            return super().forward(x, padding)
        packing = Packing.of(padding)
        rows = packing.pack(x)
        for layer in self.layers:
            rows = cast(BertLayer, layer).packed(rows, packing)
        return packing.unpack(rows)
