"""The ways of running a model compute what the model computes. Nothing here asserts how long something takes."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.errors import TrialFailure, UserMistake
from nas.latency import Target
from nas.latency.runner import _drawn_lengths, inputs_for, make_runner, session
from nas.latency.runtimes import cudagraph
from nas.latency.runtimes.base import check_outputs, distinct_shapes, tensors_of
from nas.latency.runtimes.onnx_export import export_onnx, named_inputs
from tests.nas import _runtime_models
from tests.nas._runtime_models import ONE, Tokens, tokens

_one_thread = _runtime_models.one_thread  # a fixture is found by a name in the module of its tests
needs_onnxruntime = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="no onnxruntime"
)
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="no openvino")


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
