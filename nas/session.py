"""One run from start to report: set it up or take it up again, search, conclude."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nas.conclude import conclude, identity_here, measured_elsewhere
from nas.config import SearchConfig, to_yaml
from nas.controllers import make_controller
from nas.environment import describe_environment
from nas.errors import RunStopped, UserMistake
from nas.executors import LocalExecutor, RayExecutor
from nas.executors.ray_targets import placed, split_ray_target
from nas.files import atomic_write_text
from nas.joining import JoinedStudy
from nas.loop import Observer, Search
from nas.pruning import CurvePruner
from nas.recorded import edits, put_back, read_recorded, write_start
from nas.resolve import (
    CHANGEABLE,
    changed_keys,
    objectives_of,
    openmp_settings,
    probe_architectures,
    resolve,
    resolved_storage,
)
from nas.run_directory import RunDirectory
from nas.shared import joined_settings, require_shareable, shared_identity
from nas.study import Study
from spaces import get_space
from spaces.loading import load_object

if TYPE_CHECKING:
    from nas.executors import Executor
    from nas.recorded import Recorded
    from nas.records import StoredTrial
    from nas.report.data import RunReport
    from spaces import Architecture, SearchSpace

__all__ = ["Session", "SessionObserver", "Stopped", "default_directory"]

logger = logging.getLogger(__name__)


class SessionObserver(Observer, Protocol):
    """Who watches a whole run."""

    def space(self, space: SearchSpace, config: SearchConfig, found: Mapping[str, Any]) -> None:
        """What the space is, before the search; ``found`` is what ``nas.search_jobs.probe`` returned."""

    def searching(self, config: SearchConfig, finished: Sequence[StoredTrial]) -> None:
        """The search begins; the results of ``finished`` are known from before."""

    def concluding(self, text: str) -> None:
        """Work after the search."""


class Stopped(Exception):
    """The user asked to stop before the search had begun."""


@dataclass
class _SetUp:
    config: SearchConfig
    space: SearchSpace
    study: Study
    facts: dict[str, Any]


def default_directory(space: str, join: str | None = None) -> Path:
    """``runs/SPACE-DATE-TIME`` below the current directory, ``runs/STUDY-HOST-PID`` for one of several drivers."""
    if join is not None:
        name = "".join(char if char.isalnum() or char in "-_" else "-" for char in join)
        return Path("runs") / f"{name}-{socket.gethostname()}-{os.getpid()}"
    name = "".join(char if char.isalnum() or char in "-_" else "-" for char in Path(space.split(":")[0]).stem)
    return Path("runs") / f"{name or 'search'}-{datetime.now():%Y%m%d-%H%M%S}"


class Session:
    """Drives one run directory.

    ``stop()`` may be called from a signal handler or another thread at any time: running candidates go back into
    the queue, and what is finished stays.
    """

    def __init__(
        self,
        out: Path,
        observer: SessionObserver,
        executor: Executor | None = None,
        space: SearchSpace | None = None,
    ):
        self.run_directory = RunDirectory(out)
        self._new_parents = [parent for parent in out.parents if not parent.exists()]
        self.observer = observer
        self.stopping = threading.Event()
        self._executor = executor
        self._space = space
        self._search: Search | None = None

    def stop(self) -> None:
        """Stop as soon as it is safe."""
        self.stopping.set()
        if self._search is not None:
            self._search.stopping.set()

    def run(self, given: Mapping[str, Any]) -> RunReport:
        """Start the run that ``given`` describes, or go on with the one that is in the directory already.

        ``given`` holds the keys of a recipe; a directory that holds a run needs none of them.
        Raises UserMistake, RunStopped.
        """
        try:
            if not self.run_directory.holds_run() and not self.run_directory.is_empty():
                raise UserMistake(
                    f"--out {self.run_directory.path}: holds files but no run; give an empty or a new directory"
                )
            self.run_directory.acquire()
            # Only now: until it had the lock, another driver may have started a run here.
            set_up = self._resume(given) if self.run_directory.holds_run() else self._start(given)
            self._drive(set_up)
            return conclude(
                set_up.study, set_up.config, set_up.facts, self._executor, self.observer, self.stopping
            )
        finally:
            if self._executor is not None:
                self._executor.close(kill=True)
            self.run_directory.discard_if_empty()
            self.run_directory.release()
            for parent in self._new_parents:  # ours if a refused start made them, and gone only if empty
                with contextlib.suppress(OSError):
                    parent.rmdir()

    # -- setting up ------------------------------------------------------------------------------------------------

    def _start(self, given: Mapping[str, Any]) -> _SetUp:
        shared = self._shared(given) if given.get("join") else None
        config = resolve(SearchConfig.parse(given if shared is None else joined_settings(given, shared)))
        if config.join is None:
            Study.require_free(self.run_directory, config.dump())
        executor = self._make_executor(config)
        config = _with_places(config, executor)
        space = self._space or get_space(config.space, task=config.task)
        make_controller(config.controller, space, ["minimize"], config.seed, **config.controller_options)
        _check_evaluator(config.evaluator)
        facts: dict[str, Any] = {
            "objective": None,
            "candidates": {},
            "task": {},
            "epochs": config.epochs or 1,
        }
        if shared is not None:
            facts = dict(shared["facts"])
        elif ":" not in config.evaluator:
            facts = self._probe(executor, config, space)
        objectives = objectives_of(config, facts["objective"])
        resolved = {"objectives": [f"{name}:{direction}" for name, direction in objectives]}
        config = SearchConfig.parse({**config.dump(), **resolved})
        self.observer.space(space, config, facts)
        _refuse_impossible_budgets(config, facts)
        make_controller(
            config.controller, space, [d for _, d in objectives], config.seed, **config.controller_options
        )
        facts.setdefault("started", datetime.now().astimezone().isoformat(timespec="seconds"))
        if shared is not None:
            self._warn_of_conditions(
                executor, config, [found["latency"] for found in facts.get("candidates", {}).values()]
            )
        facts["environment"] = describe_environment(gpu=config.device != "cpu")
        if config.join is not None:
            joined, facts = JoinedStudy.begin(self.run_directory, space, objectives, config.dump(), facts)
            facts = write_start(self.run_directory, config, facts)
            return _SetUp(_with_total(config, joined), space, joined, facts)
        facts = write_start(self.run_directory, config, facts)
        study = Study.create(self.run_directory, space, objectives, config.dump(), facts)
        return _SetUp(config, space, study, facts)

    def _shared(self, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the study to be joined says of itself; None when this driver is the first."""
        url = require_shareable(resolved_storage(given.get("storage")))
        return shared_identity(self.run_directory, url, str(given["join"]))

    def _resume(self, given: Mapping[str, Any]) -> _SetUp:
        recorded = read_recorded(self.run_directory)
        _refuse_edited(recorded, self.run_directory)
        config = recorded.config
        if changes := changed_keys(given, config):
            raise UserMistake(
                f"{self.run_directory.path}: holds a run with other settings ({'; '.join(changes)}); "
                "start this one with another --out"
            )
        wanted = {key: value for key, value in given.items() if key in CHANGEABLE and value is not None}
        config = resolve(SearchConfig.parse({**config.dump(), **wanted}))
        executor = self._make_executor(config)
        config = _with_places(config, executor)
        space = self._space or get_space(config.space, task=config.task)
        objectives = objectives_of(config, None)
        study, mended = Study.open(self.run_directory, space, objectives, config.dump(), recorded.facts)
        results = [trial.result for trial in study.trials() if trial.result is not None]
        self._warn_of_conditions(executor, config, [result.latency for result in results if result.latency])
        for line in [*put_back(self.run_directory, recorded), *mended]:
            self.observer.note(line)
        if config.join is None and (changed := edits(recorded.config, study.started_config())):
            texts = "; ".join(changed.values())
            self.observer.note(f"{self.run_directory.recipe} was changed since the last session: {texts}")
        study.adopt(config.dump())
        config = _with_total(config, study)
        atomic_write_text(self.run_directory.recipe, to_yaml(config))
        return _SetUp(
            config, space, study, recorded.facts or {"candidates": {}, "epochs": config.epochs or 1}
        )

    def _make_executor(self, config: SearchConfig) -> Executor:
        model = ":" not in config.evaluator
        if self._executor is None and config.ray is not None:
            self._executor = RayExecutor(
                config.workers,
                address=config.ray,
                cpus_per_trial=config.cpus_per_trial,
                gpus_per_trial=config.gpus_per_trial,
                runtime_env=config.ray_runtime_env,
                measure_on=split_ray_target(config.target or "")[0],
                memory_limit_bytes=config.memory_limit,
                retries=config.retries,
                environment=openmp_settings(config, os.environ),
                setup="nas.evaluators.train" if model else "nas.trial",
                announce=True,
            )
        elif self._executor is None:
            executor = LocalExecutor(
                config.workers or 1,
                memory_limit_bytes=config.memory_limit or _share_of_memory(config.workers or 1),
                retries=config.retries,
                log_directory=None,
                environment=openmp_settings(config, os.environ),
                setup="nas.evaluators.train" if model else "nas.trial",
            )
            executor.warm()
            if executor.capacity < (config.workers or 1):
                self.observer.note(
                    f"{executor.capacity} of {config.workers} workers: there are too few file handles for more; "
                    "raise the limit with `ulimit -n 1024`"
                )
            self._executor = executor
        return self._executor

    def _probe(self, executor: Executor, config: SearchConfig, space: SearchSpace) -> dict[str, Any]:
        payload = {"config": config.dump(), "architectures": probe_architectures(space, config.seed)}
        future = executor.submit("nas.search_jobs:probe", payload, tag="probe", **placed(config.target))
        while not wait([future], timeout=0.2).done:
            if self.stopping.is_set():
                raise Stopped
        outcome = future.result()
        if outcome.failure is not None:
            logger.debug("%s", outcome.failure.log_tail)
            raise RunStopped(f"the search space could not be sized: {outcome.failure.reason}")
        found = outcome.value or {}
        if "mistake" in found:
            raise UserMistake(found["mistake"])
        return found

    def _warn_of_conditions(
        self, executor: Executor, config: SearchConfig, latencies: Sequence[Mapping[str, Any]]
    ) -> None:
        """Say it before the search when latencies of several machines or conditions would meet in one run."""
        if ":" in config.evaluator or not latencies:
            return
        here = identity_here(config, executor, self.stopping)
        if here is not None and (line := measured_elsewhere(latencies, here)):
            self.observer.note(line)

    # -- searching -------------------------------------------------------------------------------------------------

    def _drive(self, set_up: _SetUp) -> None:
        config, study, space = set_up.config, set_up.study, set_up.space
        assert self._executor is not None  # made while setting up
        directions = [direction for _, direction in study.objectives]
        controller = make_controller(
            config.controller,
            space,
            directions,
            study.controller_seed(config.seed),
            **config.controller_options,
        )
        study.stop_waiting(self.stopping)
        pruner = CurvePruner(config.pruner, int(set_up.facts.get("epochs") or config.epochs or 1))
        self._search = Search(config, study, controller, self._executor, pruner, self.observer)
        if self.stopping.is_set():
            self._search.stopping.set()
        self.observer.searching(config, [trial for trial in study.trials() if trial.result is not None])
        started = time.monotonic()
        self._search.run(_first_architectures(space, config))
        study.gather()
        logger.info("searched for %.1f s", time.monotonic() - started)


