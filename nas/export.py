"""Handing a found model over: its weights and what it takes to build it again, and the way back."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserMistake
from nas.files import CorruptFile, read_record, sweep_temporary, write_record

if TYPE_CHECKING:
    from torch import nn

    from nas.reader import ReadRun
    from nas.study import StoredTrial

__all__ = ["best_trial", "export_trial", "load_model", "write_checked_onnx"]

FORMAT = 1


def best_trial(run: ReadRun) -> StoredTrial:
    """The member of the front with the best first objective. Raises UserMistake when there is no front."""
    report = run.report()
    front = report.front()
    if not front:
        raise UserMistake(
            f"{run.directory.path}: no candidate was evaluated to the end; there is nothing to export"
        )
    name, direction = report.objectives[0]
    pick = max if direction == "maximize" else min
    return run.trial(pick(front, key=lambda row: row.values[name]).number)


def export_trial(run: ReadRun, trial: StoredTrial, out: Path, *, onnx: bool = False) -> Path:
    """Write ``weights.safetensors`` and a sealed ``architecture.json`` of a trained trial into ``out``.

    The exported weights are loaded back into a model built from the written architecture before this returns.

    Args:
        run, trial: what to export.
        out: a new or empty directory.
        onnx: also write ``model.onnx``, in float32, for batches of any size; what onnxruntime makes of it is compared
            with the model at batch 1 and 7, and the record tells by how much they differ. Sequences have a fixed
            length, the longest that the model takes; pad shorter ones.

    Raises:
        UserMistake: the trial was not trained to the end, its weights were not kept, or onnx, onnxscript or
            onnxruntime is missing.
        CorruptFile: the weights are damaged.
        RunStopped: the model cannot be written as ONNX, or onnxruntime computes something else.
    """
    from nas.weights import load_tensors, save_weights

    result = trial.result
    if result is None or result.state != "complete":
        raise UserMistake(f"trial {trial.number}: {trial.state}; only a complete trial has weights to export")
    signature = run.facts.get("signature")
    source = run.directory.trial(trial.number) / "weights.safetensors"
    if result.weights_sha256 is None or signature is None or not source.exists():
        raise UserMistake(
            f"trial {trial.number}: its weights were not kept (keep_weights, or an --evaluator without a model)"
        )
    tensors, metadata = load_tensors(source, sha256=result.weights_sha256)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserMistake(f"--to {out}: not an empty directory; give a new one")
    described = {
        "format": FORMAT,
        "space": run.config.space,
        "scale_task": run.config.task or run.study.space.task,
        "fingerprint": run.study.space.fingerprint(),
        "architecture": trial.architecture,
        "key": trial.key,
        "signature": signature,
        "metrics": result.metrics,
        "latency": result.latency,
        "values": result.values,
        "task": run.facts.get("task"),
        "environment": run.facts.get("environment"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporary(out.parent)
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    staging.mkdir()
    try:
        digest = save_weights(tensors, staging / "weights.safetensors", metadata)
        write_record(staging / "architecture.json", {**described, "weights_sha256": digest})
        model = load_model(staging)
        if onnx:
            described["onnx"] = write_checked_onnx(model, read_signature(signature, source), staging)
            write_record(staging / "architecture.json", {**described, "weights_sha256": digest})
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # after the rename this name is gone
    return out


def write_checked_onnx(model: nn.Module, signature: Any, directory: Path) -> dict[str, Any]:
    """Write ``directory/model.onnx``, compare it with the model, and say what it is: JSON for the record.

    Translation is compared with padded sequences too. Raises as ``export_trial``.
    """
    import torch

    from nas.files import sha256_file
    from nas.onnx_file import check_onnx, write_onnx
    from nas.source_inputs import inputs_of

    draw = inputs_of("the exported model", signature, None)
    example = draw(1, torch.Generator().manual_seed(0), length=getattr(signature, "max_length", None))
    path = write_onnx(model, example, directory)
    gaps = check_onnx(path, model, example)
    if hasattr(signature, "padding"):
        padded = tuple(x.clone() for x in example)
        for x in padded:
            x[:, x.shape[1] // 2 :] = signature.padding
        gaps = {batch: max(gaps[batch], gap) for batch, gap in check_onnx(path, model, padded).items()}
    return {
        "sha256": sha256_file(path),
        "dtype": "float32",
        "inputs": {f"input_{number}": ["batch", *x.shape[1:]] for number, x in enumerate(example)},
        "largest_difference": {str(batch): gap for batch, gap in gaps.items()},
    }


def load_model(directory: str | Path) -> nn.Module:
    """The exported model, on the CPU and in evaluation mode.

    Raises UserMistake when ``directory`` is not an export or its space is not to be had, CorruptFile when a file is
    damaged.
    """
    import torch

    from nas.weights import load_weights
    from spaces import get_space

    directory = Path(directory)
    path = directory / "architecture.json"
    if not path.exists():
        raise UserMistake(
            f"{directory}: holds no architecture.json; give a directory written by 'nas export'"
        )
    described = read_record(path)
    if described.get("format") != FORMAT:
        raise UserMistake(f"{path}: format {described.get('format')!r}; this version reads {FORMAT}")
    space = get_space(described["space"], task=described["scale_task"])
    with torch.random.fork_rng(devices=[]):  # building draws initial weights that are replaced at once
        model = space.build(
            space.canonical(described["architecture"]), read_signature(described["signature"], path)
        )
    load_weights(model, directory / "weights.safetensors", sha256=described["weights_sha256"])
    return model.eval()


def describe_signature(signature: Any) -> dict[str, Any]:
    """JSON form of a task's signature."""
    return {"task": signature.task, **dataclasses.asdict(signature)}


def read_signature(data: dict[str, Any], where: Path) -> Any:
    """The inverse of ``describe_signature``. Raises CorruptFile for what no version has written."""
    from spaces import signature as signatures

    kinds = [
        getattr(signatures, name)
        for name in signatures.__all__
        if isinstance(getattr(signatures, name), type)
    ]
    for kind in kinds:
        if kind.task == data.get("task"):
            return kind(**{name: value for name, value in data.items() if name != "task"})
    raise CorruptFile(where, f"its signature is for an unknown task {data.get('task')!r}")
