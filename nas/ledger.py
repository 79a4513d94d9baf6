"""Trials in an Optuna storage: written with one transaction per suggestion and one per result, read in bulk.

Through Optuna's public interface a suggestion with 44 parameters costs some 180 statements, a result two commits, and
reading 2,000 trials a JSON document per parameter. ``DatabaseLedger`` writes the very same rows through Optuna's own
table classes, as long as the schema is one that it knows; every other storage is used through the public interface.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from nas.errors import UserMistake
from nas.journal import JournalLock, lock_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

__all__ = ["ATTRIBUTES", "Ledger", "PublicLedger", "Row", "make_ledger"]

ATTRIBUTES = ("nas", "result", "interruptions", "lost", "lease")
"""User attributes of a trial that are ours: its sealed suggestion, its sealed result, how many deaths of a driver it
was running at, why a trial of which nothing could be restored is there at all, and in a study that is shared, which
driver has it."""

_SCHEMAS = ("v3.2.0.a",)


@dataclass(frozen=True)
class Row:
    """One trial as it is stored, not yet believed. ``odd`` says what about it cannot be right whatever it holds."""

    trial_id: int
    number: int
    state: str  # Optuna's name
    values: list[float] | None
    attributes: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(
        default_factory=dict
    )  # external values, or None for what no value stands for
    odd: str | None = None


class Ledger(Protocol):
    """The trials of one study in its storage. Every change is durable when the call returns."""

    def create(
        self,
        state: str,
        architecture: Mapping[str, Any],
        attributes: Mapping[str, Any],
        values: Sequence[float] | None = None,
    ) -> tuple[int, int]:
        """A new trial in ``state`` (Optuna's name); its id and its number."""

    def update(
        self, trial_id: int, attributes: Mapping[str, Any], state: str, values: Sequence[float] | None = None
    ) -> bool:
        """Give an unfinished trial attributes and another state; False when another program was faster."""

    def rows(self, after: int | None = None, among: Sequence[int] = ()) -> list[Row]:
        """All trials in the order of their ids, or those with ids above ``after`` and those of ``among``.

        Raises CorruptFile when something among them cannot be read.
        """

    def exclusive(self) -> AbstractContextManager[None]:
        """Within the block nobody else changes the study, whatever machine they are on; one thread at a time.

        What is written inside is durable when the block has ended; a database keeps none of it when it raises.
        Raises UserMistake where the storage has no such lock.
        """

    def study_attributes(self) -> dict[str, Any]:
        """The user attributes of the study."""

    def set_study_attribute(self, name: str, value: Any) -> None:
        """Write one user attribute of the study."""


def make_ledger(storage: BaseStorage, study_id: int, distributions: Mapping[str, BaseDistribution]) -> Ledger:
    """The ledger that fits the storage."""
    from optuna.storages import RDBStorage

    from nas.database_ledger import DatabaseLedger

    if isinstance(storage, RDBStorage) and storage.get_current_version() in _SCHEMAS:
        return DatabaseLedger(storage, study_id, distributions)
    return PublicLedger(storage, study_id, distributions, lock_of(storage))


class PublicLedger:
    """Any storage, through Optuna's public interface."""

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        distributions: Mapping[str, BaseDistribution],
        lock: JournalLock | None = None,
    ):
        self._storage = storage
        self._study_id = study_id
        self._distributions = distributions
        self._lock = lock

    def create(
        self,
        state: str,
        architecture: Mapping[str, Any],
        attributes: Mapping[str, Any],
        values: Sequence[float] | None = None,
    ) -> tuple[int, int]:
        frozen = _frozen(state, architecture, self._distributions, attributes, values)
        trial_id = self._storage.create_new_trial(self._study_id, frozen)
        return trial_id, self._storage.get_trial_number_from_id(trial_id)

    def update(
        self, trial_id: int, attributes: Mapping[str, Any], state: str, values: Sequence[float] | None = None
    ) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            for name, value in attributes.items():
                self._storage.set_trial_user_attr(trial_id, name, value)
            return self._storage.set_trial_state_values(trial_id, TrialState[state], values)
        except UpdateFinishedTrialError:
            return False

    def rows(self, after: int | None = None, among: Sequence[int] = ()) -> list[Row]:
        found = []
        everything = self._storage.get_all_trials(self._study_id, deepcopy=False)
        for frozen in everything if after is None else _chosen(everything, after, among):
            known = all(self._distributions.get(name) == kind for name, kind in frozen.distributions.items())
            odd = None if known else "its distributions are not those of the space"
            attributes = {name: frozen.user_attrs[name] for name in ATTRIBUTES if name in frozen.user_attrs}
            numbers = (frozen._trial_id, frozen.number)
            found.append(
                Row(*numbers, frozen.state.name, frozen.values, attributes, dict(frozen.params), odd)
            )
        return found

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        if self._lock is None:
            text = "this storage cannot be shared by several drivers; give journal:FILE or postgresql://..."
            raise UserMistake(f"--join: {text}")
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def study_attributes(self) -> dict[str, Any]:
        return dict(self._storage.get_study_user_attrs(self._study_id))

    def set_study_attribute(self, name: str, value: Any) -> None:
        self._storage.set_study_user_attr(self._study_id, name, value)


def _chosen(trials: Sequence[FrozenTrial], after: int, among: Sequence[int]) -> Iterator[FrozenTrial]:
    """Of trials in the order of their ids those above ``after`` and those of ``among``, without looking at the rest."""
    start = bisect_right(trials, after, key=_id_of)
    for trial_id in sorted(set(among)):
        place = bisect_left(trials, trial_id, hi=start, key=_id_of)
        if place < start and trials[place]._trial_id == trial_id:
            yield trials[place]
    yield from trials[start:]


def _id_of(trial: FrozenTrial) -> int:
    return trial._trial_id


def _frozen(
    state: str,
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
    attributes: Mapping[str, Any],
    values: Sequence[float] | None,
) -> FrozenTrial:
    from optuna.trial import FrozenTrial, TrialState

    now = datetime.now()
    found = TrialState[state]
    return FrozenTrial(
        number=-1,  # the storage gives both numbers
        trial_id=-1,
        state=found,
        value=None,
        values=list(values) if values is not None else None,
        datetime_start=now if state != "WAITING" else None,
        datetime_complete=now if found.is_finished() else None,
        params=dict(params),
        distributions={name: distributions[name] for name in params},
        user_attrs=dict(attributes),
        system_attrs={},
        intermediate_values={},
    )
