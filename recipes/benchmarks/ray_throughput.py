"""What does the distribution cost? Simulated candidates through the Ray executor, and through Ray Tune with Optuna.

    python -m recipes.benchmarks.ray_throughput --out recipes/results/ray_throughput.json

Every case runs in a process and a local Ray of its own, whose processors are faked: candidates sleep, so that what is
measured is bookkeeping. Both sides ask Optuna's TPE for each candidate of the same space and tell it the score;
the case without a controller asks nobody. The clock starts when all workers are up (ours), or when as many
candidates have ended as there are workers (Ray Tune, whose actors start with its first trials, which then do not
count), so that neither pays for the start.

Per case: the time on the clock, its ratio to the ideal, the processor time of the driver per candidate (all its
threads), and the memory of the driver, sampled every second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import psutil

from nas.environment import describe_environment
from nas.files import atomic_write_json
from spaces import Choice, SearchSpace

__all__ = ["main", "sleep"]

VALUES = ("a", "b", "c", "d")
NAMES = tuple(f"choice{index}" for index in range(12))
SPACE = SearchSpace("twelve", {name: Choice(VALUES) for name in NAMES})
STORE = 100 << 20
CASE_SECONDS = 1200.0


def sleep(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
    """A candidate: takes its time, and has a score."""
    time.sleep(payload["seconds"])
    return {"score": score(payload["architecture"])}


def score(architecture: dict[str, Any]) -> float:
    """The more "d", the better."""
    return float(sum(VALUES.index(value) for value in architecture.values()))


class Watch:
    """Memory of this process every second, and its processor time."""

    def __init__(self) -> None:
        self.memory_mb: list[float] = []
        self._ended = threading.Event()
        self._process = psutil.Process()
        self._cpu = time.process_time()
        self._began = time.perf_counter()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.memory_mb.append(round(self._process.memory_info().rss / 2**20, 1))
            if self._ended.wait(1.0):
                return

    def result(self, candidates: int, workers: int, seconds: float) -> dict[str, Any]:
        """Figures of the case that ends now."""
        wall = time.perf_counter() - self._began
        cpu = time.process_time() - self._cpu
        self._ended.set()
        ideal = math.ceil(candidates / workers) * seconds
        half = self.memory_mb[len(self.memory_mb) // 2 :]
        return {
            "candidates": candidates,
            "workers": workers,
            "seconds_each": seconds,
            "wall_seconds": round(wall, 3),
            "ideal_seconds": ideal,
            "efficiency": round(ideal / wall, 4) if seconds else None,
            "wall_ms_per_candidate": round(1000 * wall / candidates, 3),
            "driver_cpu_ms_per_candidate": round(1000 * cpu / candidates, 3),
            "driver_memory_mb": self.memory_mb[:: max(1, len(self.memory_mb) // 60)],
            "driver_memory_grown_mb_in_second_half": round(half[-1] - half[0], 1),
        }


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(candidates: int, workers: int, seconds: float, controller: str | None) -> dict[str, Any]:
    """The executor, fed one candidate for each that ends; ``controller`` None: all of one architecture."""
    from nas.controllers import make_controller
    from nas.executors import RayExecutor

    asked = make_controller(controller, SPACE, ["maximize"], 0) if controller else None
    fixed: dict[str, Any] = dict.fromkeys(NAMES, "a")
    began = time.perf_counter()
    options = {"num_cpus": workers, "object_store_memory": STORE}
    with RayExecutor(workers, address="local", local_options=options) as executor:
        while executor.capacity < workers:
            time.sleep(0.1)
        first = [_submit(executor, fixed, 0.0) for _ in range(workers)]
        wait(first)
        started = time.perf_counter() - began
        watch = Watch()
        running: dict[Future[Any], dict[str, Any]] = {}
        left = candidates
        while left or running:
            while left and len(running) < workers:
                architecture = asked.ask() if asked else fixed
                running[_submit(executor, architecture, seconds)] = architecture
                left -= 1
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                outcome, architecture = future.result(), running.pop(future)
                if outcome.value is None:
                    raise RuntimeError(str(outcome.failure))
                if asked:
                    asked.tell(architecture, [outcome.value["score"]])
        return {**watch.result(candidates, workers, seconds), "start_seconds": round(started, 2)}


def _submit(executor: Any, architecture: dict[str, Any], seconds: float) -> Future[Any]:
    payload = {"architecture": architecture, "seconds": seconds}
    found: Future[Any] = executor.submit(f"{__file__}:sleep", payload)
    return found


# -- Ray Tune ----------------------------------------------------------------------------------------------------------


def tune(candidates: int, workers: int, seconds: float, controller: str | None) -> dict[str, Any]:
    """Ray Tune with OptunaSearch (TPE), its actors reused; without a controller, its own random search."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    import ray
    from ray import tune as library
    from ray.tune.search.optuna import OptunaSearch

    ray.init(
        num_cpus=workers,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )

    def trainable(config: dict[str, Any]) -> None:
        time.sleep(seconds)
        library.report(
            {"score": float(sum("abcd".index(value) for value in config.values())), "at": time.time()}
        )

    search = None
    if controller:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        search = OptunaSearch(sampler=optuna.samplers.TPESampler(seed=0), metric="score", mode="max")
    with tempfile.TemporaryDirectory() as folder:
        tuner = library.Tuner(
            trainable,
            param_space={name: library.choice(VALUES) for name in NAMES},
            tune_config=library.TuneConfig(
                search_alg=search,
                metric="score",
                mode="max",
                num_samples=candidates,
                max_concurrent_trials=workers,
                reuse_actors=True,
            ),
            run_config=library.RunConfig(storage_path=folder, verbose=0),
        )
        watch = Watch()
        began = time.time()
        grid = tuner.fit()
        ends = sorted(float(result.metrics["at"]) for result in grid if result.metrics)
    found = watch.result(candidates, workers, seconds)
    ray.shutdown()
    if len(ends) != candidates:
        raise RuntimeError(f"{candidates - len(ends)} candidates have no result")
    begin, counted = ends[workers - 1], candidates - workers
    wall, ideal = ends[-1] - begin, math.ceil(counted / workers) * seconds
    found |= {
        "start_seconds": round(begin - began - seconds, 2),
        "wall_seconds": round(wall, 3),
        "wall_seconds_with_start": found["wall_seconds"],
        "ideal_seconds": ideal,
        "efficiency": round(ideal / wall, 4) if seconds else None,
        "wall_ms_per_candidate": round(1000 * wall / counted, 3),
    }
    return found


