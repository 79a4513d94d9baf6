"""The loop: ask, submit, record, tell. It owns no policy; each step is another module's."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any, Protocol

from nas.errors import RunStopped, SpaceExhausted, UserMistake
from nas.executors.ray_targets import placed
from nas.study import KeyTaken, StoredTrial, Study, StudyFull, TakenOver, TrialResult
from nas.trial_parts import drop_checkpoints

if TYPE_CHECKING:
    from nas.config import SearchConfig
    from nas.controllers import Controller
    from nas.executors import Executor, Outcome
    from nas.pruning import CurvePruner
    from spaces import Architecture

__all__ = ["Observer", "Search"]

logger = logging.getLogger(__name__)

_SAMPLE = ("work", "median_ms", "conditions", "trusted")
_SAMPLES = 300

MAX_CONSECUTIVE_FAILURES = 12
"""So many failures on end, and not one success before, mean that the set-up is at fault and not the candidates."""


class Observer(Protocol):
    """Who watches a search: the terminal, a log, a test."""

    def started(self, trial: StoredTrial) -> None:
        """A candidate begins."""

    def stage(self, trial: StoredTrial, event: dict[str, Any]) -> None:
        """A candidate was counted, measured, or finished an epoch. Called from the executor's threads."""

    def finished(self, trial: StoredTrial) -> None:
        """A result was recorded."""

    def note(self, text: str) -> None:
        """Something a person should know."""


