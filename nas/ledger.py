"""Trials in an Optuna storage: written with one transaction per suggestion and one per result, read in bulk.

Through Optuna's public interface a suggestion with 44 parameters costs some 180 statements, a result two commits, and
reading 2,000 trials a JSON document per parameter. ``DatabaseLedger`` writes the very same rows through Optuna's own
table classes, as long as the schema is one that it knows; every other storage is used through the public interface.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from nas.files import CorruptFile

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage, RDBStorage
    from optuna.trial import FrozenTrial

__all__ = ["ATTRIBUTES", "DatabaseLedger", "Ledger", "PublicLedger", "Row", "make_ledger"]

ATTRIBUTES = ("nas", "result", "interruptions", "lost")
"""User attributes of a trial that are ours: its sealed suggestion, its sealed result, how many deaths of a driver it
was running at, and why a trial of which nothing could be restored is there at all."""

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

    def rows(self) -> list[Row]:
        """All trials in the order of their ids. Raises CorruptFile when something among them cannot be read."""


def make_ledger(storage: BaseStorage, study_id: int, distributions: Mapping[str, BaseDistribution]) -> Ledger:
    """The ledger that fits the storage."""
    from optuna.storages import RDBStorage

    if isinstance(storage, RDBStorage) and storage.get_current_version() in _SCHEMAS:
        return DatabaseLedger(storage, study_id, distributions)
    return PublicLedger(storage, study_id, distributions)


class PublicLedger:
    """Any storage, through Optuna's public interface."""

    def __init__(self, storage: BaseStorage, study_id: int, distributions: Mapping[str, BaseDistribution]):
        self._storage = storage
        self._study_id = study_id
        self._distributions = distributions

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

    def rows(self) -> list[Row]:
        found = []
        for frozen in self._storage.get_all_trials(self._study_id, deepcopy=False):
            known = all(self._distributions.get(name) == kind for name, kind in frozen.distributions.items())
            odd = None if known else "its distributions are not those of the space"
            attributes = {name: frozen.user_attrs[name] for name in ATTRIBUTES if name in frozen.user_attrs}
            numbers = (frozen._trial_id, frozen.number)
            found.append(
                Row(*numbers, frozen.state.name, frozen.values, attributes, dict(frozen.params), odd)
            )
        return found


