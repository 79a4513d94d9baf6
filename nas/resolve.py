"""From what a user asked for to a configuration in which nothing is left open."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.config import SearchConfig
from nas.errors import UserMistake

if TYPE_CHECKING:
    from nas.pareto import Direction
    from spaces import SearchSpace

__all__ = ["CHANGEABLE", "changed_keys", "objectives_of", "resolve"]

CHANGEABLE = frozenset(
    {"trials", "time_budget", "workers", "trial_timeout", "memory_limit", "retries", "keep_weights"}
)
"""Keys that may differ when a run is resumed, because they do not change what a result means."""

MAX_AUTOMATIC_WORKERS = 4


def resolve(config: SearchConfig) -> SearchConfig:
    """Fill in the target, the workers and the memory limit, and check the device and the target.

    Raises UserMistake when a device or target does not exist here.
    """
    from nas.latency.target import Target

    changes: dict[str, Any] = {}
    if config.device.startswith("cuda"):
        Target.parse(config.device).check()
    elif config.device != "cpu":
        raise UserMistake(f"--device {config.device}: must be cpu, cuda or cuda:N; see 'nas doctor'")
    target = Target.parse(config.target or ("cpu:1" if config.device == "cpu" else config.device))
    target.check()
    changes["target"] = str(target)
    workers = config.workers or _automatic_workers(config)
    changes["workers"] = workers
    if config.memory_limit is None:
        import psutil

        changes["memory_limit"] = int(psutil.virtual_memory().total * 0.8 / workers)
    for key in ("space", "evaluator", "data"):
        changes[key] = _absolute(getattr(config, key))
    if ":" in config.evaluator and config.objectives is None:
        raise UserMistake(
            f"--evaluator {config.evaluator}: name what it returns, such as --objective score:maximize"
        )
    return SearchConfig.parse({**config.dump(), **changes})


def _automatic_workers(config: SearchConfig) -> int:
    if config.device != "cpu":
        return 1
    return max(1, min(MAX_AUTOMATIC_WORKERS, os.cpu_count() or 1))


def _absolute(text: str | None) -> str | None:
    """Paths are written down absolute, so that a run can be resumed from any directory."""
    if text is None:
        return None
    path, separator, attribute = text.rpartition(":") if ".py:" in text else (text, "", "")
    if not os.path.exists(path) or (separator == "" and os.sep not in path and not path.startswith(".")):
        return text
    return f"{Path(path).resolve()}{separator}{attribute}"


def objectives_of(config: SearchConfig, task_objective: list[str] | None) -> list[tuple[str, Direction]]:
    """The objectives of a run: those configured, or the task's own and the latency."""
    if config.objectives is not None:
        pairs = [text.partition(":") for text in config.objectives]
        return [(name, "maximize" if direction == "maximize" else "minimize") for name, _, direction in pairs]
    assert task_objective is not None  # a run without a task names its objectives: resolve() has checked
    direction: Direction = "maximize" if task_objective[1] == "maximize" else "minimize"
    return [(task_objective[0], direction), ("latency_ms", "minimize")]


def changed_keys(given: Mapping[str, Any], recorded: SearchConfig) -> list[str]:
    """What a resumed run's command asks for differently, as ``key: recorded -> given``, CHANGEABLE keys left out."""
    asked = SearchConfig.parse({**recorded.dump(), **given}).dump()
    changes = []
    for key in given:
        old, new = recorded.dump()[key], asked[key]
        if key in ("space", "evaluator", "data"):
            new = _absolute(new)
        if key == "target" and new is not None:
            from nas.latency.target import Target

            new = str(Target.parse(new))
        if new is not None and new != old and key not in CHANGEABLE:
            changes.append(f"{key}: {old} -> {new}")
    return changes


def probe_architectures(space: SearchSpace, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Architectures to size a space by: all numbers at their low end, some samples, all numbers at their high end."""
    import random

    rng = random.Random(f"probe:{seed}")
    found = {"smallest": [_corner(space, low=True)], "typical": [space.sample(rng) for _ in range(9)]}
    return {**found, "largest": [_corner(space, low=False)]}


def _corner(space: SearchSpace, *, low: bool) -> dict[str, Any]:
    from spaces import Choice, Float, Int

    architecture: dict[str, Any] = {}
    for name, parameter in space.parameters.items():
        if isinstance(parameter, (Int, Float)):
            architecture[name] = parameter.low if low else parameter.high
        elif isinstance(parameter, Choice) and (numbers := [v for v in parameter.values if type(v) in (int, float)]):
            architecture[name] = min(numbers) if low else max(numbers)  # type: ignore[type-var]  # just filtered
        else:
            architecture[name] = parameter.default
    return space.canonical(architecture)
