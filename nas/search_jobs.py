"""Jobs around a search: space and conditions, before it; the finalists' test metrics and latencies, after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserMistake, nearest
from nas.export import describe_signature
from nas.trial_latency import against, alone_on, identity_here, measure_candidate
from nas.trial_parts import count, skeleton_of, space_of, target_of, task_of, training_threads

if TYPE_CHECKING:
    from nas.tasks.base import Task
    from nas.trial import Channel
    from spaces import Architecture

__all__ = ["conditions_here", "finalist_metrics", "finalists_latency", "probe"]


def probe(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """What a space is on this task and target: facts of the task, and the size of three of its architectures.

    ``payload``: config, architectures, of which those with the fewest, the median and the most parameters are
    counted and measured. A user's mistake comes back as ``{"mistake": text}``, because it concerns the whole run.
    """
    config = payload["config"]
    try:
        task = task_of(config)
        described: dict[str, Any] = {
            "task": {"name": task.name, **task.describe()},
            "signature": describe_signature(task.signature),
            "objective": [task.objective.name, task.objective.direction],
            "epochs": config["epochs"] or task.default_epochs,
            "candidates": {},
        }
        by_size = sorted(payload["architectures"], key=lambda architecture: _size(config, task, architecture))
        chosen = {"smallest": by_size[0], "typical": by_size[len(by_size) // 2], "largest": by_size[-1]}
        for label, architecture in chosen.items():
            described["candidates"][label] = found = _probe_candidate(payload, task, architecture)
            channel.event({"stage": "probed", "label": label, **found})
        _check_objectives(config, task)
        return described
    except UserMistake as mistake:
        return {"mistake": str(mistake)}


def _size(config: Mapping[str, Any], task: Task, architecture: Architecture) -> int:
    return sum(parameter.numel() for parameter in skeleton_of(config, task, architecture).parameters())


def _probe_candidate(payload: Mapping[str, Any], task: Task, architecture: Architecture) -> dict[str, Any]:
    model = space_of(payload["config"]).build(architecture, task.signature)
    target = target_of(payload["config"])
    latency = measure_candidate(model, task, target, payload, seconds=0.7)
    return {"architecture": architecture, **count(model.cpu(), task), "latency": latency}


def _check_objectives(config: Mapping[str, Any], task: Task) -> None:
    """Raises UserMistake for an objective that no candidate could have, before one is trained for nothing."""
    if config["objectives"] is None or config["evaluator"] != "train":
        return
    known = {task.objective.name, "loss", "perplexity", "latency_ms", "params", "macs"}
    names = ", ".join(sorted(known))
    for text in config["objectives"]:
        name = text.partition(":")[0]
        if name not in known:
            raise UserMistake(
                f"--objective {text}: {name!r} is not measured here{nearest(name, known)}; known: {names}"
            )


def conditions_here(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """``identity``: what a latency would be measured under now, where this job runs. ``payload``: config."""
    return {"identity": identity_here(target_of(payload["config"])).to_dict()}


def finalist_metrics(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Test metrics of a finished candidate, from its saved weights.

    ``payload``: config, architecture, directory, weights_sha256.
    """
    import torch

    from nas.latency import DeviceGate
    from nas.weights import load_weights

    config = payload["config"]
    task = task_of(config)
    device = torch.device(config["device"])
    torch.set_num_threads(training_threads(config))
    model = space_of(config).build(payload["architecture"], task.signature)
    load_weights(model, Path(payload["directory"]) / "weights.safetensors", sha256=payload["weights_sha256"])
    with DeviceGate(str(device)).shared():
        return {"metrics": task.evaluate(model.to(device), "test", device)}


def finalists_latency(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """The finalists measured together and compared with one of them, each with its identity and ``conditions``.

    ``payload``: config, scale, architectures (label -> architecture), reference (a label).
    """
    from nas.latency import Options, Plan, measure_together

    config, base = payload["config"], payload["reference"]
    task, target, space = task_of(config), target_of(config), space_of(config)
    models = {
        label: (
            space.build(architecture, task.signature),
            task.example_inputs(target.batch, target.torch_device()),
        )
        for label, architecture in payload["architectures"].items()
    }
    keys = {label: space.key(architecture) for label, architecture in payload["architectures"].items()}
    found = alone_on(
        target,
        lambda lease: measure_together(
            models,
            target,
            plan=Plan(max_seconds=min(30.0, 6.0 + 3.0 * len(models))),
            against=base,
            options=Options(scale=Path(payload["scale"]), keys=keys),
            lease=lease,
        ),
    )
    return {label: against(found, label, base) for label in models}
