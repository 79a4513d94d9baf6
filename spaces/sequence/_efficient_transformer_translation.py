"""The encoder-decoder of efficient_transformer (HAT's rules); facts and sources in ``efficient_transformer``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from spaces.attention import Attention
from spaces.errors import SpaceError, UserMistake
from spaces.layers.embed import sinusoids
from spaces.parameters import Architecture
from spaces.sequence._efficient_transformer_image import core_macs, self_attention
from spaces.sequence._efficient_transformer_published import WMT_ENCODER_DEPTH
from spaces.signature import Signature, TranslationSignature

__all__ = [
    "SCALES",
    "DecoderSpec",
    "EncoderDecoder",
    "EncoderSpec",
    "Memory",
    "TranslationOptions",
    "build_translation",
    "count_translation_macs",
    "translation_plan",
]

Memory = tuple[Tensor, Tensor]
"""What ``encode`` gives to ``decode``: states (B, K, S, E) of the last K encoder layers, the very last one last, and
the padding mask (B, S). Batch first in both, so that a beam search repeats or reorders them along dimension 0."""


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder layer: number of heads, width of the feed-forward part, kind of attention."""

    heads: int
    ffn: int
    attention: str = "softmax"


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder layer.

    Args:
        self_heads, cross_heads: numbers of attention heads.
        ffn: width of the feed-forward part.
        self_attention: kind of the causal attention over the target.
        cross_attention: kind of the attention over the source, "softmax" or "cosformer".
        span: encoder layers that the cross-attention reads, in HAT's code: -1 the last one, 1 the last two, 2 the
            last three, side by side. "cosformer" reads the last one only, because it weighs by position.
    """

    self_heads: int
    cross_heads: int
    ffn: int
    self_attention: str = "softmax"
    cross_attention: str = "softmax"
    span: int = -1

    @property
    def encoder_layers(self) -> int:
        """How many encoder layers the cross-attention reads."""
        return 1 if self.span == -1 else self.span + 1


@dataclass(frozen=True)
class TranslationOptions:
    """What all layers have in common.

    Args:
        inner_dim: width of queries, keys and values, whatever the number of heads; ``None``: heads times ``head_dim``.
        head_dim: width of a head where ``inner_dim`` is None.
        pre_norm: LayerNorm before each part and once at the end, instead of after each part.
        relative_length: clip of the distances in "relative" layers.
        dropout: probability on embeddings and on the result of each part, in [0, 1).
        attention_dropout: probability on attention weights, in [0, 1).
    """

    inner_dim: int | None = None
    head_dim: int = 32
    pre_norm: bool = False
    relative_length: int = 8
    dropout: float = 0.1
    attention_dropout: float = 0.0

    def width(self, heads: int) -> int:
        """Width of one of ``heads`` heads."""
        return self.head_dim if self.inner_dim is None else self.inner_dim // heads


_HAT = TranslationOptions(inner_dim=512, dropout=0.3, attention_dropout=0.1)
SCALES = {
    "small_translation": TranslationOptions(),
    "wmt14ende": _HAT,
    "wmt14ende_hat": _HAT,
    "wmt14_large": replace(_HAT, inner_dim=1024, pre_norm=True),
}


class _Layer(nn.Module):
    """Residual parts with the norm before or after each."""

    def __init__(self, dim: int, parts: Sequence[str], ffn: int, options: TranslationOptions):
        super().__init__()
        self.norms = nn.ModuleDict({part: nn.LayerNorm(dim) for part in parts})
        self.ffn = Mlp(dim, ffn, act_layer=nn.ReLU, drop=0.0)
        self.dropout = nn.Dropout(options.dropout)
        self.pre_norm = options.pre_norm

    def residual(self, part: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        norm = self.norms[part]
        if self.pre_norm:
            return x + self.dropout(function(norm(x)))  # type: ignore[no-any-return]
        return norm(x + self.dropout(function(x)))  # type: ignore[no-any-return]


class TranslationEncoderLayer(_Layer):
    """Self-attention and feed-forward part."""

    def __init__(self, dim: int, spec: EncoderSpec, options: TranslationOptions, max_length: int):
        super().__init__(dim, ("attention", "ffn"), spec.ffn, options)
        self.attention = _attention(spec.attention, dim, spec.heads, options, max_length)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(B, S, E), padding (B, S) -> (B, S, E)."""
        x = self.residual("attention", x, lambda y: self.attention(y, key_padding_mask=padding))
        return self.residual("ffn", x, self.ffn)


