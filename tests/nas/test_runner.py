"""Runners: what they call a model with, which clock they read. Nothing here asserts how long something takes."""

from __future__ import annotations

import gc
import math
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.errors import UserMistake
from nas.latency import Target
from nas.latency.runner import (
    EventClock,
    HostClock,
    Times,
    WaitingClock,
    _drawn_lengths,
    _like,
    inputs_for,
    make_runner,
    relocate,
    session,
)
from nas.latency.runtimes.base import twin
from tests.nas import _runtime_models
from tests.nas._runtime_models import ONE, tokens

CXX = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
_one_thread = _runtime_models.one_thread  # a fixture is found by a name in the module of its tests


class Seen(nn.Module):
    """Remembers the shapes and contents it was called with, also by its copies."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls: list[tuple[Tensor, ...]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Seen:
        other = Seen()
        other.load_state_dict(self.state_dict())
        other.calls = self.calls
        return other

    def forward(self, *inputs: Tensor) -> Tensor:
        self.calls.append(inputs)
        return inputs[0]


# -- runner ------------------------------------------------------------------------------------------------------------


def test_a_call_gives_its_times_and_the_versions_are_named() -> None:
    runner = make_runner(nn.Linear(4, 4), (torch.randn(1, 4),), ONE)
    times = runner()
    assert isinstance(times, Times)
    assert times.wall > 0
    assert times.cpu >= 0
    assert math.isnan(times.events)
    assert runner.runtime_versions == {"torch": torch.__version__}
    runner.close()


def test_one_set_of_inputs_is_filled_up_with_permuted_copies_that_take_turns() -> None:
    model = Seen()
    x = torch.randn(2, 64)
    runner = make_runner(model, (x,), ONE)
    for _ in range(8):
        runner()
    contents = [tuple(call[0].flatten().tolist()) for call in model.calls]
    assert len(set(contents)) == 4
    assert contents[:4] == contents[4:]
    assert all(call[0] is not x for call in model.calls)


@pytest.mark.parametrize(("given", "different"), [(1, 4), (2, 4), (3, 6), (4, 4), (7, 7)])
def test_several_sets_of_one_shape_take_turns(given: int, different: int) -> None:
    model = Seen()
    runner = make_runner(model, [(torch.randn(1, 64),) for _ in range(given)], ONE)
    for _ in range(2 * different):
        runner()
    contents = [tuple(call[0].flatten().tolist()) for call in model.calls]
    assert len(set(contents)) == different
    assert contents[:different] == contents[different:]


def test_with_several_lengths_every_call_runs_each_and_gives_the_mean() -> None:
    model = Seen()
    sets = [(torch.zeros(1, length),) for length in (3, 9, 5)]
    runner = make_runner(model, sets, ONE)
    clock = iter([Times(1.0, 10.0, math.nan), Times(2.0, 20.0, math.nan), Times(6.0, 60.0, math.nan)] * 2)

    def read(run: Callable[[], Any]) -> Times:
        run()
        return next(clock)

    runner._clock = read
    for _ in range(2):
        times = runner()
        assert (times.wall, times.cpu) == (3.0, 30.0)
    assert [call[0].shape[1] for call in model.calls] == [3, 9, 5] * 2


def test_nothing_to_call_with_is_refused() -> None:
    for inputs in ((), [()]):
        with pytest.raises(UserMistake, match="inputs: there is none"):
            make_runner(nn.Linear(4, 4), inputs, ONE)


def test_channels_last_reaches_weights_and_images_and_is_refused_without_an_image() -> None:
    found: list[bool] = []

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            found.append(x.is_contiguous(memory_format=torch.channels_last))
            found.append(self.weight.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    target = Target.parse("cpu:1+channels_last")
    make_runner(Conv(3, 4, 3), (torch.randn(1, 3, 8, 8),), target)()
    assert found == [True, True]
    with pytest.raises(UserMistake, match=r"\+channels_last is for images, but no input has 4 dimensions"):
        make_runner(nn.Linear(4, 4), (torch.randn(1, 4),), target)


def test_rotated_inputs_hold_the_same_values_in_another_order() -> None:
    image = torch.randn(2, 3, 8, 8)
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 9, 9, 9, 9, 0]])
    mask = torch.tensor([True, False])
    for x in (image, ids):
        copies = [_like(x, number) for number in range(4)]
        assert len({tuple(copy.flatten().tolist()) for copy in copies}) == 4
        assert all(torch.equal(copy.flatten().sort().values, x.flatten().sort().values) for copy in copies)
        assert all(copy.shape == x.shape for copy in copies)
    assert all((_like(ids, n) == 0).sum(-1).tolist() == [2, 1] for n in range(4))
    assert torch.equal(_like(mask, 1), mask)


def test_a_twin_keeps_complex_and_integer_weights() -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("spectrum", torch.ones(2, dtype=torch.complex64))
    model.register_buffer("steps", torch.ones((), dtype=torch.int64))
    found = twin(model, torch.bfloat16, "cpu", channels_last=False)
    assert {name: x.dtype for name, x in found.state_dict().items()} == {
        "weight": torch.bfloat16,
        "bias": torch.bfloat16,
        "spectrum": torch.complex64,
        "steps": torch.int64,
    }
    assert model.weight.dtype == torch.float32
    assert model.training
    assert not found.training


def test_a_session_sets_the_surroundings_and_puts_them_back_even_after_a_failure() -> None:
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="inside"), session(ONE, 1):
        assert torch.get_num_threads() == 1
        assert not gc.isenabled()
        assert torch.is_inference_mode_enabled()
        raise RuntimeError("inside")
    assert torch.get_num_threads() == 2
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_a_session_of_compiled_models_lets_each_compile_for_itself() -> None:
    import torch._dynamo.config as config

    before = config.recompile_limit
    with session(Target.parse("cpu:1+compile"), 50):
        assert config.recompile_limit > 50
        assert config.fail_on_recompile_limit_hit
    assert config.recompile_limit == before


# -- clocks ------------------------------------------------------------------------------------------------------------


class FakeDevice:
    """Writes down what happens to it, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, what: str) -> Callable[[], None]:
        return lambda: self.log.append(what)

    def event(self, name: str) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                device.log.append(f"record {name}")

            def synchronize(self) -> None:
                device.log.append(f"await {name}")

            def elapsed_time(self, end: Any) -> float:
                return 1.5

        return Event()


