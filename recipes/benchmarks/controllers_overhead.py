"""What does one proposal cost? Time of ask and tell on a space of 40 four-way choices after 1,000 tells.

    python -m recipes.benchmarks.controllers_overhead --out recipes/results/controllers_overhead.json

Each controller is told 1,000 random architectures with two objectives; then it is asked and told 1,000 times more,
so that its history grows to 2,000. The time of the objectives themselves is not counted. One process, one thread.
Where the machine is shared, the clock also counts the waiting for a core; processor time does not.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nas.controllers import list_controllers, make_controller
from nas.environment import describe_environment
from nas.files import atomic_write_json
from spaces import Choice, SearchSpace

__all__ = ["main", "measure_controller"]

TOLD = 1000
MEASURED = 1000
TARGETS_MS = {"random": 1.0, "evolution": 1.0, "local_search": 1.0, "nsga2": 5.0, "tpe": 30.0}
"""Mean milliseconds per ask and tell that were asked for."""

VALUES = ("a", "b", "c", "d")


def objectives(architecture: Mapping[str, Any]) -> tuple[float, float]:
    """Two objectives in conflict: "d" is best for the first, "a" for the second, and neighbours interact."""
    codes = [VALUES.index(value) for value in architecture.values()]
    gain = sum(code + 0.5 * (code == after) for code, after in pairwise(codes))
    return gain, float(sum(code * code for code in codes))


def measure_controller(
    name: str, *, told: int = TOLD, measured: int = MEASURED, seed: int = 0
) -> dict[str, Any]:
    """Milliseconds per ask and tell of one controller: of its thread's processor time, and on the clock."""
    space = SearchSpace("forty", {f"choice{i}": Choice(VALUES) for i in range(40)})
    controller = make_controller(name, space, ["maximize", "minimize"], seed)
    rng = random.Random(seed)
    for _ in range(told):
        architecture = space.sample(rng)
        controller.tell(architecture, objectives(architecture))
    wall_ms, cpu_ms = [], []
    for _ in range(measured):
        began, used = time.perf_counter(), time.thread_time()
        architecture = controller.ask()
        asked, used_by_ask = time.perf_counter() - began, time.thread_time() - used
        outcome = objectives(architecture)
        began, used = time.perf_counter(), time.thread_time()
        controller.tell(architecture, outcome)
        wall_ms.append(1e3 * (asked + time.perf_counter() - began))
        cpu_ms.append(1e3 * (used_by_ask + time.thread_time() - used))
    return {"cpu_ms": statistic(cpu_ms), "wall_ms": statistic(wall_ms)}


def statistic(times: Sequence[float]) -> dict[str, float]:
    """Median, mean, 95th percentile and maximum."""
    return {
        "median": statistics.median(times),
        "mean": statistics.fmean(times),
        "p95": float(np.quantile(times, 0.95)),
        "max": max(times),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every controller and writes the times beside the targets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="*", help="names of controllers; all if not given")
    chosen = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = {}
    # NNI's tuners need an extra, and are measured when they are named.
    for name in chosen.only or [name for name in list_controllers() if not name.startswith("nni:")]:
        result = measure_controller(name)
        target = TARGETS_MS.get(name)
        results[name] = {**result, "target_mean_ms": target}
        for clock, times in result.items():
            row = "".join(f"  {key} {value:8.3f}" for key, value in times.items())
            print(f"{name:14s}{clock:8s}{row}  target of the mean {target}")
    record = {
        "command": "python -m recipes.benchmarks.controllers_overhead --out recipes/results/controllers_overhead.json",
        "what": f"one ask and tell, two objectives, 40 four-way choices, {MEASURED} calls after {TOLD} tells, one core",
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "environment": describe_environment(),
        "results": results,
    }
    atomic_write_json(chosen.out, record)


if __name__ == "__main__":
    main()
