"""Stopping a candidate early without losing the front.

Optuna's pruners rank learning curves, and Optuna refuses them for several objectives. Here a candidate is compared
only with those that are at least as good in every objective known before training (latency, size), so that a small,
fast, less accurate candidate is not stopped for being less accurate than a large one: within that group Optuna's
rule is applied as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial

__all__ = ["CurvePruner"]


class CurvePruner:
    """Decides on learning curves (epoch -> quality, more is better) with one of Optuna's pruners.

    Args:
        name: median, successive_halving or none.
        max_epochs: the last step of a full evaluation.
        startup: finished curves that must exist among a candidate's rivals before it may be stopped.
    """

    def __init__(self, name: str, max_epochs: int, startup: int = 5):
        import optuna

        self._pruner = _make_pruner(name, max_epochs, startup)
        self._startup = startup
        self._has_memory = name == "successive_halving"  # it notes each trial's rungs as it decides
        self._study = _comparable_study(optuna.storages.InMemoryStorage())
        self._ids: dict[int, int] = {}
        self._costs: dict[int, tuple[float, ...]] = {}
        self._finished: set[int] = set()
        self._lock = threading.Lock()

    def start(self, number: int, costs: Sequence[float]) -> None:
        """Tell a trial and those of its objectives that are known before training, all to be minimised."""
        import optuna

        with self._lock:
            running = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
            self._ids[number] = self._study._storage.create_new_trial(self._study._study_id, running)
            self._costs[number] = tuple(costs)

    def should_stop(self, number: int, epoch: int, quality: float) -> bool:
        """Record the quality of a started trial after ``epoch`` and decide. Safe to call from several threads."""
        with self._lock:
            if number not in self._ids:
                return False
            trial_id = self._ids[number]
            self._study._storage.set_trial_intermediate_value(trial_id, epoch, quality)
            if self._pruner is None:
                return False
            rivals = {other for other in self._finished if self._no_costlier(other, number)}
            self._study.comparable = {self._ids[other] for other in rivals} | {trial_id}
            stop = self._pruner.prune(self._study, self._study._storage.get_trial(trial_id))
            return bool(stop) and len(rivals) >= self._startup

    def finish(self, number: int, *, complete: bool) -> None:
        """Tell that a trial has ended; only complete ones set the bar for others under the median rule."""
        from optuna.trial import TrialState

        with self._lock:
            if number not in self._ids or number in self._finished:
                return
            trial = self._study._storage.get_trial(self._ids[number])
            if not trial.intermediate_values:
                return
            last = trial.intermediate_values[max(trial.intermediate_values)]
            state = TrialState.COMPLETE if complete else TrialState.PRUNED
            self._study._storage.set_trial_state_values(self._ids[number], state, [last])
            self._finished.add(number)

    def replay(
        self, number: int, costs: Sequence[float], curve: Mapping[int, float], *, complete: bool
    ) -> None:
        """Tell a finished trial of an earlier session, epoch by epoch, as it happened."""
        self.start(number, costs)
        for epoch in sorted(curve):
            if self._has_memory:
                self.should_stop(number, epoch, curve[epoch])
            else:
                self._study._storage.set_trial_intermediate_value(self._ids[number], epoch, curve[epoch])
        self.finish(number, complete=complete)

    def _no_costlier(self, other: int, number: int) -> bool:
        return all(a <= b for a, b in zip(self._costs[other], self._costs[number], strict=True))


def _comparable_study(storage: Any) -> Any:
    """An in-memory study that shows a pruner only the trials set in ``comparable``."""
    import optuna

    class ComparableStudy(optuna.Study):
        comparable: set[int]

        def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
            found = super().get_trials(deepcopy=deepcopy, states=states)
            return [trial for trial in found if trial._trial_id in self.comparable]

    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], study_name="curves")
    study = ComparableStudy(storage.get_study_name_from_id(study_id), storage)
    study.comparable = set()
    return study


def _make_pruner(name: str, max_epochs: int, startup: int) -> BasePruner | None:
    from optuna import pruners

    smallest = max(1, max_epochs // 9)
    if name == "none":
        return None
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=max(1, max_epochs // 4))
    if name == "successive_halving":
        return pruners.SuccessiveHalvingPruner(min_resource=smallest, reduction_factor=3)
    raise ValueError(f"unknown pruner {name!r}; known: median, successive_halving, none")
