"""How good are the controllers? Best value and hypervolume after 100 and 300 evaluations of synthetic problems.

    python -m recipes.benchmarks.controllers_quality --out recipes/results/controllers_quality.json

Two conditional search spaces, each with one objective (quality) and with two (quality, cost), and a new problem for
every seed: ``layers`` is a network of up to six layers whose parameters exist only where the layer does, with
random tables for what each layer contributes and how it gets on with the one before; ``mixed`` has numbers,
logarithms and branches. Beside the controllers run Optuna's samplers with plain defaults and without the
toolkit. All values are synthetic; they compare search strategies and say nothing about models.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from nas.controllers import list_controllers, make_controller
from nas.environment import describe_environment
from nas.files import atomic_write_json
from nas.pareto import Direction, hypervolume_2d
from spaces import Architecture, Choice, Float, Int, Parameter, SearchSpace

__all__ = ["PEERS", "PROBLEMS", "VARIANTS", "Problem", "main"]

BUDGETS = (100, 300)
DIRECTIONS: tuple[Direction, Direction] = ("maximize", "minimize")
LAYERS = 6


@dataclass(frozen=True)
class Problem:
    """A space and what its architectures are worth: quality (more is better) and cost (less is better)."""

    space: SearchSpace
    evaluate: Callable[[Mapping[str, Any]], tuple[float, float]]


def layers(seed: int) -> Problem:
    """Up to six layers, each of one of three operations with its own parameters; some 1e13 architectures."""
    parameters: dict[str, Parameter] = {"depth": Int(1, LAYERS), "width": Choice([64, 128, 192, 256])}
    for i in range(LAYERS):
        parameters |= _layer(i)
    rng = random.Random(f"layers:{seed}")
    tables: dict[tuple[Any, ...], float] = {}

    def table(*index: Any) -> float:
        if index not in tables:
            tables[index] = random.Random(f"{seed}:{index}").random()
        return tables[index]

    weights = sorted((rng.uniform(0.4, 1.0) for _ in range(LAYERS)), reverse=True)

    def evaluate(a: Mapping[str, Any]) -> tuple[float, float]:
        gain, cost, before = 0.0, 0.0, "input"
        for i in range(int(a["depth"])):
            op, ratio = str(a[f"layer{i}.op"]), int(a[f"layer{i}.ratio"])
            detail = a.get(f"layer{i}.heads", a.get(f"layer{i}.kernel"))
            fit = 0.4 * table(i, op, detail) + 0.35 * table(i, op, before) + 0.25 * table(i, op, ratio)
            gain += weights[i] * fit * (1 + 0.1 * ratio)
            unit = {"softmax": 1.6, "linear": 1.0, "conv": 0.15 * int(a.get(f"layer{i}.kernel") or 0)}[op]
            cost += (unit + 0.5 * ratio) * int(a["width"]) / 128
            before = op
        width = math.log2(int(a["width"]) / 64)
        return 1 - math.exp(-gain * (0.6 + 0.15 * width)), cost

    return Problem(SearchSpace("layers", parameters), evaluate)


def _layer(i: int) -> dict[str, Parameter]:
    op = f"layer{i}.op"

    def exists(a: Mapping[str, Any]) -> bool:
        return bool(a["depth"] > i)

    def attends(a: Mapping[str, Any]) -> bool:
        return a.get(op) in ("softmax", "linear")

    def convolves(a: Mapping[str, Any]) -> bool:
        return a.get(op) == "conv"

    return {
        op: Choice(["softmax", "linear", "conv"], when=exists),
        f"layer{i}.heads": Choice([2, 4, 8], when=attends),
        f"layer{i}.kernel": Choice([3, 5, 7, 9], when=convolves),
        f"layer{i}.ratio": Choice([1, 2, 3, 4], when=exists),
    }


def mixed(seed: int) -> Problem:
    """Numbers on linear and logarithmic scales, and branches with parameters of their own."""
    space = SearchSpace(
        "mixed",
        {
            "family": Choice(["cnn", "transformer"]),
            "optimizer": Choice(["sgd", "adamw", "lion"]),
            "rate": Float(1e-5, 1e-1, log=True),
            "momentum": Float(0.5, 0.99, when=lambda a: a["optimizer"] == "sgd"),
            "decay": Float(1e-4, 1.0, log=True, when=lambda a: a["optimizer"] != "sgd"),
            "depth": Int(2, 16),
            "width": Int(32, 512, step=32),
            "kernel": Choice([3, 5, 7], when=lambda a: a["family"] == "cnn"),
            "heads": Int(1, 16, when=lambda a: a["family"] == "transformer"),
            "dropout": Float(0.0, 0.6),
            "activation": Choice(["relu", "gelu", "silu", "mish"]),
        },
    )
    rng = random.Random(f"mixed:{seed}")
    best = {
        (f, o): (rng.uniform(-4, -2), rng.random())
        for f in ("cnn", "transformer")
        for o in ("sgd", "adamw", "lion")
    }
    taste = {key: rng.random() for key in ("relu", "gelu", "silu", "mish", 3, 5, 7)}
    spot = {key: rng.random() for key in ("momentum", "decay", "heads", "dropout")}

    def evaluate(a: Mapping[str, Any]) -> tuple[float, float]:
        unit = dict(zip(space.encoding_names, space.encode(a).tolist(), strict=True))
        log_rate, worth = best[str(a["family"]), str(a["optimizer"])]
        depth, width = int(a["depth"]), int(a["width"])
        target = log_rate - 0.4 * math.log2(depth / 4) / 2
        loss = 0.6 * (math.log10(float(a["rate"])) - target) ** 2 + 0.5 * (1 - worth)
        for name in ("momentum", "decay", "heads", "dropout"):
            loss += 0.8 * (unit[name] - spot[name]) ** 2 if name in a else 0.0
        loss += 0.3 * (1 - taste[str(a["activation"])]) + (
            0.3 * (1 - taste[int(a["kernel"])]) if "kernel" in a else 0.0
        )
        capacity = 1 - math.exp(-depth * width / 1500)
        return capacity * math.exp(-loss), depth * (width / 64) ** 2 / 64

    return Problem(space, evaluate)


PROBLEMS: dict[str, Callable[[int], Problem]] = {"layers": layers, "mixed": mixed}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"evolution (initial=50)": ("evolution", {"initial": 50})}
"""Controllers with other options than their defaults, for what the documentation says of those."""

PEERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "optuna TPE (defaults)": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "optuna TPE (multivariate, group)": lambda seed: optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True
    ),
    "optuna NSGA-II (defaults)": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "optuna NSGA-II (population 20)": lambda seed: optuna.samplers.NSGAIISampler(
        seed=seed, population_size=20
    ),
}

Outcomes = list[tuple[float, float]]
Job = tuple[str, str, int, int]
"""Problem, searcher, number of objectives, seed."""


def run_controller(name: str, problem: Problem, objectives: int, seed: int) -> Outcomes:
    """Outcomes of the architectures that a controller asks for, in their order."""
    name, options = VARIANTS.get(name, (name, {}))
    controller = make_controller(name, problem.space, DIRECTIONS[:objectives], seed, **options)
    outcomes = []
    for _ in range(max(BUDGETS)):
        architecture = controller.ask()
        outcomes.append(problem.evaluate(architecture))
        controller.tell(architecture, outcomes[-1][:objectives])
    return outcomes


def run_peer(name: str, problem: Problem, objectives: int, seed: int) -> Outcomes:
    """The same by one of Optuna's samplers, as a user of Optuna would write it."""
    study = optuna.create_study(sampler=PEERS[name](seed), directions=DIRECTIONS[:objectives])
    outcomes = []
    for _ in range(max(BUDGETS)):
        trial = study.ask()
        architecture: Architecture = {}
        for key, parameter in problem.space.parameters.items():
            if parameter.when is None or parameter.when(architecture):
                architecture[key] = _suggest(trial, key, parameter)
        outcomes.append(problem.evaluate(architecture))
        study.tell(trial, outcomes[-1][:objectives])
    return outcomes


