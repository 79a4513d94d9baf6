"""Runners and the ways of running a model. Nothing here asserts how long something takes."""

from __future__ import annotations

import gc
import importlib
import math
import random
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.errors import TrialFailure, UserMistake
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
from nas.latency.runtimes import cudagraph
from nas.latency.runtimes.base import check_outputs, distinct_shapes, tensors_of, twin
from nas.latency.runtimes.onnx_export import export_onnx, named_inputs

ONE = Target.parse("cpu:1")
needs_onnxruntime = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="no onnxruntime"
)
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="no openvino")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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


class Tokens(nn.Module):
    """Of any length; its mean over the tokens depends on the length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.embed(tokens).mean(1)), "argmax": self.embed(tokens).argmax(-1)}


def tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(0, 50, (batch, 24), generator=generator),)


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


# -- comparing what was computed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([torch.tensor([1.0, 100.2])], None),  # 0.05 % short of the largest: within 0.1 %
        ([torch.tensor([1.2, 100.0])], "output 0 deviates .* by 0.002 of its largest value .bound 0.001"),
        ([torch.tensor([1.0, math.nan])], "output 0 deviates .* by nan"),
        ([torch.tensor([[1.0, 100.0]])], r"output 0 has shape \(1, 2\), but the model's has \(2,\)"),
        ([], "gives 0 outputs, but the model 1"),
    ],
)
def test_a_runtime_that_computes_something_else_is_found(found: list[Tensor], message: str | None) -> None:
    expected = [torch.tensor([1.0, 100.15])] if message is None else [torch.tensor([1.0, 100.0])]
    target = Target.parse("cpu+onnxruntime")
    if message is None:
        check_outputs(expected, found, target)
        return
    with pytest.raises(TrialFailure, match=f"onnxruntime: {message}") as caught:
        check_outputs(expected, found, target)
    assert caught.value.kind == "error"


def test_whole_numbers_must_be_equal_and_lower_precision_may_deviate_more() -> None:
    with pytest.raises(TrialFailure, match=r"output 1 .*bound 0\)"):
        pair = [torch.zeros(0), torch.tensor([7, 1000])]
        check_outputs(pair, [torch.zeros(0), torch.tensor([7, 1001])], Target.parse("cpu+ort"))
    check_outputs([torch.ones(2)], [torch.full((2,), 1.01)], Target.parse("cpu+fp16+ort"))


def test_outputs_are_found_in_any_structure() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert [x.tolist() for x in tensors_of({"x": a, "y": [b, None, (c, 3)]})] == [[0.0], [1.0], [1.0, 1.0]]
    assert distinct_shapes([(a,), (b,), (c,), (a,)]) == [0, 2]


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


GRAPH = Target("cpu", runtime="cudagraph")  # which check() would refuse


def replaying(self: cudagraph.CudaGraph, buffers: tuple[Tensor, ...]) -> tuple[Callable[[], None], Any]:
    """A graph in the manner of CUDA's: it computes from its buffers into its own outputs."""
    outputs = self._model(*buffers).clone()
    return lambda: outputs.copy_(self._model(*buffers)), outputs


def test_a_graph_computes_from_the_staged_inputs_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraph.CudaGraph, "_capture", replaying)
    model = nn.Linear(4, 2)
    sets = [(torch.randn(1, 4),), (torch.randn(1, 3, 4),), (torch.randn(1, 4),)]
    with torch.inference_mode():
        graph = cudagraph.CudaGraph(model, sets, GRAPH)
        for number in (0, 1, 2, 0):
            graph.stage(number)
            torch.testing.assert_close(graph.run(), model(*sets[number]))
    graph.close()


def test_a_graph_that_replays_what_it_was_captured_with_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(self: cudagraph.CudaGraph, buffers: tuple[Tensor, ...]) -> tuple[Callable[[], None], Any]:
        return (lambda: None), self._model(*buffers)

    monkeypatch.setattr(cudagraph.CudaGraph, "_capture", frozen)
    with pytest.raises(TrialFailure, match="cudagraph: output 0 deviates"), torch.inference_mode():
        cudagraph.CudaGraph(nn.Linear(4, 2), [(torch.randn(1, 4),), (torch.randn(1, 4),)], GRAPH)


