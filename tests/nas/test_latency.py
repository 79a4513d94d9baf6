"""Targets and measurements. Nothing here asserts how long something takes."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.environment import usable_cpus
from nas.errors import UserMistake
from nas.latency import (
    DeviceGate,
    LatencyResult,
    LeaseLost,
    Options,
    Plan,
    Session,
    Target,
    measure,
    measure_together,
)
from nas.latency.clocks import clock_of
from nas.latency.identity import Identity, comparable
from nas.latency.runner import Times as _Times
from nas.latency.self_test import SelfTest, agreement, self_test
from nas.latency.statistics import median_interval
from nas.latency.visits import _MOST_CALLS
from tests.nas import _runtime_models
from tests.nas._runtime_models import ONE

pytestmark = pytest.mark.alone

_one_thread = _runtime_models.one_thread  # a fixture is found by a name in the module of its tests


class Spy(nn.Module):
    """Remembers how it was called."""

    calls: list[tuple[Tensor, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: dict[str, Any] = {"inputs": [], "threads": set(), "modes": set(), "collector": set()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Spy:
        twin = Spy()
        twin.load_state_dict(self.state_dict())
        twin.seen = self.seen
        return twin

    def forward(self, x: Tensor) -> Tensor:
        self.seen["inputs"].append(x)
        self.seen["threads"].add(torch.get_num_threads())
        self.seen["modes"].add(
            (self.training, torch.is_inference_mode_enabled(), self.linear.weight.dtype, x.dtype)
        )
        self.seen["collector"].add(gc.isenabled())
        result: Tensor = self.linear(x)
        return result


def deep(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "low"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (20, 6), (50, 18), (100, 40)]
)
def test_interval_of_the_median_has_the_ranks_of_the_tables(count: int, low: int) -> None:
    values = list(range(1, count + 1))
    random.Random(0).shuffle(values)
    assert median_interval(values) == (low, count + 1 - low)


def test_interval_of_many_values_continues_that_of_few() -> None:
    few, many = median_interval(range(400)), median_interval(range(401))
    assert abs(few[0] - many[0]) <= 1
    assert abs(few[1] - many[1]) <= 2


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        low, high = median_interval([rng.expovariate(1.0) for _ in range(25)])
        hits += low <= math.log(2) <= high
    assert 0.92 < hits / 400 <= 1.0


def test_cpu_time_is_the_clock_only_of_a_single_contended_thread() -> None:
    slowed = [_Times(wall=2.0, cpu=1.0, events=math.nan)] * 5
    clean = [_Times(wall=1.02, cpu=1.0, events=math.nan)] * 5
    assert clock_of(ONE, [slowed]) == "cpu"
    assert clock_of(ONE, [clean]) == "wall"
    assert clock_of(ONE, [[*clean, _Times(wall=50.0, cpu=1.0, events=math.nan)]]) == "wall"
    assert clock_of(Target("cpu", threads=2), [slowed]) == "wall"
    assert clock_of(Target("cuda"), [slowed]) == "events"


def test_the_clock_is_judged_by_each_model_alone() -> None:
    """The middle of all calls together lies between a fast and a slow model, where one disturbed call decides."""
    fast = [_Times(wall=1.0, cpu=1.0, events=math.nan)] * 60
    slow = [_Times(wall=40.0, cpu=40.0, events=math.nan)] * 59 + [
        _Times(wall=60.0, cpu=40.0, events=math.nan)
    ]
    assert clock_of(ONE, [fast, slow]) == "wall"
    contended = [_Times(wall=48.0, cpu=40.0, events=math.nan)] * 60
    assert clock_of(ONE, [fast, contended]) == "cpu"


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_a_result_is_consistent_and_round_trips() -> None:
    result = measure(nn.Linear(8, 8), (torch.randn(1, 8),), ONE, max_seconds=30.0, precision=1e6)
    assert 0 < result.low_ms <= result.median_ms <= result.high_ms
    assert 0 < result.raw_low_ms <= result.raw_median_ms <= result.raw_high_ms
    assert result.median_ms == pytest.approx(result.ratio * result.reference_ms)
    assert result.reference_ms == result.session_reference_ms
    assert result.runs == 1 + result.warmup_runs + result.samples
    assert result.rounds >= 9
    assert 0 < result.quiet_rounds <= result.rounds
    assert result.warmup_runs >= 1
    assert result.first_call_ms > 0
    # Where the machine makes it look longer there may be a tail.
    assert result.p99_ms is None or result.rounds * _MOST_CALLS >= 1000
    assert result.cpu_ms is not None
    assert result.wall_cpu_ratio == pytest.approx(result.wall_ms / result.cpu_ms)
    assert (result.target, result.threads) == ("cpu:1", 1)
    assert result.trusted == (not result.reasons)
    assert result.holds(result.high_ms)
    assert not result.holds(result.high_ms * 0.999)
    again = LatencyResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again == dataclasses.replace(result, identity=again.identity)
    with pytest.raises(ValueError, match="LatencyResult: speed missing or unknown"):
        LatencyResult.from_dict({**result.to_dict(), "speed": 1})


def test_the_identity_says_what_was_measured_under_which_conditions() -> None:
    model, x = nn.Linear(8, 8), (torch.randn(2, 8),)
    options = Options(keys={"a": "0123456789abcdef"}, priority="off")
    plan = Plan(max_seconds=0.02)
    found = measure_together(
        {"a": (model, x), "b": (model, x)}, Target.parse("cpu:1@2"), plan=plan, options=options
    )
    a, b = (Identity.from_dict(found.results[name].identity) for name in "ab")
    assert (a.key, b.key) == ("0123456789abcdef", None)
    assert a.digest() == b.digest()
    assert (a.batch, a.threads, a.dtype, a.runtime) == (2, 1, "fp32", "eager")
    assert a.inputs == (((2, 8), "float32"),)
    assert a.priority == found.results["a"].priority == "none"
    other = measure(
        model, (torch.randn(1, 8),), Target.parse("cpu:1+bf16"), max_seconds=0.02, options=options
    )
    assert comparable(a, Identity.from_dict(other.identity)) == ["dtype", "batch", "inputs"]


def test_the_model_is_left_as_it_was_and_runs_in_the_right_state() -> None:
    model = Spy().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.set_num_threads(usable_cpus())
    threads = torch.get_num_threads()
    x = torch.randn(2, 4)
    measure(model, (x,), Target.parse("cpu:1+bf16@2"), max_seconds=0.05)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.linear.weight.dtype == torch.float32
    assert model.seen["modes"] == {(False, True, torch.bfloat16, torch.bfloat16)}
    assert model.seen["threads"] == {1}
    assert model.seen["collector"] == {False}
    seen_values = {tuple(seen.flatten().tolist()) for seen in model.seen["inputs"]}
    assert 1 < len(seen_values) <= 4
    assert all(seen is not x for seen in model.seen["inputs"])
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_everything_is_put_back_when_the_model_fails() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken inside")

    torch.set_num_threads(usable_cpus())
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken inside"):
        measure(Broken(), (torch.zeros(1),), ONE)
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_a_model_that_caches_in_its_first_call_can_still_be_trained() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(4.0)
            return x * self.weight * self.table

    model = Caching()
    measure(model, (torch.randn(1, 4),), ONE, max_seconds=0.05)
    model(torch.randn(1, 4)).sum().backward()
    assert model.weight.grad is not None


def test_without_time_it_still_measures_and_says_it_is_not_precise() -> None:
    result = measure(nn.Linear(4, 4), (torch.randn(1, 4),), ONE, max_seconds=1e-6)
    assert result.rounds == 6
    assert result.stopped == "time"
    assert not result.precise
    # One, and one more wherever a round took long enough for the weights to be moved.
    assert 1 <= result.warmup_runs <= 1 + result.rounds


def test_a_wide_precision_stops_early_and_an_impossible_one_does_not() -> None:
    model, x = nn.Linear(4, 4), (torch.randn(1, 4),)
    assert measure(model, x, ONE, max_seconds=30.0, precision=1e6).stopped == "precision"
    assert measure(model, x, ONE, max_seconds=0.05, precision=1e-12).stopped == "time"
    assert measure(model, x, ONE, max_seconds=0.05, precision=1e6, min_rounds=10**9).stopped == "time"
    assert measure(model, x, ONE, max_seconds=30.0, precision=1e-12, limit_ms=1e-6).stopped == "decision"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seconds": 0.0}, "max_seconds=0.0 must be finite and above 0"),
        ({"precision": math.nan}, "precision=nan must be finite"),
        ({"min_rounds": 2}, "min_rounds=2 must be finite and at least 6"),
        ({"limit_ms": -1.0}, "limit_ms=-1.0 must be finite and above 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        measure(nn.Linear(4, 4), (torch.randn(1, 4),), ONE, **options)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(UserMistake, match="most_rounds=3 must be finite and at least 6"):
        measure_together({"a": (nn.Linear(4, 4), (torch.randn(1, 4),))}, ONE, plan=Plan(1.0, most_rounds=3))


def test_inputs_of_another_batch_are_refused() -> None:
    with pytest.raises(
        UserMistake, match=r"inputs\[0\] of model has batch 3, but target 'cpu:1' means 1; .* cpu@3"
    ):
        measure(nn.Linear(4, 4), (torch.randn(3, 4),), ONE)


def test_one_model_has_nobody_to_be_compared_with() -> None:
    found = measure_together(
        {"a": (nn.Linear(4, 4), (torch.randn(1, 4),))}, ONE, plan=Plan(0.05, 1e-12), pairs=True
    )
    assert (found.pairs, found.results["a"].stopped) == ((), "time")


def test_a_lost_lease_ends_the_measurement(tmp_path: Path) -> None:
    class Losing:
        checks = 0

        def check(self, patience: float | None = None) -> None:
            self.checks += 1
            if self.checks > 5:
                raise LeaseLost("another process has it")

    with pytest.raises(LeaseLost, match="another process"):
        measure(nn.Linear(4, 4), (torch.randn(1, 4),), ONE, max_seconds=5.0, precision=1e-12, lease=Losing())
    with DeviceGate("cpu", tmp_path).exclusive() as lease:
        assert (
            measure(nn.Linear(4, 4), (torch.randn(1, 4),), ONE, max_seconds=0.05, lease=lease).median_ms > 0
        )


def test_peak_memory_is_measured_where_asked_for() -> None:
    class Hungry(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(64, 2**18).sum() + x  # 64 MiB

    x, options = (torch.randn(1),), Options(memory=True, energy=True, retries=0)
    result = measure(Hungry(), x, ONE, max_seconds=0.02, options=options)
    assert result.peak_memory_bytes is None or 48 * 2**20 < result.peak_memory_bytes < 200 * 2**20
    assert result.energy_mj is None or result.energy_mj > 0


# -- measuring several -------------------------------------------------------------------------------------------------


def test_models_measured_together_are_ranked_and_compared() -> None:
    x = (torch.randn(1, 64),)
    models = {"large": (deep(60), x), "small": (deep(5), x), "copy": (deep(5), x)}
    told: list[dict[str, Any]] = []
    # It ends with the verdicts, whatever the time until then: at such a precision with nothing else.
    found = measure_together(models, ONE, plan=Plan(45.0, 1e-9), against="large", progress=told.append)
    assert list(found.results) == ["large", "small", "copy"]
    assert found.results["small"].ratio < found.results["large"].ratio
    assert {result.stopped for result in found.results.values()} == {"decision"}
    assert found.pair("small", "large").verdict == found.pair("copy", "large").verdict == "faster"
    assert found.pair("large", "small").verdict == "slower"
    assert found.pair("large", "small").ratio == pytest.approx(1 / found.pair("small", "large").ratio)
    assert found.drift
    assert {event["visit"] for event in told if "visit" in event} == {"large", "small", "copy", "reference"}
    assert Session.from_dict(json.loads(json.dumps(found.to_dict()))).to_dict() == json.loads(
        json.dumps(found.to_dict())
    )
    with pytest.raises(KeyError):
        found.pair("small", "unknown")
    assert len(measure_together(models, ONE, plan=Plan(0.05), pairs=True).pairs) == 3
    against = measure_together(models, ONE, plan=Plan(0.05), against="small")
    assert {(pair.first, pair.second) for pair in against.pairs} == {("large", "small"), ("copy", "small")}


def test_several_lengths_are_one_measurement() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    sets = [(torch.randn(1, length, 4),) for length in (4, 8, 16)]
    found = measure_together({"m": (Tokens(), sets)}, Target.parse("cpu:1/4-16"), plan=Plan(0.02))
    assert len(found.results["m"].identity["inputs"]) == 3


def test_wrong_sets_of_models_are_refused() -> None:
    x = (torch.randn(1, 4),)
    with pytest.raises(UserMistake, match="there is none to measure"):
        measure_together({}, ONE)
    with pytest.raises(UserMistake, match="against='b' is not among the models: a"):
        measure_together({"a": (nn.Linear(4, 4), x)}, ONE, against="b")


# -- self-test ---------------------------------------------------------------------------------------------------------


def test_agreement_of_two_measurements() -> None:
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert agreement(first, first) == (1.0, 0.0)
    tau, deviation = agreement(first, {"a": 1.0, "b": 2.2, "c": 3.3, "d": 3.2})
    assert tau == pytest.approx(2 / 3)
    assert deviation == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("tau", "deviation", "passed"),
    [(0.95, 0.03, True), (0.94, 0.0, False), (1.0, 0.031, False)],
)
def test_the_self_test_refuses_what_does_not_repeat(tau: float, deviation: float, passed: bool) -> None:
    assert SelfTest("cpu:1", tau, deviation, "wall", "none", (), {}, {}).passed is passed


def test_the_self_test_measures_ten_models_twice() -> None:
    found = self_test(ONE, max_seconds=0.01)
    assert len(found.first_ms) == len(found.second_ms) == 10
    assert -1 <= found.tau <= 1
    assert json.loads(json.dumps(found.to_dict()))["passed"] is found.passed


# -- runtimes and devices ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_models_of_one_class_are_all_compiled() -> None:
    x = (torch.randn(1, 64),)
    models = {f"m{layers}": (deep(layers), x) for layers in range(1, 11)}
    found = measure_together(models, Target.parse("cpu:1+compile"), plan=Plan(0.1))
    assert len(found.results) == 10
    assert measure(deep(2), x, Target.parse("cpu:1+compile"), max_seconds=0.1).target == "cpu:1+compile"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("text", ["cuda", "cuda:0+bf16", "cuda:0+fp16@4"])
def test_on_a_gpu_events_are_theclock_of(text: str) -> None:
    target = Target.parse(text)
    model = deep(4)
    result = measure(model, (torch.randn(target.batch, 64),), target, max_seconds=0.5)
    assert result.clock == "events"
    assert 0 < result.median_ms <= result.wall_ms * 1.5
    assert result.threads is None
    assert result.contended is None
    assert next(model.parameters()).device.type == "cpu"
    found = measure_together({"a": (model, (torch.randn(target.batch, 64),))}, target, plan=Plan(0.1))
    assert found.results["a"].clock == "events"
