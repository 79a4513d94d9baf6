"""How many calls of a model does it take to know its latency to within one per cent?

    python -m recipes.benchmarks.latency_precision --out recipes/results/latency_precision.json

One thread of a CPU, each model measured by itself, three times. Beside the calls that were made (warm-up included)
stands what single calls scatter by when they follow each other at once, on the same machine and in the same minute, and
how many calls that scatter alone would ask for: the 95 % interval of a median of n independent values has a half-width
of about 1.2533 x 1.96 x scatter / sqrt(n).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from nas.environment import describe_environment
from nas.files import atomic_write_json
from nas.latency import Options, Target, measure
from nas.latency.priority import undisturbed
from nas.latency.runner import make_runner, session
from recipes.benchmarks.latency_repeat import build

PRETRAINED = {
    "resnet18": 224,
    "mobilenetv3_large_100": 224,
    "deit_tiny_patch16_224": 224,
    "convnext_nano": 224,
    "deit_small_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
}
SMALL = 4
"""ViTs of a few milliseconds, from the thirty models of ``latency_repeat``."""

_TARGET = "cpu:1"
_STRAIGHT = 100
_NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", type=float, default=0.01)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, (model, inputs) in models().items():
        rows[name] = row(model, inputs, given.precision, given.times)
        print(f"{name:32} {rows[name]}", flush=True)
    if given.out is not None:
        found = {
            "command": f"python -m recipes.benchmarks.latency_precision --precision {given.precision:g}",
            "target": _TARGET,
            "models": rows,
            "environment": describe_environment(),
        }
        atomic_write_json(given.out, found)


def models() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    found: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
        name: (timm.create_model(name).eval(), (torch.randn(1, 3, size, size),))
        for name, size in PRETRAINED.items()
    }
    small = {name: pair for name, pair in build(30, 0).items() if name.startswith("vit")}
    return found | dict(list(small.items())[:SMALL])


def row(model: nn.Module, inputs: tuple[torch.Tensor, ...], precision: float, times: int) -> dict[str, Any]:
    scatter = statistics.median(straight(model, inputs) for _ in range(times))
    found = [
        measure(
            model,
            inputs,
            Target.parse(_TARGET),
            max_seconds=60.0,
            precision=precision,
            options=Options(retries=0),
        )
        for _ in range(times)
    ]
    return {
        "ms": round(statistics.median(one.median_ms for one in found), 2),
        "runs": [one.runs for one in found],
        "of_them_warm_up": [one.warmup_runs for one in found],
        "half_widths": [round(one.half_width, 4) for one in found],
        "stopped": [one.stopped for one in found],
        "trusted": [one.trusted for one in found],
        "scatter_of_calls": round(scatter, 4),
        "runs_that_scatter_asks_for": round((1.2533 * 1.96 * scatter / precision) ** 2),
    }


def straight(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """Relative scatter of calls in a row, by their median absolute deviation."""
    target = Target.parse(_TARGET)
    with session(target, 1):
        runner = make_runner(model, inputs, target)
        with undisturbed(1) as granted:
            for _ in range(5):
                runner()
            walls = []
            for _ in range(_STRAIGHT):
                walls.append(runner().wall)
                granted.pause()
        runner.close()
    middle = statistics.median(walls)
    return _NORMAL * statistics.median(abs(wall - middle) for wall in walls) / middle


if __name__ == "__main__":
    main()
