"""Cuts of attentions and MLPs of any class are exact, or refused; never wrong in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from torch import nn

from compress.outputs import relative_gap
from compress.passes import make_pass
from compress.passes._ofb_supernet import Dimensions, Supernet
from compress.probing import fit, require_fit, require_runs
from compress.structure import StructureError, recognise
from compress.surgery import keep_embedding, keep_head_channels, keep_heads, keep_mlp_units
from tests.compress._written_by_hand import (
    ATTENTIONS,
    EXAMPLE,
    DepthwiseMlp,
    LateDropout,
    NormalisedMlp,
    Plain,
    WithWeights,
    context,
    half_zeroed,
    handwritten,
)
from tests.compress.models import small_vit
from tests.compress.ofb_models import vit as ofb_vit

CHANNELS: dict[str, Any] = {"ratio": 0.5, "units": "channels", "multiple": 1, "epochs": 0}
OFB: dict[str, Any] = {"epochs": 0, "finetune_epochs": 0, "embedding": False, "mlp": False, "heads": False}


def gap(made: nn.Module, model: nn.Module) -> float:
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return relative_gap(made(x), model(x))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_channels_at_zero_are_cut_exactly(name: str) -> None:
    model = half_zeroed(handwritten(ATTENTIONS[name]))
    before = copy.deepcopy(model.state_dict())
    made: Any
    for made in (
        make_pass("structured", **CHANNELS).apply(model, context()),
        make_pass("ofb", target=0.9, **OFB).apply(model, context()),
    ):
        assert made.blocks[1].attn.qkv.out_features < 72
        assert gap(made, model) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model.blocks[0].attn) is ATTENTIONS[name]


def test_attentions_that_can_be_cut_stay_what_they_are() -> None:
    told: list[str] = []
    for name, replaced in {"Plain": False, "Fused": False, "Classic": True, "HeadFirst": True}.items():
        made: Any = make_pass("structured", **CHANNELS).apply(
            handwritten(ATTENTIONS[name]), context(report=told.append)
        )
        assert (type(made.blocks[0].attn) is Attention) == replaced
    assert told == ["blocks.0.attn, blocks.1.attn: timm's Attention now, which computes the same"] * 2


@pytest.mark.parametrize("units", ["heads+channels+mlp+embedding", "heads", "embedding"])
def test_the_classic_attention_loses_everything_and_learns(units: str) -> None:
    made = make_pass("structured", units=units).apply(handwritten(), context())
    assert made(EXAMPLE[0]).shape == (1, 5)
    assert not any(parameter.grad is not None for parameter in made.parameters())


def test_the_classic_attention_is_searched() -> None:
    made: Any = make_pass("ofb", target=0.8, mlp=False).apply(handwritten(), context())
    assert made.blocks[0].attn.qkv.out_features < 72
    assert made(EXAMPLE[0]).shape == (1, 5)


@pytest.mark.parametrize("attention", [WithWeights, LateDropout])
def test_what_timm_cannot_follow_is_refused_by_name(attention: type[Plain]) -> None:
    model = handwritten(attention)
    text = rf"HandwrittenViT: blocks\.0\.attn \({attention.__name__}\) does not run with fewer channels.*qkv must be"
    with pytest.raises(StructureError, match=text):
        make_pass("structured").apply(model, context())
    made = make_pass("structured", units="mlp").apply(model, context())
    assert made.blocks[0].mlp.fc1.out_features == 48  # type: ignore[union-attr, index]


def test_the_search_leaves_out_what_it_cannot_cut() -> None:
    told: list[str] = []
    made: Any = make_pass("ofb", target=0.8).apply(handwritten(WithWeights), context(report=told.append))
    assert made.blocks[0].attn.qkv.out_features == 72
    assert made.blocks[0].mlp.fc1.out_features < 96
    assert any("not searched: blocks.1.attn (WithWeights) does not run" in line for line in told)


@pytest.mark.parametrize(
    ("mlp", "text"), [(NormalisedMlp, "gives something else"), (DepthwiseMlp, "does not run")]
)
def test_hidden_units_that_depend_on_each_other_are_refused(mlp: Any, text: str) -> None:
    with pytest.raises(StructureError, match=rf"blocks\.0\.mlp \({mlp.__name__}\) {text} with fewer hidden"):
        make_pass("structured", units="mlp").apply(handwritten(mlp=mlp), context())
    told: list[str] = []
    made: Any = make_pass("ofb", target=0.8, heads=False).apply(
        handwritten(mlp=mlp), context(report=told.append)
    )
    assert made.blocks[0].mlp.fc1.out_features == 96
    assert any(f"blocks.0.mlp ({mlp.__name__})" in line for line in told)


def test_surgery_tries_by_itself() -> None:
    structure = recognise(handwritten(ATTENTIONS["HeadFirst"], NormalisedMlp))
    block = structure.blocks[1]
    with pytest.raises(StructureError, match=r"blocks\.1\.attn \(HeadFirst\) gives something else"):
        keep_heads(block, [0, 2])
    with pytest.raises(StructureError, match=r"blocks\.1\.attn \(HeadFirst\) gives something else"):
        keep_head_channels(block, [0, 1])
    with pytest.raises(StructureError, match=r"blocks\.1\.mlp \(NormalisedMlp\) gives something else"):
        keep_mlp_units(block, range(9))
    of_width = recognise(handwritten(ATTENTIONS["ScaleOfWidth"]))
    with pytest.raises(StructureError, match=r"blocks\.0\.attn \(ScaleOfWidth\) gives something else"):
        keep_embedding(of_width, range(12))
    assert block.qkv.out_features == 72


def test_a_probe_leaves_model_and_generator_alone() -> None:
    model = handwritten()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(StructureError, match=r"here \(Classic\) does not run"):
        require_fit(model.blocks[0].attn, "here", {"channels"})
    assert fit(model, [], ["blocks.0.mlp"], {"hidden"}, EXAMPLE).reasons == {}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_replaced_attentions_keep_dropout_mode_type_and_what_is_frozen() -> None:
    model = handwritten().double()
    attention = model.blocks[0].attn
    attention.attn_drop = nn.Dropout(0.3)
    attention.qkv.weight.requires_grad_(False)
    found = fit(model, ["blocks.0.attn"], [], {"heads"}, [EXAMPLE[0].double()])
    plain = model.blocks[0].attn
    assert found.replaced == ("blocks.0.attn",)
    assert (plain.attn_drop.p, plain.training, plain.qkv.weight.dtype) == (0.3, False, torch.float64)
    assert [p.requires_grad for p in plain.parameters()] == [False, True, True, True]
    model.blocks[1].attn.after = nn.Dropout(0.3)
    assert "blocks.1.attn" in fit(model, ["blocks.1.attn"], [], {"heads"}, [EXAMPLE[0].double()]).reasons


def test_known_classes_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.probing.why_not", lambda *_: pytest.fail("tried"))
    names = ["blocks.0.attn", "blocks.1.attn"]
    assert fit(small_vit(), names, ["blocks.0.mlp"], {"heads"}, EXAMPLE).reasons == {}


def test_a_model_that_holds_on_to_a_size_is_refused() -> None:
    model = handwritten()
    model.head = nn.Linear(7, 5)
    with pytest.raises(StructureError, match="HandwrittenViT does not run with fewer heads"):
        require_runs(model, EXAMPLE, "heads")


def test_a_normalised_attention_of_one_choice_of_heads_is_left_alone() -> None:
    supernet = Supernet(ofb_vit(qk_norm=True, num_heads=2), Dimensions(embedding=False, mlp=True))
    assert all(site.name.endswith("mlp") for site in supernet.sites)