class Search:
    """One session of a search over a study that may hold earlier trials already."""

    def __init__(
        self,
        config: SearchConfig,
        study: Study,
        controller: Controller,
        executor: Executor,
        pruner: CurvePruner,
        observer: Observer,
    ):
        self.config = config
        self.study = study
        self.controller = controller
        self.executor = executor
        self.pruner = pruner
        self.observer = observer
        self.stopping = threading.Event()
        self._running: dict[Future[Outcome], StoredTrial] = {}
        self._waiting: deque[StoredTrial] = deque()
        self._first: deque[tuple[str, Architecture]] = deque()
        self._told_waiting = False
        self._succeeded = False
        self._failures_on_end = 0
        self._exhausted = False

    def run(self, first: Sequence[tuple[str, Architecture]] = ()) -> None:
        """Search until the trials or the time are used up, the space is exhausted, or ``stopping`` is set.

        ``first``: named architectures to evaluate before the controller is asked. When stopped, running candidates
        go back into the queue of the study. Raises RunStopped when every candidate fails.
        """
        self._replay(first)
        deadline = None if self.config.time_budget is None else time.monotonic() + self.config.time_budget
        try:
            while not self.stopping.is_set():
                self._listen()
                self._fill(deadline)
                if not self._running:
                    if not self._worth_waiting(deadline):
                        break
                    self.stopping.wait(0.2)
                    continue
                done, _ = wait(self._running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finish(self._running.pop(future), future.result())
        finally:
            self._park_running()

    # -- what is already known -------------------------------------------------------------------------------------

    def _replay(self, first: Sequence[tuple[str, Architecture]]) -> None:
        self._waiting.extend(self.study.recover())
        trials = self.study.trials()
        known = {trial.key for trial in trials}
        for trial in trials:
            if trial.result is not None:
                self._tidy(trial)  # its driver may have died before it could
            self._take_in(trial)
        for name, architecture in first:
            if self.study.space.key(architecture) not in known:
                known.add(self.study.space.key(architecture))
                self._first.append((name, architecture))

    def _take_in(self, trial: StoredTrial) -> None:
        if trial.result is None:
            self.controller.reserve(trial.architecture)
        else:
            self._tell(trial)
            self._replay_curve(trial, trial.result)

    # -- what other drivers do -------------------------------------------------------------------------------------

    def _listen(self) -> None:
        for trial in self.study.news():
            self._take_in(trial)
            if trial.result is not None:
                self.observer.finished(trial)

    def _worth_waiting(self, deadline: float | None) -> bool:
        """Whether other drivers may yet leave something to do, or to report."""
        if deadline is not None and time.monotonic() >= deadline:
            return False
        at_work = self.study.others_at_work()
        if at_work and not self._told_waiting:
            self._told_waiting = True
            self.observer.note(
                "all candidates are given out; waiting for those of other drivers (Ctrl-C: stop)"
            )
        return at_work

    def _replay_curve(self, trial: StoredTrial, result: TrialResult) -> None:
        curve = {int(point["epoch"]): float(point["quality"]) for point in result.curve if "quality" in point}
        costs = self._known_costs({**result.metrics, **_latency_metric(result.latency)})
        if curve and len(costs) >= len(self.study.objectives) - 1:
            self.pruner.replay(trial.number, costs, curve, complete=result.state == "complete")

    # -- asking ----------------------------------------------------------------------------------------------------

    def _fill(self, deadline: float | None) -> None:
        while len(self._running) < self.executor.capacity and not self.stopping.is_set():
            if deadline is not None and time.monotonic() >= deadline:
                return
            trial = self._next()
            if trial is None:
                return
            self._submit(trial)

    def _next(self) -> StoredTrial | None:
        if self._waiting:
            return self.study.claim(self._waiting.popleft())
        if (left := self.study.take_over()) is not None:
            return left
        while self.study.size < self.study.total(self.config.trials) and not self._exhausted:
            try:
                return self._suggest(*self._propose())
            except KeyTaken:  # by another driver, a moment ago; the controller knows the architecture now
                self._listen()
            except StudyFull:
                return None
            except SpaceExhausted:
                self._exhausted = True
                self.observer.note(f"every architecture of the space has been evaluated ({self.study.size})")
        return None

    def _propose(self) -> tuple[Architecture, str | None]:
        if not self._first:
            return self.controller.ask(), None
        name, architecture = self._first.popleft()
        self.controller.reserve(architecture)
        return architecture, name

    def _suggest(self, architecture: Architecture, name: str | None) -> StoredTrial:
        base = self.config.seed * 1_000_003
        return self.study.suggest(architecture, name=name, seed=lambda number: (base + number) % 2**31)

    def _submit(self, trial: StoredTrial) -> None:
        directory = self.study.run.trial(trial.number)
        payload = {
            "number": trial.number,
            "key": trial.key,
            "architecture": trial.architecture,
            "seed": trial.seed,
            "directory": str(directory),
            "scale": str(self.study.run.scale),
            "named": trial.name is not None,
            "measured": self._measured(),
            "log": str(directory / "log.txt"),
            "config": self.config.dump(),
            "objectives": [list(objective) for objective in self.study.objectives],
        }
        self.observer.started(trial)
        try:
            future = self.executor.submit(
                "nas.trial:run_trial",
                payload,
                on_event=lambda event: self._on_event(trial, event, payload),
                time_limit=self.config.trial_timeout,
                tag=f"trial {trial.number}",
            )
        except BaseException:  # Ctrl-C in a job of this very process, an executor that was closed
            self.study.park(trial)
            raise
        self._running[future] = trial

    def _measured(self) -> list[dict[str, Any]]:
        """Work and latency of what was measured, for predicting the next ones; only a budget asks for that."""
        if self.config.latency_budget is None:
            return []
        found = [
            trial.result.latency for trial in self.study.trials() if trial.result and trial.result.latency
        ]
        return [
            {name: latency[name] for name in _SAMPLE} for latency in found[-_SAMPLES:] if "work" in latency
        ]

    def _on_event(
        self, trial: StoredTrial, event: dict[str, Any], payload: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Runs in a thread of the executor, one for each trial, so that waiting holds up nobody else."""
        if event["stage"] == "measure":
            return self._measure_elsewhere(payload)
        self.observer.stage(trial, event)
        if event["stage"] == "begun":
            self._start_pruning(trial, event)
        if event["stage"] == "report":
            return {"stop": self.pruner.should_stop(trial.number, event["epoch"], event["quality"])}
        return None

    def _measure_elsewhere(self, payload: dict[str, Any]) -> dict[str, Any] | None:
        """A job of its own on the node that carries the target, while the trial waits."""
        asked = {name: value for name, value in payload.items() if name not in ("directory", "log")}
        place = placed(self.config.target)
        limit = self.config.trial_timeout
        outcome = self.executor.submit("nas.trial:measure_trial", asked, time_limit=limit, **place).result()
        if outcome.failure is not None:
            return {"failed": [outcome.failure.kind, outcome.failure.reason]}
        return outcome.value

    def _start_pruning(self, trial: StoredTrial, metrics: dict[str, Any]) -> None:
        """Early stopping is fair only when every objective but the one of the curve is known before training."""
        costs = self._known_costs(metrics)
        if len(costs) >= len(self.study.objectives) - 1:
            self.pruner.start(trial.number, costs)

    def _known_costs(self, metrics: dict[str, Any]) -> list[float]:
        """The objectives that do not depend on training, as costs."""
        costs = []
        for name, direction in self.study.objectives:
            value = metrics.get(name)
            if name in ("latency_ms", "params", "macs") and isinstance(value, (int, float)):
                costs.append(value if direction == "minimize" else -value)
        return costs

    # -- recording -------------------------------------------------------------------------------------------------

    def _finish(self, trial: StoredTrial, outcome: Outcome) -> None:
        if outcome.failure is not None and outcome.failure.kind == "interrupted":
            self.study.park(trial)
            return
        if outcome.value is not None and "mistake" in outcome.value:
            self.study.park(trial)
            raise UserMistake(outcome.value["mistake"])
        if outcome.value is not None:
            result = TrialResult.from_dict(outcome.value)
        else:
            assert outcome.failure is not None  # an outcome has one of the two
            failure = {
                "kind": outcome.failure.kind,
                "reason": outcome.failure.reason,
                "log_tail": outcome.failure.log_tail,
            }
            result = TrialResult(state="failed", failure=failure, seconds=outcome.seconds)
        try:
            trial = self.study.record(trial, result)
        except TakenOver as error:
            self.observer.note(f"{error}; its result from here is not counted")
            self._tidy(trial)
            return
        self._tidy(trial)
        self.pruner.finish(trial.number, complete=result.state == "complete")
        self._tell(trial)
        self.observer.finished(trial)
        self._watch_failures(result)

    def _tidy(self, trial: StoredTrial) -> None:
        """Remove what a worker that was killed has left to go on from.

        What a user's function keeps in the directory is its own business.
        """
        if ":" not in self.config.evaluator:
            drop_checkpoints(self.study.run.trial(trial.number))

    def _tell(self, trial: StoredTrial) -> None:
        assert trial.result is not None  # only finished trials are told
        values = trial.result.values
        complete = trial.result.state == "complete"
        self.controller.tell(
            trial.architecture, [values[n] for n, _ in self.study.objectives] if complete else None
        )
        self._succeeded = self._succeeded or complete

    def _watch_failures(self, result: TrialResult) -> None:
        self._failures_on_end = self._failures_on_end + 1 if result.state == "failed" else 0
        if not self._succeeded and self._failures_on_end >= MAX_CONSECUTIVE_FAILURES:
            raise RunStopped(
                f"stopped: the first {self._failures_on_end} candidates all failed; {self.commonest_failure()}"
            )

    def commonest_failure(self) -> str:
        """The reason that most failed trials share, with a count; or that there is none."""
        failed = [trial for trial in self.study.trials() if trial.result and trial.result.failure]
        reasons = Counter(
            str(trial.result.failure["reason"]) for trial in failed if trial.result and trial.result.failure
        )
        if not reasons:
            return "no candidate was evaluated"
        reason, count = reasons.most_common(1)[0]
        first = next(
            t.number for t in failed if t.result and t.result.failure and t.result.failure["reason"] == reason
        )
        log = self.study.run.trial(first) / "log.txt"
        return f"commonest reason ({count} of {len(failed)}): {reason}; see {log}"

    def _park_running(self) -> None:
        """Stop what still runs and put it back into the queue; what finished in the meantime is recorded."""
        if not self._running:
            return
        self.executor.close(kill=True)
        for future, trial in list(self._running.items()):
            with contextlib.suppress(RunStopped, UserMistake):  # the first of them is on its way already
                self._finish(trial, future.result())
        self._running.clear()


def _latency_metric(latency: dict[str, Any] | None) -> dict[str, float]:
    return {"latency_ms": latency["median_ms"]} if latency else {}
