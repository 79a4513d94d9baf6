"""The pass that the Hiformer paper implies, on the Hiformer network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compress.passes import make_pass
from compress.passes._low_rank_analysis import factorised, find_layers, put
from compress.passes.base import Context
from nas.profile import profile
from spaces import ClickThroughRateSignature, get_space
from spaces.layers.low_rank import LowRankLinear

SIGNATURE = ClickThroughRateSignature((20, 9, 12, 7, 15, 6), (1, 1, 3, 1, 1, 1), 4)
IDS = torch.randint(1, 6, (7, 8), generator=torch.Generator().manual_seed(0))
DENSE = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).double()
CONTEXT = Context(example=(IDS[:1], DENSE[:1]))
COMPOSITE = ["layers.0.attention.key.map", "layers.0.attention.value.map"]


def network(name: str = "hiformer_1layer") -> nn.Module:
    space = get_space("hiformer")
    torch.manual_seed(0)
    return space.build(space.published[name], SIGNATURE).double().eval()


def dense(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def macs(model: nn.Module) -> int:
    return profile(model, (IDS[:1], DENSE[:1])).macs


def factorised_names(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, LowRankLinear)]


def reduced(model: nn.Module, **options: Any) -> nn.Module:
    return make_pass("low_rank", keep="anyway", only=["map"], **options).apply(model, CONTEXT)


@torch.no_grad()
def test_full_rank_is_the_original() -> None:
    model = network()
    layers = find_layers(
        model, CONTEXT, only=["map"], skip=(), least=4, split=False, batches=0, sensitivity=False
    )
    assert [layer.name for layer in layers] == COMPOSITE
    made = copy.deepcopy(model)
    for layer in layers:
        put(made, layer.names, factorised(layer, [len(layer.parts[0].energies)]))
    torch.testing.assert_close(made(IDS, DENSE), model(IDS, DENSE), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_true_rank_is_the_original_for_fewer_macs() -> None:
    """Matrices that are products of factors of rank 8 are found to be so."""
    model = network()
    for name in COMPOSITE:
        weight = dense(model, name).weight
        rows, columns = weight.shape
        left = torch.randn(rows, 8, dtype=torch.float64)
        weight.copy_(left @ torch.randn(8, columns, dtype=torch.float64) / 50)
    made = reduced(model, rank=8)
    assert factorised_names(made) == COMPOSITE
    torch.testing.assert_close(made(IDS, DENSE), model(IDS, DENSE), rtol=1e-9, atol=1e-10)
    saved = sum(
        dense(model, name).weight.numel() - 8 * sum(dense(model, name).weight.shape) for name in COMPOSITE
    )
    assert macs(model) - macs(made) == saved > 0


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
def test_a_lower_rank_costs_less(ratio: float) -> None:
    model = network()
    made = reduced(model, ratio=ratio)
    assert factorised_names(made) == COMPOSITE
    composite = sum(dense(model, name).weight.numel() for name in COMPOSITE)
    assert macs(model) - macs(made) == pytest.approx(ratio * composite, rel=0.1)
    assert not torch.allclose(made(IDS, DENSE), model(IDS, DENSE))


@torch.no_grad()
def test_a_network_trained_with_factors_is_left_alone_where_it_is_cheap() -> None:
    model = network("hiformer_1layer_low_rank")
    made = reduced(model, energy=1.0)
    torch.testing.assert_close(made(IDS, DENSE), model(IDS, DENSE), rtol=1e-10, atol=1e-12)
    assert macs(made) == macs(model)
