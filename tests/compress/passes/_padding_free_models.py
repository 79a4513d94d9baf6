"""Models that take padded sequences, and sequences of given lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.passes import make_pass
from compress.passes.base import Context
from spaces.layers.bert_encoder import BertEncoder
from spaces.sequence.efficient_transformer import DecoderSpec, EncoderDecoder, EncoderSpec, TranslationOptions
from spaces.signature import TranslationSignature

__all__ = ["SENTENCES", "bert", "mask", "packed", "sentences", "translator"]

SENTENCES = TranslationSignature(31, 31, max_length=24)


def mask(lengths: list[int], longest: int | None = None) -> Tensor:
    """(B, S) padding mask of sequences of these lengths."""
    wide = max(lengths) if longest is None else longest
    return torch.arange(wide) >= torch.tensor(lengths).unsqueeze(1)


def sentences(lengths: list[int], longest: int | None = None, seed: int = 0) -> Tensor:
    padding = mask(lengths, longest)
    words = torch.randint(3, 31, padding.shape, generator=torch.Generator().manual_seed(seed))
    return words.masked_fill(padding, 0)


def translator(*kinds: str, pre_norm: bool = False, span: int = -1, **more: Any) -> EncoderDecoder:
    torch.manual_seed(1)
    model = EncoderDecoder(
        more.pop("signature", SENTENCES),
        dims=(16, 12),
        encoder=[EncoderSpec(2, 20, kind) for kind in kinds],
        decoder=[DecoderSpec(2, 2, 16, span=span), DecoderSpec(2, 2, 16)],
        options=TranslationOptions(head_dim=8, pre_norm=pre_norm, relative_length=3, **more),
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # their usual start hides where they are applied
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    return model.double().eval()


def bert(depth: int = 2, **options: Any) -> BertEncoder:
    torch.manual_seed(2)
    return BertEncoder(16, 2, depth, **options).double().eval()


def packed(model: nn.Module, *example: Tensor) -> Any:
    return make_pass("padding_free").apply(model, Context(example=example))
