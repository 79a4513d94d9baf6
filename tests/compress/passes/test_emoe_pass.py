"""The emoe pass: what it splits, trains, merges, saves and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from compress import compress, load
from compress.passes import list_passes, make_pass, parse_pass
from compress.passes._emoe_sites import find_sites
from compress.passes._emoe_training import TrainedExperts, in_training
from compress.passes.base import Adjustable, Context
from compress.passes.emoe import Emoe, merge_experts
from compress.pipeline import check_order
from compress.structure import StructureError
from nas.errors import UserMistake
from nas.profile import compare
from spaces.layers.token_slimming import TokenSlimming
from tests.compress._fresh_process import assert_same_in_a_fresh_process
from tests.compress.models import batches, small_vit
from tests.compress.passes._emoe_models import ANYWAY, CONTEXT, FORMS, X, assert_same_state, experts, moes

# -- the pass ----------------------------------------------------------------------------------------------------------


def test_it_is_found_and_placed_as_in_the_paper() -> None:
    assert "emoe" in list_passes()
    one = parse_pass("emoe:experts=8,k=2,last=1,keep=anyway,epochs=0")
    assert isinstance(one, Emoe)
    assert isinstance(one, Adjustable)
    assert str(one) == "emoe:last=1,experts=8,k=2,keep=anyway,epochs=0"
    assert Emoe()._positions(12) == [8, 10]
    assert Emoe(last=3)._positions(12) == [6, 8, 10]
    assert Emoe(layers=[-1, 0])._positions(4) == [3, 0]


@pytest.mark.parametrize("gate", ["average", "learned"])
def test_fine_tuning_and_back(gate: str) -> None:
    model, data = small_vit(), batches(count=2, size=4)
    context = CONTEXT.with_changes(train=data)
    options = {**ANYWAY, "gate": gate, "epochs": 1, "learning_rate": 1e-3}
    made = make_pass("emoe", **options).apply(model, context)
    [one] = moes(made)
    assert not any(isinstance(module, TrainedExperts) for module in made.modules())
    assert not made.training
    old = model.get_submodule("blocks.1.mlp.fc1").weight
    assert not torch.allclose(one.dense().fc1.weight, old)
    if gate == "average":
        torch.testing.assert_close(one.gate.weight, one.keys.view(8, 24, 48).mean(1))
    said: list[str] = []
    back = make_pass("emoe", **options, back=True).apply(model, context.with_changes(report=said.append))
    assert moes(back) == []
    assert "merged into dense" in said[-1]
    assert_same_state(back, merge_experts(made))


def test_training_forward() -> None:
    made = experts().train()
    holder = nn.Sequential(made)
    x = torch.randn(2, 5, 10)
    with in_training(holder, noise=0.0, momentum=0.5, official=False):
        trained = holder[0]
        assert isinstance(trained, TrainedExperts)
        old = made.gate.weight.clone()
        with torch.no_grad():
            made.keys.mul_(3)
        out = trained.train()(x)
        torch.testing.assert_close(made.gate.weight, 0.5 * old + 0.5 * 3 * old)
        torch.testing.assert_close(out, made(x))
        assert trained.balance is not None
        out.sum().backward()
        assert made.keys.grad is not None
    assert holder[0] is made


def test_only_what_is_faster_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    verdicts = iter(["faster", "slower"])

    class Answer:
        ratio, low, high = 0.8, 0.7, 0.9

        def __init__(self) -> None:
            self.verdict = next(verdicts)

    def answer(candidate: nn.Module, other: nn.Module, context: Context, **options: Any) -> Answer:
        asked.append(tuple(context.example[0].shape))
        return Answer()

    monkeypatch.setattr("compress.passes.emoe.compare_on_target", answer)
    said: list[str] = []
    one = make_pass("emoe", layers=[0, 1, 2], experts=8, k=[2, 3, 2], epochs=0)
    made = one.apply(small_vit(), CONTEXT.with_changes(report=said.append))
    assert asked == [(1, 17, 48), (1, 17, 48)], "networks of one kind are measured once"
    assert [module.k for module in moes(made)] == [2, 2]
    assert "3 of 8 experts take 0.800 [0.700, 0.900] of the time on cpu:1: they stay dense" in said[1]
    first, said = said, []
    one.apply(small_vit(), CONTEXT.with_changes(report=said.append))
    assert said == first, "told also where a run that nobody heard has measured it"
    assert len(asked) == 2


def test_strength() -> None:
    one = make_pass("emoe", layers=[0, 2], experts=8, keep="anyway", epochs=0)
    assert isinstance(one, Adjustable)
    used = []
    for strength in (0.0, 0.5, 1.0):
        made = one.with_strength(strength).apply(small_vit(), CONTEXT)
        used.append([module.k for module in moes(made)])
    assert used == [[], [4, 4], [1, 1]]


@pytest.mark.parametrize(
    ("hidden", "expected"),
    # 192 and 1536 as in the paper; what a width pass left; two as near; none near enough; primes.
    [(192, 24), (1536, 24), (232, 29), (448, 28), (880, 22), (202, 0), (29, 0), (1009, 0), (10, 0)],
)
def test_number_of_experts_left_open(hidden: int, expected: int) -> None:
    model = nn.Sequential(Mlp(8, hidden))
    said: list[str] = []
    context = Context(example=(torch.randn(1, 3, 8),), report=said.append)
    made = make_pass("emoe", layers=[0], keep="anyway", grouping="random", epochs=0).apply(model, context)
    assert [(one.experts, one.k) for one in moes(made)] == ([(expected, 4)] if expected else [])
    assert said[0] == (
        f"experts in 0 (4 of {expected})"
        if expected
        else f"0 stays dense: its {hidden} hidden units cannot be shared out evenly to 8 to 64 experts"
    )


def test_each_network_has_its_own_number_of_experts() -> None:
    model = nn.Sequential(Mlp(8, 232), Mlp(8, 31), Mlp(8, 96))
    context = Context(example=(torch.randn(1, 3, 8),))
    options = {"layers": [0, 1, 2], "keep": "anyway", "grouping": "random", "epochs": 0}
    made = make_pass("emoe", **options, k=[3, 2, 1]).apply(model, context)
    assert [(one.experts, one.k) for one in moes(made)] == [(29, 3), (24, 1)]
    weaker = make_pass("emoe", **options).with_strength(0.5).apply(model, context)
    assert [(one.experts, one.k) for one in moes(weaker)] == [(29, 14), (24, 12)]
    with pytest.raises(UserMistake, match="experts=24 must divide the 232 hidden units of 0"):
        make_pass("emoe", **options, experts=24).apply(model, context)


def test_defaults_follow_a_width_pass() -> None:
    narrow = make_pass("structured", ratio=0.4).apply(small_vit(embed_dim=96, depth=4), CONTEXT)
    made = make_pass("emoe", keep="anyway", grouping="random", epochs=0).apply(narrow, CONTEXT)
    assert [one.hidden % 24 for one in moes(made)] == [16, 16], "else this shows nothing"
    assert [one.experts for one in moes(made)] == [29, 29]


def test_other_passes() -> None:
    for text in ("structured", "token_merging:r=2", "class_token_last_block", "sit", "ofb"):
        with pytest.raises(UserMistake, match=r"cannot follow 'emoe'.*not recognised any more"):
            check_order([parse_pass("emoe"), parse_pass(text)])
        check_order([parse_pass("emoe:back=true"), parse_pass(text)])
        check_order([parse_pass(text), parse_pass("emoe")])
    with pytest.raises(UserMistake, match=r"cannot follow 'low_rank'.*no hidden units"):
        check_order([parse_pass("low_rank"), parse_pass("emoe")])


@pytest.mark.parametrize(
    "passes",
    [
        ["structured:ratio=0.5,units=mlp,epochs=0", "emoe:experts=8,k=2,last=1,keep=anyway"],
        ["token_merging:r=2", "class_token_last_block", "emoe:experts=8,k=2,layers=[1],keep=anyway"],
        ["emoe:experts=8,k=2,last=1,keep=anyway", "low_rank:keep=anyway,ratio=0.3"],
        ["emoe:experts=8,k=2,last=1,keep=anyway", "dynamic_quantization:keep_anyway=true"],
        ["emoe:experts=8,k=2,last=1,keep=anyway,gate=learned,capacity=1.5"],
        ["emoe:experts=8,k=2,last=1,keep=anyway,back=true", "structured:ratio=0.5"],
    ],
)
def test_composed_saved_and_loaded(passes: list[str], tmp_path: Path) -> None:
    result = compress(small_vit(act_layer=nn.ReLU), passes, measure_seconds=0)
    assert len(moes(result.model)) == (0 if "back" in passes[0] else 1)
    again = load(result.save(tmp_path / "saved"))
    with torch.no_grad():
        torch.testing.assert_close(again.model(X), result.model(X), rtol=0, atol=0)


def test_token_slimming_is_no_feed_forward_network() -> None:
    assert find_sites(nn.Sequential(TokenSlimming(8, 3))) == []


@pytest.mark.parametrize("gate", ["average", "learned"])
@pytest.mark.parametrize("form", FORMS)
def test_counters_agree(form: str, gate: str) -> None:
    made = Emoe(experts=8, k=2, last=1, keep="anyway", gate=gate, epochs=0).apply(small_vit(), CONTEXT)
    [one] = moes(made)
    one.form = form
    found = compare(made, CONTEXT.example)
    assert found.failures == {}
    assert found.disagreements == ()
    assert found.uncounted == ()
    counts = found.counts["torch"]
    assert counts.method == "meta"
    own = 17 * 2 * 48 * 192 // (4 if form == "grouped" else 1)
    assert counts.modules["blocks.1.mlp"].macs == own
    gates = 17 * 48 * 8 if gate == "average" else 17 * (48 * 256 + 256 * 8)
    assert sum(work.macs for name, work in counts.modules.items() if "mlp.gate" in name) == gates


@pytest.mark.slow
def test_a_fresh_process_without_the_pass(tmp_path: Path) -> None:
    result = compress(small_vit(), [make_pass("emoe", **ANYWAY)], measure_seconds=0)
    assert_same_in_a_fresh_process(result, tmp_path / "saved", torch.ones(2, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"gate": "learned"}, {"capacity": 1.0}, {"capacity": 1.5, "gate": "normalised"}]
)
def test_onnxruntime(options: dict[str, Any], tmp_path: Path) -> None:
    """``check_onnx`` compares at batch 1 and 7."""
    from nas.onnx_file import check_onnx, write_onnx

    pytest.importorskip("onnxruntime")
    made = make_pass("emoe", **ANYWAY, epochs=0, **options).apply(small_vit(), CONTEXT)
    gaps = check_onnx(write_onnx(made, CONTEXT.example, tmp_path), made, CONTEXT.example)
    assert sorted(gaps) == [1, 7]
    assert max(gaps.values()) < 1e-4


class Odd(nn.Module):
    """Looks like a feed-forward network and does more."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.act(self.fc1(x)))
        return out


