"""Runs to report on, made up of trials without training, and what their tables look like in a terminal."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from rich.console import Console

from nas.report import RunReport, TrialRow

__all__ = [
    "ACCURACY",
    "BASE",
    "CASES",
    "HOSTILE",
    "LATENCY",
    "PARAMS",
    "architecture",
    "failed",
    "finalists",
    "many",
    "printed",
    "run",
    "trial",
]


ACCURACY, LATENCY, PARAMS = ("accuracy", "maximize"), ("latency_ms", "minimize"), ("params", "minimize")
MARKUP = "</script><script>alert('x')</script><img src=\"http://evil.example/\"> &"
HOSTILE = f"{MARKUP} \u2028\u2029 \x1b[31m $\\frac \udc80"


def architecture(rng: random.Random, depth: int | None = None) -> dict[str, Any]:
    depth = depth or rng.randint(2, 6)
    made: dict[str, Any] = {"embed_dim": rng.choice([32, 48, 64, 96]), "depth": depth}
    for layer in range(depth):
        made[f"layer{layer}.attention"] = rng.choice(["softmax", "cosformer"])
        made[f"layer{layer}.heads"] = rng.choice([2, 4])
        made[f"layer{layer}.ffn"] = rng.choice([64, 128, 256])
    return made


def trial(
    number: int,
    accuracy: float = 0.98,
    ms: float = 0.5,
    *,
    width: float = 0.02,
    name: str | None = None,
    **more: Any,
) -> TrialRow:
    """A complete trial whose latency interval reaches ``width`` (a share of the latency) to both sides."""
    bounds = {"low_ms": ms * (1 - width), "high_ms": ms * (1 + width)}
    measured = {"median_ms": ms, **bounds, "samples": 50, "precise": True}
    row = TrialRow(
        number=number,
        architecture=architecture(random.Random(number)),
        key=f"{number:016x}",
        state="complete",
        name=name,
        values={"accuracy": accuracy, "latency_ms": ms},
        metrics={"params": 34_100 + number, "macs": 1_250_000, "accuracy": accuracy},
        latency=measured,
        curve=[{"epoch": e, "train_loss": 2.0 / e, "accuracy": accuracy * (1 - 0.5**e)} for e in range(1, 5)],
        seconds=3.2,
        seed=number,
    )
    return dataclasses.replace(row, **more)


def failed(
    number: int, kind: str = "memory", reason: str = "cannot allocate", log: str = "Traceback"
) -> TrialRow:
    failure = {"kind": kind, "reason": reason, "log_tail": log}
    state = "pruned" if kind in ("pruned", "budget") else "failed"
    return trial(number, state=state, values={}, latency=None, curve=[], failure=failure)


def run(*trials: TrialRow, **more: Any) -> RunReport:
    report = RunReport(
        name="demo",
        space="efficient_transformer",
        task_description={"name": "image_classification", "train": 1077, "validation": 360},
        target="cpu:1",
        objectives=[ACCURACY, LATENCY],
        trials=list(trials),
        environment={"cpu": "some CPU", "versions": {"torch": "2.9"}},
        recipe={"space": "efficient_transformer", "trials": 32, "training": {"amp": "auto"}},
        started="2026-01-01T10:00:00",
        finished="2026-01-01T10:03:00",
        wall_seconds=180.0,
        baseline="softmax_baseline",
    )
    return dataclasses.replace(report, **more)


BASE = trial(0, 0.979, 0.95, width=0.015, name="softmax_baseline")


def many(count: int, seed: int = 0) -> RunReport:
    rng = random.Random(seed)
    rows = [BASE]
    for number in range(1, count):
        if rng.random() < 0.1:
            rows.append(failed(number, rng.choice(["memory", "nan", "pruned"])))
            continue
        made = architecture(rng)
        softmax = sum(value == "softmax" for value in made.values())
        latency = 0.1 * made["depth"] + 0.02 * softmax + rng.gauss(0, 0.003)
        accuracy = 0.9 + 0.0006 * made["embed_dim"] + 0.002 * softmax + rng.gauss(0, 0.002)
        rows.append(trial(number, accuracy, latency, architecture=made))
    return run(*rows)


def printed(item: Any, width: int) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(item)
    return capture.get().splitlines()


def finalists(report: RunReport) -> RunReport:
    rows = [BASE, *report.front()]
    found = [
        {"number": r.number, "name": r.name, "median_ms": 0.4, "low_ms": 0.39, "high_ms": 0.41, "ratio": 0.44,
         "ratio_low": 0.43, "ratio_high": 0.45, "test": {"accuracy": 0.97}}
        for r in rows
    ]  # fmt: skip
    return dataclasses.replace(report, finalists=found, test_metric="accuracy")


CASES = {
    "two": many(30),
    "one objective": dataclasses.replace(many(20), objectives=[ACCURACY]),
    "quality alone, no baseline": dataclasses.replace(many(20), objectives=[ACCURACY], baseline=None),
    "latency alone": dataclasses.replace(many(20), objectives=[LATENCY]),
    "one trial": run(BASE),
    "nothing": run(),
    "failures only": run(failed(1), failed(2)),
    "log axis": run(BASE, trial(1, 0.9, 0.01), trial(2, 0.99, 50.0)),
}