# -- all cases ---------------------------------------------------------------------------------------------------------

SIDES = {"ours": ours, "tune": tune}


def cases(quick: bool, sizes: list[int]) -> list[dict[str, Any]]:
    """Side, candidates, workers, seconds and controller of each case."""
    rounds = 4 if quick else 10
    found: list[dict[str, Any]] = [
        {
            "side": side,
            "candidates": rounds * workers,
            "workers": workers,
            "seconds": 1.0,
            "controller": "tpe",
        }
        for workers in sizes
        for side in SIDES
    ]
    instant = {"side": "ours", "candidates": 10_000, "workers": 8, "seconds": 0.0, "controller": None}
    compared = {"candidates": 200 if quick else 1000, "workers": 8, "seconds": 0.0, "controller": "tpe"}
    return [*found, instant, *({"side": side, **compared} for side in SIDES)]


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """The case in a process of its own; what went wrong is its result then."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, "-m", "recipes.benchmarks.ray_throughput", "--case", json.dumps(case)]
        try:
            done = subprocess.run(
                [*command, "--out", file.name], capture_output=True, text=True, timeout=CASE_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {**case, "error": f"not done after {CASE_SECONDS:g} s"}
        if done.returncode:
            return {**case, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        return {**case, **json.loads(Path(file.name).read_text(encoding="utf-8"))}


def main() -> None:
    """Run all cases, or the one given, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="fewer candidates")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32, 128], help="one case each and side")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case = json.loads(arguments.case)
        found = SIDES[case.pop("side")](**case)
        arguments.out.write_text(json.dumps(found), encoding="utf-8")
        return
    found = []
    for case in cases(arguments.quick, arguments.workers):
        load = statistics.mean(os.getloadavg()[:1])
        found.append({"load_before": round(load, 2), **run_case(case)})
        shown = {key: value for key, value in found[-1].items() if key != "driver_memory_mb"}
        print(json.dumps(shown), flush=True)
    result = {
        "command": "python -m recipes.benchmarks.ray_throughput --workers "
        + " ".join(map(str, arguments.workers))
        + (" --quick" if arguments.quick else ""),
        "environment": describe_environment(),
        "cases": found,
    }
    atomic_write_json(arguments.out, result)


if __name__ == "__main__":
    main()