class TranslationDecoderLayer(_Layer):
    """Causal self-attention, cross-attention over the last encoder layers, feed-forward part."""

    def __init__(
        self, dim: int, encoder_dim: int, spec: DecoderSpec, options: TranslationOptions, max_length: int
    ):
        super().__init__(dim, ("attention", "cross", "ffn"), spec.ffn, options)
        self.encoder_layers = spec.encoder_layers
        self.attention = _attention(
            spec.self_attention, dim, spec.self_heads, options, max_length, causal=True
        )
        self.cross = _attention(
            spec.cross_attention, dim, spec.cross_heads, options, max_length, kdim=encoder_dim
        )

    def forward(self, x: Tensor, padding: Tensor, memory: Memory) -> Tensor:
        """(B, T, D), padding (B, T), memory -> (B, T, D)."""
        states = memory[0][:, -self.encoder_layers :].flatten(1, 2)  # (B, layers * S, E)
        hidden = memory[1].repeat(1, self.encoder_layers)
        x = self.residual("attention", x, lambda y: self.attention(y, key_padding_mask=padding))
        x = self.residual("cross", x, lambda y: self.cross(y, states, key_padding_mask=hidden))
        return self.residual("ffn", x, self.ffn)


def _attention(
    kind: str, dim: int, heads: int, options: TranslationOptions, max_length: int, **more: Any
) -> Attention:
    return self_attention(
        kind,
        dim,
        heads,
        head_dim=options.width(heads),
        relative_length=options.relative_length,
        dropout=options.attention_dropout,
        max_length=max_length,
        **more,
    )


