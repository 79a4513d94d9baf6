"""Targets and measurements. Nothing here asserts how long something takes."""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.environment import usable_cpus
from nas.errors import UserMistake
from nas.latency import InterleavedResult, LatencyResult, Target, measure, measure_interleaved
from nas.latency.measure import _clock, _relative_slope, median_interval
from nas.latency.runner import Times as _Times
from nas.latency.runner import _like

ONE = Target.parse("cpu:1")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu", Target("cpu")),
        ("cpu:4", Target("cpu", threads=4)),
        ("cpu:1@8", Target("cpu", threads=1, batch=8)),
        ("cpu+bf16", Target("cpu", dtype="bf16")),
        ("cuda", Target("cuda")),
        ("cuda:0", Target("cuda:0")),
        ("cuda:1+fp16", Target("cuda:1", dtype="fp16")),
        ("cuda:0+bf16+compile@64", Target("cuda:0", dtype="bf16", compile=True, batch=64)),
    ],
)
def test_targets_round_trip(text: str, expected: Target) -> None:
    assert Target.parse(text) == expected
    assert str(expected) == text


def test_other_spellings_have_one_canonical_form() -> None:
    assert str(Target.parse(" cuda:0+compile+bf16@1 ")) == "cuda:0+bf16+compile"
    assert str(Target.parse("cpu:01+fp32")) == "cpu:1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu", "target 'gpu': unknown device 'gpu'.*allowed: cpu, cpu:THREADS, cuda or cuda:INDEX"),
        ("cudaa", r"unknown device 'cudaa' \(did you mean 'cuda'\?\)"),
        ("", "unknown device ''"),
        ("cpu:", "threads '' must be a whole number from 1 to 1024"),
        ("cpu:0", "threads '0' must be a whole number from 1"),
        ("cpu:-1", "threads '-1' must be"),
        ("cpu:1_0", "threads '1_0' must be"),
        ("cuda:x", "device index 'x' must be a whole number from 0"),
        ("cpu@0", "batch '0' must be a whole number from 1 to 1000000"),
        ("cpu@", "batch '' must be"),
        ("cpu@8@8", "batch '8@8' must be"),
        ("cpu+compil", r"unknown option \+compil \(did you mean 'compile'\?\)"),
        ("cpu+bf16+fp16", r"\+fp16 repeats or contradicts an option"),
        ("cpu+compile+compile", r"\+compile repeats or contradicts"),
        ("cpu@8+bf16", r"batch '8\+bf16' must be"),
    ],
)
def test_a_wrong_target_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(UserMistake, match=message) as caught:
        Target.parse(text)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="cpuda:0123456789+bf16compile@ ", max_size=24))
def test_no_text_crashes_the_parser(text: str) -> None:
    try:
        target = Target.parse(text)
    except UserMistake:
        return
    assert Target.parse(str(target)) == target


def test_check_refuses_more_threads_than_cores() -> None:
    with pytest.raises(
        UserMistake, match=rf"asks for 1024 threads, but this process may use {usable_cpus()} cores"
    ):
        Target.parse("cpu:1024").check()
    Target.parse("cpu:1").check()
    Target.parse("cpu").check()


def test_check_without_cuda_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserMistake, match=r"\(--gpu\) asks for a CUDA device but torch sees none .*'nas doctor'"
    ):
        Target.parse("cuda:0+bf16").check()


def test_check_names_the_devices_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserMistake, match=r"torch sees 2 CUDA device\(s\); allowed: cuda:0, cuda:1"):
        Target.parse("cuda:2").check()


def test_check_wants_a_compiler_for_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.latency.target.shutil.which", lambda name: None)
    with pytest.raises(UserMistake, match=r"\+compile needs a C\+\+ compiler"):
        Target.parse("cpu+compile").check()


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


def test_slope_is_relative_to_the_level() -> None:
    assert _relative_slope([10.0, 11.0, 12.0, 13.0, 14.0]) == pytest.approx(1 / 12)
    assert _relative_slope([5.0] * 5) == 0.0


def test_cpu_time_is_the_clock_only_of_a_single_contended_thread() -> None:
    slowed = [_Times(wall=2.0, cpu=1.0, events=math.nan)] * 5
    clean = [_Times(wall=1.02, cpu=1.0, events=math.nan)] * 5
    assert _clock(ONE, slowed) == "cpu"
    assert _clock(ONE, clean) == "wall"
    assert _clock(ONE, [*clean, _Times(wall=50.0, cpu=1.0, events=math.nan)]) == "wall"
    assert _clock(Target("cpu", threads=2), slowed) == "wall"
    assert _clock(Target("cuda"), slowed) == "events"


def test_rotated_inputs_hold_the_same_values_in_another_order() -> None:
    image = torch.randn(2, 3, 8, 8)
    tokens = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 9, 9, 9, 9, 0]])
    mask = torch.tensor([True, False])
    for x in (image, tokens):
        copies = [_like(x, number) for number in range(4)]
        assert len({tuple(copy.flatten().tolist()) for copy in copies}) == 4
        assert all(torch.equal(copy.flatten().sort().values, x.flatten().sort().values) for copy in copies)
        assert all(copy.shape == x.shape for copy in copies)
    assert all((_like(tokens, n) == 0).sum(-1).tolist() == [2, 1] for n in range(4))
    assert torch.equal(_like(mask, 1), mask)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_a_result_is_consistent_and_round_trips() -> None:
    result = measure(nn.Linear(8, 8), (torch.randn(1, 8),), ONE, max_seconds=0.2)
    assert 0 < result.low_ms <= result.median_ms <= result.high_ms
    assert result.median_ms <= result.p90_ms
    assert result.samples >= 20
    assert result.warmup_runs >= 3
    assert result.first_call_ms > 0
    assert result.drift > 0
    assert result.cpu_ms is not None
    assert result.wall_cpu_ratio == pytest.approx(result.wall_ms / result.cpu_ms)
    assert (result.target, result.threads, result.torch_version) == ("cpu:1", 1, torch.__version__)
    assert result.median_ms == (result.cpu_ms if result.clock == "cpu" else result.wall_ms)
    assert LatencyResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    with pytest.raises(ValueError, match="LatencyResult: speed missing or unknown"):
        LatencyResult.from_dict({**result.to_dict(), "speed": 1})


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
    assert len({tuple(seen.flatten().tolist()) for seen in model.seen["inputs"]}) == 4
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
    assert result.samples == 3
    assert not result.precise
    assert result.warmup_runs == 1


