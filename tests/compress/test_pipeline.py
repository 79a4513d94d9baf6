"""The whole way: passes in order, judged, counted, measured, and adjusted to a budget."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import compress, parse_pass
from compress.budgeting import Costs
from compress.finetune import distillation_loss
from compress.passes import make_pass
from compress.passes.base import Budget, Context, Pass, PassFailed
from compress.structure import StructureError
from nas.errors import UserMistake
from nas.tasks import make_task
from tests.compress.models import batches, small_vit

QUICK: dict[str, Any] = {"measure_seconds": 0}


def test_steps_tell_what_each_pass_did_and_the_original_stays() -> None:
    model = small_vit().train()
    before = copy.deepcopy(model.state_dict())
    data = batches(3)
    result = compress(
        model,
        ["structured:ratio=0.5,epochs=1", "class_token_last_block"],
        train=data,
        validation=data,
        **QUICK,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    original, cut, last = result.steps
    assert original.name == "original"
    assert original.params == sum(p.numel() for p in model.parameters())
    assert cut.params < 0.7 * original.params
    assert last.params == cut.params
    assert last.macs < cut.macs < 0.7 * original.macs
    assert original.agreement is None
    assert last.agreement == cut.agreement
    assert 0 <= (cut.agreement or 0) <= 1
    assert last.metrics["accuracy"] == cut.metrics["accuracy"]
    lines = str(result).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("structured:epochs=1 ")
    assert result.report().row_count == 3


def test_same_seed_same_model() -> None:
    def run() -> nn.Module:
        return compress(small_vit(), "structured:epochs=1", train=batches(2), seed=3, **QUICK).model

    for one, other in zip(run().parameters(), run().parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_task_gives_data_and_judges() -> None:
    task = make_task("image_classification", data="digits")
    model = small_vit(img_size=8, patch_size=2, in_chans=1, num_classes=10)
    result = compress(model, ["token_merging:r=2"], train=task, **QUICK)
    assert result.example[0].shape == (1, 1, 8, 8)
    assert set(result.final.metrics) == {"accuracy", "loss"}
    assert 0 < (result.final.agreement or 0) <= 1


@pytest.mark.parametrize(
    ("budget", "kind", "limit"), [("macs=0.6", "macs", 0.6), ("params=50%", "params", 0.5)]
)
def test_counted_budgets_are_met_by_little(budget: str, kind: str, limit: float) -> None:
    result = compress(small_vit(), [make_pass("structured", multiple=1)], budget=budget, **QUICK)
    share = getattr(result.final, kind) / getattr(result.original, kind)
    assert limit - 0.08 < share <= limit


@pytest.fixture
def half_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which half of the latency is overhead: a share of 0.7 needs MACs of at most 0.4."""
    from compress import budgeting, pipeline
    from compress.measuring import count
    from nas.latency import LatencyResult, Pair, Session

    def fake(models: Any, against: str, example: Any, target: Any, **options: Any) -> Session:
        macs = {name: count(model, example)["macs"] for name, model in models.items()}
        times = {name: 0.5 + 0.5 * value / macs[against] for name, value in macs.items()}
        fields = dict.fromkeys(LatencyResult.__dataclass_fields__, None)
        results = {
            name: LatencyResult(**{**fields, "median_ms": ms, "low_ms": ms, "high_ms": ms, "reasons": ()})  # type: ignore[arg-type]
            for name, ms in times.items()
        }
        pairs = tuple(
            Pair(name, against, ms, ms - 0.002, ms + 0.002, "faster", 0.01, 20)
            for name, ms in times.items()
            if name != against
        )
        return Session(str(target), results, {}, pairs)

    monkeypatch.setattr(budgeting, "measure_against", fake)
    monkeypatch.setattr(pipeline, "measure_against", fake)


@pytest.mark.usefixtures("half_overhead")
def test_a_latency_budget_is_met_by_measuring_and_not_by_counting() -> None:
    result = compress(
        small_vit(), [make_pass("structured", multiple=1)], budget="latency=0.7", measure_seconds=1
    )
    assert result.final.ratio is not None
    assert 0.62 < result.final.ratio["high"] <= 0.7
    assert result.final.macs / result.original.macs <= 0.4


@pytest.mark.usefixtures("half_overhead")
def test_a_latency_budget_that_is_out_of_reach() -> None:
    with pytest.raises(
        UserMistake, match=r"latency <= 0\.51 of the original: cannot be met: at full strength"
    ):
        compress(small_vit(), [make_pass("structured")], budget="latency=0.51", measure_seconds=1)
    with pytest.raises(
        UserMistake, match=r"not met by the result of class_token_last_block: latency is 0\.8"
    ):
        compress(small_vit(), "class_token_last_block", budget="latency=0.7", measure_seconds=1)


