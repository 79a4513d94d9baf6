"""What does one proposal cost? Time of ask and tell on a space of 40 four-way choices after 1,000 tells.

    python -m recipes.benchmarks.controllers_overhead --out recipes/results/controllers_overhead.json

Each controller is told 1,000 random architectures with two objectives; then it is asked and told 1,000 times more,
so that its history grows to 2,000. The time of the objectives themselves is not counted. One process, one thread.
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
    """Milliseconds per ask and tell of one controller: median, mean, 95th percentile, maximum."""
    space = SearchSpace("forty", {f"choice{i}": Choice(VALUES) for i in range(40)})
    controller = make_controller(name, space, ["maximize", "minimize"], seed)
    rng = random.Random(seed)
    for _ in range(told):
        architecture = space.sample(rng)
        controller.tell(architecture, objectives(architecture))
    times_ms = []
    for _ in range(measured):
        began = time.perf_counter()
        architecture = controller.ask()
        asked = time.perf_counter()
        outcome = objectives(architecture)
        evaluated = time.perf_counter()
        controller.tell(architecture, outcome)
        times_ms.append(1e3 * (time.perf_counter() - evaluated + asked - began))
    return {
        "median_ms": statistics.median(times_ms),
        "mean_ms": statistics.fmean(times_ms),
        "p95_ms": float(np.quantile(times_ms, 0.95)),
        "max_ms": max(times_ms),
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
    for name in chosen.only or list_controllers():
        result = measure_controller(name)
        target = TARGETS_MS.get(name)
        results[name] = {**result, "target_mean_ms": target}
        print(
            f"{name:14s}"
            + "".join(f"  {key} {value:8.3f}" for key, value in result.items())
            + f"  target {target}"
        )
    record = {
        "command": "python -m recipes.benchmarks.controllers_overhead --out recipes/results/controllers_overhead.json",
        "what": f"one ask and tell, two objectives, 40 four-way choices, {MEASURED} calls after {TOLD} tells, one core",
        "environment": describe_environment(),
        "results": results,
    }
    atomic_write_json(chosen.out, record)


if __name__ == "__main__":
    main()
