"""After the search: the finalists on test data and side by side on the target, then the report files."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from nas.executors.ray_targets import placed
from nas.files import CorruptFile, read_record, write_record
from nas.report.conditions import differing
from nas.report.data import RunReport, TrialRow

if TYPE_CHECKING:
    from nas.config import SearchConfig
    from nas.executors import Executor, Outcome
    from nas.run_directory import RunDirectory
    from nas.study import StoredTrial, Study

__all__ = ["build_report", "conclude", "identity_here", "measured_elsewhere", "write_report_files"]

logger = logging.getLogger(__name__)

MAX_FINALISTS = 12

_TOGETHER_SECONDS = 900.0  # to wait for the device, build all finalists, and measure them twice at the most


class _Watcher(Protocol):
    def concluding(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


def conclude(
    study: Study,
    config: SearchConfig,
    facts: Mapping[str, Any],
    executor: Executor | None,
    watcher: _Watcher,
    stopping: threading.Event,
) -> RunReport:
    """Judge the finalists (unless the run was stopped), write the report files and return the report.

    The figures on test data and the interleaved latencies go to ``finalists.json``; they are kept when nothing new
    has been evaluated since, and the target is still measured under the same conditions.
    """
    report = build_report(study, config, facts)
    _say_mixed_conditions(report, watcher)
    trained = ":" not in config.evaluator
    if trained and executor is not None and report.front() and not stopping.is_set():
        chosen = _finalists(report)
        if not _already_judged(study.run, chosen, config, executor, stopping):
            watcher.concluding(f"measuring {len(chosen)} finalists again, side by side, and on test data")
            judged = _judge(study, config, chosen, executor, watcher, stopping)
            if judged is not None:
                write_record(study.run.finalists, {"finalists": judged})
        if config.keep_weights == "front":
            _drop_weights(study, {row.number for front in [*report.fronts(), chosen] for row in front})
        report = build_report(study, config, facts)
    watcher.concluding("writing the report")
    write_report_files(report, study.run)
    return report


def build_report(study: Study, config: SearchConfig, facts: Mapping[str, Any]) -> RunReport:
    """Everything known about a run at this moment."""
    trials = study.trials()
    objective = facts.get("objective")
    return RunReport(
        name=study.run.path.resolve().name,
        space=study.space.name,
        task_description=dict(facts.get("task") or {}),
        target=config.target or "",
        objectives=study.objectives,
        trials=[_row(trial) for trial in trials],
        environment=dict(facts.get("environment") or {}),
        recipe=config.dump(),
        started=str(facts.get("started", "")),
        finished=datetime.now().astimezone().isoformat(timespec="seconds"),
        wall_seconds=_wall_seconds(study.run),
        baseline=study.space.baseline if config.published else None,
        finalists=_saved_finalists(study.run),
        test_metric=objective[0] if objective else None,
    )


def _wall_seconds(run: RunDirectory) -> float | None:
    """Time from the recipe to the last result; None when a pause between sessions would count as work."""
    results = [path.stat().st_mtime for path in run.trials.glob("*/result.json")]
    if not results or not run.environment.exists():
        return None
    started = run.environment.stat().st_mtime
    resumed = run.recipe.stat().st_mtime - started > 5  # every session writes its recipe, the first one both
    return None if resumed else max(results) - started


def _row(trial: StoredTrial) -> TrialRow:
    row = TrialRow(
        number=trial.number,
        architecture=trial.architecture,
        key=trial.key,
        state=trial.state,
        name=trial.name,
        seed=trial.seed,
    )
    if trial.result is None:
        return row
    names = ("values", "metrics", "latency", "curve", "seconds", "failure")
    return dataclasses.replace(row, **{name: getattr(trial.result, name) for name in names})


def _say_mixed_conditions(report: RunReport, watcher: _Watcher) -> None:
    """A run that went on after an upgrade, or with another priority, holds figures that do not compare."""
    groups = report.groups()
    if len(groups) > 1:
        counts = " and ".join(str(len(rows)) for _, rows in groups)
        watcher.note(
            f"latencies were measured under {len(groups)} kinds of conditions ({counts} candidates; see 'identity' in "
            "result.json): the front is made of the first of these; the best of each are finalists, which compare "
            "once they have been measured again together"
        )


# -- conditions --------------------------------------------------------------------------------------------------------


def identity_here(
    config: SearchConfig, executor: Executor, stopping: threading.Event
) -> dict[str, Any] | None:
    """What a latency would be measured under now, asked of the machine that measures; None when it cannot be told."""
    payload = {"config": config.dump()}
    asked = executor.submit(
        "nas.search_jobs:conditions_here", payload, tag="conditions", **placed(config.target)
    )
    if not _finish([asked], stopping):
        return None
    outcome = asked.result()
    if outcome.value is None:
        logger.info("the conditions of the target are not known: %s", outcome.failure)
        return None
    found: dict[str, Any] = outcome.value["identity"]
    return found


def measured_elsewhere(latencies: Iterable[Mapping[str, Any]], here: Mapping[str, Any]) -> str:
    """A warning when latencies of a run would meet those of other conditions; "" when all are of those ``here``."""
    found = [differing(latency["identity"], here) for latency in latencies if latency.get("identity")]
    apart = [differences for differences in found if differences]
    if not apart:
        return ""
    return (
        f"{len(apart)} of {len(found)} latencies of this run were measured under other conditions than hold here now "
        f"({'; '.join(apart[-1])}): they are not compared with those measured from now on"
    )


# -- finalists ---------------------------------------------------------------------------------------------------------


def _finalists(report: RunReport) -> list[TrialRow]:
    """The front, and where latencies were measured under several conditions, that of each of them; what has a name."""
    fronts = report.fronts()[: MAX_FINALISTS // 2]
    chosen = [row for front in fronts for row in _thinned(front, MAX_FINALISTS // len(fronts))]
    named = [row for row in report.usable() if row.name is not None and row not in chosen]
    return [*chosen, *named]


def _thinned(front: list[TrialRow], most: int) -> list[TrialRow]:
    """A long front is thinned evenly; its two ends stay."""
    step = (len(front) - 1) / (most - 1)
    return front if step <= 1 else [front[round(i * step)] for i in range(most)]


def _saved_finalists(run: RunDirectory) -> list[dict[str, Any]] | None:
    if not run.finalists.exists():
        return None
    try:
        found: list[dict[str, Any]] = read_record(run.finalists)["finalists"]
        return found
    except CorruptFile as error:
        logger.warning("%s; the finalists will be judged again", error)
        return None


def _already_judged(
    run: RunDirectory,
    chosen: list[TrialRow],
    config: SearchConfig,
    executor: Executor,
    stopping: threading.Event,
) -> bool:
    saved = _saved_finalists(run)
    if saved is None or any(entry.get("test") is None or entry.get("failure") for entry in saved):
        return False
    if {entry["number"] for entry in saved} != {row.number for row in chosen}:
        return False
    here = identity_here(config, executor, stopping)
    # Where the target does not answer, nothing can be measured, and the table says where it was made.
    return here is None or not any(differing(entry.get("identity") or {}, here) for entry in saved)


def _judge(
    study: Study,
    config: SearchConfig,
    chosen: list[TrialRow],
    executor: Executor,
    watcher: _Watcher,
    stopping: threading.Event,
) -> list[dict[str, Any]] | None:
    base = next((row for row in chosen if row.name == study.space.baseline), chosen[0])
    shared = {"config": config.dump()}
    trials = {trial.number: trial for trial in study.trials()}
    tests: dict[int, Future[Outcome]] = {}
    for row in chosen:
        result = trials[row.number].result
        payload = {
            **shared,
            "architecture": row.architecture,
            "directory": str(study.run.trial(row.number)),
            "weights_sha256": result.weights_sha256 if result else None,
        }
        tests[row.number] = executor.submit(
            "nas.search_jobs:finalist_metrics",
            payload,
            time_limit=config.trial_timeout,
            tag=f"test of trial {row.number}",
        )
    architectures = {str(row.number): row.architecture for row in chosen}
    if not _finish(list(tests.values()), stopping):
        return None
    payload = {
        **shared,
        "architectures": architectures,
        "reference": str(base.number),
        "scale": str(study.run.scale),
    }
    timed = executor.submit(
        "nas.search_jobs:finalists_latency",
        payload,
        time_limit=None if config.trial_timeout is None else config.trial_timeout + _TOGETHER_SECONDS,
        tag="latency of the finalists",
        **placed(config.target),
    )
    if not _finish([timed], stopping):
        return None
    latencies = timed.result()
    lost = latencies.failure.reason if latencies.failure is not None else None
    if lost is not None:
        watcher.note(f"the finalists could not be measured again: {lost}")
    judged = []
    for row in chosen:
        outcome = tests[row.number].result()
        if outcome.failure is not None:
            watcher.note(f"trial {row.number} could not be evaluated on test data: {outcome.failure.reason}")
        test = outcome.value["metrics"] if outcome.value else None
        measured = {"failure": lost} if latencies.value is None else latencies.value[str(row.number)]
        judged.append(
            {"number": row.number, "name": row.name, "test": test, "baseline": base.number, **measured}
        )
    return judged


def _finish(futures: list[Future[Outcome]], stopping: threading.Event) -> bool:
    while wait(futures, timeout=0.2).not_done:
        if stopping.is_set():
            return False
    return True


def _drop_weights(study: Study, keep: set[int]) -> None:
    for trial in study.trials():
        if trial.number not in keep and trial.result is not None:
            folder = study.run.trial(trial.number)
            for name in ("weights.safetensors", "weights.safetensors.sha256"):
                (folder / name).unlink(missing_ok=True)


# -- files -------------------------------------------------------------------------------------------------------------


def write_report_files(report: RunReport, run: RunDirectory) -> None:
    """``pareto.csv``, ``pareto.png`` and ``report.html`` in the run directory, each written whole or not at all."""
    from nas.report.html import write_html
    from nas.report.pareto_csv import write_pareto_csv
    from nas.report.pareto_png import write_pareto_png

    write_pareto_csv(report, run.csv)
    write_pareto_png(report, run.png)
    write_html(report, run.html)