@pytest.mark.slow
def test_really_measured() -> None:
    model = small_vit(embed_dim=96, depth=4)
    result = compress(model, "structured:ratio=0.7", measure_seconds=6)
    assert result.original.latency is not None
    assert result.final.ratio is not None
    assert result.final.ratio["rounds"] >= 3


def test_budgets_as_text() -> None:
    assert Budget.parse("latency<=60%") == Budget("latency", 0.6)
    assert Budget.parse({"macs": 0.5}) == Budget("macs", 0.5)
    assert Budget.parse("params=2e6") == Budget("params", 2e6, relative=False)
    assert Budget.parse("latency=8ms").limit(100) == 8
    assert Budget.parse("latency=0.6").limit(100) == 60
    for wrong, why in (
        ("latency=8", "has its unit"),
        ("macs=0", "allowed: a share"),
        ("flops=0.5", "allowed: latency, macs, params"),
        ("latency", "write latency=0.6"),
    ):
        with pytest.raises(UserMistake, match=why):
            Budget.parse(wrong)


class _Once:
    """An iterable that is no iterator, and gives nothing."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


def test_data_that_cannot_be_used() -> None:
    model = small_vit()
    for data, why in (
        (_Once(), "train: yields no batch"),
        (iter(batches(1)), "can be gone through only once"),
        ([torch.zeros(2, 3)], r"must yield pairs \(inputs, labels\) of tensors .* not Tensor"),
        (7, "train: int cannot be gone through"),
    ):
        with pytest.raises(UserMistake, match=why):
            compress(model, "structured", train=data, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(UserMistake, match=r"pass 'structured' needs data \(train\); give train="):
        compress(model, "structured:criterion=taylor", **QUICK)


def test_a_loss_that_becomes_nan() -> None:
    def loss(outputs: Any, labels: Tensor) -> Tensor:
        return outputs.sum() * float("nan")

    with pytest.raises(
        PassFailed, match=r"pass 'structured': fine-tuning failed: loss became nan at epoch 1, step 1"
    ):
        compress(small_vit(), "structured:epochs=1", train=batches(1), loss=loss, **QUICK)


def test_tied_weights() -> None:
    model: Any = small_vit()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    with pytest.raises(
        UserMistake, match=r"blocks\.0\.mlp\.fc1\.weight and blocks\.1\.mlp\.fc1\.weight are one tensor"
    ):
        compress(model, "structured", **QUICK)
    assert compress(model, "token_merging:r=2", **QUICK).final.macs < 1e9


def test_unknown_names_and_options() -> None:
    with pytest.raises(UserMistake, match=r"unknown pass 'structred' \(did you mean 'structured'\?\)"):
        compress(small_vit(), "structred", **QUICK)
    with pytest.raises(
        UserMistake, match=r"pass 'structured': unknown option 'ration' \(did you mean 'ratio'\?\)"
    ):
        parse_pass("structured:ration=0.5")
    with pytest.raises(UserMistake, match="is not option=value"):
        parse_pass("structured:0.5")
    parsed: Any = parse_pass("token-merging:r=[1, 2, 3],proportional=false")
    assert (parsed.r, parsed.proportional) == ([1, 2, 3], False)


def test_orders_that_make_no_sense() -> None:
    with pytest.raises(
        UserMistake, match=r"pass 'structured' cannot follow 'dynamic_quantization', .* quantise last"
    ):
        compress(small_vit(), ["dynamic_quantization", "structured"], **QUICK)
    for early in ("class_token_last_block", "token_merging"):
        with pytest.raises(UserMistake, match=f"'ofb' cannot follow '{early}': .* put {early} behind it"):
            compress(small_vit(), [early, "ofb"], train=batches(1), **QUICK)
    with pytest.raises(UserMistake, match="passes: there is none"):
        compress(small_vit(), [], **QUICK)


class _Shouts(Pass):
    """Gives other shapes, or leaves a hook."""

    name = "shouts"

    def __init__(self, how: str):
        self.how = how

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        if self.how == "hook":
            model.register_forward_hook(lambda *args: None)
            return model
        if self.how == "structure":
            raise StructureError("is too loud")
        return nn.Sequential(model, nn.Flatten(0))


@pytest.mark.parametrize(
    ("how", "why"),
    [("hook", "left a mask or a hook"), ("shape", "another shape"), ("structure", "is too loud")],
)
def test_what_a_pass_gives_back_is_looked_at(how: str, why: str) -> None:
    model = small_vit()
    with pytest.raises((PassFailed, StructureError), match=f"pass 'shouts': .*{why}"):
        compress(model, _Shouts(how), **QUICK)
    assert not model._forward_hooks


def test_distillation() -> None:
    one, other = torch.randn(4, 5), torch.randn(4, 5)
    assert float(distillation_loss(one, one)) == pytest.approx(0, abs=1e-6)
    p, q = (other / 2).softmax(-1), (one / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(one, other, 2.0), expected)
    torch.testing.assert_close(distillation_loss((one, one), (other, other), 2.0), expected)


def test_costs_without_a_budget_say_so() -> None:
    context = Context(example=(torch.randn(1, 3, 32, 32),))
    costs = Costs(small_vit(), {"params": 1, "macs": 2, "uncounted": []}, context, 0)
    assert costs.original() == {"params": 1.0, "macs": 2.0}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("2E+2", 200.0), ("1.5e-4", 0.00015), ("-3e1", -30.0), ("7", 7)]
)
def test_numbers_with_exponents_are_numbers(text: str, value: float) -> None:
    parsed: Any = parse_pass(f"ofb:learning_rate=1,cost_weight={text.lstrip('-')}")
    assert parsed.cost_weight == abs(value)
    assert type(parsed.cost_weight) is type(value)
    listed: Any = parse_pass(f"low_rank:only=[mlp],learning_rate={text}")
    assert listed.learning_rate == value
    quoted: Any = parse_pass("low_rank:only='1e-3'")
    assert quoted.only == ("1e-3",)


TRAINED = {
    "structured:epochs=1": "structured",
    "low_rank:keep=anyway,least=8,calibrate=false,epochs=1": "low_rank",
    "token_merging:r=2,epochs=1": "token_merging",
    "activation_pruning:epochs=1": "activation_pruning",
    "sit:epochs=1": "sit",
    "ofb:epochs=1,importance=magnitude": "ofb",
}


@pytest.mark.parametrize("text", TRAINED)
def test_nan_in_the_training_of_every_pass(text: str) -> None:
    def loss(outputs: Any, labels: Tensor) -> Tensor:
        found = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        return found.sum() * float("nan")

    with pytest.raises(PassFailed, match=rf"pass '{TRAINED[text]}'.*: .*nan.*lower"):
        compress(small_vit(), text, train=batches(1), loss=loss, **QUICK)


@pytest.mark.parametrize("text", TRAINED)
def test_a_budget_out_of_reach_of_every_pass(text: str) -> None:
    with pytest.raises(
        UserMistake, match=r"budget .*(cannot be met|out of reach).*(allow more|raise the budget)"
    ):
        compress(small_vit(), text, train=batches(1), budget="macs=0.002", **QUICK)


@pytest.mark.parametrize("text", TRAINED)
def test_tied_weights_and_every_pass(text: str) -> None:
    model: Any = small_vit()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    if parse_pass(text).changes <= {"tokens"}:
        made: Any = compress(model, text, train=batches(1), **QUICK).model
        one, other = [block.mlp.fc1.weight for block in made.blocks if hasattr(block, "mlp")][:2]
        assert one is other
    else:
        with pytest.raises(
            UserMistake, match=rf"are one tensor \(tied weights\), which pass '{TRAINED[text]}'"
        ):
            compress(model, text, train=batches(1), **QUICK)


class _Drains:
    """Can be gone through once, although it looks as if it could be again and again."""

    def __init__(self) -> None:
        self._rest = iter(batches(1))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._rest


@pytest.mark.parametrize("text", TRAINED)
def test_a_loader_that_runs_dry(text: str) -> None:
    with pytest.raises((UserMistake, PassFailed), match=r"no batch|nothing|yield"):
        compress(small_vit(), text, train=_Drains(), **QUICK)


def test_hooks_and_parametrizations_are_refused_before_anything_is_done() -> None:
    model: Any = small_vit()
    handle = model.blocks[1].register_forward_hook(lambda *given: None)
    with pytest.raises(UserMistake, match=r"model: blocks\.1 has a forward hook, .* remove it first"):
        compress(model, "structured", **QUICK)
    handle.remove()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(UserMistake, match=r"model: head is parametrized; make its weights plain"):
        compress(model, "structured", **QUICK)
    kept: Any = small_vit()
    kept.last = kept.head.weight * 2
    with pytest.raises(UserMistake, match="model: cannot be copied"):
        compress(kept, "structured", **QUICK)


def test_a_pass_that_does_not_make_it_faster_says_so() -> None:
    from compress.pipeline import _with_doubts
    from compress.result import Step

    def step(name: str, low: float, high: float) -> Step:
        return Step(
            name, 1, 1, ratio={"ratio": (low + high) / 2, "low": low, "high": high}, notes=("before",)
        )

    steps = [
        Step("original", 1, 1),
        step("faster", 0.7, 0.8),
        step("as before", 0.69, 0.79),
        step("faster again", 0.5, 0.6),
        step("slower", 0.9, 1.1),
    ]
    found = _with_doubts(steps)
    assert [len(one.notes) for one in found] == [0, 1, 2, 1, 2]
    assert found[2].notes[1] == (
        "not surely faster: 0.740 [0.690, 0.790] of the original's time, 0.750 before this pass"
    )
    assert found[4].notes[1].endswith("0.550 before this pass")
