"""What happens to one candidate, in the process that runs it: build, count, measure, train, evaluate, save.

Everything here is called by an executor with JSON in and JSON out, so that the same code serves a local process and
a node of a cluster.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nas.environment import usable_cpus
from nas.errors import TrialFailure, UserMistake, nearest
from nas.export import describe_signature
from nas.files import CorruptFile, read_record, write_record
from nas.trial_latency import against, alone_on, measure_candidate, over_budget, predicted_over_budget

if TYPE_CHECKING:
    from torch import nn

    from nas.latency import Target
    from nas.tasks.base import Task
    from spaces import Architecture, SearchSpace

__all__ = ["Channel", "finalist_metrics", "finalists_latency", "probe", "provide", "run_trial"]

_SPACES: dict[tuple[str, str | None], SearchSpace] = {}
_TASKS: dict[str, Task] = {}
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
    torch.set_num_threads(_training_threads(config))
    with gate.shared():
        task = _task(config)
        if over := predicted_over_budget(_skeleton(config, task, payload["architecture"]), task, payload):
            return _stopped(result, over, "budget")
        torch.manual_seed(payload["seed"])
        model = _space(config).build(payload["architecture"], task.signature)
        result["metrics"].update(_count(model, task))
    channel.event({"stage": "counted", **result["metrics"]})
    if (over := _over_limits(config, result["metrics"])) is not None:
        return _stopped(result, over, "budget")
    result["latency"] = measure_candidate(model, task, _target(config), payload)
    channel.event({"stage": "measured", "latency": result["latency"]})
    if (over := over_budget(config["latency_budget"], result["latency"])) is not None:
        return _stopped(result, over, "budget")
    channel.event({"stage": "begun", **_known_metrics(result)})
    curve = _Curve(channel)
    with gate.shared():
        context = Context(config, device, payload["seed"], directory, curve.report, gate.breathe)
        evaluate = EVALUATORS.get(config["evaluator"])
        evaluation = evaluate(model.to(device), payload["architecture"], task, context)
    result["metrics"].update(evaluation.metrics)
    result["curve"] = curve.points
    if evaluation.stopped_early:
        return _stopped(result, f"stopped after epoch {len(curve.points)}: worse than what is no slower")
    result["weights_sha256"] = save_weights(model, directory / "weights.safetensors")
    return result


def _training_threads(config: Mapping[str, Any]) -> int:
    """Cores shared evenly among the workers, at least one each."""
    return max(1, usable_cpus() // int(config["workers"]))


def _count(model: Any, task: Task) -> dict[str, Any]:
    import torch

    from nas.profile import profile

    counted = profile(model, task.example_inputs(1, torch.device("cpu")))
    return {"params": counted.params, "macs": counted.macs, "macs_uncounted": list(counted.uncounted)}


def _over_limits(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str | None:
    for name in ("params", "macs"):
        budget = config[f"{name}_budget"]
        if budget is not None and metrics[name] > budget:
            return f"{metrics[name]:,} {name} exceed the budget of {budget:,}"
    return None


# -- before and after the search ---------------------------------------------------------------------------------------


def probe(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """What a space is on this task and target: facts of the task, and the size of three of its architectures.

    ``payload``: config, architectures, of which those with the fewest, the median and the most parameters are
    counted and measured. A user's mistake comes back as ``{"mistake": text}``, because it concerns the whole run.
    """
    config = payload["config"]
    try:
        task = _task(config)
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
    return sum(parameter.numel() for parameter in _skeleton(config, task, architecture).parameters())


def _skeleton(config: Mapping[str, Any], task: Task, architecture: Architecture) -> nn.Module:
    """The model without data: shapes only, made in no time."""
    import torch

    with torch.device("meta"):
        return _space(config).build(architecture, task.signature)


def _probe_candidate(payload: Mapping[str, Any], task: Task, architecture: Architecture) -> dict[str, Any]:
    model = _space(payload["config"]).build(architecture, task.signature)
    target = _target(payload["config"])
    latency = measure_candidate(model, task, target, payload, seconds=0.7)
    return {"architecture": architecture, **_count(model.cpu(), task), "latency": latency}


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


def finalist_metrics(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Test metrics of a finished candidate, from its saved weights.

    ``payload``: config, architecture, directory, weights_sha256.
    """
    import torch

    from nas.latency import DeviceGate
    from nas.weights import load_weights

    config = payload["config"]
    task = _task(config)
    device = torch.device(config["device"])
    torch.set_num_threads(_training_threads(config))
    model = _space(config).build(payload["architecture"], task.signature)
    load_weights(model, Path(payload["directory"]) / "weights.safetensors", sha256=payload["weights_sha256"])
    with DeviceGate(str(device)).shared():
        return {"metrics": task.evaluate(model.to(device), "test", device)}


def finalists_latency(payload: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """The finalists measured together and compared with one of them.

    ``payload``: config, scale, architectures (label -> architecture), reference (a label).
    """
    from nas.latency import Options, Plan, measure_together

    config, base = payload["config"], payload["reference"]
    task, target, space = _task(config), _target(config), _space(config)
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
            plan=Plan(max_seconds=30.0),
            against=base,
            options=Options(scale=Path(payload["scale"]), keys=keys),
            lease=lease,
        ),
    )
    return {label: against(found, label, base) for label in models}


# -- made once in each process -----------------------------------------------------------------------------------------


def _space(config: Mapping[str, Any]) -> SearchSpace:
    from spaces import get_space

    name = (config["space"], config["task"])
    if name not in _SPACES:
        _SPACES[name] = get_space(config["space"], task=config["task"])
    return _SPACES[name]


def _task(config: Mapping[str, Any]) -> Task:
    from nas.tasks import make_task

    name = config["task"] or _space(config).task
    if name is None:
        raise UserMistake(
            f"--task: the space {config['space']!r} has no task of its own; name one, or give --evaluator"
        )
    options = dict(config["task_options"])
    if config["data"] is not None:
        options["data"] = config["data"]
    text = json.dumps([name, options], sort_keys=True)
    if text not in _TASKS:
        _TASKS.clear()  # one data set in memory at a time
        _TASKS[text] = make_task(name, **options)
    return _TASKS[text]


def _target(config: Mapping[str, Any]) -> Target:
    from nas.latency import Target

    return Target.parse(config["target"])
