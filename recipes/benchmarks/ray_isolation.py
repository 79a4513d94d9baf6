"""Latency on the target's node of a Ray cluster: idle, and while all other nodes train.

    python -m recipes.benchmarks.ray_isolation --out recipes/results/ray_isolation.json

A cluster of one target node (no CPUs for trials, one unit of a custom resource) and training nodes of one CPU each, all
on this machine. That is harder than reality: the training shares the cores and, as on other machines, does not stop
for a measurement. Ten models are measured through the executor on the target's node, first with the cluster idle, then
with a training on every other node, then idle again. Kendall's tau and the median relative difference to the first
measurement are reported; the third one tells what repeats anyway. It takes about four minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from typing import Any

from nas.config import SearchConfig
from nas.environment import describe_environment
from nas.executors import RayExecutor
from nas.files import atomic_write_json
from nas.latency.self_test import agreement
from nas.resolve import resolve
from spaces import get_space

RESOURCE = "target"
WANTED_TAU = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=3, help="that train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    load, began = os.getloadavg(), time.monotonic()
    found = measure(given.models, given.nodes, given.seed)
    for name in ("training", "idle again"):
        print(
            f"idle against {name}: tau {found[name]['tau']:.3f}, median deviation {found[name]['deviation']:.2%}"
        )
    record = {
        "command": f"python -m recipes.benchmarks.ray_isolation --models {given.models} --nodes {given.nodes} "
        f"--seed {given.seed} --out recipes/results/ray_isolation.json",
        "what": f"milliseconds of {given.models} models on the target's node of a Ray cluster on one machine: idle, "
        f"while {given.nodes} other nodes train, and idle again; each against the first",
        "wanted_tau": WANTED_TAU,
        "load_average_before": load,
        "seconds": round(time.monotonic() - began, 1),
        "environment": describe_environment(),
        "results": found,
    }
    atomic_write_json(given.out, record)


def measure(models: int, nodes: int, seed: int) -> dict[str, Any]:
    """Latencies of the models in the three situations, by key of the architecture, and how they agree."""
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, **small)
        cluster.add_node(num_cpus=0, resources={RESOURCE: 1}, **small)
        cluster.wait_for_nodes()
        executor = RayExecutor(nodes, address=cluster.address, measure_on=RESOURCE)
        try:
            return _compare(executor, models, nodes, seed)
        finally:
            executor.close(kill=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _compare(executor: RayExecutor, models: int, nodes: int, seed: int) -> dict[str, Any]:
    space, rng = get_space("efficient_transformer"), random.Random(seed)
    architectures = {space.key(a): a for a in (space.sample(rng) for _ in range(models))}
    found: dict[str, Any] = {"models": architectures, "idle": {"ms": _latencies(executor, architectures)}}
    jobs = [
        executor.submit("recipes.benchmarks.ray_isolation:train", {}, tag="training") for _ in range(nodes)
    ]
    time.sleep(15.0)  # until all of them train
    found["training"] = {
        "ms": _latencies(executor, architectures),
        "jobs_running": sum(not j.done() for j in jobs),
    }
    for job in jobs:
        if (failure := job.result().failure) is not None:
            raise RuntimeError(failure)
    found["idle again"] = {"ms": _latencies(executor, architectures)}
    for name in ("training", "idle again"):
        found[name]["tau"], found[name]["deviation"] = agreement(found["idle"]["ms"], found[name]["ms"])
    return found


def _latencies(executor: RayExecutor, architectures: dict[str, dict[str, Any]]) -> dict[str, float]:
    config = resolve(
        SearchConfig.parse(
            {"space": "efficient_transformer", "ray": "auto", "target": f"ray:{RESOURCE}/cpu:1"}
        )
    )
    found = {}
    for key, architecture in architectures.items():
        payload = {"config": config.dump(), "architecture": architecture, "key": key}
        outcome = executor.submit("nas.trial:measure_trial", payload, where=RESOURCE).result()
        if outcome.value is None:
            raise RuntimeError(outcome.failure)
        found[key] = float(outcome.value["latency"]["median_ms"])
    return found


def train(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
    """A training on digits for about 75 seconds, which gives way to no measurement."""
    import torch

    from nas.tasks import make_task
    from nas.training import TrainConfig
    from nas.training import train as run

    torch.set_num_threads(1)
    task = make_task("image_classification")
    space = get_space("efficient_transformer")
    model = space.build(space.published[space.baseline or ""], task.signature)
    until = time.monotonic() + 75.0
    config = TrainConfig(epochs=10_000, batch_size=32, learning_rate=1e-3)
    run(model, task, config, torch.device("cpu"), report=lambda progress: time.monotonic() > until)
    return {}


if __name__ == "__main__":
    main()
