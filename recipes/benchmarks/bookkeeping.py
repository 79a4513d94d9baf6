"""What does it cost to remember a candidate durably? Time per trial, and time to open a study of 2,000 trials.

    python -m recipes.benchmarks.bookkeeping --out recipes/results/bookkeeping.json

A space of 44 parameters; every trial is suggested and recorded as a driver does it, with the result file that the
candidate's process leaves in between (its writing is that process's time and is shown apart). ``growth`` compares
the last hundred trials with the first hundred. ``flush_ms`` is what one fsync takes on this disk: a suggestion needs
three of them (one for the database, two for its file), a result one with SQLite and two with a journal.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nas.environment import describe_environment
from nas.files import atomic_write_json
from nas.pareto import Direction
from nas.run_directory import RunDirectory
from nas.study import StoredTrial, Study, TrialResult
from spaces import Choice, Float, Int, SearchSpace

__all__ = ["SPACE", "main"]

OBJECTIVES: list[tuple[str, Direction]] = [("accuracy", "maximize"), ("latency_ms", "minimize")]
SPACE = SearchSpace(
    "bookkeeping",
    {
        **{f"layer{index}.kind": Choice(["softmax", "linear", "conv", "none"]) for index in range(20)},
        **{f"layer{index}.width": Int(16, 256, step=16) for index in range(20)},
        **{f"rate{index}": Float(1e-4, 1e-1, log=True) for index in range(4)},
    },
)


def result_of(number: int) -> TrialResult:
    """A result as a trained candidate has it: metrics, a latency with its interval, a curve of ten epochs."""
    values = {"accuracy": 0.9 + number * 1e-6, "latency_ms": 1.0 + number * 1e-4}
    metrics = {"params": 123456 + number, "macs": 7654321, "accuracy": values["accuracy"], "loss": 0.31}
    latency = {
        "median_ms": values["latency_ms"],
        "low_ms": 0.9,
        "high_ms": 1.2,
        "samples": 120,
        "precise": True,
    }
    curve = [{"epoch": epoch, "quality": 0.1 * epoch, "train_loss": 1.0 / epoch} for epoch in range(1, 11)]
    digest = "0" * 64
    return TrialResult("complete", values, metrics, latency, curve, 12.5, None, digest)


def timed(call: Callable[[], Any], into: list[float]) -> Any:
    """The value of ``call``; its milliseconds are appended to ``into``."""
    began = time.perf_counter()
    value = call()
    into.append((time.perf_counter() - began) * 1e3)
    return value


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile in milliseconds."""
    ordered = sorted(values)
    return {
        "median_ms": round(statistics.median(ordered), 2),
        "p95_ms": round(ordered[int(len(ordered) * 0.95)], 2),
    }


def measure(folder: Path, storage: str, trials: int) -> dict[str, Any]:
    """Costs of ``trials`` trials in a new run below ``folder``, and of opening it again."""
    run = RunDirectory(folder / "run")
    run.acquire()
    config = {"storage": f"journal:{folder / 'journal'}" if storage == "journal" else None}
    study = Study.create(run, SPACE, OBJECTIVES, config)
    rng = random.Random(0)
    suggest: list[float] = []
    record: list[float] = []
    candidate: list[float] = []
    used = time.process_time()
    for number in range(trials):
        architecture = SPACE.sample(rng)
        trial: StoredTrial = timed(lambda: study.suggest(architecture, seed=number), suggest)  # noqa: B023
        result = result_of(number)
        timed(lambda: study._records.write_result(trial, result), candidate)  # noqa: B023
        timed(lambda: study.record(trial, result), record)  # noqa: B023
    used = time.process_time() - used
    run.release()
    total = [a + b for a, b in zip(suggest, record, strict=True)]
    growth = statistics.median(total[-100:]) / statistics.median(total[:100])
    opening: list[float] = []
    reading: list[float] = []
    for _ in range(3):
        run = RunDirectory(folder / "run")
        run.acquire()
        found, lines = timed(lambda: Study.open(run, SPACE, OBJECTIVES, config), opening)  # noqa: B023
        assert len(found.trials()) == trials
        assert lines == []
        run.release()
        timed(lambda: Study.read(run, SPACE, OBJECTIVES, config), reading)  # noqa: B023
    return {
        "trials": trials,
        "per_trial": spread(total),
        "suggest": spread(suggest),
        "record": spread(record),
        "result_file_written_by_the_candidate": spread(candidate),
        "cpu_ms_per_trial": round(used * 1e3 / trials, 2),
        "growth": round(growth, 2),
        "open_seconds": round(statistics.median(opening) / 1e3, 2),
        "read_seconds": round(statistics.median(reading) / 1e3, 2),
    }


def flush_ms(folder: Path) -> float:
    """Median milliseconds of one fsync after a small write."""
    times: list[float] = []
    with open(folder / "flush", "wb", buffering=0) as file:
        for _ in range(50):
            file.write(b"x" * 200)
            timed(lambda: os.fsync(file.fileno()), times)
    return round(statistics.median(times), 2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    given = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    found: dict[str, Any] = {}
    for storage in ("sqlite", "journal"):
        folder = Path(tempfile.mkdtemp(prefix="nas-bookkeeping-", dir=given.folder))
        try:
            found[storage] = {"flush_ms": flush_ms(folder), **measure(folder, storage, given.trials)}
        finally:
            shutil.rmtree(folder)
        each = found[storage]
        print(
            f"{storage}: {each['per_trial']['median_ms']} ms per trial (95 %: {each['per_trial']['p95_ms']} ms), "
            f"growth {each['growth']}, opened in {each['open_seconds']} s"
        )
    if given.out is not None:
        document = {
            "command": f"python -m recipes.benchmarks.bookkeeping --trials {given.trials}",
            "parameters": len(SPACE.parameters),
            "load_average_before": round(load_before, 2),
            **found,
            "environment": describe_environment(),
        }
        atomic_write_json(given.out, document)


if __name__ == "__main__":
    main()
