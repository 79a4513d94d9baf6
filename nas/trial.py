"""What happens to one candidate, in the process that runs it: build, count, measure, train, evaluate, save.

Everything here is called by an executor with JSON in and JSON out, so that the same code serves a local process and
a node of a cluster.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nas.errors import TrialFailure, UserMistake
from nas.executors.ray_targets import split_ray_target
from nas.files import CorruptFile, read_record, write_record
from nas.trial_latency import measure_candidate, over_budget, predicted_over_budget
from nas.trial_parts import (
    checkpoint_of,
    count,
    drop_checkpoints,
    skeleton_of,
    space_of,
    target_of,
    task_of,
    training_threads,
)

if TYPE_CHECKING:
    from torch import nn

    from nas.tasks.base import Task

__all__ = [
    "Channel",
    "measure_trial",
    "provide",
    "run_trial",
]

_PROVIDED: dict[str, Callable[..., Mapping[str, float]]] = {}


class Channel(Protocol):
    """The way back to the driver while a job runs."""

    def event(self, message: dict[str, Any]) -> None:
        """Tell, without waiting."""

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Tell, and wait for the answer."""


def run_trial(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Evaluate one candidate; the result is also left, sealed, in ``payload["directory"]``.

    ``payload``: number, key, architecture, seed, directory, config (``SearchConfig.dump()``), objectives (pairs of
    name and direction), scale (file of the reference's long-run times), measured (work and latency of candidates so
    far), named (whether it is a given architecture). Returns the dict form of ``nas.study.TrialResult``, or
    ``{"mistake": text}`` for what concerns the whole run. Raises TrialFailure for what concerns this candidate alone.
    """
    started = time.perf_counter()
    config = payload["config"]
    if (saved := _saved(payload)) is not None:
        return saved
    try:
        result = (_call_function if ":" in config["evaluator"] else _evaluate_model)(payload, channel)
    except UserMistake as mistake:  # it concerns the whole run: nothing is recorded against this candidate
        return {"mistake": str(mistake)}
    result["seconds"] = time.perf_counter() - started
    result.setdefault("weights_sha256", None)
    if result["state"] == "complete":
        result["values"] = _objective_values(payload["objectives"], result)
    result = dict(_finite(result))
    write_record(Path(payload["directory"]) / "result.json", {**result, "key": payload["key"]})
    if ":" not in config["evaluator"]:  # what a user's function keeps there is its own business
        drop_checkpoints(Path(payload["directory"]))
    return result


def _saved(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of an attempt that was killed between writing it and telling the driver."""
    try:
        found = read_record(Path(payload["directory"]) / "result.json")
    except (OSError, CorruptFile):
        return None
    return found if found.pop("key", None) == payload["key"] else None


def _finite(value: Any) -> Any:
    """NaN and infinities outside the objectives become null: JSON has no form for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _objective_values(objectives: list[list[str]], result: Mapping[str, Any]) -> dict[str, float]:
    known = _known_metrics(result)
    values = {}
    for name, _ in objectives:
        value = known.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            numbers = sorted(key for key, found in known.items() if isinstance(found, (int, float)))
            raise TrialFailure(
                "error", f"objective {name!r} is not among the metrics: {', '.join(numbers) or 'none'}"
            )
        if not math.isfinite(value):
            raise TrialFailure("nan", f"objective {name} is {value}")
        values[name] = float(value)
    return values


def _known_metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    latency = result["latency"]
    return {**result["metrics"], **({"latency_ms": latency["median_ms"]} if latency else {})}


class _Curve:
    """The learning curve of one candidate, kept for the record while each point is told to the driver."""

    def __init__(self, channel: Channel):
        self.points: list[dict[str, Any]] = []
        self._channel = channel

    def report(self, epoch: int, epochs: int, quality: float, point: dict[str, Any]) -> bool:
        """Returns True when the driver wants the candidate to stop."""
        self.points.append({"epoch": epoch, "quality": quality, **point})
        message = {"stage": "report", "epoch": epoch, "epochs": epochs, "quality": quality, "point": point}
        return bool(self._channel.ask(message)["stop"])


# -- a user's own function ---------------------------------------------------------------------------------------------


def _call_function(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """``evaluator: module:function``; it takes the architecture and any of report, seed, directory by name."""
    function = _function(payload["config"]["evaluator"])
    curve = _Curve(channel)
    stopped = False
    sign = 1.0 if payload["objectives"][0][1] == "maximize" else -1.0

    def report(epoch: int, value: float) -> bool:
        """Tell an intermediate value of the first objective; True means: return now, this one is not promising."""
        nonlocal stopped
        stopped = curve.report(epoch, epoch, sign * value, {payload["objectives"][0][0]: value})
        return stopped

    channel.event({"stage": "begun"})
    offered = {"report": report, "seed": payload["seed"], "directory": payload["directory"]}
    accepted = inspect.signature(function).parameters
    metrics = _plain(
        function(payload["architecture"], **{name: offered[name] for name in offered if name in accepted})
    )
    result: dict[str, Any] = {"state": "complete", "metrics": metrics, "latency": None, "curve": curve.points}
    return _stopped(result, "not promising") if stopped else {**result, "failure": None}


def provide(name: str, function: Callable[..., Mapping[str, float]]) -> None:
    """Make a function of the running script known as an evaluator, for jobs that run in this very process."""
    _PROVIDED[name] = function


def _function(name: str) -> Callable[..., Mapping[str, float]]:
    from spaces.registry import load_object

    if name in _PROVIDED:
        return _PROVIDED[name]
    if name.startswith("script:"):
        raise UserMistake(f"evaluator {name!r} belongs to a script; run that script again to go on")
    found: Callable[..., Mapping[str, float]] = load_object(name)
    return found


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Scalars of numpy and torch as Python's own numbers."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}


def _stopped(result: dict[str, Any], reason: str, kind: str = "pruned") -> dict[str, Any]:
    return {**result, "state": "pruned", "failure": {"kind": kind, "reason": reason, "log_tail": ""}}


# -- a model -----------------------------------------------------------------------------------------------------------


def _evaluate_model(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    import torch

    from nas.evaluators import EVALUATORS, Context
    from nas.latency import DeviceGate
    from nas.weights import save_weights

    config = payload["config"]
    directory = Path(payload["directory"])
    device = torch.device(config["device"])
    gate = DeviceGate(str(device))
    result: dict[str, Any] = {
        "state": "complete",
        "metrics": {},
        "latency": None,
        "curve": [],
        "failure": None,
    }
    torch.set_num_threads(training_threads(config))
    with gate.shared():
        task = task_of(config)
        if over := _predicted(task, payload) if _measured_here(config) else None:
            return _stopped(result, over, "budget")
        torch.manual_seed(payload["seed"])
        model = space_of(config).build(payload["architecture"], task.signature)
        result["metrics"].update(count(model, task))
    channel.event({"stage": "counted", **result["metrics"]})
    if (over := _over_limits(config, result["metrics"])) is not None:
        return _stopped(result, over, "budget")
    latency = _latency(model, task, payload, channel)
    if isinstance(latency, str):
        return _stopped(result, latency, "budget")
    result["latency"] = latency
    channel.event({"stage": "measured", "latency": result["latency"]})
    if (over := over_budget(config["latency_budget"], result["latency"])) is not None:
        return _stopped(result, over, "budget")
    channel.event({"stage": "begun", **_known_metrics(result)})
    curve = _Curve(channel)
    with gate.shared():
        checkpoint = checkpoint_of(directory, payload["key"])
        context = Context(
            config, device, payload["seed"], directory, curve.report, gate.breathe, checkpoint=checkpoint
        )
        evaluate = EVALUATORS.get(config["evaluator"])
        evaluation = evaluate(model.to(device), payload["architecture"], task, context)
    result["metrics"].update(evaluation.metrics)
    result["curve"] = curve.points
    if evaluation.stopped_early:
        last = curve.points[-1]["epoch"]
        return _stopped(result, f"stopped after epoch {last}: worse than what is no slower")
    result["weights_sha256"] = save_weights(model, directory / "weights.safetensors")
    return result


def _measured_here(config: Mapping[str, Any]) -> bool:
    """Whether latency is that of the machine on which a candidate trains, and not of the target's own node."""
    return split_ray_target(config["target"])[0] is None


def _predicted(task: Task, payload: Mapping[str, Any]) -> str | None:
    return predicted_over_budget(skeleton_of(payload["config"], task, payload["architecture"]), task, payload)


def _latency(
    model: nn.Module, task: Task, payload: Mapping[str, Any], channel: Channel
) -> dict[str, Any] | str:
    """Measured here, or by the driver's asking on the node that carries the target; a text: why it was not."""
    config = payload["config"]
    if _measured_here(config):
        return measure_candidate(model, task, target_of(config), payload)
    answer = channel.ask({"stage": "measure"})
    if "mistake" in answer:
        raise UserMistake(answer["mistake"])
    if "failed" in answer:
        raise TrialFailure(*answer["failed"])
    latency: dict[str, Any] | str = answer.get("over") or answer["latency"]
    return latency


def measure_trial(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """The latency of one candidate, for the node that carries the target. ``payload`` as for ``run_trial``.

    Predicted here, too, because a prediction holds for the conditions of this node and not of the one that trains:
    ``{"over": text}`` where that is enough to discard the candidate.
    """
    from nas.latency import DeviceGate

    config = payload["config"]
    try:
        task = task_of(config)
        with DeviceGate(str(target_of(config).torch_device())).shared():
            over = _predicted(task, payload)
        if over is not None:
            return {"over": over}
        model = space_of(config).build(payload["architecture"], task.signature)
        return {"latency": measure_candidate(model, task, target_of(config), payload)}
    except UserMistake as mistake:
        return {"mistake": str(mistake)}


def _over_limits(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str | None:
    for name in ("params", "macs"):
        budget = config[f"{name}_budget"]
        if budget is not None and metrics[name] > budget:
            return f"{metrics[name]:,} {name} exceed the budget of {budget:,}"
    return None
