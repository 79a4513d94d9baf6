"""What the TPE controller needs of Optuna; a module of its own so that only making that controller imports Optuna."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

__all__ = ["Draw", "OptunaStudy", "categories", "interval", "steps"]

_STUDY_NAME = "controller"
# Optuna wants a date on every trial; a constant keeps the clock out of what is proposed.
_NO_DATE = datetime(2000, 1, 1)


def categories(count: int) -> BaseDistribution:
    """Codes 0 to ``count`` - 1 without order."""
    return CategoricalDistribution(range(count))


def steps(count: int) -> BaseDistribution:
    """Codes 0 to ``count`` - 1 in order."""
    return IntDistribution(0, count - 1)


def interval(low: float, high: float, log: bool) -> BaseDistribution:
    """Numbers from ``low`` to ``high``, uniform in the logarithm where ``log`` asks for it."""
    return FloatDistribution(low, high, log=log)


class _ShownTrials(InMemoryStorage):
    """Shows samplers a chosen part of the history, in the order of trial numbers, without copying it."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[FrozenTrial] = []

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self.shown if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        # Samplers leave notes here for other processes on the trial that they draw for; this one is never stored.
        pass


class OptunaStudy:
    """An Optuna study in memory of which the sampler sees what :meth:`draw` is given.

    Args:
        objectives: number of losses of each trial.
        distributions: of every parameter, over codes.
        candidates: samples of which TPE takes the one with the best acquisition value.
    """

    def __init__(
        self, objectives: int, distributions: Mapping[str, BaseDistribution], candidates: int
    ) -> None:
        self._distributions = dict(distributions)
        self._candidates = candidates
        self._storage = _ShownTrials()
        with _quiet():
            optuna.create_study(
                storage=self._storage, study_name=_STUDY_NAME, directions=["minimize"] * objectives
            )

    def trial(self, number: int, codes: Mapping[str, Any], losses: Sequence[float] | None) -> FrozenTrial:
        """A trial to be shown; without losses (pending, failed, pruned) it counts among the bad ones."""
        # A running trial is what TPE's constant liar always puts among the bad.
        return FrozenTrial(
            number=number,
            trial_id=number,
            state=TrialState.RUNNING if losses is None else TrialState.COMPLETE,
            value=None,
            values=None if losses is None else list(losses),
            datetime_start=_NO_DATE,
            datetime_complete=None if losses is None else _NO_DATE,
            params=dict(codes),
            distributions={name: self._distributions[name] for name in codes},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )

    def draw(self, trials: Sequence[FrozenTrial], seed: int) -> Draw:
        """A source of proposals by TPE.

        Args:
            trials: in the order of their numbers, at least one of them with losses.
            seed: from 0 to 2**32 - 1.
        """
        self._storage.shown = list(trials)
        with _quiet():
            sampler = TPESampler(
                multivariate=True,
                constant_liar=True,
                n_startup_trials=0,
                n_ei_candidates=self._candidates,
                seed=seed,
            )
            study = optuna.load_study(study_name=_STUDY_NAME, storage=self._storage, sampler=sampler)
        return Draw(study, self.trial(trials[-1].number + 1, {}, None), self._distributions)


class Draw:
    """Draws codes of parameters jointly; every draw goes on in the same random sequence."""

    def __init__(
        self, study: optuna.Study, trial: FrozenTrial, distributions: Mapping[str, BaseDistribution]
    ) -> None:
        self._study = study
        self._trial = trial
        self._distributions = distributions

    def __call__(self, names: Sequence[str]) -> dict[str, Any]:
        """Codes of ``names``, modelled on the trials that have all of them."""
        group = {name: self._distributions[name] for name in names}
        return self._study.sampler.sample_relative(self._study, self._trial, group)


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back Optuna's notes on experimental arguments and new studies, and nothing else, for a moment."""
    verbosity = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
        try:
            yield
        finally:
            optuna.logging.set_verbosity(verbosity)
