"""Run directories of the toy space, made in this process in the way a driver makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nas.config import SearchConfig
from nas.pareto import Direction
from nas.recorded import write_start
from nas.run_directory import RunDirectory
from nas.study import StoredTrial, Study, TrialResult
from tests.nas.toys import toy

OBJECTIVES: list[tuple[str, Direction]] = [("score", "maximize"), ("cost", "minimize")]
STATES = ("complete", "complete", "failed", "complete", "pruned", "complete")
TOYS = Path(toy.__file__)


def _find_schema_once() -> None:
    """Optuna loads all its migrations at every opening to learn the newest schema, and these tests open a lot."""
    from optuna.storages._rdb.storage import _VersionManager

    find = _VersionManager.get_head_version
    found: list[str] = []

    def get_head_version(self: _VersionManager) -> str:
        if not found:
            found.append(find(self))
        return found[0]

    _VersionManager.get_head_version = get_head_version  # type: ignore[method-assign]


_find_schema_once()


def toy_config(storage: str | None = None, **settings: Any) -> SearchConfig:
    """The resolved configuration of a run of the toy space."""
    return SearchConfig.parse(
        {
            "space": f"{TOYS}:SPACE",
            "evaluator": f"{TOYS}:evaluate",
            "objectives": [f"{name}:{direction}" for name, direction in OBJECTIVES],
            "target": "cpu:1",
            "workers": 1,
            "trials": 8,
            "memory_limit": 10**9,
            "storage": storage,
            **settings,
        }
    )


def toy_result(trial: StoredTrial, state: str = "complete") -> TrialResult:
    """What the toy evaluator makes of a trial, or a failure."""
    metrics = toy.evaluate(trial.architecture, "")
    if state == "complete":
        return TrialResult("complete", values=metrics, metrics=metrics, seconds=0.25)
    return TrialResult(
        state, metrics=metrics, failure={"kind": "error", "reason": f"was {state}", "log_tail": ""}
    )


def architectures() -> list[dict[str, Any]]:
    """Eight architectures, the baseline first."""
    found = [toy.SPACE.published["plain"]]
    for architecture in toy.SPACE.enumerate():
        if toy.SPACE.key(architecture) not in {toy.SPACE.key(known) for known in found}:
            found.append(architecture)
        if len(found) == 8:
            return found
    raise AssertionError("the toy space is smaller than this")


def made_run(path: Path, storage: str | None = None, states: Sequence[str] = STATES) -> RunDirectory:
    """A run with one trial for each of ``states``, closed; "running" leaves a trial as a killed driver does."""
    run = RunDirectory(path)
    config = toy_config(storage)
    run.acquire()
    facts = write_start(run, config, {"objective": None, "candidates": {}, "task": {}, "epochs": 1})
    study = Study.create(run, toy.SPACE, OBJECTIVES, config.dump(), facts)
    for number, (state, architecture) in enumerate(zip(states, architectures(), strict=False)):
        trial = study.suggest(architecture, name="plain" if number == 0 else None, seed=number)
        if state == "waiting":
            study.park(trial)
        elif state != "running":
            study.record(trial, toy_result(trial, state))
    run.release()
    return run


def opened(run: RunDirectory, storage: str | None = None) -> tuple[Study, list[str]]:
    """The study as a resuming driver opens it, and what was mended. The caller releases ``run``."""
    from nas.recorded import read_recorded

    run.acquire()
    recorded = read_recorded(run)
    return Study.open(run, toy.SPACE, OBJECTIVES, recorded.config.dump(), recorded.facts)


def summary(study: Study) -> list[tuple[int, str, str, str | None, int, Any]]:
    """What must not change whatever happens to a run."""
    return [
        (
            trial.number,
            trial.key,
            trial.state,
            trial.name,
            trial.seed,
            trial.result and trial.result.to_dict(),
        )
        for trial in study.trials()
    ]
