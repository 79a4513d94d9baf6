"""OFB on plain ViTs that drop patches, have gated MLPs, no head, or the original's options only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from torch import nn

from compress.passes._ofb_sites import why_no_embedding
from compress.passes.ofb import Dimensions, Ofb, Supernet
from nas.errors import UserMistake
from tests.compress.ofb_models import IMAGES, distilled, vit
from tests.compress.test_ofb import context, cost

FEW: dict[str, Any] = {"epochs": 1, "finetune_epochs": 1}


def test_patches_are_not_dropped_while_they_are_modelled() -> None:
    model = vit(patch_drop_rate=0.5)
    supernet = Supernet(model).train()
    supernet.schedule(0.5, 0.5)
    supernet(IMAGES)
    assert supernet.embedder is not None
    assert supernet.embedder.hidden is not None
    assert supernet.embedder.hidden.shape == (3, 16)
    assert supernet.reconstruction(IMAGES) is not None
    assert isinstance(
        Supernet(model, Dimensions(masked_images=False)).host.patch_drop, type(model.patch_drop)
    )


@pytest.mark.parametrize("masked", [True, False])
def test_a_model_that_drops_patches_does_so_afterwards(masked: bool) -> None:
    model = vit(patch_drop_rate=0.5)
    out: Any = Ofb(target=0.8, masked_images=masked, **FEW).apply(model, context())
    assert cost(out) <= 0.8 * cost(model)
    assert type(out.patch_drop) is type(model.patch_drop)
    assert out.patch_drop.prob == model.patch_drop.prob == 0.5


@pytest.mark.parametrize("layer", [SwiGLU, SwiGLUPacked])
def test_the_embedding_of_a_model_of_gated_mlps_stays(layer: type[nn.Module]) -> None:
    model = vit(mlp_layer=layer)
    lines: list[str] = []
    out: Any = Ofb(target=0.85, **FEW).apply(model, context(report=lines.append))
    assert cost(out) <= 0.85 * cost(model)
    assert out.embed_dim == 32
    assert sum(line.startswith("ofb: not searched: embedding: blocks.0:") for line in lines) == 1


def test_a_block_of_another_form_is_named() -> None:
    model = vit(mlp_layer=SwiGLU)
    assert why_no_embedding(model) == "blocks.0: its MLP (SwiGLU) has no fc1 and fc2"
    model.blocks[0].attn = nn.Identity()
    assert why_no_embedding(model) == "blocks.0: its attention (Identity) has no qkv and proj"


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("official", [False, True])
def test_the_embedding_that_is_the_output_stays(epochs: int, official: bool) -> None:
    model = vit(num_classes=0)
    lines: list[str] = []
    settings: dict[str, Any] = {"epochs": epochs, "finetune_epochs": 0, "official_options": official}
    out = Ofb(target=0.5, **settings).apply(model, context(report=lines.append))
    assert out(IMAGES).shape == model(IMAGES).shape == (3, 32)
    assert cost(out) <= 0.5 * cost(model)
    told = "ofb: not searched: embedding: it has no head, so that its outputs are as wide as the embedding"
    assert lines.count(told) == 1


def test_both_heads_of_a_distilled_model_are_looked_at() -> None:
    model = distilled()
    assert why_no_embedding(model) == ""
    model.head_dist = nn.Identity()
    assert "it has no head_dist" in why_no_embedding(model)
    assert why_no_embedding(model, headless=True) == ""
    del model.head
    assert "it has no head," in why_no_embedding(model)


def test_the_options_of_the_original_in_a_search() -> None:
    model = vit(num_heads=3, embed_dim=36, mlp_ratio=2)
    lines: list[str] = []
    out: Any = Ofb(target=0.6, grow=False, official_options=True, **FEW).apply(
        model, context(report=lines.append)
    )
    assert cost(out) <= 0.6 * cost(model)
    assert {block.attn.num_heads for block in out.blocks} == {2}
    supernet = Supernet(model, Dimensions(official_options=True))
    options = [(gate.head_options, gate.channel_options[-1]) for gate in supernet.gates()]
    assert options[:3] == [((1,), 36), ((2,), 12), ((1,), 72)]


def test_heads_of_a_model_of_two_are_searched_alone() -> None:
    model = vit(num_heads=2)
    wanted = Dimensions(embedding=False, channels=False, mlp=False)
    supernet = Supernet(model, wanted)
    assert [gate.head_options for gate in supernet.gates()] == [(1, 2)] * 2
    assert [tuple(gate.score.shape) for gate in supernet.gates()] == [(2, 1)] * 2
    settings: dict[str, Any] = {"embedding": False, "channels": False, "mlp": False}
    out: Any = Ofb(target=0.95, **settings, **FEW).apply(model, context())
    assert sorted(block.attn.num_heads for block in out.blocks) == [1, 2]
    with pytest.raises(UserMistake, match="nothing to search"):
        Supernet(model, Dimensions(embedding=False, channels=False, mlp=False, head_step=2))


def test_the_search_of_two_heads_goes_on_with_a_score_for_each() -> None:
    model = vit(num_heads=2, embed_dim=32)
    out = Ofb(target=0.5, **FEW).apply(model, context())
    assert cost(out) <= 0.5 * cost(model)
    assert torch.isfinite(out(IMAGES)).all()
