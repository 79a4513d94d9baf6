"""Layers of the original by its names and options, against a plain account of what it computes, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.passes.emoe import Emoe
from nas.errors import UserMistake
from spaces.layers.expert_loading import load_emoe, load_emoe_swiglu
from spaces.layers.expert_mlp import ExpertMlp
from tests.compress.models import small_vit
from tests.compress.passes._emoe_models import CONTEXT, moes

N, S, D, OUT, T = 5, 3, 6, 4, 17


def state_of(
    gate: str = "top", *, spread: bool = False, seed: int = 0, prefix: str = ""
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bias = draw(N, OUT) if spread else draw(1, OUT).repeat(N, 1)
    made = {
        "_num_global_experts": torch.tensor(N),
        "experts.batched_fc1_w": draw(N, S, D),
        "experts.batched_fc1_bias": draw(N, S),
        "experts.batched_fc2_w": draw(N, S, OUT),
        "experts.batched_fc2_bias": bias,
    }
    if gate == "top":
        made["gates.0.wg.weight"] = draw(N, D)
    else:
        made |= {
            "gates.0.temperature": torch.full((1,), 1.3, dtype=torch.float64),
            "gates.0.sim_matrix": draw(11, N),
            "gates.0.cosine_projector.weight": draw(11, D),
            "gates.0.cosine_projector.bias": draw(11),
        }
    return {prefix + name: value for name, value in made.items()}


def by_hand(
    state: dict[str, Tensor],
    x: Tensor,
    k: int,
    *,
    capacity: float = 0.0,
    ones: bool = True,
    normalise: bool = True,
    prioritised: bool = True,
    unit: bool = False,
    act: Any = functional.gelu,
) -> Tensor:
    if "gates.0.wg.weight" in state:
        logits = (functional.normalize(x, dim=1) if unit else x) @ state["gates.0.wg.weight"].T
    else:
        weight, bias = state["gates.0.cosine_projector.weight"], state["gates.0.cosine_projector.bias"]
        projected = functional.normalize(x @ weight.T + bias, dim=1)
        logits = projected @ functional.normalize(state["gates.0.sim_matrix"], dim=0)
        logits = logits * math.exp(min(float(state["gates.0.temperature"]), math.log(100)))
    scores = logits.softmax(1)
    best = scores.topk(k, dim=1)
    room = k * int(abs(capacity) * math.ceil(len(x) / N)) if capacity else len(x) * k
    order = scores.max(1).values.argsort(descending=True) if prioritised else torch.arange(len(x))
    taken, made = [0] * N, torch.zeros(len(x), OUT, dtype=x.dtype)
    for slot in range(k):
        for token in order.tolist():
            expert = int(best.indices[token, slot])
            taken[expert] += 1
            if taken[expert] > room:
                continue
            share = best.values[token, slot]
            if ones:
                share = torch.ones(())
            elif normalise and k > 1:
                share = share / best.values[token].sum()
            hidden = (
                state["experts.batched_fc1_w"][expert] @ x[token] + state["experts.batched_fc1_bias"][expert]
            )
            values = state["experts.batched_fc2_w"][expert]
            made[token] += share * (act(hidden) @ values + state["experts.batched_fc2_bias"][expert])
    return made


X = torch.randn(T, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("form", ["grouped", "masked"])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("capacity", [0.0, 0.5, -1.25])
@pytest.mark.parametrize("k", [1, 3, N])
@pytest.mark.parametrize(
    ("gate", "ones", "normalise"),
    [("top", True, True), ("top", False, True), ("top", False, False), ("cosine_top", False, True)],
)
def test_options(
    gate: str,
    ones: bool,
    normalise: bool,
    k: int,
    capacity: float,
    prioritised: bool,
    spread: bool,
    form: str,
) -> None:
    state = state_of(gate, spread=spread)
    made = load_emoe(
        state,
        top_k=k,
        gate_type=gate,
        capacity_factor=capacity,
        one_score_gate=ones,
        normalize_gate=normalise,
        batch_prioritized_routing=prioritised,
        form=form,
    )
    wanted = by_hand(state, X, k, capacity=capacity, ones=ones, normalise=normalise, prioritised=prioritised)
    torch.testing.assert_close(made(X), wanted, rtol=0, atol=1e-12)
    again = ExpertMlp(**made.config()).double().eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(X), made(X)), "its config tells all"


@pytest.mark.parametrize("k", [1, 3])
def test_the_pass_weighs_as_the_original_where_asked_to(k: int) -> None:
    made: Any = Emoe([0], experts=4, k=k, gate="learned", official=True, keep="anyway", epochs=0).apply(
        small_vit(depth=1), CONTEXT
    )
    (layer,) = moes(made)
    assert (layer.weighting, layer.total) == (("scores", 1.0) if k == 1 else ("shares", 1.0))


@torch.no_grad()
def test_further_options() -> None:
    state = state_of(spread=True)
    made = load_emoe(state, top_k=2, normalize_one_score_gate=True, act=nn.ReLU())
    wanted = by_hand(state, X, 2, unit=True, act=functional.relu)
    torch.testing.assert_close(made(X), wanted, rtol=0, atol=1e-12)
    more = load_emoe(state, top_k=N + 3)  # the original takes all there are
    torch.testing.assert_close(more(X), by_hand(state, X, N), rtol=0, atol=1e-12)
    merged = made.dense().fc2.bias
    torch.testing.assert_close(merged, 2 * state["experts.batched_fc2_bias"].mean(0))


@torch.no_grad()
def test_without_biases_and_with_shared_keys() -> None:
    state = {name: value for name, value in state_of().items() if not name.endswith("_bias")}
    state["experts.batched_fc1_w"] = state["experts.batched_fc1_w"][:1]
    made = load_emoe(state, top_k=2)
    assert made.key_bias is None
    assert made.bias is None
    full = dict(state)
    full["experts.batched_fc1_w"] = state["experts.batched_fc1_w"].repeat(N, 1, 1)
    full["experts.batched_fc1_bias"] = torch.zeros(N, S, dtype=torch.float64)
    full["experts.batched_fc2_bias"] = torch.zeros(N, OUT, dtype=torch.float64)
    torch.testing.assert_close(made(X), by_hand(full, X, 2), rtol=0, atol=1e-12)


@torch.no_grad()
def test_layers_are_found_by_their_prefix() -> None:
    both = state_of(prefix="blocks.8.mlp.") | state_of(seed=1, prefix="blocks.10.mlp.")
    with pytest.raises(UserMistake, match=r"give one of blocks\.10\.mlp, blocks\.8\.mlp"):
        load_emoe(both, top_k=2)
    made = load_emoe(both, top_k=2, prefix="blocks.10.mlp")
    torch.testing.assert_close(made(X), by_hand(state_of(seed=1), X, 2), rtol=0, atol=1e-12)


@torch.no_grad()
def test_types_are_those_of_the_state() -> None:
    state = {
        name: value.half() if name.startswith("experts") else value for name, value in state_of().items()
    }
    state["gates.0.wg.weight"] = state["gates.0.wg.weight"].float()
    made = load_emoe(state, top_k=2)
    assert {one.dtype for one in made.parameters()} == {torch.float16}
    assert made.gate.weight.dtype == torch.float32, "gates are computed in float32"
    torch.testing.assert_close(made(X.half()).double(), by_hand(state_of(), X, 2), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_gated_network_before_and_after_it_was_rearranged() -> None:
    torch.manual_seed(0)
    rows = {name: torch.randn(12, D, dtype=torch.float64) for name in ("gate_proj", "up_proj")}
    down, labels = torch.randn(OUT, 12, dtype=torch.float64), torch.randperm(12) % 4
    order = torch.cat([(labels == expert).nonzero()[:, 0] for expert in range(4)])
    dense = {f"m.{name}.weight": value for name, value in rows.items()} | {"m.down_proj.weight": down}
    moved = {f"m.{name}.weight": value[order] for name, value in rows.items()}
    moved["m.down_proj.weight"] = down[:, order]
    hidden = functional.silu(X @ rows["gate_proj"].T) * (X @ rows["up_proj"].T)
    scores = torch.stack([(X @ rows["up_proj"].T)[:, labels == one].mean(1) for one in range(4)], dim=1)
    kept = torch.zeros(T, 4, dtype=torch.float64).scatter(1, scores.topk(2).indices, 1.0)
    wanted = (hidden * kept[:, labels]) @ down.T
    options: dict[str, Any] = {"n_expert": 4, "topk": 2, "select": "up", "cluster_ids": labels}
    for state, rearranged in ((dense, False), (moved, True)):
        made = load_emoe_swiglu(state, rearranged=rearranged, **options)
        torch.testing.assert_close(made(X), wanted, rtol=0, atol=1e-12)
        back: Any = made.dense()
        assert torch.equal(back.fc1_g.weight, rows["gate_proj"])
        assert torch.equal(back.fc2.weight, down)


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state_of().items() if key != name}


@pytest.mark.parametrize(
    ("state", "options", "text"),
    [
        (without("experts.batched_fc1_w"), {}, r"holds no experts\.batched_fc1_w"),
        (without("experts.batched_fc2_w"), {}, r"must be \(N, s, d\)"),
        (without("gates.0.wg.weight"), {}, r"must hold either gates\.0\.wg\.weight, or all of"),
        (state_of() | {"gates.1.wg.weight": torch.zeros(N, D)}, {}, r"gates\.1\.wg\.weight is unknown"),
        (state_of() | {"gates.0.wg.weight": torch.zeros(N + 1, D)}, {}, "experts of the gate"),
        (state_of() | {"gates.0.wg.weight": torch.zeros(N, D + 1)}, {}, "gate does not fit the experts"),
        (state_of() | {"experts.batched_fc2_bias": torch.zeros(N, 1)}, {}, r"batched_fc2_bias is \(5, 1\)"),
        (state_of(), {"gate_type": "cosine_top"}, "holds a gate 'top'"),
        (state_of(), {"model_dim": 8}, "model_dim=8, but the state has 6"),
        (state_of(), {"top_k": 0}, "top_k=0 must be at least 1"),
        (state_of(), {"cluster_ids": torch.zeros(N * S)}, "must give each of 5 experts 3"),
        (state_of(), {"prefix": "mlp"}, r"holds no mlp\.experts\.batched_fc1_w"),
    ],
)
def test_mistakes_are_told(state: dict[str, Tensor], options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserMistake, match=text) as found:
        load_emoe(state, **{"top_k": 2, **options})
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"select": "gates"}, "did you mean 'gate'"),
        ({"n_expert": 5}, "n_expert=5 must divide the 12"),
        ({"topk": 9}, r"k=9 must be in \[1, 4\]"),
        ({"rearranged": False}, "cluster_ids: needed"),
        ({"hidden_size": 5}, "hidden_size=5, but the state has 6"),
        ({"cluster_ids": torch.zeros(12)}, "must give each of 4 experts 3"),
    ],
)
def test_mistakes_of_the_gated_form_are_told(options: dict[str, Any], text: str) -> None:
    state = {f"{name}_proj.weight": torch.zeros(12, 6) for name in ("gate", "up")}
    state["down_proj.weight"] = torch.zeros(6, 12)
    with pytest.raises(UserMistake, match=text):
        load_emoe_swiglu(state, **{"n_expert": 4, "topk": 2, **options})
