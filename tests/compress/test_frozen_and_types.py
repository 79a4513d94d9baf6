"""What the user has frozen stays frozen, and models of other float types are trained like others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import nn

from compress.finetune import finetune
from compress.passes import make_pass
from compress.passes._ofb_supernet import Supernet
from compress.passes.base import Context
from compress.passes.emoe import merge_experts
from nas.errors import UserMistake
from tests.compress._sit_models import batches, context, deit, slimmings

PASSES: dict[str, dict[str, Any]] = {
    "structured": {},
    "ofb": {"target": 0.6},
    "sit": {"slim_after": [1]},
}


def of_type(kind: torch.dtype) -> Context:
    train = [(images.to(kind), labels) for images, labels in batches()]
    return context(train=train, epochs=1, example=(torch.zeros(1, 3, 16, 16, dtype=kind),))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PASSES)
def test_other_float_types(name: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    run = of_type(kind)
    made: Any = make_pass(name, **PASSES[name]).apply(deit(depth=3).to(kind), run)
    assert {parameter.dtype for parameter in made.parameters()} == {kind}
    assert made(run.example[0]).isfinite().all()


def test_probabilities_of_a_search_are_wide() -> None:
    supernet = Supernet(deit().bfloat16())
    assert {gate.alpha.dtype for gate in supernet.gates()} == {torch.float32}
    assert {gate.alpha.dtype for gate in Supernet(deit().double()).gates()} == {torch.float64}
    supernet.train()
    supernet.schedule(0.5, 0.5)
    images = batches(1)[0][0].bfloat16()
    assert supernet(images).dtype == torch.bfloat16
    rebuilt = supernet.reconstruction(images)
    assert rebuilt is not None
    assert rebuilt.isfinite()


def test_factors_of_frozen_layers_are_frozen() -> None:
    model: Any = deit()
    model.blocks[1].requires_grad_(False)
    made: Any = make_pass("low_rank", rank=4, keep="anyway", epochs=0).apply(model, context(epochs=0))
    assert not any(p.requires_grad for p in made.blocks[1].parameters())
    assert all(p.requires_grad for p in made.blocks[0].parameters())
    assert len(list(made.blocks[1].parameters())) > len(list(model.blocks[1].parameters()))


@pytest.mark.parametrize("name", PASSES)
def test_frozen_parts_stay_frozen(name: str) -> None:
    torch.manual_seed(0)
    model: Any = deit()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(("head", "blocks.3")))
    own: dict[str, dict[str, Any]] = {"ofb": {"embedding": False}, "sit": {"start": "random"}}
    options = {**PASSES[name], **own.get(name, {})}
    made: Any = make_pass(name, **options).apply(model, context(epochs=1))
    last = made.blocks[-1]
    kept = [made.pos_embed, made.blocks[0].attn.qkv.weight, made.blocks[0].mlp.fc2.bias, made.norm.weight]
    assert not any(parameter.requires_grad for parameter in kept)
    assert all(parameter.requires_grad for part in (last, made.head) for parameter in part.parameters())
    assert torch.equal(made.pos_embed, model.pos_embed)
    assert torch.equal(made.blocks[0].mlp.fc2.bias, model.blocks[0].mlp.fc2.bias)
    assert not torch.equal(made.head.weight, model.head.weight)
    assert all(parameter.grad is None for parameter in made.parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [("structured", {"epochs": 0}), ("ofb", {"target": 0.6, "epochs": 1, "finetune_epochs": 0})],
)
def test_all_frozen_is_cut_but_not_trained(name: str, options: dict[str, Any]) -> None:
    model: Any = deit().requires_grad_(False)
    made: Any = make_pass(name, **options).apply(model, context())
    assert not any(parameter.requires_grad for parameter in made.parameters())
    sizes = [sum(p.numel() for p in one.parameters()) for one in (made, model)]
    assert sizes[0] < 0.8 * sizes[1]
    rows = {tuple(row) for row in model.blocks[1].mlp.fc1.weight[:, :1].tolist()}
    if name == "structured":
        assert {tuple(row) for row in made.blocks[1].mlp.fc1.weight[:, :1].tolist()} <= rows


@pytest.mark.parametrize(("name", "option"), [("structured", "epochs"), ("ofb", "finetune_epochs")])
def test_nothing_to_train_is_told_at_the_start(
    name: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.passes.ofb.Supernet", lambda *_: pytest.fail("began"))
    monkeypatch.setattr("compress.passes.structured.Scorer", lambda *_: pytest.fail("began"))
    text = rf"every parameter of VisionTransformer is frozen \(requires_grad=False\); .* or give {option}=0"
    with pytest.raises(UserMistake, match=text):
        make_pass(name).apply(deit().requires_grad_(False), context(epochs=1))


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("kind", ["plain", "gated", "packed"])
def test_frozen_parts_of_experts_stay_frozen(kind: str, back: bool) -> None:
    layers: dict[str, Any] = {"plain": Mlp, "gated": SwiGLU, "packed": GluMlp}
    model: Any = deit(mlp_layer=layers[kind])
    first = "fc1_g" if kind == "gated" else "fc1"
    frozen = (f"blocks.0.mlp.{first}.weight", "blocks.0.mlp.fc2.bias")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    options = {"experts": 4, "k": 2, "layers": [0], "keep": "anyway", "learning_rate": 1e-2}
    made: Any = make_pass("emoe", back=back, epochs=1, **options).apply(model, context(epochs=1))
    split = made if not back else make_pass("emoe", **options, epochs=0).apply(made, context(epochs=0))
    learns = {name: one.requires_grad for name, one in split.blocks[0].mlp.named_parameters()}
    fixed = {"keys", "bias"} | ({"factors"} if kind == "packed" else set())
    assert {name for name, one in learns.items() if not one} == fixed
    merged = made if back else merge_experts(made)
    assert {name for name, one in merged.named_parameters() if not one.requires_grad} == set(frozen)
    for name, before in model.named_parameters():
        assert torch.equal(merged.get_parameter(name), before) == (name in frozen), name


def test_slimmings_of_a_frozen_model_learn_alone() -> None:
    model: Any = deit().requires_grad_(False)
    made: Any = make_pass("sit", slim_after=[1], epochs=1, start="random").apply(model, context())
    learnt = {id(p) for one in slimmings(made) for p in one.parameters()}
    assert {id(p) for p in made.parameters() if p.requires_grad} == learnt
    assert torch.equal(made.head.weight, model.head.weight)


def test_no_gradient_is_left() -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    finetune(model, context(), epochs=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(UserMistake, match="every parameter of Sequential is frozen"):
        finetune(model.requires_grad_(False), context(), epochs=1)