def _with_places(config: SearchConfig, executor: Executor) -> SearchConfig:
    """On a cluster, how many candidates run at a time is known only now."""
    if config.workers is not None:
        return config
    places = executor.workers if isinstance(executor, RayExecutor) else executor.capacity
    return config.model_copy(update={"workers": places})


def _with_total(config: SearchConfig, study: Study) -> SearchConfig:
    return config.model_copy(update={"trials": study.total(config.trials)})


def _share_of_memory(workers: int) -> int:
    import psutil

    return int(psutil.virtual_memory().total * 0.8 / workers)


def _check_evaluator(name: str) -> None:
    """Raises UserMistake now for what would otherwise fail every candidate."""
    if name.startswith("script:"):
        return
    if ":" in name:
        load_object(name)
    else:
        from nas.evaluators import EVALUATORS

        if name not in EVALUATORS.names():
            EVALUATORS.get(name)


def _first_architectures(space: SearchSpace, config: SearchConfig) -> list[tuple[str, Architecture]]:
    """The baseline, then published variants, at most a third of the trials: the rest is for searching."""
    if not config.published:
        return []
    names = sorted(space.published, key=lambda name: name != space.baseline)
    return [(name, space.published[name]) for name in names[: max(1, config.trials // 3)]]


def _refuse_impossible_budgets(config: SearchConfig, facts: Mapping[str, Any]) -> None:
    smallest = facts["candidates"].get("smallest")
    if smallest is None:
        return
    costs = {
        "latency_budget": (smallest["latency"]["low_ms"], "ms"),
        "params_budget": (smallest["params"], "parameters"),
        "macs_budget": (smallest["macs"], "MACs"),
    }
    for key, (least, unit) in costs.items():
        budget = getattr(config, key)
        if budget is not None and least > budget:
            raise UserMistake(
                f"--{key.replace('_', '-')} {budget:g}: the smallest architecture of the space takes "
                f"{least:.4g} {unit} on {config.target}; give at least that, or another space"
            )


def _refuse_edited(recorded: Recorded, run: RunDirectory) -> None:
    if recorded.edited:
        raise UserMistake(
            f"{run.recipe}: differs from what the run was started with ({'; '.join(recorded.edited.values())}); "
            f"start another run with --out, or write the original back with 'nas doctor --repair {run.path}'"
        )
