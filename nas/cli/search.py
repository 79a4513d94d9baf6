"""``nas search``: find the front of a space on a task and a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from nas.errors import UserMistake

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("search")(search)


def search(
    space: str | None = typer.Option(
        None,
        help="Search space: a name from 'nas spaces', name:scale, module:ATTRIBUTE or file.py:ATTRIBUTE.",
    ),
    task: str | None = typer.Option(None, help="Task; by default the one the space is for."),
    data: str | None = typer.Option(
        None, help="Data: a named set, a folder, an archive or a parquet file; embedded data by default."
    ),
    gpu: bool = typer.Option(
        False, "--gpu", help="Train and measure on the first CUDA device; short for --device cuda."
    ),
    device: str | None = typer.Option(None, help="Where candidates train: cpu (default), cuda, cuda:1."),
    target: str | None = typer.Option(
        None,
        help="Where latency counts: cpu:THREADS, cuda, cuda+bf16; ray:RESOURCE/cpu on such nodes; "
        "the device by default.",
    ),
    trials: int | None = typer.Option(None, help="How many candidates (default 30)."),
    time_budget: str | None = typer.Option(None, help="No new candidate after this time: 90s, 3m, 1h."),
    controller: str | None = typer.Option(
        None, help="What proposes: tpe (default), nsga2, evolution, local_search, random, nni:NAME."
    ),
    evaluator: str | None = typer.Option(
        None, help="train (default), or your function: module:NAME or file.py:NAME."
    ),
    objective: list[str] | None = typer.Option(
        None, help="name:maximize or name:minimize; repeat for several."
    ),
    epochs: int | None = typer.Option(None, help="Epochs of a full training; the task's own by default."),
    pruner: str | None = typer.Option(
        None, help="Early stopping: median (default), successive_halving, asha, hyperband, none."
    ),
    latency_budget: float | None = typer.Option(
        None, help="Milliseconds; a slower candidate is not trained."
    ),
    params_budget: str | None = typer.Option(None, help="Most parameters: 800k, 25M."),
    macs_budget: str | None = typer.Option(None, help="Most multiply-accumulates: 80M, 1.3G."),
    trial_timeout: str | None = typer.Option(None, help="Time one candidate may take (default 1h)."),
    memory_limit: str | None = typer.Option(
        None, help="Bytes one candidate may hold: 4G; an equal share by default."
    ),
    seed: int | None = typer.Option(
        None, help="One seed, one worker: the same architectures in the same order."
    ),
    workers: int | None = typer.Option(
        None,
        help="Candidates at a time; by default the cores, at most 4, or 1 on a GPU; with --ray all that fit.",
    ),
    ray: str | None = typer.Option(
        None, help="Run candidates on a Ray cluster: auto (the one of this machine), local, or HOST:PORT."
    ),
    cpus_per_trial: float | None = typer.Option(
        None, help="With --ray: processors of a candidate (default 1; fractions allowed)."
    ),
    gpus_per_trial: float | None = typer.Option(
        None, help="With --ray: GPUs of a candidate (default 0, or 1 on CUDA; fractions allowed)."
    ),
    storage: str | None = typer.Option(None, help="Another Optuna storage: a database URL, or journal:FILE."),
    join: str | None = typer.Option(
        None,
        help="Share the study of this name in --storage with other drivers; the first one begins it, and all others "
        "take their settings from it.",
    ),
    lease: str | None = typer.Option(
        None,
        help="With --join: a driver silent for so long loses its candidates to the others (default 60s).",
    ),
    out: Path | None = typer.Option(
        None, help="Run directory (default runs/SPACE-TIME). Holding a run, it is resumed."
    ),
    recipe: Path | None = typer.Option(None, help="YAML file with these settings; flags override it."),
) -> None:
    """Search: propose, measure latency on the target, train, and keep the Pareto front.

    The same command with the same --out goes on where it was stopped.
    """
    from nas.cli._run import run_session
    from nas.config import load_recipe
    from nas.run_directory import RunDirectory
    from nas.session import default_directory

    given: dict[str, Any] = {} if recipe is None else load_recipe(recipe)
    if gpu and device not in (None, "cuda"):
        raise UserMistake(f"--gpu and --device {device} contradict each other; give one of them")
    flags = {
        "space": space,
        "task": task,
        "data": data,
        "device": "cuda" if gpu else device,
        "target": target,
        "trials": trials,
        "time_budget": time_budget,
        "controller": controller,
        "evaluator": evaluator,
        "objectives": objective or None,
        "epochs": epochs,
        "pruner": pruner,
        "latency_budget": latency_budget,
        "params_budget": params_budget,
        "macs_budget": macs_budget,
        "trial_timeout": trial_timeout,
        "memory_limit": memory_limit,
        "seed": seed,
        "workers": workers,
        "ray": ray,
        "cpus_per_trial": cpus_per_trial,
        "gpus_per_trial": gpus_per_trial,
        "storage": storage,
        "join": join,
        "lease": lease,
    }
    given |= {key: value for key, value in flags.items() if value is not None}
    known = "join" in given or (out is not None and RunDirectory(out).holds_run())
    if "space" not in given and not known:
        raise UserMistake("--space is required (or a recipe that names one); 'nas spaces' lists them")
    run_session(out or default_directory(str(given.get("space")), given.get("join")), given)