def test_refusals() -> None:
    context = Context(example=(torch.randn(1, 8),))
    with pytest.raises(StructureError, match="Mlp: within it is no feed-forward network"):
        make_pass("emoe", layers=[0], experts=4, k=2, keep="anyway").apply(Mlp(8, 16), context)
    with pytest.raises(StructureError, match=r"0 \(Odd\): does more than its two layers"):
        make_pass("emoe", layers=[0], experts=4, k=1, keep="anyway").apply(nn.Sequential(Odd()), context)
    with pytest.raises(StructureError, match="no feed-forward network of plain"):
        make_pass("emoe").apply(nn.Sequential(nn.Linear(8, 8)), context)
    vit = small_vit()
    for options, why in (
        (
            {"experts": 7},
            r"experts=7 must divide the 192 hidden units of blocks\.1\.mlp; allowed here: \[2, 3, 4,",
        ),
        ({"experts": 8, "k": 9}, r"k=9 must be in \[1, 8\]"),
        ({"layers": [3]}, r"layers=\[3\] must be in \[-3, 3\)"),
        ({"layers": [0, -3]}, "each once"),
        ({"experts": [8, 8]}, "experts has 2 numbers for 1 networks"),
        ({"last": 2}, "last=2 needs 4 feed-forward networks, the model has 3"),
        ({"gate": "inter"}, "gate='inter'.*allowed: average, normalised, learned"),
    ):
        with pytest.raises(UserMistake, match=why):
            make_pass("emoe", **{"last": 1, "keep": "anyway", **options}).apply(vit, CONTEXT)
    twice = make_pass("emoe", **ANYWAY)
    with pytest.raises(StructureError, match=r"blocks\.1\.mlp is split into experts already"):
        twice.apply(twice.apply(vit, CONTEXT), CONTEXT)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layers": "some"}, "layers='some' must be a list of positions, 'all'"),
        ({"layers": []}, r"layers=\[\]"),
        ({"experts": 0}, "experts=0 must be at least 1"),
        ({"k": [2, 0]}, r"k=\[2, 0\] must be at least 1"),
        ({"k": True}, "k=[Tt]rue must be"),
        ({"k": 2, "strength": 0.5}, "k or strength, not both"),
        ({"strength": 1.5}, "strength=1.5"),
        ({"gate": "averge"}, "gate='averge'.*average"),
        ({"grouping": "means"}, "grouping='means'"),
        ({"keep": "slower"}, "keep='slower'"),
        ({"capacity": -1}, "capacity=-1"),
        ({"momentum": 1}, "momentum=1"),
    ],
)
def test_mistakes(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserMistake, match=why):
        make_pass("emoe", **options)
