"""The model exported to ONNX and run by ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nas.errors import TrialFailure, UserMistake
from nas.latency.runtimes.base import RUNTIMES, InputSets, Runtime, check_outputs
from nas.latency.runtimes.onnx_export import cast, eager_outputs, export_onnx, named_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.latency.target import Target

__all__ = ["OnnxRuntime"]


@RUNTIMES.register("onnxruntime")
class OnnxRuntime(Runtime):
    """An ``InferenceSession`` on the CPU or the CUDA provider, called through bindings.

    The inputs lie on the device and the outputs' memory is allocated before the clock starts; the time holds no copy
    between host and device. Documentation: https://onnxruntime.ai/docs/performance/tune-performance/threading.html
    """

    devices = ("cpu", "cuda")
    packages = ("onnx", "onnxruntime")
    install = "pip install 'nas-toolkit[export]'"
    own_layout = True
    reads_onnx = True

    def __init__(self, model: nn.Module | Path, sets: InputSets, target: Target):
        expected = eager_outputs(model, sets)
        if target.is_cuda:
            import torch

            self.stream = torch.cuda.Stream(target.torch_device())
        self._folder = tempfile.TemporaryDirectory(prefix="nas-onnx-")
        try:
            exported = export_onnx(model, sets, target, target.torch_dtype(), Path(self._folder.name))
            self._session = _session(exported.path, target, self.stream)
        except BaseException:
            self._folder.cleanup()
            raise
        self.found = exported.versions
        typed = cast(sets, target.torch_dtype())
        self._again = (exported.path, typed, target)
        if isinstance(model, Path):
            _check_file(self._session, model, typed[0], target)
        self._bound = [_bound(self._session, tensors, target) for tensors in typed]
        self.stage(0)
        for number in expected:
            self.stage(number)
            self.run()
            check_outputs(expected[number], _fetched(self._binding), target)

    def stage(self, number: int) -> None:
        self._staged, self._binding = number, self._bound[number].binding

    def run(self) -> Any:
        self._session.run_with_iobinding(self._binding)

    def move(self) -> Callable[[], None] | None:
        path, sets, target = self._again
        if target.is_cuda:
            return None
        session = _session(path, target, self.stream)
        bound = [_bound(session, tensors, target) for tensors in sets]

        def switch() -> None:
            self._session, self._bound = session, bound
            self.stage(self._staged)

        return switch

    def close(self) -> None:
        self._folder.cleanup()
        super().close()

    @classmethod
    def check(cls, target: Target) -> None:
        super().check(target)
        if target.dtype == "bf16":
            raise UserMistake(
                f"target {str(target)!r}: onnxruntime has too few bf16 kernels; use +fp16 or neither"
            )
        if target.is_cuda and _provider(target) not in import_module("onnxruntime").get_available_providers():
            raise UserMistake(
                f"target {str(target)!r}: the installed onnxruntime has no CUDA provider; "
                "pip uninstall onnxruntime && pip install onnxruntime-gpu, or use another runtime"
            )


def _provider(target: Target) -> str:
    return "CUDAExecutionProvider" if target.is_cuda else "CPUExecutionProvider"


def _session(path: Path, target: Target, stream: Any) -> Any:
    import torch

    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = target.cpu_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Otherwise the threads of the model that has just run spin on the cores of the one that runs now.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    settings: dict[str, str] = {}
    if target.is_cuda:
        settings = {
            "device_id": str(target.cuda_index()),
            "user_compute_stream": str(stream.cuda_stream),
            # As eager does: TF32 is on in one and off in the other by default.
            "use_tf32": str(int(torch.backends.cuda.matmul.allow_tf32)),
        }
    provider = _provider(target)
    try:
        session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
    except Exception as error:  # the module's exceptions have no common class of their own
        why = str(error).partition("\n")[0]
        raise TrialFailure("error", f"onnxruntime: the exported model cannot be loaded: {why}") from error
    # It falls back to the CPU with a mere warning when the libraries of CUDA are not found.
    if session.get_providers()[0] != provider:
        raise UserMistake(
            f"target {str(target)!r}: onnxruntime could not start its {provider} and fell back to "
            f"{session.get_providers()[0]}; install the CUDA and cuDNN that this onnxruntime-gpu was built for"
        )
    return session


def _check_file(session: Any, path: Path, tensors: tuple[Tensor, ...], target: Target) -> None:
    wanted = [entry.type for entry in session.get_inputs()]
    types = {"torch.float32": "tensor(float)", "torch.float16": "tensor(float16)"}
    given = [types.get(str(x.dtype), f"tensor({str(x.dtype).removeprefix('torch.')})") for x in tensors]
    if wanted != given:
        raise UserMistake(
            f"target {str(target)!r}: {path.name} takes {', '.join(wanted)}, but the target's inputs are "
            f"{', '.join(given)}; choose the dtype that the file was exported with"
        )


class _Bound(NamedTuple):
    """A binding, and the values whose memory it uses without owning it."""

    binding: Any
    values: list[Any]


def _bound(session: Any, tensors: tuple[Tensor, ...], target: Target) -> _Bound:
    """Inputs and outputs bound to fixed memory; the shapes of the outputs are found by one run."""
    value_of = import_module("onnxruntime").OrtValue.ortvalue_from_numpy
    place = ("cuda", target.cuda_index()) if target.is_cuda else ("cpu", 0)
    inputs = {
        name: value_of(x.contiguous().numpy(), *place)
        for name, x in named_inputs([entry.name for entry in session.get_inputs()], tensors).items()
    }
    outputs = [entry.name for entry in session.get_outputs()]
    trial, binding = session.io_binding(), session.io_binding()
    for name, value in inputs.items():
        trial.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        trial.bind_output(name, *place)
    session.run_with_iobinding(trial)
    values = trial.get_outputs()
    for name, value in zip(outputs, values, strict=True):
        binding.bind_ortvalue_output(name, value)
    return _Bound(binding, [*inputs.values(), *values])


def _fetched(binding: Any) -> list[Tensor]:
    import torch

    return [torch.from_numpy(array) for array in binding.copy_outputs_to_cpu()]