def test_a_model_that_cannot_be_captured_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: cudagraph.CudaGraph, buffers: tuple[Tensor, ...]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cudagraph.CudaGraph, "_capture", capture)
    with pytest.raises(TrialFailure, match="cannot be captured: operation not permitted when stream is cap"):
        cudagraph.CudaGraph(nn.Linear(4, 2), [(torch.randn(1, 4),)], GRAPH)


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _quick_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter on TorchScript takes a hundredth of a second, the other one several."""
    monkeypatch.setattr("nas.latency.runtimes.onnx_export.find_spec", lambda name: None)


@needs_onnxruntime
@pytest.mark.usefixtures("_quick_exporter")
@pytest.mark.parametrize("text", ["cpu:1+onnxruntime@2", "cpu:1+fp16+onnxruntime@2"])
def test_onnxruntime_runs_the_model_in_a_measuring_session(text: str) -> None:
    target = Target.parse(text)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).train()
    with session(target, 1):
        runner = make_runner(model, (torch.randn(2, 3, 8, 8),), target)
        times = [runner() for _ in range(5)]
    assert all(found.wall > 0 and math.isnan(found.events) for found in times)
    assert set(runner.runtime_versions) == {"torch", "onnx", "onnxruntime", "exporter"}
    assert runner.runtime_versions["exporter"] == "torchscript"
    assert model.training
    runner.close()


@needs_onnxruntime
@pytest.mark.usefixtures("_quick_exporter")
def test_onnxruntime_takes_several_lengths_and_every_kind_of_output() -> None:
    target = Target.parse("ort:1@2/8-24")
    runner = make_runner(Tokens(), inputs_for(target, tokens), target)
    assert runner().wall > 0
    engine = runner._runtime
    engine.stage(3)
    engine.run()
    assert engine._binding.copy_outputs_to_cpu()[1].shape[1] == _drawn_lengths(8, 24, 0)[3]


@needs_onnxruntime
@pytest.mark.usefixtures("_quick_exporter")
def test_a_constant_that_the_exporter_baked_in_is_found() -> None:
    class Baked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1) * float(x.shape[1])

    target = Target.parse("ort:1/4-9")
    sets = [(torch.ones(1, 4),), (torch.ones(1, 9),)]
    with pytest.raises(TrialFailure, match="onnxruntime: output 0 deviates from the eager model's"):
        make_runner(Baked(), sets, target)


@needs_onnxruntime
@pytest.mark.usefixtures("_quick_exporter")
def test_a_model_that_no_exporter_knows_fails_with_both_reasons() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i1e(x)

    with pytest.raises(
        TrialFailure,
        match=r"cannot be written as ONNX \(dynamo: onnxscript is not installed; torchscript: .*i1e",
    ) as caught:
        make_runner(Odd(), (torch.randn(1, 4),), Target.parse("ort:1"))
    assert "\n" not in str(caught.value)


@needs_onnxruntime
@pytest.mark.usefixtures("_quick_exporter")
def test_an_onnx_file_is_measured_as_it_is(tmp_path: Path) -> None:
    target, x = Target.parse("ort:1"), (torch.randn(1, 4),)
    path = export_onnx(nn.Linear(4, 2), [x], target, torch.float32, tmp_path).path
    runner = make_runner(path, x, target)
    assert runner().wall > 0
    assert runner.runtime_versions["exporter"] == "none"
    with pytest.raises(
        UserMistake, match=r"takes tensor\(float\), but the target's inputs are tensor\(float16\)"
    ):
        make_runner(path, x, Target.parse("cpu:1+fp16+ort"))
    with pytest.raises(UserMistake, match=r"is an ONNX file, which eager does not read; use \+onnxruntime"):
        make_runner(path, x, ONE)


def test_inputs_are_matched_by_our_names_or_by_position() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert named_inputs(["input_1"], (a, b)) == {"input_1": b}
    assert named_inputs(["ids", "mask"], (a, b)) == {"ids": a, "mask": b}
    with pytest.raises(UserMistake, match=r"there are 2, but the ONNX model takes 1 \(ids\)"):
        named_inputs(["ids"], (a, b))


@needs_onnxruntime
@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxscript") is None, reason="no onnxscript")
def test_the_exporter_on_torch_export_is_preferred_and_knows_lengths() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(self.embed(x)).mean(1)
            return found

    target = Target.parse("ort:1@2/8-24")
    with session(target, 1):
        runner = make_runner(Encoder(), inputs_for(target, tokens), target)
        assert runner().wall > 0
    assert runner.runtime_versions["exporter"] == "dynamo"


@needs_openvino
@pytest.mark.usefixtures("_quick_exporter")
@pytest.mark.parametrize("text", ["cpu:1+openvino@2", "cpu:1+openvino@2/8-24", "cpu:1+bf16+openvino@2"])
def test_openvino_runs_the_model(text: str) -> None:
    target = Target.parse(text)
    try:
        target.check()
    except UserMistake as mistake:
        pytest.skip(str(mistake))
    model = Tokens() if target.lengths else nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    with session(target, 1):
        inputs = inputs_for(target, tokens) if target.lengths else (torch.randn(2, 3, 8, 8),)
        runner = make_runner(model, inputs, target)
        assert runner().wall > 0
    assert set(runner.runtime_versions) == {"torch", "onnx", "openvino", "exporter"}
    runner.close()


# -- compiled ----------------------------------------------------------------------------------------------------------


def test_compiling_is_for_fixed_shapes_unless_the_inputs_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic: list[bool] = []

    def compiled(model: nn.Module, *, dynamic: bool, seen: list[bool] = dynamic) -> nn.Module:
        seen.append(dynamic)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    target = Target.parse("cpu:1+compile")
    make_runner(nn.Linear(4, 4), (torch.randn(1, 4),), target)()
    make_runner(nn.Linear(4, 4), [(torch.randn(1, 4),), (torch.randn(1, 2, 4),)], target)()
    assert dynamic == [False, True]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_model_runs_with_one_shape_and_with_several() -> None:
    for text in ("cpu:1+compile@2/24", "cpu:1+compile@2/8-24"):
        target = Target.parse(text)
        with session(target, 1):
            assert make_runner(Tokens(), inputs_for(target, tokens), target)().wall > 0


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "text",
    [
        "cuda",
        "cuda+bf16+channels_last",
        "cuda+cudagraph",
        "cuda+fp16+cudagraph",
        "cuda+onnxruntime",
        "cuda+fp16+onnxruntime",
        "cuda+tensorrt",
        "cuda+fp16+tensorrt",
    ],
)
def test_on_a_gpu_every_runtime_gives_host_and_device_time(text: str) -> None:
    target = Target.parse(text)
    try:
        target.check()
    except UserMistake as mistake:
        pytest.skip(str(mistake))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    with session(target, 1):
        runner = make_runner(model, (torch.randn(1, 3, 8, 8),), target)
        times = [runner() for _ in range(10)]
        assert all(found.wall > 0 and found.events > 0 and math.isnan(found.cpu) for found in times)
        runner.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("text", ["cuda/8-24", "cuda+cudagraph/8-24", "cuda+onnxruntime/8-24"])
def test_on_a_gpu_several_lengths(text: str) -> None:
    target = Target.parse(text)
    try:
        target.check()
    except UserMistake as mistake:
        pytest.skip(str(mistake))
    with session(target, 1):
        assert make_runner(Tokens(), inputs_for(target, tokens), target)().events > 0


def test_runtimes_import_neither_torch_nor_an_engine() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from nas.latency.runtimes import RUNTIMES; RUNTIMES.names(); import nas.latency.identity; "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert importlib.import_module("nas.latency.runtimes").RUNTIMES.get("eager").cpu_clock == "thread"


# -- where weights lie -------------------------------------------------------------------------------------------------


def test_relocated_weights_are_the_same_elsewhere() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight  # tied
    x = torch.randn(1, 8)
    runner = make_runner(model, (x,), Target.parse("cpu:1"))
    inside = runner._runtime
    expected = inside.run()
    places = [weight.data_ptr() for weight in runner.weights()]
    given = [weight.data_ptr() for weight in model.parameters()]
    assert relocate([runner])
    assert not set(places) & {weight.data_ptr() for weight in runner.weights()}
    assert [weight.data_ptr() for weight in model.parameters()] == given
    twin = inside._model
    assert twin[2].weight is twin[0].weight
    assert torch.equal(inside.run(), expected)
    assert not relocate([])


def test_relocating_leaves_the_callers_random_numbers_alone() -> None:
    runner = make_runner(nn.Linear(8, 8), (torch.randn(1, 8),), Target.parse("cpu:1"))
    before = random.getstate()
    assert relocate([runner])
    assert random.getstate() == before
