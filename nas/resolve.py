"""From what a user asked for to a configuration in which nothing is left open."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.config import SearchConfig
from nas.environment import usable_cpus
from nas.errors import UserMistake
from nas.executors.ray_targets import split_ray_target
from nas.storage import local_file

if TYPE_CHECKING:
    from nas.pareto import Direction
    from spaces import SearchSpace

__all__ = ["CHANGEABLE", "changed_keys", "objectives_of", "openmp_settings", "resolve"]

CHANGEABLE = frozenset(
    {
        "trials",
        "time_budget",
        "workers",
        "trial_timeout",
        "memory_limit",
        "retries",
        "keep_weights",
        "ray",
        "cpus_per_trial",
        "gpus_per_trial",
        "ray_runtime_env",
    }
)
"""Keys that may differ when a run is resumed, because they do not change what a result means."""

MAX_AUTOMATIC_WORKERS = 4


def openmp_settings(config: SearchConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a resolved configuration's workers, beside those of ``environment``.

    Threads that spin while they wait make a training twenty times slower as soon as somebody else works on one of
    their cores (measured: an epoch of 1.0 s with one thread took 19.9 s with two, and 1.3 s when they wait asleep). So
    they wait asleep, unless the user has chosen, or latency is measured on several threads: those of a deployed model
    would spin.
    """
    from nas.latency.target import Target

    if config.ray is not None:
        threads = max(1, int(config.cpus_per_trial))
    else:
        threads = max(1, usable_cpus() // (config.workers or 1))
    settings = {"OMP_NUM_THREADS": str(threads)}
    target = Target.parse(split_ray_target(config.target or "cpu:1")[1])
    measured_on_several = target.device == "cpu" and target.cpu_threads() > 1
    if not measured_on_several and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        settings["OMP_WAIT_POLICY"] = "PASSIVE"
    return settings


def resolve(config: SearchConfig) -> SearchConfig:
    """Fill in the target and the workers, make paths absolute, and check the device and the target.

    On a cluster the devices are those of its nodes, which are not checked from here, and ``workers`` may stay open
    until its room is known. Raises UserMistake when a device or target does not exist here.
    """
    from nas.latency.target import Target

    changes: dict[str, Any] = {}
    device = Target.parse(config.device) if config.device.startswith("cuda") else None
    if device is not None and device.device == config.device:
        if config.ray is None:
            device.check()
        elif not config.gpus_per_trial:
            changes["gpus_per_trial"] = 1.0
    elif config.device != "cpu":
        raise UserMistake(f"--device {config.device}: must be cpu, cuda or cuda:N; see 'nas doctor'")
    resource, text = split_ray_target(config.target or "")
    target = Target.parse(text or ("cpu:1" if config.device == "cpu" else config.device))
    if target.size is not None:
        raise UserMistake(
            f"--target {config.target}: a search measures with the task's own inputs; leave /{target.size} out"
        )
    if config.ray is None:
        if resource is not None:
            raise UserMistake(f"--target {config.target}: needs a cluster; give --ray ADDRESS as well")
        target.check()
        changes["workers"] = config.workers or _automatic_workers(config)
    changes["target"] = str(target) if resource is None else f"ray:{resource}/{target}"
    changes["ray_runtime_env"] = _absolute_folder(config.ray_runtime_env)
    for key in ("space", "evaluator", "data"):
        changes[key] = _absolute(getattr(config, key))
    changes["storage"] = resolved_storage(config.storage)
    if ":" in config.evaluator and config.objectives is None:
        raise UserMistake(
            f"--evaluator {config.evaluator}: name what it returns, such as --objective score:maximize"
        )
    return SearchConfig.parse({**config.dump(), **changes})


def _automatic_workers(config: SearchConfig) -> int:
    if config.device != "cpu":
        return 1
    return min(MAX_AUTOMATIC_WORKERS, usable_cpus())


def _absolute(text: str | None) -> str | None:
    """Paths are written down absolute, so that a run can be resumed from any directory."""
    if text is None:
        return None
    path, separator, attribute = text.rpartition(":") if ".py:" in text else (text, "", "")
    if not os.path.exists(path):
        return text
    return f"{Path(path).resolve()}{separator}{attribute}"


def _absolute_folder(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    folder = (runtime_env or {}).get("working_dir")
    if runtime_env is None or not isinstance(folder, str) or not os.path.isdir(folder):
        return runtime_env
    return {**runtime_env, "working_dir": os.path.abspath(folder)}


def resolved_storage(url: str | None) -> str | None:
    """The URL with the path of its file, if it has one, absolute."""
    path = local_file(url) if url is not None else None
    if url is None or path is None:
        return url
    return url[: url.index(":")] + (":" if url.startswith("journal:") else ":///") + str(path.resolve())


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
        if key == "storage":
            new = resolved_storage(new)
        if key == "target" and new is not None:
            from nas.latency.target import Target

            resource, text = split_ray_target(new)
            new = str(Target.parse(text)) if resource is None else f"ray:{resource}/{Target.parse(text)}"
        if new is not None and new != old and key not in CHANGEABLE:
            changes.append(f"{key}: {old} -> {new}")
    return changes


def probe_architectures(space: SearchSpace, seed: int) -> list[dict[str, Any]]:
    """Architectures to size a space by: its two corners where they are allowed, published variants, samples."""
    import random

    from spaces import ArchitectureError

    rng = random.Random(f"probe:{seed}")
    found = [*space.published.values(), *(space.sample(rng) for _ in range(9))]
    for low in (True, False):
        with contextlib.suppress(ArchitectureError):  # a constraint excludes the corner
            found.append(_corner(space, low=low))
    return found


def _corner(space: SearchSpace, *, low: bool) -> dict[str, Any]:
    from spaces import Choice, Float, Int

    architecture: dict[str, Any] = {}
    for name, parameter in space.parameters.items():
        if isinstance(parameter, (Int, Float)):
            architecture[name] = parameter.low if low else parameter.high
        elif isinstance(parameter, Choice) and (
            numbers := [v for v in parameter.values if type(v) in (int, float)]
        ):
            architecture[name] = min(numbers) if low else max(numbers)  # type: ignore[type-var]  # just filtered
        else:
            architecture[name] = parameter.default
    return space.canonical(architecture)