def test_on_cuda_the_device_spins_and_is_awaited_before_the_events_enclose_the_call() -> None:
    device = FakeDevice()
    clock = EventClock(
        device.event("start"), device.event("end"), spin=device("spin"), synchronize=device("wait")
    )
    times = clock(device("run"))
    assert device.log == ["spin", "wait", "record start", "run", "record end", "await end"]
    assert times.events == 1.5
    assert times.wall >= 0
    assert math.isnan(times.cpu)


def test_without_events_the_device_is_awaited_on_both_sides() -> None:
    device = FakeDevice()
    times = WaitingClock(device("wait"))(device("run"))
    assert device.log == ["wait", "run", "wait"]
    assert times.wall >= 0
    assert math.isnan(times.cpu)
    assert math.isnan(times.events)


def test_the_cpu_clock_is_the_one_it_was_given() -> None:
    readings = iter([1_000_000, 4_000_000])
    assert HostClock(lambda: next(readings))(lambda: None).cpu == 3.0


# -- inputs for a target -----------------------------------------------------------------------------------------------


def lengths_of(sets: list[tuple[Tensor, ...]]) -> list[int]:
    return [row[0].shape[1] for row in sets]


def test_inputs_of_one_size_are_four_different_sets() -> None:
    sets = inputs_for(Target.parse("cpu@3/24"), tokens)
    assert [tuple(row[0].shape) for row in sets] == [(3, 24)] * 4
    assert len({tuple(row[0].flatten().tolist()) for row in sets}) == 4


def test_lengths_are_drawn_from_the_range_the_same_at_every_call_and_for_every_model() -> None:
    target = Target.parse("cpu@2/8-24")

    def wide(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return torch.randn(batch, 24, 5, generator=generator), torch.zeros(batch)

    sets = inputs_for(target, tokens)
    assert lengths_of(sets) == lengths_of(inputs_for(target, tokens)) == lengths_of(inputs_for(target, wide))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(sets, inputs_for(target, tokens), strict=True))
    assert lengths_of(sets) == _drawn_lengths(8, 24, 0)
    assert lengths_of(sets) != lengths_of(inputs_for(target, tokens, seed=1))
    assert [x.shape for x in inputs_for(target, wide)[0]] == [(2, lengths_of(sets)[0], 5), (2,)]


