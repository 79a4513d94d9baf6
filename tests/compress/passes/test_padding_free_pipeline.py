"""Padding-free models among other passes, saved, exported, and where none can be made."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from compress import compress, load
from compress.passes import make_pass
from compress.passes.base import Context
from compress.pipeline import check_order
from compress.result import CompressionResult
from compress.structure import StructureError
from nas.export import describe_signature
from spaces import get_space
from spaces.attention import Attention, make_attention
from spaces.errors import UserMistake
from spaces.layers.padding_free import Packing, packed_attention
from spaces.sequence._efficient_transformer_padding_free import PaddingFreeEncoderDecoder
from tests.compress._fresh_process import assert_same_in_a_fresh_process
from tests.compress.passes._padding_free_models import SENTENCES, bert, mask, packed, sentences, translator


def compressed() -> tuple[CompressionResult, Tensor, Tensor]:
    space = get_space("efficient_transformer:small_translation")
    assert space.baseline is not None
    kinds = {"encoder.layer1.attention": "cosformer", "encoder.layer2.attention": "relative"}
    architecture = {**space.published[space.baseline], **kinds}
    model = space.build(architecture, SENTENCES).eval()
    source, target = sentences([5, 1, 12]), sentences([4, 2, 3], seed=1)
    origin = {
        "kind": "space",
        "space": "efficient_transformer:small_translation",
        "architecture": architecture,
        "signature": describe_signature(SENTENCES),
    }
    result = compress(model, "padding_free", example=(source, target), origin=origin, measure_seconds=0)
    return result, source, target


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    result, source, target = compressed()
    again = load(result.save(tmp_path / "saved"))
    assert type(again.model) is PaddingFreeEncoderDecoder
    torch.testing.assert_close(again.model(source, target), result.model(source, target), rtol=0, atol=0)


@pytest.mark.slow
@torch.no_grad()
def test_a_fresh_process_imports_no_pass(tmp_path: Path) -> None:
    result, source, target = compressed()
    assert_same_in_a_fresh_process(result, tmp_path / "saved", source, target)


@torch.no_grad()
def test_low_rank_goes_before_and_behind() -> None:
    model = translator("softmax", "cosformer").float()
    source, target = sentences([5, 1, 12]), sentences([4, 2, 3], seed=1)
    context = Context(example=(source, target))
    rank, free = (
        make_pass(
            "low_rank", energy=0.6, calibrate=False, sensitivity=False, least=4, multiple=1, keep="anyway"
        ),
        make_pass("padding_free"),
    )
    thin = rank.apply(model, context)
    wanted = thin(source, target)
    torch.testing.assert_close(free.apply(thin, context)(source, target), wanted, rtol=1e-4, atol=1e-5)
    behind = rank.apply(free.apply(model, context), context)
    torch.testing.assert_close(behind(source, target), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_exported_graph_gives_the_same() -> None:
    """A graph holds for all lengths, so it is that of the padded model, with zeros at padding."""
    encoder = bert()
    padding, x = mask([4, 2, 6]), torch.randn(3, 6, 16, dtype=torch.float64)
    result = packed(encoder, x, padding)
    graph = torch.export.export(result, (x, padding)).module()
    other = mask([6, 6, 1])
    torch.testing.assert_close(graph(x, other), result(x, other), rtol=0, atol=1e-10)


def test_padding_anywhere_else_is_an_error() -> None:
    model = translator("softmax")
    source = sentences([4, 5])
    result = packed(model, source, source)
    source[1, 2] = 0
    with pytest.raises(UserMistake, match="sequence 1 of the batch has a token behind padding"):
        result(source, source)
    with pytest.raises(UserMistake, match="sequence 0 of the batch has a token behind padding"):
        Packing.of(mask([2, 3]).flip(1))
    with pytest.raises(UserMistake, match=r"padding: is torch\.uint8, must be torch\.bool"):
        Packing.of(mask([2, 3]).to(torch.uint8))
    with pytest.raises(UserMistake, match="longer than the model's max_length=24"):
        result(sentences([30]), source[:1])


class _Mean(Attention):
    def forward(self, query: Tensor, *others: Any, **options: Any) -> Tensor:
        return query.mean(1, keepdim=True).expand_as(query)


def test_what_cannot_be_proven_is_refused() -> None:
    source = sentences([3, 5])

    def refused(match: str, model: nn.Module, *example: Tensor) -> None:
        with pytest.raises(StructureError, match=match):
            packed(model, *(example or (source, source)))

    refused("VisionTransformer: where its sequences", timm.create_model("vit_tiny_patch16_224", depth=1))
    model = translator("softmax", "softmax")
    refused("no padding already", packed(model, source, source))
    changed: Any = copy.deepcopy(model)
    changed.encoder[1].attention = _Mean(16, 2)
    refused(r"encoder\.1\.attention is a _Mean, and how that treats padding", changed)
    changed = copy.deepcopy(model)
    changed.encoder[0].ffn.norm = nn.BatchNorm1d(20)
    refused(r"encoder\.0\.ffn\.norm is a BatchNorm1d", changed)
    changed = copy.deepcopy(model)
    changed.encoder[0].norms["ffn"] = nn.LayerNorm((5, 16))
    refused(r"norms\.ffn normalises over \(5, 16\)", changed)
    changed = copy.deepcopy(model)
    changed.encoder[0].attention = make_attention("cosformer", 16, 2)
    refused("cosFormer without max_length", changed)
    changed = copy.deepcopy(model)
    changed.encoder[1].ffn.fc1.register_forward_hook(lambda *_: None)
    refused(r"encoder\.1\.ffn\.fc1 has a hook", changed)
    changed = copy.deepcopy(model)
    changed.encoder[1] = nn.Identity()
    refused(r"encoder\.1 is a Identity, not a TranslationEncoderLayer", changed)


def test_packed_attention_refuses_what_it_does_not_know() -> None:
    packing, x = Packing.of(mask([3, 5])), torch.randn(8, 16)
    with pytest.raises(UserMistake, match="_Mean is not one of"):
        packed_attention(_Mean(16, 2), x, packing)
    with pytest.raises(UserMistake, match="cosFormer without max_length"):
        packed_attention(make_attention("cosformer", 16, 2), x, packing)


def test_int8_comes_behind() -> None:
    free, int8 = make_pass("padding_free"), make_pass("dynamic_quantization")
    check_order([free, int8])
    with pytest.raises(UserMistake, match=r"cannot follow 'dynamic_quantization'.*quantise behind it"):
        check_order([int8, free])
