"""The model exported to ONNX and built into a TensorRT engine."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import TrialFailure
from nas.latency.runtimes.base import RUNTIMES, InputSets, Runtime, check_outputs, distinct_shapes
from nas.latency.runtimes.eager import on_device
from nas.latency.runtimes.onnx_export import eager_outputs, export_onnx, named_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.latency.target import Target

__all__ = ["TensorRt"]


@RUNTIMES.register("tensorrt")
class TensorRt(Runtime):
    """A strongly typed engine: its precision is that of the exported model. Needs TensorRT 10 or later.

    Inputs and outputs lie on the device before the clock starts. Documentation:
    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
    """

    devices = ("cuda",)
    packages = ("tensorrt", "onnx")
    install = "pip install tensorrt 'nas-toolkit[export]'"
    own_layout = True
    reads_onnx = True

    def __init__(self, model: nn.Module | Path, sets: InputSets, target: Target):
        import torch

        expected = eager_outputs(model, sets)
        self.stream = torch.cuda.Stream(target.torch_device())
        with tempfile.TemporaryDirectory(prefix="nas-onnx-") as directory:
            exported = export_onnx(model, sets, target, target.torch_dtype(), Path(directory))
            self._runtime, self._engine = _engine(exported.path, sets)
        self.found = exported.versions
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = import_module("tensorrt").TensorIOMode.INPUT
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == is_input]
        self._outputs = [name for name in names if name not in self._inputs]
        self._sets = on_device(sets, target)
        for number in expected:
            self.stage(number)
            self.stream.wait_stream(torch.cuda.current_stream())  # which has copied the inputs
            self.run()
            self.stream.synchronize()
            check_outputs(expected[number], list(self._results.values()), target)

    def stage(self, number: int) -> None:
        for name, x in named_inputs(self._inputs, self._sets[number]).items():
            self._context.set_input_shape(name, tuple(x.shape))
            self._context.set_tensor_address(name, x.data_ptr())
        self._results = self._allocated(self._outputs)
        for name, x in self._results.items():
            self._context.set_tensor_address(name, x.data_ptr())

    def run(self) -> Any:
        if not self._context.execute_async_v3(self.stream.cuda_stream):
            raise TrialFailure("error", "tensorrt: the engine did not run; its log has the reason")

    def _allocated(self, names: list[str]) -> dict[str, Tensor]:
        import torch

        trt = import_module("tensorrt")
        dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
            trt.DataType.INT32: torch.int32,
            trt.DataType.BOOL: torch.bool,
        }
        return {
            name: torch.empty(
                tuple(self._context.get_tensor_shape(name)),
                dtype=dtypes[self._engine.get_tensor_dtype(name)],
                device=self._sets[0][0].device,
            )
            for name in names
        }


def _engine(path: Path, sets: InputSets) -> tuple[Any, Any]:
    """The runtime, which must live as long as the engine, and the engine."""
    import torch

    trt = import_module("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # A version that knows no weakly typed networks needs no flag for the others.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        why = str(parser.get_error(0)).partition("\n")[0] if parser.num_errors else "no reason given"
        raise TrialFailure("error", f"tensorrt: the exported model cannot be read: {why}")
    config = builder.create_builder_config()
    if not torch.backends.cuda.matmul.allow_tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if len(distinct_shapes(sets)) > 1:
        config.add_optimization_profile(_profile(builder, network, sets))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise TrialFailure(
            "error", "tensorrt: no engine could be built for the model; its log has the reason"
        )
    runtime = trt.Runtime(logger)
    return runtime, runtime.deserialize_cuda_engine(plan)


def _profile(builder: Any, network: Any, sets: InputSets) -> Any:
    """Shapes from the smallest to the largest of the sets; tuned for the one in the middle."""
    profile = builder.create_optimization_profile()
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    named = [named_inputs(names, tensors) for tensors in sets]
    for name in names:
        shapes = sorted({tuple(tensors[name].shape) for tensors in named})
        if len(shapes) > 1:
            profile.set_shape(name, shapes[0], shapes[len(shapes) // 2], shapes[-1])
    return profile
