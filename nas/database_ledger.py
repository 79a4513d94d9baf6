"""Trials in a database whose schema is known, in Optuna's own rows and with fewer statements than Optuna takes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from nas.files import CorruptFile
from nas.ledger import ATTRIBUTES, Row

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import RDBStorage

__all__ = ["DatabaseLedger"]

_MOST_IDLE = 10_000
"""Milliseconds after which PostgreSQL takes the lock from a driver that was paused while it held it."""


class DatabaseLedger:
    """A database whose schema is known."""

    def __init__(self, storage: RDBStorage, study_id: int, distributions: Mapping[str, BaseDistribution]):
        from optuna.distributions import distribution_to_json

        self._storage = storage
        self._study_id = study_id
        self._distributions = distributions
        self._texts = {name: distribution_to_json(kind) for name, kind in distributions.items()}
        self._inside: Any = None  # the session of an exclusive block

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
            if self._inside is None:  # else it is locked already
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
    def exclusive(self) -> Iterator[None]:
        from optuna.storages._rdb import models

        with self._transaction() as session:
            dialect = self._storage.engine.dialect.name
            if dialect != "sqlite":
                # What is read after the lock was given must be what others wrote before they gave it back.
                session.connection(execution_options={"isolation_level": "READ COMMITTED"})
            if dialect == "postgresql":
                import sqlalchemy

                # A driver that is paused in here must not keep the others waiting for ever.
                session.execute(
                    sqlalchemy.text(f"SET LOCAL idle_in_transaction_session_timeout = {_MOST_IDLE}")
                )
            models.StudyModel.find_or_raise_by_id(self._study_id, session, for_update=True)
            self._inside = session
            try:
                yield
            finally:
                self._inside = None

    def study_attributes(self) -> dict[str, Any]:
        found = self._query("SELECT a.key, value_json FROM study_user_attributes a WHERE study_id = :study")
        return {key: _json_or_none(text) for key, text in found}

    def set_study_attribute(self, name: str, value: Any) -> None:
        from optuna.storages._rdb import models

        kind = models.StudyUserAttributeModel
        with self._transaction() as session:
            old = session.query(kind).filter(kind.study_id == self._study_id, kind.key == name).one_or_none()
            if old is None:
                session.add(kind(study_id=self._study_id, key=name, value_json=json.dumps(value)))
            else:
                old.value_json = json.dumps(value)

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        if self._inside is not None:
            yield self._inside
            self._inside.flush()
            return
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

    def rows(self, after: int | None = None, among: Sequence[int] = ()) -> list[Row]:
        where = "t.study_id = :study"
        if after is not None:
            listed = f" OR t.trial_id IN ({', '.join(str(int(number)) for number in among)})" if among else ""
            where += f" AND (t.trial_id > {int(after)}{listed})"
        try:
            return self._rows(where)
        except (TypeError, ValueError, KeyError) as error:
            raise CorruptFile(
                "the study", f"it holds what no version has written ({type(error).__name__})"
            ) from None

    def _rows(self, where: str) -> list[Row]:
        # Trials come first: whatever belongs to one of them was written no later, also while a driver is at work.
        trials = self._query(
            f"SELECT t.trial_id, number, state FROM trials t WHERE {where} ORDER BY t.trial_id"
        )
        if not trials:
            return []
        values: dict[int, dict[int, float]] = defaultdict(dict)
        for trial_id, objective, value, kind in self._select(
            "objective, value, value_type", "trial_values", where
        ):
            values[trial_id][objective] = float(value) if kind == "FINITE" else float("nan")
        attributes: dict[int, dict[str, Any]] = defaultdict(dict)
        for trial_id, key, text in self._select("a.key, value_json", "trial_user_attributes", where):
            if key in ATTRIBUTES:
                attributes[trial_id][key] = _json_or_none(text)
        params: dict[int, dict[str, Any]] = defaultdict(dict)
        for trial_id, name, internal in self._select("param_name, param_value", "trial_params", where):
            params[trial_id][name] = self._external(name, internal)
        odd = self._odd_trials(where)
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

    def _odd_trials(self, where: str) -> set[int]:
        """Trials with a parameter of another distribution; the database compares, as there are few different ones."""
        kinds = self._query(
            "SELECT DISTINCT p.param_name, p.distribution_json FROM trial_params p JOIN trials t "
            f"ON t.trial_id = p.trial_id WHERE {where}"
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

    def _select(self, columns: str, table: str, where: str) -> list[Any]:
        return self._query(
            f"SELECT a.trial_id, {columns} FROM {table} a JOIN trials t ON t.trial_id = a.trial_id WHERE {where}"
        )

    def _query(self, text: str, bound: Mapping[str, Any] | None = None) -> list[Any]:
        import sqlalchemy

        values = dict(bound or {"study": self._study_id})
        if self._inside is not None:
            self._inside.flush()
            return list(self._inside.execute(sqlalchemy.text(text), values))
        with self._storage.engine.connect() as connection:
            return list(connection.execute(sqlalchemy.text(text), values))


def _json_or_none(text: Any) -> Any:
    """What no seal can hold, where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
