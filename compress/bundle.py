"""The bundle that is handed over: structure, weights, an ONNX file that was compared with the model, a latency card."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nas.environment import describe_environment
from nas.errors import RunStopped, UserMistake, first_line
from nas.files import atomic_write_json, sha256_file
from nas.latency import Target
from nas.latency.runtimes.base import twin

if TYPE_CHECKING:
    from compress.result import CompressionResult

__all__ = ["check_onnx", "in_float32", "write_bundle", "write_onnx"]

BATCHES = (1, 7)
_TOLERANCE = 1e-3
_SECONDS = 5.0


def write_bundle(result: CompressionResult, out: Path) -> Path:
    """Write ``compressed.json``, ``weights.safetensors``, ``model.onnx`` (dynamic batch) and ``latency.json``.

    The ONNX file is in float32, whatever the numbers of the model are; the card tells both. It is run in onnxruntime
    at batch 1 and 7 and its outputs are compared with those of the model in float32. A model whose latency was not
    measured is measured now.

    Raises:
        UserMistake: the directory is not empty, or onnx or onnxruntime is missing.
        RunStopped: the model does not run in float32 or cannot be written as ONNX, or onnxruntime computes something
            else.
    """
    from compress.result import check_empty

    check_empty(out)
    in_float32(result.model, result.example)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    staging.mkdir()
    try:
        result.write(staging)
        onnx = write_onnx(result.model, result.example, staging)
        gaps = check_onnx(onnx, result.model, result.example)
        card = latency_card(result)
        card["onnx"] = {
            "sha256": sha256_file(onnx),
            "dtype": "float32",
            "model_dtypes": _dtypes(result.model),
            "compared_with": "the model in float32",
            "largest_difference": {str(batch): gap for batch, gap in gaps.items()},
        }
        atomic_write_json(staging / "latency.json", card)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # after the rename this name is gone
    return out


def write_onnx(model: nn.Module, example: tuple[torch.Tensor, ...], directory: Path) -> Path:
    """``directory/model.onnx``, in float32, with a batch of any size; inputs are ``input_0``, ``input_1``, ..."""
    from nas.errors import TrialFailure
    from nas.latency.runtimes.onnx_export import export_onnx

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


def in_float32(
    model: nn.Module, example: tuple[torch.Tensor, ...]
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Model and inputs with their floating-point numbers in float32; the model itself where it has no others.

    Raises RunStopped when the model does not run in float32.
    """
    given = tuple(x.float() if x.is_floating_point() else x for x in example)
    if set(_dtypes(model)) <= {"float32"}:
        return model, given
    plain = twin(model, torch.float32, "cpu", channels_last=False)
    try:
        with torch.no_grad():
            plain(*given)
    except Exception as error:  # the model is anybody's
        raise RunStopped(
            f"export: the file is written in float32, and {type(model).__name__}, of {', '.join(_dtypes(model))}, "
            f"does not run in it ({first_line(error, 150)}); take away the types that its forward names"
        ) from None
    return plain, given


def check_onnx(path: Path, model: nn.Module, example: tuple[torch.Tensor, ...]) -> dict[int, float]:
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


def latency_card(result: CompressionResult) -> dict[str, Any]:
    """Device, runtime, dtype, batch, threads, median and interval in ms, and the ratio to the original."""
    target, latency = Target.parse(result.target), result.final.latency
    if latency is None:
        from compress.measuring import measure_against

        session = measure_against({"model": result.model}, "model", result.example, target, seconds=_SECONDS)
        latency = session.results["model"].to_dict()
    environment = describe_environment(gpu=target.is_cuda)
    return {
        "target": result.target,
        "device": target.device,
        "runtime": target.runtime,
        "dtype": target.dtype,
        "batch": target.batch,
        "threads": latency["threads"],
        "clock": latency["clock"],
        "median_ms": latency["median_ms"],
        "low_ms": latency["low_ms"],
        "high_ms": latency["high_ms"],
        "trusted": latency["trusted"],
        "reasons": latency["reasons"],
        "of_original": result.final.ratio,
        "input": [list(x.shape[1:]) for x in result.example],
        "environment": environment,
    }


def _dtypes(model: nn.Module) -> list[str]:
    """Of its floating-point parameters and buffers, sorted."""
    tensors = (*model.parameters(), *model.buffers())
    return sorted({str(x.dtype).removeprefix("torch.") for x in tensors if x.is_floating_point()})


def _varied(x: torch.Tensor, batch: int, generator: torch.Generator) -> torch.Tensor:
    many = x.expand(batch, *x.shape[1:]).clone()
    if many.is_floating_point():
        many += 0.1 * torch.randn(many.shape, generator=generator)
    return many
