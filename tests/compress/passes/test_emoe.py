"""Experts against the original's vectors, closed forms, and the dense network that they come from and go back to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers.mlp import GluMlp, SwiGLU
from torch import nn

from compress.passes import make_pass
from compress.passes._emoe_grouping import balanced_kmeans, group_units, inertia
from compress.passes._emoe_sites import find_sites, split
from compress.passes._emoe_training import balance_loss
from compress.passes.base import Context
from compress.passes.emoe import Emoe, merge_experts
from nas.errors import UserMistake
from nas.profile import compare
from spaces.layers.expert_loading import load_emoe, load_emoe_swiglu
from spaces.layers.expert_mlp import ExpertMlp, Experts
from spaces.layers.expert_swiglu import ExpertSwiGLU
from tests.compress.models import small_vit
from tests.compress.passes._emoe_models import ANYWAY, CONTEXT, FORMS, X, assert_same_state, experts, moes
from tests.golden_vectors import Golden, golden, golden_json

AVERAGE = ("emoe-avgk", "emoe-avgk-k-half", "emoe-avgk-capacity")


def from_golden(vectors: Golden, capacity: float = 0.0, **options: Any) -> ExpertMlp:
    arguments = {**vectors.facts["args"], "capacity_factor": capacity, **options}
    return load_emoe(vectors.state, cluster_ids=vectors.inputs["cluster_ids"], **arguments)


# -- vectors of the original -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*AVERAGE, "emoe-learn"])
def test_golden_experts(name: str, form: str) -> None:
    vectors = golden(name)
    args, x = vectors.facts["args"], vectors.inputs["x"]
    free = from_golden(vectors, form=form)
    limited = from_golden(vectors, form=form, capacity=args["capacity_factor"])
    near = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(free(x), vectors.outputs["y_no_drop"], **near)
    torch.testing.assert_close(limited(x), vectors.outputs["y_capacity"], **near)
    logits = free.logits(x.flatten(0, 1))
    torch.testing.assert_close(logits, vectors.mid["gate_logits"], **near)
    assert torch.equal(logits.topk(args["top_k"]).indices, vectors.mid["topk_indices"].long())
    loss = balance_loss(logits, logits, args["top_k"], args["gate_noise"], official=True)
    torch.testing.assert_close(loss, vectors.outputs["l_aux"][0], rtol=1e-5, atol=1e-7)
    if name in AVERAGE:
        # The original divides the bias by k, so that all experts carry too much of it.
        every = from_golden(vectors, top_k=args["num_experts"], form=form)
        torch.testing.assert_close(every(x), vectors.outputs["y_all_experts"], **near)
        dense = free.dense()
        torch.testing.assert_close(dense(x), vectors.outputs["dense"], **near)
        for own in ("fc1.weight", "fc1.bias", "fc2.weight"):
            assert torch.equal(dense.get_parameter(own), vectors.state[f"dense.{own}"])
        torch.testing.assert_close(dense.fc2.bias, vectors.state["dense.fc2.bias"], rtol=1e-6, atol=0)


def test_golden_capacity_really_drops() -> None:
    outputs = golden("emoe-avgk-capacity").outputs
    assert not torch.allclose(outputs["y_capacity"], outputs["y_no_drop"])


@pytest.mark.parametrize("name", [*AVERAGE, "emoe-learn"])
def test_golden_grouping_is_at_least_as_tight(name: str) -> None:
    vectors = golden(name)
    keys = vectors.state["dense.fc1.weight"]
    count = vectors.facts["args"]["num_experts"]
    labels = group_units(keys, count, "kmeans", 0)
    assert labels.bincount().tolist() == [len(keys) // count] * count
    unit = nn.functional.normalize(keys.double(), dim=1)
    theirs = vectors.facts["kmeans"]["inertia"]
    assert inertia(unit, vectors.inputs["cluster_ids"].long()) == pytest.approx(theirs, rel=1e-5)
    assert inertia(unit, labels) <= theirs * (1 + 1e-5)
    assert inertia(unit, labels) < inertia(unit, group_units(keys, count, "random", 0))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("output", "select", "k"),
    [
        ("y", "gate", 2),
        ("y_select_gate", "gate", 2),
        ("y_select_up", "up", 2),
        ("y_select_up_abs", "up_abs", 2),
        ("y_select_inter", "inter", 2),
        ("y_select_inter_abs", "inter_abs", 2),
        ("y_topk_all", "gate", 8),
        ("dense", "inter", 8),
    ],
)
def test_golden_swiglu(output: str, select: str, k: int, form: str) -> None:
    vectors = golden("emoe-swiglu")
    options = {"n_expert": 8, "topk": k, "select": select, "form": form}
    made = load_emoe_swiglu(vectors.state, prefix="rearranged", **options)
    torch.testing.assert_close(made(vectors.inputs["x"]), vectors.outputs[output], rtol=1e-5, atol=1e-5)


def test_golden_gate_refresh() -> None:
    vectors = golden("emoe-gate-refresh")
    for momentum, name in ((0.0, "gate_after_refresh"), (0.9, "gate_after_refresh_momentum_0.9")):
        made = load_emoe(vectors.state, model_dim=12, num_experts=4, top_k=2, hidden=32)
        made.refresh_gate(momentum)
        torch.testing.assert_close(made.gate.weight, vectors.outputs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("gate", ["average", "learned"])
def test_published_counts(size: str, gate: str) -> None:
    import timm

    variants = golden_json("emoe-variants")
    key = f"deit_{size}_emoe{'_learn' if gate == 'learned' else ''}_N24_k4_layers_8_10"
    model = timm.create_model(f"deit_{size}_patch16_224").eval()
    context = Context(example=(torch.zeros(1, 3, 224, 224),))
    made = Emoe(keep="anyway", epochs=0, grouping="random", gate=gate).apply(model, context)
    found = compare(made, context.example)
    assert found.disagreements == ()
    assert {count.macs for count in found.counts.values()} == {int(variants[key]["macs"])}
    width = model.embed_dim
    theirs = 2 * 23 * width + (
        2 * 24 * width if gate == "average" else 0
    )  # copies of the bias, and the mean keys
    assert {count.params + theirs for count in found.counts.values()} == {variants[key]["params"]}


# -- closed forms ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [None, 1.0])
@pytest.mark.parametrize("gate", ["average", "normalised", "learned"])
def test_token_by_token(gate: str, weight: float | None, form: str) -> None:
    made = experts(gate=gate, total=weight, form=form).double()
    x = torch.randn(11, 10, dtype=torch.float64)
    logits = made.logits(x)
    wanted = torch.zeros(11, 7, dtype=torch.float64)
    for token in range(11):
        best = logits[token].topk(2)
        shares = best.values.softmax(0) * made.total if gate == "learned" else torch.ones(2)
        for share, expert in zip(shares, best.indices.tolist(), strict=True):
            own = slice(4 * expert, 4 * expert + 4)
            hidden = nn.functional.gelu(made.keys[own] @ x[token] + made.key_bias[own])
            wanted[token] += share * (hidden @ made.values[own] + made.bias / 2)
    torch.testing.assert_close(made(x), wanted, rtol=0, atol=1e-12)


def test_gates_are_means_of_the_pre_activations() -> None:
    made = experts()
    x = torch.randn(5, 10)
    before = nn.functional.linear(x, made.keys).view(5, 6, 4).mean(2)
    torch.testing.assert_close(made.logits(x), before)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_unselected_experts_do_not_matter(form: str) -> None:
    made = experts(form=form)
    x = torch.randn(1, 10)
    chosen = made.logits(x).topk(2).indices[0].tolist()
    before = made(x)
    for expert in range(6):
        other = copy.deepcopy(made)
        other.values[4 * expert : 4 * expert + 4] = 100.0
        assert torch.equal(other(x), before) == (expert not in chosen)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("capacity", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("gate", ["average", "learned"])
def test_both_forms_agree(gate: str, capacity: float, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = experts(gate=gate, capacity=capacity, form="masked").double()
    x = torch.randn(tokens, 10, dtype=torch.float64)
    masked = made(x)
    made.form = "grouped"
    torch.testing.assert_close(made(x), masked, rtol=0, atol=1e-12)
    monkeypatch.setattr("spaces.layers.expert_mlp._AT_ONCE", 0)  # expert by expert, as with many tokens
    torch.testing.assert_close(made(x), masked, rtol=0, atol=1e-12)


@torch.no_grad()
def test_no_expert_takes_more_than_its_capacity() -> None:
    made = experts(count=4, k=2, capacity=1.0)
    x = torch.randn(1, 10).expand(10, 10) + 1e-3 * torch.randn(10, 10)  # all want the same two experts
    chosen, weights = made._choose(made.logits(x))
    assert weights is not None
    room = 2 * 3  # k * ceil(10 / 4)
    for expert in range(4):
        assert float(weights[chosen == expert].sum()) <= room
    best = made.logits(x).softmax(1).max(1).values
    taken = weights[:, 0] == 1
    assert int(taken.sum()) == room
    assert float(best[taken].min()) >= float(best[~taken].max())
    nothing = made(x)[weights.sum(1) == 0]
    assert torch.equal(nothing, torch.zeros_like(nothing))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_all_experts_are_the_dense_network(form: str) -> None:
    made = experts(k=6, form=form).double()
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    torch.testing.assert_close(made(x), made.dense()(x), rtol=0, atol=1e-10)
    made = experts(k=6, form=form, capacity=6.0).double()  # enough room for all: the long way to the same
    torch.testing.assert_close(made(x), made.dense()(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("keys_last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_gated_networks_and_back(bias: bool, keys_last: bool) -> None:
    torch.manual_seed(0)
    packed = GluMlp(10, 32, 10, act_layer=nn.SiLU, bias=bias, gate_last=keys_last)
    apart = SwiGLU(10, 16, 10, bias=bias)
    for parameter in (*packed.parameters(), *apart.parameters()):
        parameter.normal_()
    model = nn.Sequential(packed, apart).double()
    sites = find_sites(model)
    assert [site.kind for site in sites] == ["packed", "gated"]
    x = torch.randn(6, 10, dtype=torch.float64)
    for site in sites:
        labels = torch.randperm(16) % 4
        every = split(site, labels, 4)
        torch.testing.assert_close(every(x), site.module(x), rtol=0, atol=1e-10)
        again = split(site, labels, 1).dense()
        assert type(again) is type(site.module)
        assert_same_state(again, site.module)
        assert torch.equal(again(x), site.module(x))


def test_balance_loss_against_drawing() -> None:
    """The expected load is what drawing the noise of one expert anew gives on average."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, generator=generator, dtype=torch.float64) * 0.2
    noisy = logits + torch.randn(9, 4, generator=generator, dtype=torch.float64) / 4
    last = noisy.topk(2, 1).values[:, -1:]
    draws = logits + torch.randn(20_000, 9, 4, generator=generator, dtype=torch.float64) / 4
    load = (draws > last).double().mean(0).sum(0)
    importance = logits.softmax(1).sum(0)
    wanted = sum(float(amount.var() / amount.mean() ** 2) for amount in (load, importance)) / 2
    assert float(balance_loss(logits, noisy, 2, 1.0)) == pytest.approx(wanted, rel=0.03)
    even = torch.zeros(9, 4)
    assert float(balance_loss(even, even, 2, 1.0)) == pytest.approx(0, abs=1e-9)


