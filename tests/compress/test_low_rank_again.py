"""Layers that are factorised already: each is one layer still, for which a smaller rank may be found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import compress, load
from compress.passes import make_pass
from compress.passes._low_rank_analysis import factorised, find_layers
from compress.passes.base import Context
from spaces.layers.low_rank import LowRankConv2d, LowRankLinear, SplitLowRankLinear
from tests.compress.models import batches, small_vit

X = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LOW_RANK = (LowRankConv2d, LowRankLinear, SplitLowRankLinear)
MADE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (LowRankLinear(12, 10, 5), (4, 12)),
    "no bias": (LowRankLinear(12, 10, 5, bias=False), (4, 12)),
    "split": (SplitLowRankLinear(12, 30, (2, 4, 3)), (4, 12)),
    "conv": (LowRankConv2d(6, 8, 4, (3, 3), stride=(2, 1), padding=(1, 1)), (2, 6, 7, 7)),
}


@pytest.mark.parametrize("kind", MADE)
@torch.no_grad()
def test_the_whole_layer_computes_the_same(kind: str) -> None:
    made, shape = MADE[kind]
    made = made.double()
    made.down.weight.requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64)
    whole = made.whole()
    torch.testing.assert_close(whole(x), made(x), rtol=0, atol=1e-12)
    assert type(whole) is (nn.Conv2d if kind == "conv" else nn.Linear)
    assert not whole.weight.requires_grad
    assert (whole.bias is None) == (kind == "no bias")
    made.down.weight.requires_grad_(True)


@pytest.mark.parametrize("kind", MADE)
@torch.no_grad()
def test_truncation_loses_exactly_the_discarded_singular_values(kind: str) -> None:
    made, shape = MADE[kind]
    torch.manual_seed(3)
    net = nn.Sequential(made.double())
    context = Context(example=(torch.randn(shape, dtype=torch.float64)[:1],))
    options: dict[str, Any] = {"only": (), "skip": (), "least": 2, "split": False}
    (layer,) = find_layers(net, context, batches=0, sensitivity=False, **options)
    assert layer.names == ("0",)
    assert layer.dense() == sum(x.numel() for name, x in made.named_parameters() if "weight" in name)
    smaller: Any = factorised(layer, [2])
    values = torch.linalg.svdvals(made.whole().weight.flatten(1))
    lost: Tensor = smaller.whole().weight - made.whole().weight
    torch.testing.assert_close(lost.square().sum(), values[2:].square().sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("options", ["", ",qkv=three", ",energy=0.7"])
def test_twice(options: str, data: bool, tmp_path: Path) -> None:
    text = f"low_rank:epochs=0,keep=anyway{options}"
    given: dict[str, Any] = {"train": batches(1)} if data else {"example": X[:1]}
    result = compress(small_vit(depth=1), [text, text], measure_seconds=0, **given)
    macs = [step.macs for step in result.steps]
    assert macs[2] < macs[1] < macs[0]
    for module in result.model.modules():
        if isinstance(module, LOW_RANK):
            assert not any(isinstance(inner, LOW_RANK) for inner in module.modules() if inner is not module)
    again = load(result.save(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again.model(X), result.model(X))
    third = compress(again.model, text, measure_seconds=0, origin=again.origin, **given)
    assert third.final.macs < macs[2] or "energy" in options  # which is soon all in few directions
    third.save(tmp_path / "third")


def test_never_a_larger_rank_nor_a_frozen_one_thawed() -> None:
    context = Context(example=(X[:1],))
    model: Any = small_vit()
    model.blocks[1].requires_grad_(False)
    once: Any = make_pass("low_rank", rank=6, keep="anyway", epochs=0).apply(model, context)
    same: Any = make_pass("low_rank", rank=9, keep="anyway", epochs=0).apply(once, context)
    assert {name: tuple(x.shape) for name, x in same.named_parameters()} == {
        name: tuple(x.shape) for name, x in once.named_parameters()
    }
    less: Any = make_pass("low_rank", rank=3, keep="anyway", epochs=0).apply(once, context)
    assert less.blocks[0].mlp.fc1.rank == 3
    assert not any(x.requires_grad for x in less.blocks[1].parameters())
    assert all(x.requires_grad for x in less.blocks[0].parameters())


def test_tied_factors_are_left_alone() -> None:
    net = nn.Sequential(LowRankLinear(12, 12, 4), LowRankLinear(12, 12, 4)).eval()
    one, two = net
    two.down.weight = one.down.weight  # type: ignore[union-attr]
    context = Context(example=(torch.randn(1, 12),))
    options: dict[str, Any] = {"only": (), "skip": (), "least": 2, "split": False}
    assert find_layers(net, context, batches=0, sensitivity=False, **options) == []
