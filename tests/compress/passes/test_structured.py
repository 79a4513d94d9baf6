"""Which units go, how many, and that nothing of them is left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch

from compress.measuring import count
from compress.passes import make_pass
from compress.passes._unit_scores import Scorer, taylor_gradients
from compress.passes.base import Context
from compress.structure import StructureError, recognise
from nas.errors import UserMistake
from tests.compress.models import batches, small_vit

CONTEXT = Context(example=(torch.randn(1, 3, 32, 32),), train=batches(3), epochs=0)


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_half_of_the_units_go(criterion: str, scope: str) -> None:
    model = small_vit()
    before = copy.deepcopy(model.state_dict())
    made = make_pass("structured", ratio=0.5, criterion=criterion, scope=scope, multiple=1).apply(
        model, CONTEXT
    )
    blocks = recognise(made).blocks
    assert sum(block.mlp.hidden for block in blocks) == 3 * 96
    assert sum(block.head_dim for block in blocks) == 3 * 8
    assert (scope == "uniform") == all(block.mlp.hidden == 96 for block in blocks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert made(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_every_kind_of_unit_at_once() -> None:
    made: Any = make_pass("structured", ratio=0.4, units="heads+channels+mlp", bottleneck=False).apply(
        small_vit(), CONTEXT
    )
    structure = recognise(made)
    assert (structure.width, structure.blocks[0].num_heads, structure.blocks[0].head_dim) == (32, 2, 10)
    assert structure.blocks[0].mlp.hidden == 120  # 115, and up to a multiple of 8
    assert count(made, CONTEXT.example)["params"] < 0.42 * count(small_vit(), CONTEXT.example)["params"]


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({}, [(104, 32, 96)] * 2),
        ({"multiple": 1}, [(99, 31, 93)] * 2),
        ({"multiple": 4}, [(100, 32, 96)] * 2),
        ({"multiple": 16}, [(112, 31, 96)] * 2),
    ],
)
def test_widths_are_multiples_that_kernels_like(
    options: dict[str, Any], widths: list[tuple[int, int, int]]
) -> None:
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=192, depth=2, num_heads=3, mlp_ratio=204 / 192
    ).eval()
    context = Context(example=(torch.randn(1, 3, 32, 32),))
    make = {"ratio": 0.515, "units": "channels+mlp+embedding", **options}
    structure = recognise(make_pass("structured", **make).apply(model, context))
    found = [(block.mlp.hidden, block.head_dim, structure.width) for block in structure.blocks]
    assert found == widths
    narrow = recognise(make_pass("structured", **{**make, "scope": "global"}).apply(model, context))
    if not options:
        assert all(block.mlp.hidden % 8 == block.head_dim % 8 == 0 for block in narrow.blocks)


@torch.no_grad()
def test_units_that_do_nothing_go_first() -> None:
    model = small_vit()
    block = recognise(model).blocks[1]
    for unit in range(0, 192, 2):
        block.mlp.fc1.weight[unit] = 0
        block.mlp.fc1.bias[unit] = 0
        block.mlp.fc2.weight[:, unit] = 0
    x = torch.randn(2, 3, 32, 32)
    for criterion in ("l1", "l2", "taylor"):
        made = make_pass("structured", ratio=0.5, units="mlp", criterion=criterion).apply(model, CONTEXT)
        kept = recognise(made).blocks[1].mlp.fc1.weight
        assert torch.equal(kept, block.mlp.fc1.weight[1::2])
    assert made(x).shape == (2, 5)


def test_taylor_scores_are_the_first_order_change_of_the_loss() -> None:
    """Against a finite difference of a gate on each unit (in float64, one minibatch)."""
    model: Any = small_vit().double()
    images, labels = batches(1)[0]
    data = [(images.double(), labels)]
    context = CONTEXT.with_changes(train=data, loss=torch.nn.functional.cross_entropy)
    scorer = Scorer("taylor", taylor_gradients(model, context, 1))
    block = recognise(model).blocks[1]
    hidden, heads, carried = scorer.hidden(block.mlp), scorer.heads(block), scorer.carried_channels(block)

    def change(layer: Any, columns: list[int], step: float = 1e-5) -> float:
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(layer.weight.data)
            layer.weight.data[:, columns] *= 1 + sign * step
            with torch.no_grad():
                losses.append(float(context.loss(model(data[0][0]), labels)))
            layer.weight.data.copy_(moved)
        return ((losses[0] - losses[1]) / (2 * step)) ** 2

    for unit in (0, 77, 191):
        assert float(hidden[unit]) == pytest.approx(change(block.mlp.fc2, [unit]), rel=1e-2, abs=1e-9)
    assert float(heads[1]) == pytest.approx(change(block.proj, list(range(16, 32))), rel=1e-2, abs=1e-9)
    assert float(carried[2, 3]) == pytest.approx(change(block.proj, [35]), rel=1e-2, abs=1e-9)


def test_fine_tuning_learns() -> None:
    model, data = small_vit(), batches(6)
    context = CONTEXT.with_changes(train=data, epochs=None)
    plain = make_pass("structured", ratio=0.6, epochs=0).apply(model, context)
    tuned = make_pass("structured", ratio=0.6, epochs=4, learning_rate=2e-3).apply(model, context)
    images, labels = data[0]
    with torch.no_grad():
        assert context.loss(tuned(images), labels) < 0.8 * context.loss(plain(images), labels)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_hierarchical_models_lose_hidden_units_or_say_why_not(name: str) -> None:
    small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)} if "swin" in name else {}
    model = timm.create_model(name, **small).eval()
    example = (torch.randn(1, 3, 224, 224),)
    context = Context(example=example)
    made = make_pass("structured", units="mlp").apply(model, context)
    assert count(made, example)["macs"] < 0.8 * count(model, example)["macs"]
    with pytest.raises(StructureError, match=r"no 'blocks'.*units=mlp alone asks for less"):
        make_pass("structured").apply(model, context)


def test_mistakes() -> None:
    with pytest.raises(UserMistake, match=r"unknown units 'head' \(did you mean 'heads'\?\)"):
        make_pass("structured", units="head")
    with pytest.raises(UserMistake, match=r"ratio=1 must be in \[0, 1\)"):
        make_pass("structured", ratio=1)
    with pytest.raises(StructureError, match="use heads instead"):
        make_pass("structured").apply(small_vit(qk_norm=True), CONTEXT)
