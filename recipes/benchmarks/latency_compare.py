"""A model against its own copy, and against one with five per cent more of the same blocks: what is said of them?

    python -m recipes.benchmarks.latency_compare --pairs 100 --out recipes/results/latency_compare.json

One thread of a CPU. Every comparison builds both models anew, in random order; widths and image sizes vary. A copy
should be ``cannot tell``; twenty blocks against twenty-one should be ``faster`` and must never be ``slower``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from nas.environment import describe_environment
from nas.files import atomic_write_json
from nas.latency import Options, Plan, Target, measure_together
from recipes.benchmarks.latency_repeat import load

BLOCKS = 20
KINDS = {"copy": 0, "5 % slower": 1}
"""What the other model is -> how many blocks more it has."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100, help="comparisons of each kind")
    parser.add_argument("--load", type=int, default=0, help="processes that load the machine at random")
    parser.add_argument("--seconds", type=float, default=8.0, help="at most, for one comparison")
    parser.add_argument("--priority", default="auto", choices=["auto", "off"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; comparisons that it holds are not made again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.exists() else {}
    name = f"load {given.load}, priority {given.priority}, at most {given.seconds:g} s"
    found: dict[str, list[dict[str, Any]]] = known.get(name, {}).get("pairs", {kind: [] for kind in KINDS})
    with load(given.load, given.seed):
        for number in range(len(found["copy"]), given.pairs):
            for kind, more in KINDS.items():
                found[kind].append(duel(f"{given.seed}:{number}", more, given.seconds, given.priority))
            if number % 5 == 4 or number == given.pairs - 1:
                print(number + 1, {kind: verdicts(pairs) for kind, pairs in found.items()}, flush=True)
                if given.out is not None:
                    known[name] = {
                        "command": f"python -m recipes.benchmarks.latency_compare --pairs {number + 1}"
                        f" --load {given.load} --seconds {given.seconds:g} --priority {given.priority}"
                        f" --seed {given.seed}",
                        "summary": {kind: summarise(pairs) for kind, pairs in found.items()},
                        "pairs": found,
                        "environment": describe_environment(),
                    }
                    atomic_write_json(given.out, known)
    print(json.dumps({kind: summarise(pairs) for kind, pairs in found.items()}, indent=1))


def duel(seed: str, more: int, seconds: float, priority: str) -> dict[str, Any]:
    rng = random.Random(seed)
    width, size = rng.choice([64, 96, 128]), rng.choice([64, 80, 96])
    inputs = (torch.randn(1, 3, size, size),)
    models = {"base": (vit(width, size, BLOCKS), inputs), "other": (vit(width, size, BLOCKS + more), inputs)}
    names = sorted(models, key=lambda name: rng.random())
    session = measure_together(
        {name: models[name] for name in names},
        Target.parse("cpu:1"),
        plan=Plan(seconds, seed=rng.randrange(2**30)),
        pairs=True,
        options=Options(priority=priority, retries=0),
    )
    pair = session.pair("base", "other")
    base = session.results["base"]
    return {
        **{name: getattr(pair, name) for name in ("verdict", "ratio", "low", "high", "rounds")},
        "runs": base.runs,
        "seconds": round(base.seconds, 2),
        "clock": base.clock,
        "trusted": base.trusted,
    }


def vit(width: int, size: int, depth: int) -> VisionTransformer:
    return VisionTransformer(
        img_size=size, embed_dim=width, depth=depth, num_heads=width // 32, num_classes=10
    ).eval()


def verdicts(pairs: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(pair["verdict"] for pair in pairs))


def summarise(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = sorted(pair["ratio"] for pair in pairs)
    return {
        "verdicts": verdicts(pairs),
        "ratio": {"least": ratios[0], "median": statistics.median(ratios), "most": ratios[-1]},
        "median_rounds": statistics.median(pair["rounds"] for pair in pairs),
        "median_runs_of_a_model": statistics.median(pair["runs"] for pair in pairs),
        "median_seconds": statistics.median(pair["seconds"] for pair in pairs),
        "clocks": dict(Counter(pair["clock"] for pair in pairs)),
        "untrusted": sum(not pair["trusted"] for pair in pairs),
    }


if __name__ == "__main__":
    main()