class EncoderDecoder(nn.Module):
    """Transformer for translation with an attention mechanism of its own in each layer.

    Embeddings times the root of their width plus sinusoids; the decoder's embedding is also the output map. With a
    shared vocabulary there is one embedding, as wide as the wider side, and the other side takes its first columns.
    All mechanisms know ``signature.max_length``, so that neither padding nor later tokens change a result.

    Letters: B batch, S source length, T target length, E encoder width, D decoder width, V target vocabulary.

    Args:
        signature: vocabularies, special tokens, longest sequence.
        dims: E and D.
        encoder, decoder: one spec per layer, first layer first.
        options: what the layers have in common.

    Raises:
        UserMistake: a span reaches over more layers than the encoder has, or a cosFormer cross-attention has one.
    """

    def __init__(
        self,
        signature: TranslationSignature,
        *,
        dims: tuple[int, int],
        encoder: Sequence[EncoderSpec],
        decoder: Sequence[DecoderSpec],
        options: TranslationOptions,
    ):
        super().__init__()
        _check_spans(len(encoder), decoder)
        self.signature = signature
        self.encoder_dim, self.decoder_dim = dims
        self.memory_layers = max(spec.encoder_layers for spec in decoder)
        width = max(dims) if signature.shared_vocabulary else dims[1]
        self.target_embedding = nn.Embedding(signature.target_vocabulary, width)
        if not signature.shared_vocabulary:
            self.source_embedding = nn.Embedding(signature.source_vocabulary, dims[0])
        longest = signature.max_length
        self.encoder = nn.ModuleList(
            TranslationEncoderLayer(dims[0], spec, options, longest) for spec in encoder
        )
        self.decoder = nn.ModuleList(
            TranslationDecoderLayer(dims[1], dims[0], spec, options, longest) for spec in decoder
        )
        self.encoder_norm = nn.LayerNorm(dims[0]) if options.pre_norm else nn.Identity()
        self.decoder_norm = nn.LayerNorm(dims[1]) if options.pre_norm else nn.Identity()
        self.dropout = nn.Dropout(options.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform for linear maps with zero bias; embeddings normal with deviation width**-0.5."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """(B, S), (B, T) token numbers -> (B, T, V) logits; position t of the result predicts token t + 1."""
        return self.decode(target_in, self.encode(source))

    def encode(self, source: Tensor) -> Memory:
        """(B, S) -> what ``decode`` needs of the source; see ``Memory``."""
        embedding = self.target_embedding if self.signature.shared_vocabulary else self.source_embedding
        padding = source == self.signature.padding
        x = self._embed(source, embedding.weight, self.encoder_dim)
        kept: list[Tensor] = []
        for index, layer in enumerate(self.encoder):
            x = layer(x, padding)
            if index >= len(self.encoder) - self.memory_layers:
                kept.append(self.encoder_norm(x))
        return torch.stack(kept, dim=1), padding

    def decode(self, target_in: Tensor, memory: Memory) -> Tensor:
        """(B, T), memory -> (B, T, V) logits. A prefix of ``target_in`` gives the prefix of the logits."""
        padding = target_in == self.signature.padding
        x = self._embed(target_in, self.target_embedding.weight, self.decoder_dim)
        for layer in self.decoder:
            x = layer(x, padding, memory)
        return F.linear(self.decoder_norm(x), self.target_embedding.weight[:, : self.decoder_dim])

    def _embed(self, tokens: Tensor, table: Tensor, dim: int) -> Tensor:
        if tokens.shape[1] > self.signature.max_length:
            raise UserMistake(
                f"sequence of {tokens.shape[1]} tokens is longer than the model's max_length="
                f"{self.signature.max_length}; shorten it or build the model with a larger max_length"
            )
        x = F.embedding(tokens, table[:, :dim]) * math.sqrt(dim)
        return self.dropout(  # type: ignore[no-any-return]
            x + sinusoids(tokens.shape[1], dim, device=x.device, dtype=x.dtype)
        )

    def body_parameters(self) -> int:
        """Parameters without embeddings and output map, as published figures count them."""
        return sum(p.numel() for name, p in self.named_parameters() if "embedding" not in name)


def _check_spans(depth: int, decoder: Sequence[DecoderSpec]) -> None:
    for index, spec in enumerate(decoder, start=1):
        where = f"decoder.layer{index}.span={spec.span}"
        if spec.span not in (-1, 1, 2):
            raise UserMistake(f"{where} must be -1, 1 or 2: the last one, two or three encoder layers")
        if spec.encoder_layers > depth:
            raise UserMistake(
                f"{where} reads {spec.encoder_layers} encoder layers, but the encoder has {depth}"
            )
        if spec.span != -1 and spec.cross_attention != "softmax":
            raise UserMistake(
                f"{where} needs softmax cross-attention, not {spec.cross_attention!r}; use span -1"
            )


def count_translation_macs(
    source: int,
    target: int,
    *,
    dims: tuple[int, int],
    encoder: Sequence[EncoderSpec],
    decoder: Sequence[DecoderSpec],
    options: TranslationOptions,
) -> int:
    """Multiply-adds of one pass over ``source`` and ``target`` tokens in closed form, without the output map.

    The other arguments are those of ``EncoderDecoder``. The FLOPs that HAT publishes are twice this at 30 and 30
    tokens (23 and 23 for IWSLT).
    """

    def core(kind: str, heads: int, queries: int, keys: int, causal: bool = False) -> int:
        return heads * core_macs(
            kind, queries, keys, options.width(heads), relative_length=options.relative_length, causal=causal
        )

    macs = 0
    for spec in encoder:
        inner = spec.heads * options.width(spec.heads)
        macs += source * dims[0] * (4 * inner + 2 * spec.ffn) + core(
            spec.attention, spec.heads, source, source
        )
    for layer in decoder:
        keys = source * layer.encoder_layers
        inner = layer.self_heads * options.width(layer.self_heads)
        crossing = layer.cross_heads * options.width(layer.cross_heads)
        macs += target * dims[1] * (4 * inner + 2 * crossing + 2 * layer.ffn) + 2 * keys * dims[0] * crossing
        macs += core(layer.self_attention, layer.self_heads, target, target, causal=True)
        macs += core(layer.cross_attention, layer.cross_heads, target, keys)
    return macs


def translation_plan(scale: str, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``EncoderDecoder`` and of ``count_translation_macs`` for an architecture of a translation scale."""

    def layer(prefix: str) -> dict[str, Any]:
        return {
            key.removeprefix(prefix): value for key, value in architecture.items() if key.startswith(prefix)
        }

    encoder_depth = int(architecture.get("encoder.depth", WMT_ENCODER_DEPTH))
    decoder_depth = int(architecture["decoder.depth"])
    return {
        "dims": (int(architecture["encoder.embed"]), int(architecture["decoder.embed"])),
        "encoder": [EncoderSpec(**layer(f"encoder.layer{index}.")) for index in range(1, encoder_depth + 1)],
        "decoder": [DecoderSpec(**layer(f"decoder.layer{index}.")) for index in range(1, decoder_depth + 1)],
        "options": SCALES[scale],
    }


def build_translation(scale: str, architecture: Architecture, signature: Signature) -> EncoderDecoder:
    """The encoder-decoder that an architecture of a translation scale stands for.

    Raises:
        SpaceError: the signature is not one of translation.
    """
    if not isinstance(signature, TranslationSignature):
        raise SpaceError(
            f"efficient_transformer:{scale} is for translation, but the task is {signature.task}; "
            "use efficient_transformer:small"
        )
    return EncoderDecoder(signature, **translation_plan(scale, architecture))
