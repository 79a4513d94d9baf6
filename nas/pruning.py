"""Stopping a candidate early without losing the front.

Optuna's pruners rank learning curves, and Optuna refuses them for several objectives. Here a candidate is compared
only with those that are at least as good in every objective known before training (latency, size), so that a small,
fast, less accurate candidate is not stopped for being less accurate than a large one.

``median`` and ``successive_halving`` apply Optuna's rule as it is to the finished ones of that group. ``asha`` and
``hyperband`` are for many workers: a candidate that reaches a rung is compared at once with all that have reached it
before, finished or not, so that nobody waits for a straggler and the first of many parallel candidates already count.
"""

from __future__ import annotations

import binascii
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial

__all__ = ["PRUNERS", "CurvePruner", "Rungs"]

PRUNERS = ("median", "successive_halving", "asha", "hyperband", "none")
_REDUCTION = 3
"""One in so many goes on from a rung, and the next rung is so many times higher."""
_STUDY_NAME = "curves"


class CurvePruner:
    """Decides on learning curves (epoch -> quality, more is better) with one of Optuna's pruners.

    Args:
        name: one of ``PRUNERS``.
        max_epochs: the last step of a full evaluation.
        startup: curves that must exist among a candidate's rivals before it may be stopped: finished ones, or
            with ``asha`` and ``hyperband`` those that have reached the same rung.
    """

    def __init__(self, name: str, max_epochs: int, startup: int = 5):
        import optuna

        smallest = max(1, max_epochs // _REDUCTION**2)
        self._rungs = None
        if name in ("asha", "hyperband"):
            self._rungs = Rungs(smallest, max_epochs, brackets=name == "hyperband")
        self._pruner = None if self._rungs else _make_pruner(name, max_epochs, smallest, startup)
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
            if self._rungs is not None:
                better, rivals_there = self._rungs.reach(
                    number, epoch, quality, lambda other: self._no_costlier(other, number)
                )
                return not better and rivals_there >= self._startup
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
            if self._has_memory or self._rungs is not None:
                self.should_stop(number, epoch, curve[epoch])
            else:
                self._study._storage.set_trial_intermediate_value(self._ids[number], epoch, curve[epoch])
        self.finish(number, complete=complete)

    def _no_costlier(self, other: int, number: int) -> bool:
        return all(a <= b for a, b in zip(self._costs[other], self._costs[number], strict=True))


class Rungs:
    """Asynchronous successive halving, and Hyperband as several of them, on qualities of which more is better.

    Li, Jamieson, Rostamizadeh, Gonina, Hardt, Recht, Talwalkar, "A System for Massively Parallel Hyperparameter
    Tuning", MLSys 2020, in the form that stops candidates instead of pausing them: one that is not among the best
    third of those that have reached a rung so far does not go on (among fewer than three: not the best). Hyperband (Li
    et al., JMLR 18, 2018) gives each candidate one of several brackets, which begin at ever higher rungs and do not
    know of each other; the bracket follows from the number of the candidate alone, by Optuna's rule.

    Args:
        smallest: epochs to the first rung, at least 1.
        max_epochs: epochs of a full evaluation; a rung there would decide nothing.
        brackets: several brackets (Hyperband) instead of one.
    """

    def __init__(self, smallest: int, max_epochs: int, *, brackets: bool = False) -> None:
        self._max_epochs = max_epochs
        self._levels: list[int] = []
        while smallest * _REDUCTION ** len(self._levels) < max_epochs:
            self._levels.append(smallest * _REDUCTION ** len(self._levels))
        count = len(_powers_within(max_epochs // smallest)) if brackets else 1
        # As many epochs for each bracket: one that begins higher gets fewer candidates.
        self._shares = [
            math.ceil(count * _REDUCTION**halvings / (halvings + 1)) for halvings in reversed(range(count))
        ]
        self._reached: dict[tuple[int, int], dict[int, float]] = {}

    def bracket(self, number: int) -> int:
        """Which bracket a candidate belongs to; the one with number 0 begins at the lowest rung."""
        place = binascii.crc32(f"{_STUDY_NAME}_{number}".encode()) % sum(self._shares)
        for bracket, share in enumerate(self._shares):
            place -= share
            if place < 0:
                return bracket
        raise AssertionError("the place is below the sum of the shares")

    def reach(
        self, number: int, epoch: int, quality: float, rival: Callable[[int], bool]
    ) -> tuple[bool, int]:
        """Whether a candidate is among the best at the highest rung that it reaches with this epoch.

        Args:
            number: the candidate.
            epoch: the epoch just finished; every rung up to it that has no quality of the candidate yet is reached.
            quality: its quality; NaN is never among the best and sets no bar.
            rival: whether another candidate, by its number, is to be compared with.

        Returns:
            Whether it goes on, and with how many rivals it was compared; (True, 0) between rungs and at the end.
        """
        if epoch >= self._max_epochs:
            return True, 0
        bracket = self.bracket(number)
        going_on, rivals = True, 0
        for level in self._levels[bracket:]:
            reached = self._reached.setdefault((bracket, level), {})
            if level > epoch or (number in reached and level < epoch):
                continue
            others = [value for other, value in reached.items() if other != number and rival(other)]
            room = max(1, (len(others) + 1) // _REDUCTION)
            going_on = sum(value > quality for value in others) < room and not math.isnan(quality)
            rivals = len(others)
            if not math.isnan(quality):
                reached[number] = quality
        return going_on, rivals


def _powers_within(ratio: int) -> list[int]:
    """1, 3, 9, ... up to ``ratio``."""
    powers = [1]
    while powers[-1] * _REDUCTION <= ratio:
        powers.append(powers[-1] * _REDUCTION)
    return powers


def _comparable_study(storage: Any) -> Any:
    """An in-memory study that shows a pruner only the trials set in ``comparable``."""
    import optuna

    class ComparableStudy(optuna.Study):
        comparable: set[int]

        def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
            found = super().get_trials(deepcopy=deepcopy, states=states)
            return [trial for trial in found if trial._trial_id in self.comparable]

    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], study_name=_STUDY_NAME)
    study = ComparableStudy(storage.get_study_name_from_id(study_id), storage)
    study.comparable = set()
    return study


def _make_pruner(name: str, max_epochs: int, smallest: int, startup: int) -> BasePruner | None:
    from optuna import pruners

    if name == "none":
        return None
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=max(1, max_epochs // 4))
    if name == "successive_halving":
        return pruners.SuccessiveHalvingPruner(min_resource=smallest, reduction_factor=_REDUCTION)
    raise ValueError(f"unknown pruner {name!r}; known: {', '.join(PRUNERS)}")