def test_a_wide_precision_stops_early_and_an_impossible_one_does_not() -> None:
    model, x = nn.Linear(4, 4), (torch.randn(1, 4),)
    assert measure(model, x, ONE, max_seconds=30.0, precision=1e6).precise
    assert not measure(model, x, ONE, max_seconds=0.05, precision=1e-12).precise
    assert not measure(model, x, ONE, max_seconds=0.05, precision=1e6, min_samples=10**9).precise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seconds": 0.0}, "max_seconds=0.0 must be finite and above 0"),
        ({"precision": math.nan}, "precision=nan must be finite"),
        ({"min_samples": 0}, "min_samples=0 must be finite and at least 1"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        measure(nn.Linear(4, 4), (torch.randn(1, 4),), ONE, **options)


def test_inputs_of_another_batch_are_refused() -> None:
    with pytest.raises(
        UserMistake, match=r"inputs\[0\] of model has batch 3, but target 'cpu:1' means 1; .* cpu@3"
    ):
        measure(nn.Linear(4, 4), (torch.randn(3, 4),), ONE)


# -- measuring several -------------------------------------------------------------------------------------------------


def deep(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))


def test_interleaved_models_are_ranked_by_their_ratio_to_the_reference() -> None:
    x = (torch.randn(1, 64),)
    models = {"large": (deep(40), x), "reference": (deep(10), x), "small": (deep(1), x)}
    found = measure_interleaved(models, ONE, 9, reference="reference")
    assert list(found) == ["large", "reference", "small"]
    assert found["small"].ratio < 1 < found["large"].ratio
    assert (found["reference"].ratio, found["reference"].ratio_low, found["reference"].ratio_high) == (
        1.0,
        1.0,
        1.0,
    )
    assert found["large"].rounds == 9
    assert found["reference"].rounds == 9 * 3
    assert len({result.clock for result in found.values()}) == 1
    for result in found.values():
        assert 0 < result.low_ms <= result.median_ms <= result.high_ms
        assert result.ratio_low <= result.ratio <= result.ratio_high
        assert InterleavedResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_the_order_is_random_and_follows_the_seed() -> None:
    def order(seed: int) -> list[str]:
        seen: list[str] = []

        class Named(nn.Module):
            def __init__(self, name: str):
                super().__init__()
                self.name = name

            def forward(self, x: Tensor) -> Tensor:
                seen.append(self.name)
                return x

        models = {name: (Named(name), (torch.zeros(1),)) for name in "rabcd"}
        measure_interleaved(models, ONE, 5, seed=seed)
        calls_per_visit = 4
        rounds = seen[
            -5 * calls_per_visit * 9 :
        ]  # the reference first, then each of the four and the reference
        return [name for name in rounds if name != "r"][::4]

    first = order(0)
    assert sorted(first) == sorted("abcd" * 5)
    assert first == order(0)
    assert first != order(1)
    assert len({tuple(first[i : i + 4]) for i in range(0, 20, 4)}) > 1


def test_one_model_alone_is_its_own_reference() -> None:
    found = measure_interleaved({"only": (nn.Linear(4, 4), (torch.randn(1, 4),))}, ONE, 3)
    assert found["only"].ratio == 1.0
    assert found["only"].reference == "only"


def test_wrong_sets_of_models_are_refused() -> None:
    x = (torch.randn(1, 4),)
    with pytest.raises(UserMistake, match="there is none to measure"):
        measure_interleaved({}, ONE)
    with pytest.raises(UserMistake, match="reference='b' is not among the models: a"):
        measure_interleaved({"a": (nn.Linear(4, 4), x)}, ONE, reference="b")
    with pytest.raises(UserMistake, match="rounds=2 must be finite and at least 3"):
        measure_interleaved({"a": (nn.Linear(4, 4), x)}, ONE, 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_models_of_one_class_are_all_compiled() -> None:
    x = (torch.randn(1, 64),)
    models = {f"m{layers}": (deep(layers), x) for layers in range(1, 11)}
    found = measure_interleaved(models, Target.parse("cpu:1+compile"), 3)
    assert len(found) == 10
    assert measure(deep(2), x, Target.parse("cpu:1+compile"), max_seconds=0.1).target == "cpu:1+compile"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("text", ["cuda", "cuda:0+bf16", "cuda:0+fp16@4"])
def test_on_a_gpu_events_are_the_clock(text: str) -> None:
    target = Target.parse(text)
    model = deep(4)
    result = measure(model, (torch.randn(target.batch, 64),), target, max_seconds=0.5)
    assert result.clock == "events"
    assert 0 < result.median_ms <= result.wall_ms * 1.5
    assert result.threads is None
    assert result.contended is None
    assert next(model.parameters()).device.type == "cpu"
    found = measure_interleaved({"a": (model, (torch.randn(target.batch, 64),))}, target, 3)
    assert found["a"].clock == "events"
