"""Padding-free execution: an encoder computes the tokens that are there, and gives what it gave before.

Source: Zhai et al., "ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs", IPDPS 2023.
The method, not its CUDA kernels: see ``spaces.layers.padding_free``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from timm.layers.mlp import Mlp
from torch import nn

from compress.outputs import require_same
from compress.passes import register_pass
from compress.passes.base import Context, Pass
from compress.structure import StructureError
from spaces.attention import Attention
from spaces.attention.cosformer import CosformerAttention
from spaces.layers.bert_encoder import BertEncoder, BertLayer, PaddingFreeBertEncoder
from spaces.layers.low_rank import LowRankLinear, SplitLowRankLinear
from spaces.layers.padding_free import MECHANISMS
from spaces.layers.projection import HeadProjection
from spaces.sequence._efficient_transformer_padding_free import PaddingFreeEncoderDecoder
from spaces.sequence._efficient_transformer_translation import EncoderDecoder, TranslationEncoderLayer

__all__ = ["PaddingFree"]

_TOKEN_WISE: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Dropout, nn.Linear, nn.LayerNorm, nn.RMSNorm),
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Hardswish),
    *(LowRankLinear, SplitLowRankLinear),
)
"""Leaves that treat every token by itself. Norms are looked at further: they must be over the last dimension."""

_CONTAINERS: tuple[type[nn.Module], ...] = (nn.ModuleDict, nn.ModuleList, nn.Sequential, Mlp, HeadProjection)
_KNOWN = "efficient_transformer's translation models and spaces.layers.bert_encoder.BertEncoder"


@register_pass("padding_free")
class PaddingFree(Pass):
    """The encoder of a model for sequences packs the true tokens of a batch, computes those, and unpacks them.

    Exact: outputs are the original's; states of the encoder at padded positions are zero. Nothing is trained, and
    gradients flow as before. Speed comes with padding: a batch of equal lengths costs what it did. Needs all padding
    at the end of each sequence, and says so when a batch has it elsewhere.

    Raises:
        StructureError: the model is not known, or a part of its encoder cannot be proven to keep tokens apart.
    """

    changes = frozenset({"execution"})
    cannot_follow: Mapping[str, str] = MappingProxyType(
        {
            "precision": "int8 layers scale their inputs by the largest one of the batch, padding included, so the "
            "outputs would change; quantise behind it"
        }
    )

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See ``Pass.apply``; nothing is trained."""
        result = _packed(copy.deepcopy(model)).eval()
        gap = require_same(
            result, model, context.example, "its encoder does not give the same without padding"
        )
        context.report(f"largest change of an output: {gap:.1e} of their size")
        return result


def _packed(model: nn.Module) -> nn.Module:
    """``model`` with a packing encoder, made of its own parts."""
    _check_hooks("the model", model)
    if type(model) is EncoderDecoder:
        for name, layer in model.encoder.named_children():
            _check_layer(f"encoder.{name}", layer, TranslationEncoderLayer)
        _check_token_wise("encoder_norm", model.encoder_norm)
        return PaddingFreeEncoderDecoder.of(model)
    if type(model) is BertEncoder:
        for name, layer in model.layers.named_children():
            _check_layer(f"layers.{name}", layer, BertLayer)
        return PaddingFreeBertEncoder.of(model)
    if isinstance(model, (PaddingFreeEncoderDecoder, PaddingFreeBertEncoder)):
        raise StructureError("its encoder computes no padding already")
    raise StructureError(
        f"{type(model).__name__}: where its sequences and their padding are is not known; known are {_KNOWN}"
    )


def _check_layer(name: str, layer: nn.Module, wanted: type[nn.Module]) -> None:
    if type(layer) is not wanted:
        raise StructureError(
            f"{name} is a {type(layer).__name__}, not a {wanted.__name__}, so what it does across tokens is not known"
        )
    _check_hooks(name, layer)
    for part, module in layer.named_children():
        where = f"{name}.{part}"
        if isinstance(module, Attention):
            _check_attention(where, module)
        else:
            _check_token_wise(where, module)


def _check_attention(name: str, attention: Attention) -> None:
    if type(attention) not in MECHANISMS:
        known = ", ".join(one.__name__ for one in MECHANISMS)
        raise StructureError(
            f"{name} is a {type(attention).__name__}, and how that treats padding is not known; known are {known}"
        )
    if isinstance(attention, CosformerAttention) and attention.max_length is None:
        raise StructureError(
            f"{name} is a cosFormer without max_length: it weighs by the length of the padded batch, so that without "
            "padding it gives other outputs; build it with max_length"
        )
    _check_hooks(name, attention)
    for part, module in attention.named_children():
        _check_token_wise(f"{name}.{part}", module)


def _check_token_wise(name: str, module: nn.Module) -> None:
    for where, one in _walk(name, module):
        _check_hooks(where, one)
        if type(one) not in (*_TOKEN_WISE, *_CONTAINERS):
            raise StructureError(
                f"{where} is a {type(one).__name__}, which is not known to treat every token by itself"
            )
        if isinstance(one, (nn.LayerNorm, nn.RMSNorm)) and len(one.normalized_shape) != 1:
            raise StructureError(
                f"{where} normalises over {tuple(one.normalized_shape)}, more than the width of a token"
            )


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and its parts by name; what is inside a token-wise leaf belongs to it."""
    yield name, module
    if type(module) not in _TOKEN_WISE:
        for part, child in module.named_children():
            yield from _walk(f"{name}.{part}", child)


def _check_hooks(name: str, module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise StructureError(
            f"{name} has a hook or a replaced forward, which may look across tokens; remove it"
        )