def _suggest(trial: optuna.Trial, name: str, parameter: Any) -> Any:
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(name, parameter.values)
    if isinstance(parameter, Int):
        return trial.suggest_int(name, parameter.low, parameter.high, step=parameter.step)
    return trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log)


def score(outcomes: Outcomes, objectives: int, reference: tuple[float, float]) -> float:
    """Best quality so far, or the hypervolume above ``reference``."""
    if objectives == 1:
        return max(quality for quality, _ in outcomes)
    return hypervolume_2d(outcomes, reference, DIRECTIONS)


def one_run(job: Job) -> tuple[list[float], float]:
    """Scores at every budget, and the seconds that the run took."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    problem_name, searcher, objectives, seed = job
    problem = PROBLEMS[problem_name](seed)
    began = time.perf_counter()
    if searcher in PEERS:
        outcomes = run_peer(searcher, problem, objectives, seed)
    else:
        outcomes = run_controller(searcher, problem, objectives, seed)
    seconds = time.perf_counter() - began
    # The reference is what a typical architecture costs, so that cheap useless ones do not decide.
    rng = random.Random(f"reference:{seed}")
    costs = [problem.evaluate(problem.space.sample(rng))[1] for _ in range(500)]
    reference = (0.0, float(np.quantile(costs, 0.9)))
    scores = [score(outcomes[:budget], objectives, reference) for budget in BUDGETS]
    return scores, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every searcher on every problem and writes the scores of all seeds and their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", nargs="*", help="names of searchers; all if not given")
    chosen = parser.parse_args(arguments)
    searchers = [
        name
        for name in [*list_controllers(), *VARIANTS, *PEERS]
        # NNI's tuners need an extra, and play when they are named.
        if (name in chosen.only if chosen.only is not None else not name.startswith("nni:"))
    ]
    jobs = [
        (problem, name, objectives, seed)
        for problem in PROBLEMS
        for objectives in (1, 2)
        for name in searchers
        for seed in range(chosen.seeds)
    ]
    with ProcessPoolExecutor(chosen.jobs) as pool:
        results = list(pool.map(one_run, jobs))
    tables = summarise(jobs, results, searchers)
    for title, rows in tables.items():
        print(title)
        for name, row in rows.items():
            print(f"  {name:34s}" + "".join(f"{row['median'][str(budget)]:9.4f}" for budget in BUDGETS))
    record = {
        "command": "python -m recipes.benchmarks.controllers_quality --out recipes/results/controllers_quality.json",
        "what": "median over seeds after 100 and 300 evaluations; 1 objective: best quality, 2: hypervolume",
        "seeds": chosen.seeds,
        "environment": describe_environment(),
        "results": tables,
    }
    atomic_write_json(chosen.out, record)


def summarise(
    jobs: list[Job], results: list[tuple[list[float], float]], searchers: list[str]
) -> dict[str, Any]:
    """title -> searcher -> median and all scores by budget, seeds won against random, median seconds of a run."""
    tables: dict[str, Any] = {}
    by_job = dict(zip(jobs, results, strict=True))
    seeds = sorted({seed for *_, seed in jobs})
    for problem in PROBLEMS:
        for objectives in (1, 2):
            rows = {}
            for name in searchers:
                runs = [by_job[problem, name, objectives, seed] for seed in seeds]
                row: dict[str, Any] = {"median": {}, "scores": {}, "beats_random": {}}
                for place, budget in enumerate(BUDGETS):
                    scores = [scores[place] for scores, _ in runs]
                    row["median"][str(budget)] = statistics.median(scores)
                    row["scores"][str(budget)] = scores
                    if "random" in searchers:
                        rival = [by_job[problem, "random", objectives, seed][0][place] for seed in seeds]
                        row["beats_random"][str(budget)] = sum(
                            a > b for a, b in zip(scores, rival, strict=True)
                        )
                row["seconds"] = statistics.median(seconds for _, seconds in runs)
                rows[name] = row
            tables[f"{problem}, {objectives} objective{'s' * (objectives > 1)}"] = rows
    return tables


if __name__ == "__main__":
    main()
