"""A model written as an ONNX file of any batch size, and compared with the model in onnxruntime."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import RunStopped, TrialFailure, UserMistake, first_line
from nas.latency.runtimes.base import twin
from nas.latency.runtimes.onnx_export import export_onnx
from nas.latency.target import Target

__all__ = ["check_onnx", "float_types", "in_float32", "write_onnx"]

BATCHES = (1, 7)
_TOLERANCE = 1e-3


def write_onnx(model: nn.Module, example: tuple[Tensor, ...], directory: Path) -> Path:
    """``directory/model.onnx``, in float32, with a batch of any size; inputs are ``input_0``, ``input_1``, ..."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise UserMistake(
            "export: ONNX needs onnx and onnxruntime; pip install 'nas-toolkit[export]'"
        ) from None
    # Two sizes, so that the exporter sees which dimension may change; 1 it would take for a constant.
    sets: Any = [tuple(x.expand(batch, *x.shape[1:]).clone() for x in example) for batch in (2, 3)]
    try:
        found = export_onnx(model, sets, Target.parse("cpu:1+onnxruntime"), torch.float32, directory)
    except TrialFailure as failure:
        raise RunStopped(f"export: {failure.reason}") from None
    return found.path


def in_float32(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Model and inputs with their floating-point numbers in float32; the model itself where it has no others.

    Raises RunStopped when the model does not run in float32.
    """
    given = tuple(x.float() if x.is_floating_point() else x for x in example)
    if set(float_types(model)) <= {"float32"}:
        return model, given
    plain = twin(model, torch.float32, "cpu", channels_last=False)
    try:
        with torch.no_grad():
            plain(*given)
    except Exception as error:  # the model is anybody's
        raise RunStopped(
            f"export: the file is written in float32, and {type(model).__name__}, of {', '.join(float_types(model))}, "
            f"does not run in it ({first_line(error, 150)}); take away the types that its forward names"
        ) from None
    return plain, given


def check_onnx(path: Path, model: nn.Module, example: tuple[Tensor, ...]) -> dict[int, float]:
    """Batch -> largest difference between onnxruntime and the model in float32, relative to the size of the outputs.

    Raises RunStopped when one is above 1e-3, UserMistake when onnxruntime is missing.
    """
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        raise UserMistake("export: checking needs onnxruntime; pip install 'nas-toolkit[export]'") from None
    model, example = in_float32(model, example)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    generator, gaps = torch.Generator().manual_seed(0), {}
    for batch in BATCHES:
        inputs = tuple(_varied(x, batch, generator) for x in example)
        with torch.no_grad():
            outputs = model(*inputs)
        wanted = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        given = {f"input_{number}": x.numpy() for number, x in enumerate(inputs)}
        names = {one.name for one in session.get_inputs()}
        try:
            found = torch.from_numpy(session.run(None, {k: v for k, v in given.items() if k in names})[0])
        except Exception as error:  # onnxruntime raises its own kinds, of a compiled module
            reason = first_line(error, 200)
            raise RunStopped(f"export: onnxruntime cannot run the file at batch {batch}: {reason}") from None
        if found.shape != wanted.shape:
            raise RunStopped(
                f"export: onnxruntime gives {tuple(found.shape)} at batch {batch}, not {tuple(wanted.shape)}"
            )
        gaps[batch] = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        if not gaps[batch] <= _TOLERANCE:
            raise RunStopped(
                f"export: at batch {batch} onnxruntime differs from the model by {gaps[batch]:.2g}"
            )
    return gaps


def float_types(model: nn.Module) -> list[str]:
    """Of its floating-point parameters and buffers, sorted."""
    tensors = (*model.parameters(), *model.buffers())
    return sorted({str(x.dtype).removeprefix("torch.") for x in tensors if x.is_floating_point()})


def _varied(x: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    many = x.expand(batch, *x.shape[1:]).clone()
    if many.is_floating_point():
        many += 0.1 * torch.randn(many.shape, generator=generator)
    return many
