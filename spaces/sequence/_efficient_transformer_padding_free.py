"""The translation models of efficient_transformer with an encoder that computes no padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from spaces.layers.padding_free import Packing, can_pack, packed_attention
from spaces.sequence._efficient_transformer_translation import (
    EncoderDecoder,
    Memory,
    TranslationEncoderLayer,
)
from spaces.signature import TranslationSignature

__all__ = ["PaddingFreeEncoderDecoder"]


class PaddingFreeEncoderDecoder(EncoderDecoder):
    """An ``EncoderDecoder`` whose encoder packs the source's tokens once and unpacks what the decoder reads.

    Its logits are those of the original. States of the encoder at padded positions are zero; the decoder never reads
    them. Made by ``of``.

    Args:
        signature: the fields of a ``TranslationSignature``.
        dims: widths of encoder and decoder.
        memory_layers: number of last encoder layers that the decoder reads.
    """

    def __init__(self, signature: Mapping[str, Any], dims: Sequence[int], memory_layers: int):
        nn.Module.__init__(self)  # the parts are put in by name
        self.signature = TranslationSignature(**signature)
        self.encoder_dim, self.decoder_dim = dims
        self.memory_layers = memory_layers

    @classmethod
    def of(cls, model: EncoderDecoder) -> PaddingFreeEncoderDecoder:
        """With the parts of ``model``, which are not copied."""
        made = cls(asdict(model.signature), (model.encoder_dim, model.decoder_dim), model.memory_layers)
        for name, part in model.named_children():
            made.add_module(name, part)
        return made.train(model.training)

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again; the parts are put in by name."""
        return {
            "signature": asdict(self.signature),
            "dims": [self.encoder_dim, self.decoder_dim],
            "memory_layers": self.memory_layers,
        }

    def encode(self, source: Tensor) -> Memory:
        """(B, S) -> what ``decode`` needs. While a graph is recorded for export nothing is packed.

        Raises:
            UserMistake: a sentence has a token behind padding, or is longer than the model's ``max_length``.
        """
        if not can_pack():
            states, padding = super().encode(source)
            return states.masked_fill(padding[:, None, :, None], 0.0), padding
        embedding = self.target_embedding if self.signature.shared_vocabulary else self.source_embedding
        padding = source == self.signature.padding
        packing = Packing.of(padding)
        x = packing.pack(self._embed(source, embedding.weight, self.encoder_dim))
        kept: list[Tensor] = []
        for index, layer in enumerate(self.encoder):
            x = _packed_layer(cast("TranslationEncoderLayer", layer), x, packing)
            if index >= len(self.encoder) - self.memory_layers:
                kept.append(packing.unpack(self.encoder_norm(x)))
        return torch.stack(kept, dim=1), padding


def _packed_layer(layer: TranslationEncoderLayer, x: Tensor, packing: Packing) -> Tensor:
    """(T, E) -> (T, E): what the layer computes, each sentence for itself."""
    x = layer.residual("attention", x, lambda y: packed_attention(layer.attention, y, packing))
    return layer.residual("ffn", x, layer.ffn)
