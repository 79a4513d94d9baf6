"""OFB: extraction, cost, repair, and what it works on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from compress.passes._ofb_cost import Cost, Macs, OfficialMacs, Parameters, Work, expected_widths
from compress.passes._ofb_extract import Plan, expand, extract, plan_of, repair, step_of
from compress.passes._ofb_gate import (
    Gate,
)
from compress.passes._ofb_search import begin_near, magnitude_importance, rank_by
from compress.passes._ofb_sites import AttentionSite, find_sites
from compress.passes._ofb_supernet import Dimensions, Supernet
from nas.errors import UserMistake
from nas.profile import profile
from tests.compress.ofb_models import IMAGES, MODELS, TOLERANCE, scatter_alpha, swin, train_a_little, vit


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


# Extraction


def test_extracted_is_fused_is_pruned(model: Any) -> None:
    kept = {name: x.clone() for name, x in model.state_dict().items()}
    supernet = Supernet(model)
    train_a_little(supernet, 4)
    assert supernet.decided
    pruned = supernet(IMAGES)
    supernet.fuse()
    fused = supernet(IMAGES)
    plain = extract(expand(model, supernet), supernet)
    torch.testing.assert_close(fused, pruned, **TOLERANCE)
    torch.testing.assert_close(plain(IMAGES), fused, **TOLERANCE)
    assert type(plain) is type(model)
    types = {type(module) for module in model.modules()}
    assert {type(module) for module in plain.modules()} <= types
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
    widths = plan_of(supernet).widths()
    found = profile(plain, (IMAGES[:1],))
    example = (IMAGES[:1],)
    assert Macs(model, supernet.sites, example)(widths) == found.macs
    assert Parameters(model, supernet.sites, example)(widths) == found.params
    for module in plain.modules():
        if isinstance(module, Attention):
            assert module.head_dim * module.num_heads == module.attn_dim == module.proj.in_features
            assert module.scale == module.head_dim**-0.5


def test_explicit_and_fused_attention_agree(model: Any) -> None:
    supernet = Supernet(model)
    train_a_little(supernet)
    supernet.fuse()
    plain = extract(expand(model, supernet), supernet)
    expected = plain(IMAGES)
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not module.fused_attn
    torch.testing.assert_close(plain(IMAGES), expected, **TOLERANCE)


def hard_masked(full: Any, supernet: Supernet) -> nn.Module:
    """The full-width model with zeros where the search cut."""
    full = copy.deepcopy(full)
    for site in supernet.sites:
        gate = site.gated(supernet.host).gate
        dead = torch.ones(gate.dense, dtype=torch.bool)
        for head, channel in gate.present():
            dead[head, channel] = False
        first = site.first(full)
        parts = 3 if isinstance(site, AttentionSite) else 1
        with torch.no_grad():
            first.weight[dead.reshape(-1).repeat(parts)] = 0
            if first.bias is not None:
                first.bias[dead.reshape(-1).repeat(parts)] = 0
    return full


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"qk norm"}))
def test_extracted_is_the_hard_masked_model(name: str) -> None:
    model = MODELS[name]()
    supernet = Supernet(model, Dimensions(embedding=False))
    train_a_little(supernet)
    supernet.fuse()
    full = expand(model, supernet)
    masked = hard_masked(full, supernet)
    torch.testing.assert_close(extract(full, supernet)(IMAGES), masked(IMAGES), **TOLERANCE)


def test_a_narrower_embedding_is_the_masked_one_with_norms_over_what_is_left() -> None:
    model = vit()
    supernet = Supernet(model, Dimensions(heads=False, channels=False, mlp=False))
    train_a_little(supernet)
    supernet.fuse()
    full = expand(model, supernet)
    assert supernet.embedder is not None
    kept = torch.tensor([channel for _, channel in supernet.embedder.gate.present()])
    plain: Any = extract(full, supernet)
    assert plain.embed_dim == len(kept) < 32

    def masked_norm(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        out = torch.zeros_like(inputs[0])
        weight, bias = module.weight[kept], module.bias[kept]
        out[..., kept] = nn.functional.layer_norm(
            inputs[0][..., kept], (len(kept),), weight, bias, module.eps
        )
        return out

    for module in full.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(masked_norm)
    torch.testing.assert_close(plain(IMAGES), full(IMAGES), **TOLERANCE)


def test_nothing_cut_is_the_model_itself(model: Any) -> None:
    supernet = Supernet(model, Dimensions())
    torch.testing.assert_close(extract(model, supernet)(IMAGES), model(IMAGES), atol=0, rtol=0)


# Cost


def test_soft_cost_of_sure_distributions_is_the_exact_cost() -> None:
    model = vit()
    supernet = Supernet(model)
    for kind in (Macs, Parameters, OfficialMacs):
        cost = kind(model, supernet.sites, (IMAGES[:1],))
        for gate in supernet.gates():
            with torch.no_grad():
                gate.alpha.fill_(-100.0)
                gate.alpha[-1, -1] = 100.0
        assert float(cost(expected_widths(supernet)).detach()) == pytest.approx(cost.dense)
        with torch.no_grad():
            for gate in supernet.gates():
                gate.alpha.normal_()
        soft = cost(expected_widths(supernet))
        soft.backward()
        assert float(soft.detach()) < cost.dense
        assert all(gate.alpha.grad is not None and gate.score.grad is None for gate in supernet.gates())
        for gate in supernet.gates():
            gate.alpha.grad = None


# Repair


def ready(model: nn.Module) -> tuple[Supernet, dict[Gate, Tensor]]:
    supernet = Supernet(model)
    importance = magnitude_importance(model, supernet.dimensions)
    rank_by(supernet, importance)
    return supernet, dict(zip(supernet.gates(), importance, strict=True))


@pytest.mark.parametrize("kind", [Macs, Parameters])
@pytest.mark.parametrize("share", [0.9, 0.45])
def test_repair_meets_the_budget_closely(model: Any, kind: type[Cost], share: float) -> None:
    supernet, importance = ready(model)
    cost = kind(model, supernet.sites, (IMAGES[:1],))
    plan = repair(plan_of(supernet), supernet, cost, share * cost.dense, importance)
    reached = cost(plan.widths()) / cost.dense
    assert share - 0.12 < reached <= share
    plain = extract(model, supernet, plan)
    found = profile(plain, (IMAGES[:1],))
    assert cost(plan.widths()) == (found.macs if kind is Macs else found.params)
    assert torch.isfinite(plain(IMAGES)).all()


def test_repair_gives_back_what_was_cut() -> None:
    model = vit()
    supernet, importance = ready(model)
    scatter_alpha(supernet)
    supernet.compress(0.2, force=True)
    supernet.fuse()
    cost = Macs(model, supernet.sites, (IMAGES[:1],))
    start = plan_of(supernet)
    assert cost(start.widths()) < 0.9 * cost.dense
    plan = repair(start, supernet, cost, cost.dense, importance)
    assert plan == Plan(32, ((4, 8), (1, 128), (4, 8), (1, 128)))
    assert repair(start, supernet, cost, cost.dense, importance, grow=False) == start
    wide = extract(expand(model, supernet), supernet, plan)
    assert torch.isfinite(wide(IMAGES)).all()


def test_repaired_widths_are_multiples_that_kernels_like() -> None:
    model = vit()
    supernet, importance = ready(model)
    cost = Macs(model, supernet.sites, (IMAGES[:1],))
    odd = Plan(27, ((4, 7), (1, 77), (2, 5), (1, 51)))
    for share in (0.9, 0.6, 0.4):
        plan = repair(odd, supernet, cost, share * cost.dense, importance)
        assert cost(plan.widths()) <= share * cost.dense
        assert plan.embedding is not None
        assert plan.embedding % 4 == 0
        assert all(hidden % 8 == 0 for heads, hidden in (plan.sites[1], plan.sites[3]))
    assert [step_of(size) for size in (8, 32, 64, 192, 768, 1536)] == [1, 4, 8, 8, 8, 24]


def test_a_budget_out_of_reach_is_refused() -> None:
    supernet, importance = ready(vit())
    cost = Macs(vit(), supernet.sites, (IMAGES[:1],))
    with pytest.raises(UserMistake, match="out of reach: the narrowest widths"):
        repair(plan_of(supernet), supernet, cost, 0.01 * cost.dense, importance)


# What it works on


def test_models_without_anything_to_search_are_refused() -> None:
    with pytest.raises(UserMistake, match="nothing to search in ResNet"):
        Supernet(timm.create_model("resnet10t", num_classes=2))
    with pytest.raises(UserMistake, match="nothing to search"):
        Supernet(vit(), Dimensions(embedding=False, heads=False, channels=False, mlp=False))


def test_what_cannot_be_cut_is_left_out_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(4, 8), nn.Linear(8, 4), nn.Sigmoid()

    sites, left_out = find_sites(Odd())
    assert sites == []
    assert left_out == ["MLP : Sigmoid is not 0 at 0"]
    _, reasons = find_sites(vit(scale_attn_norm=True))
    assert "it normalises over all heads" in reasons[0]
    assert "embedding: it has no patch_embed.proj and blocks" in Supernet(swin()).left_out


def test_unfused_decisions_cannot_be_folded() -> None:
    with pytest.raises(UserMistake, match="some widths are undecided"):
        Supernet(vit()).fuse()


def test_the_search_begins_at_a_plan() -> None:
    model = vit()
    supernet, importance = ready(model)
    cost = Macs(model, supernet.sites, (IMAGES[:1],))
    begin_near(supernet, Plan(24, ((2, 4), (1, 64), (4, 8), (1, 128))))
    chosen = []
    for gate in supernet.gates():
        assert float(gate.alpha.detach().max()) == 1
        assert float(gate.alpha.detach().min()) == 0
        row, column = divmod(int(gate.alpha.argmax()), gate.alpha.shape[1])
        chosen.append((gate.head_options[row], gate.channel_options[column]))
    assert chosen == [(1, 24), (2, 4), (1, 64), (4, 8), (1, 128)]
    by_work = repair(
        plan_of(supernet),
        supernet,
        cost,
        0.5 * cost.dense,
        importance,
        price=Work(model, supernet.sites, (IMAGES[:1],)),
    )
    by_macs = repair(plan_of(supernet), supernet, cost, 0.5 * cost.dense, importance)
    assert by_work.embedding is not None
    assert by_macs.embedding is not None
    assert by_work.embedding >= by_macs.embedding
    assert cost(by_work.widths()) <= 0.5 * cost.dense


def test_work_is_macs_and_elements() -> None:
    model = vit(depth=1)
    supernet, _ = ready(model)
    example = (IMAGES[:1],)
    elements = 17 * (4 * 17 + 32) + 17 * (
        128 + 32
    )  # scores and hidden units, each site with its norm and residual
    assert (
        Work(model, supernet.sites, example).dense
        == Macs(model, supernet.sites, example).dense + 100 * elements
    )