def test_balanced_kmeans_finds_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(4, 6)
    truth = torch.arange(20) % 4
    labels = balanced_kmeans(centres[truth] + torch.randn(20, 6, generator=generator), 4, seed=3)
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 4


@torch.no_grad()
def test_all_experts_in_a_whole_model() -> None:
    model = small_vit().double()
    made = make_pass("emoe", layers="all", experts=8, k=1, keep="anyway", epochs=0).apply(
        model, CONTEXT.with_changes(example=(X[:1].double(),))
    )
    assert [one.size for one in moes(made)] == [24] * 3
    assert not torch.allclose(made(X.double()), model(X.double()))
    for one in moes(made):
        one.k = one.experts
    torch.testing.assert_close(made(X.double()), model(X.double()), rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_way_back_is_exact() -> None:
    model = small_vit()
    kept = copy.deepcopy(model)
    made = make_pass("emoe", **ANYWAY, epochs=0).apply(model, CONTEXT)
    assert len(moes(made)) == 1
    again = merge_experts(made)
    assert len(moes(made)) == 1, "merging changes nothing of what it is given"
    assert_same_state(again, model)
    assert_same_state(kept, model)
    assert torch.equal(again(X), model(X))
    with pytest.raises(UserMistake, match="has no experts to merge"):
        merge_experts(again)


def test_what_is_worth_grouping() -> None:
    """As measured on one core with DeiT-Ti's network: see ``Experts``."""
    for tokens, k, worth in (
        (1, 4, False),
        (197, 4, True),
        (197, 8, True),
        (197, 12, False),
        (3152, 12, True),
    ):
        made = ExpertMlp(192, 768, 24, k).eval()
        assert made._worth_grouping(torch.empty(tokens, 192)) == worth, (tokens, k)
        assert not made.train()._worth_grouping(torch.empty(tokens, 192))


def test_a_token_far_from_all_but_one_expert() -> None:
    """Softmax values beyond 1e-45 are 0 and say no more which expert is the next best."""
    logits = torch.tensor([[0.0, -300.0, -200.0, -150.0], [-300.0, -150.0, 0.0, -200.0]])
    chosen, _ = experts(count=4)._choose(logits)
    assert chosen.tolist() == [[0, 3], [2, 1]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", ["average", "learned", "inter"])
@pytest.mark.parametrize("capacity", [0.0, 1.0])
@torch.no_grad()
def test_under_autocast(gate: str, capacity: float, form: str) -> None:
    made: Experts = experts(gate=gate, capacity=capacity, form=form) if gate != "inter" else gated(capacity)
    x = torch.randn(40, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(x).float()
    # A rounded projection may move a token to another expert.
    same = ((found - made(x)).abs().amax(1) < 0.05).float().mean()
    assert same >= 0.8
    assert made.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def gated(capacity: float) -> ExpertSwiGLU:
    torch.manual_seed(0)
    layers = nn.Linear(10, 24), nn.Linear(10, 24), nn.Linear(24, 7)
    made = ExpertSwiGLU.of(*layers, nn.SiLU(), torch.arange(24) % 6, 2, gate="inter", capacity=capacity)
    return made.eval()


def test_logits_of_the_hidden_units_are_precise() -> None:
    x = torch.randn(5, 10)
    assert gated(0.0).bfloat16().logits(x.bfloat16()).dtype == torch.float32
    assert gated(0.0).double().logits(x.double()).dtype == torch.float64


def test_mistakes_of_the_layer() -> None:
    for options, why in (
        (
            {"experts": 5},
            r"experts=5 must divide the 24 hidden units into equal parts; allowed here: \[2, 3, 4, 6",
        ),
        ({"k": 7}, r"k=7 must be in \[1, 6\]"),
        ({"total": 0.0}, "total=0.0 above 0"),
        ({"form": "grouping"}, "form='grouping'.*allowed: auto, grouped, masked"),
    ):
        with pytest.raises(UserMistake, match=why):
            ExpertMlp(**{"dim": 4, "hidden": 24, "experts": 6, "k": 2, **options})
    with pytest.raises(UserMistake, match=r"each of 2 experts 2 units, but give \[3, 1\]"):
        ExpertMlp.of(nn.Linear(3, 4), nn.Linear(4, 3), nn.GELU(), torch.tensor([0, 0, 0, 1]), 1)
