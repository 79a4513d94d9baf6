"""The model exported to ONNX and run by OpenVINO on the CPU."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import TrialFailure, UserMistake
from nas.latency.runtimes.base import RUNTIMES, InputSets, Runtime, check_outputs
from nas.latency.runtimes.onnx_export import cast, eager_outputs, export_onnx, named_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.latency.target import Target

__all__ = ["OpenVino"]

_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@RUNTIMES.register("openvino")
class OpenVino(Runtime):
    """A compiled model with the latency hint and one stream, called synchronously.

    The model and its inputs stay fp32; the target's dtype is the precision that OpenVINO computes in. It is named
    even for fp32, because OpenVINO would choose bf16 by itself where the processor has it.
    """

    devices = ("cpu",)
    packages = ("openvino", "onnx")
    install = "pip install openvino 'nas-toolkit[export]'"
    own_layout = True
    reads_onnx = True
    cpu_clock = "process"

    def __init__(self, model: nn.Module | Path, sets: InputSets, target: Target):
        import torch

        expected = eager_outputs(model, sets)
        openvino = import_module("openvino")
        plain = cast(sets, torch.float32)
        with tempfile.TemporaryDirectory(prefix="nas-onnx-") as directory:
            exported = export_onnx(model, sets, target, torch.float32, Path(directory))
            compiled = _compiled(exported.path, target)
        self.found = exported.versions
        self._request = compiled.create_infer_request()
        names = [port.get_any_name() for port in compiled.inputs]
        self._arrays = [
            {
                name: openvino.Tensor(x.contiguous().numpy(), shared_memory=True)
                for name, x in named_inputs(names, tensors).items()
            }
            for tensors in plain
        ]
        self._plain = plain  # the shared memory is theirs
        for number in expected:
            self.stage(number)
            self.run()
            check_outputs(expected[number], self._fetched(len(compiled.outputs)), target)

    def stage(self, number: int) -> None:
        for name, array in self._arrays[number].items():
            self._request.set_tensor(name, array)

    def run(self) -> Any:
        self._request.infer()

    def _fetched(self, count: int) -> list[Tensor]:
        import torch

        return [torch.from_numpy(self._request.get_output_tensor(i).data.copy()) for i in range(count)]

    @classmethod
    def check(cls, target: Target) -> None:
        super().check(target)
        if target.dtype == "fp32":
            return
        able = import_module("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if target.dtype.upper() not in able:
            raise UserMistake(
                f"target {str(target)!r}: OpenVINO has no {target.dtype} on this processor (it has "
                f"{', '.join(sorted(name for name in able if name[-1].isdigit()))}); leave +{target.dtype} out"
            )


def _compiled(path: Path, target: Target) -> Any:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": target.cpu_threads(),
        "INFERENCE_PRECISION_HINT": _PRECISIONS[target.dtype],
        # The affinity of the process is recorded with the result; OpenVINO's own would contradict it.
        "ENABLE_CPU_PINNING": False,
    }
    core = import_module("openvino").Core()
    try:
        return core.compile_model(core.read_model(str(path)), "CPU", settings)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[-1] if lines else type(error).__name__
        raise TrialFailure("error", f"openvino: the exported model cannot be compiled: {why}") from error
