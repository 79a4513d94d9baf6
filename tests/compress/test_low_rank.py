"""Factorised layers: as close as can be, no dearer than asked for, and only where the target agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from compress import compress, load
from compress.measuring import count
from compress.passes import _low_rank_choice as choice
from compress.passes import make_pass, parse_pass
from compress.passes._low_rank_analysis import Layer, Part, factorised, find_layers
from compress.passes.base import Budget, Context
from compress.structure import StructureError
from nas.errors import UserMistake
from nas.latency import Pair
from spaces.layers.low_rank import LowRankConv2d, LowRankLinear, SplitLowRankLinear
from tests.compress.models import batches, small_vit
from tests.golden_vectors import golden

torch.set_num_threads(1)
X = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CONTEXT = Context(example=(X[:1],))
LOOK: dict[str, Any] = {
    "only": (),
    "skip": (),
    "least": 4,
    "split": False,
    "batches": 0,
    "sensitivity": False,
}


def layers_of(model: nn.Module, context: Context, **options: Any) -> list[Layer]:
    return find_layers(model, context, **{**LOOK, **options})


def steep_linear(rows: int = 24, columns: int = 16) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows).double()
    with torch.no_grad():
        layer.weight *= torch.linspace(2, 0.1, columns)
    return layer


@pytest.mark.parametrize("split", [False, True])
@torch.no_grad()
def test_truncation_loses_exactly_the_discarded_singular_values(split: bool) -> None:
    wrapped = nn.Sequential()
    wrapped.add_module("qkv", steep_linear())
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    (layer,) = layers_of(wrapped, CONTEXT.with_changes(example=(x,)), split=split)
    assert len(layer.parts) == (3 if split else 1)
    own: Any = layer.module
    errors = []
    for rank in range(1, 9):
        made: Any = factorised(layer, [rank] * len(layer.parts))
        eye = torch.eye(16, dtype=torch.float64)
        error = (made(eye) - own(eye)).square().sum()
        lost = sum(
            torch.linalg.svdvals(rows)[rank:].square().sum() for rows in own.weight.chunk(len(layer.parts))
        )
        torch.testing.assert_close(error, lost, rtol=1e-9, atol=1e-12)
        errors.append(float(error))
    assert errors == sorted(errors, reverse=True)
    full = factorised(layer, [len(part.energies) for part in layer.parts])
    torch.testing.assert_close(full(x), own(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 10, 1),
        nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 9, (3, 1), padding="same", dilation=2, padding_mode="reflect"),
    ],
)
@torch.no_grad()
def test_convolutions_of_full_rank_give_the_same(layer: nn.Conv2d) -> None:
    model = nn.Sequential(layer).double()
    x = torch.randn(2, layer.in_channels, 9, 9, dtype=torch.float64)
    (found,) = layers_of(model, CONTEXT.with_changes(example=(x[:1],)))
    made = factorised(found, [len(found.parts[0].energies)])
    assert isinstance(made, LowRankConv2d)
    torch.testing.assert_close(made(x), model(x), rtol=1e-10, atol=1e-12)
    again = LowRankConv2d(**made.config()).double()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x))


@torch.no_grad()
def test_calibration_data_lower_the_error_on_such_data() -> None:
    model = nn.Sequential(steep_linear(24, 16).float())
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -2, 16)
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(4)) @ mix.T + 3
    context = CONTEXT.with_changes(example=(x[:1],), train=[(x, torch.zeros(512))])
    (plain,), (aware,) = layers_of(model, context), layers_of(model, context, batches=1)
    errors = [float((factorised(one, [4])(x) - model(x)).square().sum(1).mean()) for one in (plain, aware)]
    assert errors[1] < 0.3 * errors[0]
    # The energies are the error: nothing else has to be measured.
    assert errors[1] == pytest.approx(float(aware.parts[0].energies[4:].sum()), rel=0.1)


def test_golden_composite_product_of_hiformer() -> None:
    vectors = golden("hiformer-formula")
    dense: Any = next(x for name, x in vectors.state.items() if "V" in name and x.dim() == 2 and len(x) == 48)
    layer = nn.Linear(*dense.shape, bias=False).double()
    layer.weight.data = dense.T.double().contiguous()
    (found,) = layers_of(nn.Sequential(layer), CONTEXT.with_changes(example=(torch.ones(1, 48).double(),)))
    energies = found.parts[0].energies
    values = vectors.outputs["singular_values_V"].double()
    torch.testing.assert_close(energies[: len(values)].sqrt(), values, rtol=1e-6, atol=1e-6)
    error = (energies[vectors.facts["args"]["rank_v"] :].sum() / energies.sum()).sqrt()
    assert float(error) == pytest.approx(vectors.facts["rank_truncation_rel_error_V"], rel=1e-6)


@pytest.mark.parametrize(("rank", "params", "macs"), [(72, 5_053_864, 1_123.0), (144, 5_717_416, 1_253.7)])
def test_published_counts_of_deit_tiny(rank: int, params: int, macs: float) -> None:
    model = timm.create_model("deit_tiny_patch16_224").eval()
    context = Context(example=(torch.zeros(1, 3, 224, 224),))
    made = make_pass("low_rank", rank=rank, only="qkv", keep="anyway").apply(model, context)
    found = count(made, context.example)
    assert found["params"] == params
    assert found["macs"] / 1e6 == pytest.approx(macs, abs=0.05)


@torch.no_grad()
def test_stronger_is_never_dearer_and_full_energy_changes_nothing() -> None:
    model, data = small_vit(), batches(1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for kind in ("macs", "params"):
        context = CONTEXT.with_changes(train=data, probe=True, budget=Budget.parse(f"{kind}=0.5"))
        made = make_pass("low_rank", keep="anyway", multiple=1, qkv="three")
        costs = [
            count(made.with_strength(strength).apply(model, context), CONTEXT.example)[kind]  # type: ignore[attr-defined]
            for strength in (0, 0.2, 0.5, 0.8, 1)
        ]
        assert costs[0] == count(model, CONTEXT.example)[kind]
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] < 0.4 * costs[0]
    whole = make_pass("low_rank", energy=1.0, keep="anyway").apply(model, CONTEXT)
    torch.testing.assert_close(whole(X), model(X), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_layers_that_matter_more_keep_more() -> None:
    energies = torch.linspace(1, 0.01, 32, dtype=torch.float64)
    part = Part(torch.zeros(32, 32), torch.eye(32), energies, None)
    much, little = (
        Layer((name,), nn.Linear(32, 32), 10, (1, 10, 32), [part], sensitivity=worth)
        for name, worth in (("much", 10.0), ("little", 0.1))
    )
    ranks = choice.by_budget([much, little], 0.5, "macs", 1, {"much": 15, "little": 15})
    assert ranks == {"little": (1,)} or ranks["much"] > ranks["little"]


@pytest.mark.parametrize("budget", ["params=0.7", "macs=0.7"])
def test_a_budget_is_met_and_the_result_loads(budget: str, tmp_path: Path) -> None:
    result = compress(
        small_vit(),
        "low_rank:keep=anyway,multiple=1,qkv=three,batches=1",
        train=batches(2),
        budget=budget,
        epochs=1,
        measure_seconds=0,
    )
    kind = budget.partition("=")[0]
    share = getattr(result.final, kind) / getattr(result.steps[0], kind)
    assert 0.6 < share <= 0.7
    kinds = {type(module) for module in result.model.modules()}
    assert SplitLowRankLinear in kinds
    assert LowRankLinear in kinds
    assert "layers; ranks: " in " ".join(result.final.notes)
    again = load(result.save(tmp_path / "saved"))
    with torch.no_grad():
        torch.testing.assert_close(again.model(X), result.model(X), rtol=0, atol=0)


def test_between_other_passes(tmp_path: Path) -> None:
    passes = ["structured:ratio=0.2", "low_rank:rank=8,keep=anyway,qkv=three"]
    result = compress(
        small_vit(),
        [*passes, "dynamic_quantization:keep_anyway=true,least=4"],
        example=X[:1],
        measure_seconds=0,
    )
    assert result.steps[2].params < result.steps[1].params
    again = load(result.save(tmp_path / "saved"))
    with torch.no_grad():
        torch.testing.assert_close(again.model(X), result.model(X), rtol=1e-4, atol=1e-5)


class FakeSession:
    def __init__(self, slow: bool):
        self.slow = slow

    def pair(self, first: str, second: str) -> Pair:
        word: Any = "cannot tell" if self.slow or int(first) > 12 else "faster"
        return Pair(first, second, 0.9, 0.89, 0.91, word, 0.01, 20)


def test_only_where_the_target_says_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def measured(models: Any, *others: Any, **options: Any) -> FakeSession:
        calls.append(models["dense"].weight.shape)
        return FakeSession(slow=models["dense"].out_features == 144)

    monkeypatch.setattr(choice, "measure_against", measured)
    told: list[str] = []
    made: Any = make_pass("low_rank", rank=9, only="qkv+fc1").apply(
        small_vit(), CONTEXT.with_changes(report=told.append)
    )
    assert type(made.blocks[0].attn.qkv) is nn.Linear
    assert isinstance(made.blocks[2].mlp.fc1, LowRankLinear)
    assert len(calls) == 2  # once for all layers of a shape
    assert any("at no rank, they stay as they are" in line for line in told)
    assert any("faster up to rank 9" in line for line in told)
    told.clear()
    make_pass("low_rank", rank=20, only="fc1").apply(small_vit(), CONTEXT.with_changes(report=told.append))
    assert told[-1] == "none of 3 layers is factorised: the model stays as it was"


@pytest.mark.slow
def test_what_was_measured_is_told_and_decides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512)).eval()
    told: list[str] = []
    context = Context(example=(torch.randn(1, 64, 512),), report=told.append)
    made: Any = make_pass("low_rank", rank=16, seconds=1.0).apply(model, context)
    # How fast it is depends on the machine; what is done must follow from what was found.
    found = [line for line in told if line.startswith("layers like 0 (512 -> 512) on cpu:1, time against")]
    assert len(found) == 1
    assert isinstance(made[0], LowRankLinear) == ("; faster up to" in found[0])


def test_weights_that_others_read_stay() -> None:
    first = make_pass("class_token_last_block").apply(small_vit(), CONTEXT)
    made: Any = make_pass("low_rank", rank=8, keep="anyway").apply(first, CONTEXT)
    assert type(made.blocks[2].attn.qkv) is nn.Linear
    assert isinstance(made.blocks[1].attn.qkv, LowRankLinear)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    context = CONTEXT.with_changes(example=(torch.ones(1, 3, 32),))
    with pytest.raises(StructureError, match=r"TransformerEncoderLayer: no nn\.Linear"):
        make_pass("low_rank").apply(encoder, context)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ratio": 1.0}, r"ratio=1\.0 must be in \[0, 1\)"),
        ({"energy": 0.0}, "energy=0.0 must be in"),
        ({"energy": 0.5, "rank": 3}, "exclude each other"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"batches": 0}, "batches=0"),
        ({"keep": "always"}, "keep='always'; allowed"),
    ],
)
def test_mistakes_in_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserMistake, match=match):
        make_pass("low_rank", **options)


@pytest.mark.parametrize("before", ["token_merging:r=3", "class_token_last_block"])
@pytest.mark.parametrize("qkv", ["one", "three"])
def test_behind_the_passes_that_change_tokens(before: str, qkv: str, tmp_path: Path) -> None:
    """At full rank the factorised layers are the layers, so the outputs must be those of the first pass alone."""
    model = small_vit()
    alone = compress(model, before, example=X[:1], measure_seconds=0).model
    full = make_pass("low_rank", rank=3 * 48, keep="anyway", least=4, qkv=qkv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "cheaper_below", lambda layer: 10**6)  # full rank is dearer
        whole: Any = compress(model, [before, full], example=X[:1], measure_seconds=0).model
    assert isinstance(whole.blocks[0].attn.qkv, LowRankLinear if qkv == "one" else SplitLowRankLinear)
    assert isinstance(whole.blocks[1].mlp.fc1, LowRankLinear)
    with torch.no_grad():
        gap = (whole(X) - alone(X)).abs().max() / alone(X).abs().max()
    assert gap < 1e-4
    thin = compress(
        model,
        [before, f"low_rank:rank=8,keep=anyway,least=4,qkv={qkv}"],
        example=X[:1],
        measure_seconds=0,
    )
    assert thin.final.macs < 0.7 * thin.steps[1].macs
    again = load(thin.save(tmp_path / "saved")).model
    with torch.no_grad():
        assert torch.equal(again(X), thin.model(X))


def test_order_and_data() -> None:
    with pytest.raises(UserMistake, match="cut widths first"):
        compress(small_vit(), ["low_rank", "structured"], measure_seconds=0)
    with pytest.raises(UserMistake, match="change tokens first"):
        compress(small_vit(), ["low_rank", "token_merging:r=2"], measure_seconds=0)
    with pytest.raises(UserMistake, match="needs data"):
        compress(small_vit(), "low_rank:calibrate=true", measure_seconds=0)
    assert str(parse_pass("low_rank:rank=4,only=qkv")) == "low_rank:rank=4,only=[qkv]"
