"""A search space without a model, and evaluators that behave and misbehave, for tests of a whole run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spaces import Choice, Int, SearchSpace

SPACE = SearchSpace(
    "toy",
    {
        "depth": Int(1, 4),
        "width": Choice([16, 32, 64, 128]),
        **{
            f"layer{i}.kind": Choice(["conv", "attention"], when=lambda a, i=i: a["depth"] > i)  # type: ignore[misc]
            for i in range(4)
        },
    },
    published={"plain": {"depth": 2, "width": 64, "layer0.kind": "conv", "layer1.kind": "conv"}},
    baseline="plain",
)


def _score(architecture: dict[str, Any]) -> dict[str, float]:
    attention = sum(value == "attention" for value in architecture.values())
    cost = architecture["depth"] * architecture["width"] * (1 + attention)
    return {"score": 1 - 1 / (cost * (1 + attention)), "cost": float(cost)}


def evaluate(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    """Every call leaves a mark, so that a test can count how often an architecture was evaluated."""
    mark = os.environ.get("TOY_MARKS")
    if mark:
        with open(mark, "a", encoding="utf-8") as file:
            file.write(f"{SPACE.key(architecture)}\n")
    time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
    return _score(architecture)


def odd(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    """Fails in a different way for each width; each failing candidate says which one it is in its directory."""
    width = architecture["width"]
    if width == 16:
        raise ValueError("sixteen is too narrow")
    if width == 32:
        return {"score": float("nan"), "cost": 1.0}
    if width == 64 and architecture["depth"] > 1:
        os._exit(3)
    return _score(architecture)


def always_fails(architecture: dict[str, Any]) -> dict[str, float]:
    raise RuntimeError("the data set is on fire")


def hangs(architecture: dict[str, Any]) -> dict[str, float]:
    if architecture["depth"] == 2:
        time.sleep(1e9)
    return _score(architecture)


def allocates(architecture: dict[str, Any]) -> dict[str, float]:
    held = []
    while architecture["depth"] == 2:
        held.append(bytearray(32 * 2**20))
    return _score(architecture)


def dies_once(architecture: dict[str, Any], directory: str) -> dict[str, float]:
    """Killed from outside at the first attempt, as by a machine that runs out of memory."""
    mark = Path(directory) / "died"
    if architecture["depth"] == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    return _score(architecture)


def curve(architecture: dict[str, Any], report: Callable[[int, float], bool]) -> dict[str, float]:
    score = _score(architecture)
    for step in range(1, 9):
        if report(step, score["score"] * step / 8):
            return {}
    return score
