"""What every job about candidates needs, made once in each process: space, task, target, counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.environment import usable_cpus
from nas.errors import UserMistake
from nas.executors.ray_targets import split_ray_target

if TYPE_CHECKING:
    from torch import nn

    from nas.latency import Target
    from nas.tasks.base import Task
    from spaces import Architecture, SearchSpace

__all__ = [
    "checkpoint_of",
    "count",
    "drop_checkpoints",
    "skeleton_of",
    "space_of",
    "target_of",
    "task_of",
    "training_threads",
]

_CHECKPOINTS = "checkpoint"


_SPACES: dict[tuple[str, str | None], SearchSpace] = {}
_TASKS: dict[str, Task] = {}


def training_threads(config: Mapping[str, Any]) -> int:
    """Cores shared evenly among the workers, at least one each; on a cluster those reserved for a trial."""
    if config["ray"]:
        return max(1, int(config["cpus_per_trial"]))
    return max(1, usable_cpus() // int(config["workers"]))


def checkpoint_of(directory: Path, key: str) -> Path:
    """Where the training of the candidate ``key`` keeps its state until its trial, in ``directory``, is finished.

    By key, because a damaged study may give a trial's number, and with it its directory, to another architecture.
    """
    return directory / _CHECKPOINTS / key


def drop_checkpoints(directory: Path) -> None:
    """Remove what ``checkpoint_of`` names; nothing goes on from it any more."""
    shutil.rmtree(directory / _CHECKPOINTS, ignore_errors=True)


def count(model: Any, task: Task) -> dict[str, Any]:
    import torch

    from nas.profile import profile

    counted = profile(model, task.example_inputs(1, torch.device("cpu")))
    return {"params": counted.params, "macs": counted.macs, "macs_uncounted": list(counted.uncounted)}


def skeleton_of(config: Mapping[str, Any], task: Task, architecture: Architecture) -> nn.Module:
    """The model without data: shapes only, made in no time."""
    import torch

    with torch.device("meta"):
        return space_of(config).build(architecture, task.signature)


def space_of(config: Mapping[str, Any]) -> SearchSpace:
    from spaces import get_space

    name = (config["space"], config["task"])
    if name not in _SPACES:
        _SPACES[name] = get_space(config["space"], task=config["task"])
    return _SPACES[name]


def task_of(config: Mapping[str, Any]) -> Task:
    from nas.tasks import make_task

    name = config["task"] or space_of(config).task
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


def target_of(config: Mapping[str, Any]) -> Target:
    from nas.latency import Target

    return Target.parse(split_ray_target(config["target"])[1])
