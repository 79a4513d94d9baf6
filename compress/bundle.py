"""The bundle that is handed over: structure, weights, an ONNX file that was compared with the model, a latency card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.environment import describe_environment
from nas.files import atomic_write_json, sha256_file
from nas.latency import Target
from nas.onnx_file import check_onnx, float_types, in_float32, write_onnx

if TYPE_CHECKING:
    from compress.result import CompressionResult

__all__ = ["write_bundle"]

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
    from compress.result import check_empty, staged

    check_empty(out)
    in_float32(result.model, result.example)
    with staged(out) as staging:
        result.write(staging)
        onnx = write_onnx(result.model, result.example, staging)
        gaps = check_onnx(onnx, result.model, result.example)
        card = latency_card(result)
        card["onnx"] = {
            "sha256": sha256_file(onnx),
            "dtype": "float32",
            "model_dtypes": float_types(result.model),
            "compared_with": "the model in float32",
            "largest_difference": {str(batch): gap for batch, gap in gaps.items()},
        }
        atomic_write_json(staging / "latency.json", card)
    return out


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