def test_a_source_may_take_the_length_or_draw_it_itself() -> None:
    target = Target.parse("cpu/8-24")

    def told(batch: int, generator: torch.Generator, length: int) -> tuple[Tensor, ...]:
        return (torch.zeros(batch, length),)

    def drawing(width: int) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
        def make(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
            length = int(torch.randint(8, 25, (), generator=generator))
            return (torch.randn(batch, length, width, generator=generator),)

        return make

    assert lengths_of(inputs_for(target, told)) == _drawn_lengths(8, 24, 0)
    narrow, wide = (lengths_of(inputs_for(target, drawing(width))) for width in (1, 7))
    assert narrow == wide
    assert len(set(narrow)) > 1


def test_a_range_of_lengths_for_images_is_refused() -> None:
    def images(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.zeros(batch, 3, 32, 32),)

    with pytest.raises(UserMistake, match=r"range of lengths, but no input has 24 .* \(1, 3, 32, 32\)"):
        inputs_for(Target.parse("cpu/8-24"), images)


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 4), (5, 12), (16, 128), (1, 10_000)])
def test_drawn_lengths_cover_the_range_evenly(low: int, high: int) -> None:
    found = _drawn_lengths(low, high, 0)
    assert len(found) == 8
    assert low <= min(found) <= max(found) <= high
    width = (high - low + 1) / 8
    assert all(low + part * width - 1 < x < low + (part + 1) * width for part, x in enumerate(sorted(found)))


# -- where weights lie -------------------------------------------------------------------------------------------------


def held(inside: Any) -> list[int]:
    return [x.data_ptr() for x in (*inside._model.parameters(), *inside._model.buffers(), *inside._inputs)]


@pytest.mark.parametrize(
    "runtime",
    ["", pytest.param("+compile", marks=[pytest.mark.slow, pytest.mark.skipif(not CXX, reason="no C++")])],
)
def test_relocated_models_are_the_same_elsewhere(runtime: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model[2].weight = model[0].weight  # tied
    x = torch.randn(1, 8)
    with torch.inference_mode():
        runner = make_runner(model, (x,), Target.parse(f"cpu:1{runtime}"))
        inside: Any = runner._runtime
        inside.stage(2)
        expected = inside.run()
        places = held(inside)
        given = [weight.data_ptr() for weight in model.parameters()]
        assert relocate([runner])
        moved = len(places) if not runtime else len(places) - len(list(model.buffers()))
        assert len(set(places) - set(held(inside))) == moved
        assert [weight.data_ptr() for weight in model.parameters()] == given
        twin = getattr(inside._model, "_orig_mod", inside._model)
        assert twin[2].weight is twin[0].weight
        assert torch.equal(inside.run(), expected)
        assert torch.equal(inside._inputs[0], inside._sets[2][0])
    assert not relocate([])


def test_of_what_cannot_be_copied_the_weights_are_moved() -> None:
    class Keeps(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.lock = threading.Lock()
            return super().forward(x)

    runner = make_runner(Keeps(8, 8), (torch.randn(1, 8),), Target.parse("cpu:1"))
    runner()
    inside: Any = runner._runtime
    model, places = inside._model, held(inside)
    assert relocate([runner])
    assert inside._model is model
    assert not set(places) & set(held(inside))
    runner()


def test_a_copy_that_forgets_what_was_converted_is_not_taken() -> None:
    class Own(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Own:
            return Own(8, 8)

    runner = make_runner(Own(8, 8), (torch.randn(1, 8),), Target.parse("cpu:1+bf16"))
    inside: Any = runner._runtime
    places = held(inside)
    assert relocate([runner])
    assert inside._model.weight.dtype == torch.bfloat16
    assert not set(places) & set(held(inside))
    runner()


def test_an_engine_is_made_again_elsewhere() -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(2, 8)
    runner = make_runner(nn.Linear(8, 8), (x,), Target.parse("cpu:1+onnxruntime@2"))
    inside: Any = runner._runtime
    inside.stage(1)
    inside.run()
    [before], first = inside._binding.copy_outputs_to_cpu(), inside._session
    folder = Path(inside._folder.name)
    assert relocate([runner])
    inside.run()
    assert inside._session is not first
    [after] = inside._binding.copy_outputs_to_cpu()
    assert (before == after).all()
    assert folder.exists()
    runner.close()
    assert not folder.exists()


def test_relocating_leaves_the_callers_random_numbers_alone() -> None:
    runner = make_runner(nn.Linear(8, 8), (torch.randn(1, 8),), Target.parse("cpu:1"))
    before = random.getstate()
    assert relocate([runner])
    assert random.getstate() == before
