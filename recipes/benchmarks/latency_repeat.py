"""Thirty models measured twice under random load: which way of timing gives the same answer again?

    python -m recipes.benchmarks.latency_repeat --load 2 --out recipes/results/latency_repeat.json

One thread of a CPU. Each method measures all models in two sessions, while ``--load`` processes switch between working
and resting at random; the sessions of the methods alternate. Compared are the two sessions of each method: Kendall tau
and the median relative difference. Ours keeps the reference's time of its first session as the scale of both, as a
search does; the others' figures are as they come. Every session runs in a fresh process, as two commands typed minutes
apart do: a process that has worked for long runs models of a millisecond some per cent slower.

The methods are ours (with what priority the system grants, and with none), ``torch.utils.benchmark``'s
blocked_autorange, the way of timm's benchmark script (10 warm-up calls, mean of 40) and a plain mean of 100 calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from nas.environment import describe_environment
from nas.files import atomic_write_json
from nas.latency import Options, Plan, Target, measure_together
from nas.latency.self_test import agreement
from spaces import ImageSignature, get_space

Models = dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=30)
    parser.add_argument("--load", type=int, default=0, help="processes that load the machine at random")
    parser.add_argument("--seconds", type=float, default=120.0, help="for one session of ours, at most")
    parser.add_argument("--precision", type=float, default=0.004, help="half-width at which ours stops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    scales = Path(tempfile.mkdtemp(prefix="latency-repeat-"))
    found: dict[str, Any] = {name: {"sessions": [], "seconds": [], "facts": []} for name in METHODS}
    with load(given.load, given.seed):
        for session in range(2):
            for name in METHODS:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                    times, facts, seconds = fresh.submit(
                        one_session,
                        name,
                        given.models,
                        given.seed,
                        Plan(given.seconds, given.precision),
                        scales,
                    ).result()
                found[name]["sessions"].append(times)
                found[name]["seconds"].append(round(seconds, 1))
                found[name]["facts"].append(facts)
                print(
                    f"session {session + 1}: {name}: {found[name]['seconds'][-1]} s, load {os.getloadavg()[0]:.1f}"
                )
    shutil.rmtree(scales)
    for name, entry in found.items():
        entry["tau"], entry["median_deviation"] = agreement(*entry["sessions"])
        print(f"{name:24} tau {entry['tau']:.3f}  median deviation {entry['median_deviation']:.2%}")
    if given.out is not None:
        known = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
        command = f"python -m recipes.benchmarks.latency_repeat --load {given.load} --seed {given.seed}"
        known[f"load {given.load}"] = {
            "command": command,
            "models": list(found["ours"]["sessions"][0]),
            "methods": found,
            "environment": describe_environment(),
        }
        atomic_write_json(given.out, known)


def one_session(
    name: str, count: int, seed: int, plan: Plan, scales: Path
) -> tuple[dict[str, float], dict[str, Any], float]:
    """Milliseconds by model, facts and the seconds that it took, in the process that calls it."""
    torch.set_num_threads(1)
    models = build(count, seed)
    began = time.perf_counter()
    times, facts = METHODS[name](models, plan, scales)
    return times, facts, time.perf_counter() - began


def build(count: int, seed: int) -> Models:
    """Half samples of efficient_transformer on 8x8 images, half timm ViTs of several shapes."""
    rng = random.Random(seed)
    space = get_space("efficient_transformer:small")
    signature = ImageSignature(1, 8, 8, 10)
    models: Models = {}
    while len(models) < count // 2:
        architecture = space.sample(rng)
        models[f"efficient_transformer {space.key(architecture)}"] = (
            space.build(architecture, signature).eval(),
            (torch.randn(1, 1, 8, 8),),
        )
    while len(models) < count:
        depth, width, size = (
            rng.randint(4, 12),
            rng.choice([128, 192, 256, 320, 384]),
            rng.choice([96, 128, 160]),
        )
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=size,
            embed_dim=width,
            depth=depth,
            num_heads=width // 32,
            mlp_ratio=rng.choice([2, 3, 4]),
        )
        models[f"vit {len(models)}: {depth}x{width}, {size} px"] = (
            model.eval(),
            (torch.randn(1, 3, size, size),),
        )
    return models


def ours(models: Models, plan: Plan, priority: str, scale: Path) -> tuple[dict[str, float], dict[str, Any]]:
    found = measure_together(
        models,
        Target.parse("cpu:1"),
        plan=plan,
        options=Options(priority=priority, retries=0, scale=scale),
    )
    results = found.results.values()
    facts = {
        "clock": sorted({result.clock for result in results}),
        "priority": sorted({result.priority for result in results}),
        "trusted": all(result.trusted for result in results),
        "reasons": sorted({reason for result in results for reason in result.reasons}),
        "median_runs_of_a_model": statistics.median(result.runs for result in results),
        "median_half_width": statistics.median(result.half_width for result in results),
        "quiet_share": sum(result.quiet_rounds for result in results)
        / sum(result.rounds for result in results),
    }
    return {name: result.median_ms for name, result in found.results.items()}, facts


def each(
    models: Models, timing: Callable[[nn.Module, tuple[torch.Tensor, ...]], float]
) -> tuple[dict[str, float], dict[str, Any]]:
    with torch.inference_mode():
        return {name: timing(model, inputs) for name, (model, inputs) in models.items()}, {}


def blocked_autorange(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    from torch.utils.benchmark import Timer

    timer = Timer("model(*inputs)", globals={"model": model, "inputs": inputs}, num_threads=1)
    return float(timer.blocked_autorange().median * 1000)


def mean_of(model: nn.Module, inputs: tuple[torch.Tensor, ...], warm: int, calls: int) -> float:
    for _ in range(warm):
        model(*inputs)
    began = time.perf_counter()
    for _ in range(calls):
        model(*inputs)
    return (time.perf_counter() - began) / calls * 1000


@contextlib.contextmanager
def load(processes: int, seed: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=work_and_rest, args=(seed * 100 + number,), daemon=True)
        for number in range(processes)
    ]
    for process in started:
        process.start()
    try:
        time.sleep(5.0 if processes else 0.0)
        yield
    finally:
        for process in started:
            process.kill()


def work_and_rest(seed: int) -> None:
    """Matrix products or copies of memory for up to three seconds, then rest for as long at most.

    Ends by itself when the process that started it is gone, also if that was killed.
    """
    parent = os.getppid()
    torch.set_num_threads(1)
    rng = random.Random(seed)
    a, b = torch.randn(512, 512), torch.randn(8_000_000)
    while os.getppid() == parent:
        until = time.monotonic() + rng.uniform(0.1, 3.0)
        products = rng.random() < 0.5
        while time.monotonic() < until:
            if products:
                torch.mm(a, a)
            else:
                b.clone()
        time.sleep(rng.uniform(0.0, 3.0))


METHODS: dict[str, Callable[[Models, Plan, Path], tuple[dict[str, float], dict[str, Any]]]] = {
    "ours": lambda m, plan, scales: ours(m, plan, "auto", scales / "auto.json"),
    "ours, without priority": lambda m, plan, scales: ours(m, plan, "off", scales / "off.json"),
    "blocked_autorange": lambda m, plan, scales: each(m, blocked_autorange),
    "timm (mean of 40)": lambda m, plan, scales: each(m, lambda f, x: mean_of(f, x, 10, 40)),
    "mean of 100": lambda m, plan, scales: each(m, lambda f, x: mean_of(f, x, 1, 100)),
}


if __name__ == "__main__":
    main()