class DatabaseLedger:
    """A database whose schema is known."""

    def __init__(self, storage: RDBStorage, study_id: int, distributions: Mapping[str, BaseDistribution]):
        from optuna.distributions import distribution_to_json

        self._storage = storage
        self._study_id = study_id
        self._distributions = distributions
        self._texts = {name: distribution_to_json(kind) for name, kind in distributions.items()}

    def create(
        self,
        state: str,
        architecture: Mapping[str, Any],
        attributes: Mapping[str, Any],
        values: Sequence[float] | None = None,
    ) -> tuple[int, int]:
        from optuna.storages._rdb import models
        from optuna.trial import TrialState

        now = datetime.now()
        with self._transaction() as session:
            models.StudyModel.find_or_raise_by_id(self._study_id, session, for_update=True)
            trial = models.TrialModel(study_id=self._study_id, number=None, state=TrialState[state])
            trial.datetime_start = now if state != "WAITING" else None
            trial.datetime_complete = now if TrialState[state].is_finished() else None
            session.add(trial)
            session.flush()  # gives it its id
            trial.number = trial.count_past_trials(session)
            session.add_all(
                models.TrialParamModel(
                    trial_id=trial.trial_id,
                    param_name=name,
                    param_value=self._distributions[name].to_internal_repr(value),
                    distribution_json=self._texts[name],
                )
                for name, value in architecture.items()
            )
            trial_id = int(trial.trial_id)
            self._add(session, trial_id, attributes, values)
            return trial_id, int(trial.number)

    def update(
        self, trial_id: int, attributes: Mapping[str, Any], state: str, values: Sequence[float] | None = None
    ) -> bool:
        from optuna.storages._rdb import models
        from optuna.trial import TrialState

        now = datetime.now()
        with self._transaction() as session:
            trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            if trial.state.is_finished() or (state == "RUNNING" and trial.state != TrialState.WAITING):
                return False
            if attributes:
                kind = models.TrialUserAttributeModel
                old = session.query(kind).filter(kind.trial_id == trial_id, kind.key.in_(list(attributes)))
                old.delete(synchronize_session=False)
            if values is not None:
                kept = models.TrialValueModel
                session.query(kept).filter(kept.trial_id == trial_id).delete(synchronize_session=False)
            self._add(session, trial_id, attributes, values)
            trial.state = TrialState[state]
            if state == "RUNNING":
                trial.datetime_start = now
            if trial.state.is_finished():
                trial.datetime_complete = now
            return True

    def _add(
        self, session: Any, trial_id: int, attributes: Mapping[str, Any], values: Sequence[float] | None
    ) -> None:
        from optuna.storages._rdb import models

        session.add_all(
            models.TrialUserAttributeModel(trial_id=trial_id, key=name, value_json=json.dumps(value))
            for name, value in attributes.items()
        )
        finite = models.TrialValueModel.TrialValueType.FINITE  # the study admits no other
        session.add_all(
            models.TrialValueModel(trial_id=trial_id, objective=index, value=value, value_type=finite)
            for index, value in enumerate(values or ())
        )

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        session = self._storage.scoped_session()
        try:
            yield session
            session.commit()
        except BaseException:
            session.rollback()
            raise
        finally:
            session.close()

    # -- reading ---------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        try:
            return self._rows()
        except (TypeError, ValueError, KeyError) as error:
            raise CorruptFile(
                "the study", f"it holds what no version has written ({type(error).__name__})"
            ) from None

    def _rows(self) -> list[Row]:
        # Trials come first: whatever belongs to one of them was written no later, also while a driver is at work.
        trials = self._query(
            "SELECT trial_id, number, state FROM trials WHERE study_id = :study ORDER BY trial_id"
        )
        values: dict[int, dict[int, float]] = defaultdict(dict)
        for trial_id, objective, value, kind in self._select("objective, value, value_type", "trial_values"):
            values[trial_id][objective] = float(value) if kind == "FINITE" else float("nan")
        attributes: dict[int, dict[str, Any]] = defaultdict(dict)
        for trial_id, key, text in self._select("a.key, value_json", "trial_user_attributes"):
            if key in ATTRIBUTES:
                attributes[trial_id][key] = _json_or_none(text)
        params: dict[int, dict[str, Any]] = defaultdict(dict)
        for trial_id, name, internal in self._select("param_name, param_value", "trial_params"):
            params[trial_id][name] = self._external(name, internal)
        odd = self._odd_trials()
        return [
            Row(
                trial_id,
                number,
                state,
                [value for _, value in sorted(values[trial_id].items())] or None,
                attributes[trial_id],
                params[trial_id],
                "its distributions are not those of the space" if trial_id in odd else None,
            )
            for trial_id, number, state in trials
        ]

    def _odd_trials(self) -> set[int]:
        """Trials with a parameter of another distribution; the database compares, as there are few different ones."""
        kinds = self._query(
            "SELECT DISTINCT p.param_name, p.distribution_json FROM trial_params p JOIN trials t "
            "ON t.trial_id = p.trial_id WHERE t.study_id = :study"
        )
        strange = [(name, text) for name, text in kinds if self._texts.get(name) != text]
        found: set[int] = set()
        for name, text in strange:
            query = "SELECT trial_id FROM trial_params WHERE param_name = :name AND distribution_json = :text"
            found |= {trial_id for (trial_id,) in self._query(query, {"name": name, "text": text})}
        return found

    def _external(self, name: str, internal: float) -> Any:
        kind = self._distributions.get(name)
        try:
            return kind.to_external_repr(internal) if kind is not None else None
        except (ValueError, IndexError, TypeError):
            return None

    def _select(self, columns: str, table: str) -> list[Any]:
        return self._query(
            f"SELECT a.trial_id, {columns} FROM {table} a JOIN trials t ON t.trial_id = a.trial_id "
            "WHERE t.study_id = :study"
        )

    def _query(self, text: str, bound: Mapping[str, Any] | None = None) -> list[Any]:
        import sqlalchemy

        with self._storage.engine.connect() as connection:
            return list(connection.execute(sqlalchemy.text(text), dict(bound or {"study": self._study_id})))


def _json_or_none(text: Any) -> Any:
    """What no seal can hold, where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None


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
