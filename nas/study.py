"""What is remembered: one durable record per suggestion and one per result, in Optuna's storage and beside it.

The order of writes makes every moment safe to be killed at:
suggestion  -> RUNNING trial in the storage (one transaction) -> trials/N/architecture.json (sealed)
result      -> trials/N/result.json (sealed, written where the candidate ran) -> result and final state in the storage
So whatever the storage lacks can be told from the sealed records, and the storage can be built again from them.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nas.errors import RunStopped, UserMistake
from nas.files import CorruptFile, seal
from nas.mending import Found, mend_files, ordered
from nas.records import Records, StoredTrial, TrialResult
from nas.storage import (
    DamagedStorage,
    MissingStudy,
    close_storage,
    open_storage,
    require_place,
    stop_on_error,
)
from nas.stored import OPTUNA_STATES, StoredStudy, make_identity, study_name

if TYPE_CHECKING:
    import threading

    from nas.ledger import Ledger
    from nas.pareto import Direction
    from nas.run_directory import RunDirectory
    from spaces import Architecture, SearchSpace

__all__ = [
    "MAX_INTERRUPTIONS",
    "KeyTaken",
    "StoredTrial",
    "Study",
    "StudyFull",
    "TakenOver",
    "TrialResult",
]

logger = logging.getLogger(__name__)

MAX_INTERRUPTIONS = 3
"""A candidate that ran at this many deaths of its driver is suspected of causing them and is not tried again."""

_TOLD = 3


class KeyTaken(RuntimeError):
    """Another driver of a shared study has reserved this architecture."""


class StudyFull(RuntimeError):
    """All trials of a shared study are reserved."""


class TakenOver(RuntimeError):
    """Another driver of a shared study has this trial now; what comes of it here does not count."""


class Study:
    """All trials of one search. Open it with ``Study.create`` or ``Study.open`` while holding the run directory.

    Nobody else writes to it then, so what was read once is kept in memory. ``nas.joining.JoinedStudy`` is one that
    several drivers share; what only concerns those is here what it is for a driver that is alone.
    """

    def __init__(
        self,
        run: RunDirectory,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        stored: StoredStudy,
        found: Found,
        token: str,
        *,
        writable: bool,
    ):
        self.run = run
        self.space = space
        self.objectives = list(objectives)
        self.token = token
        self._stored = stored
        self._trials = dict(found.trials)
        self._count = found.count()
        self._records = Records(run, token)
        self._where = f"the study in {run.path}"
        self._ledger: Ledger | None = stored.ledger(space) if writable else None

    # -- opening ---------------------------------------------------------------------------------------------------

    @staticmethod
    def url(run: RunDirectory, storage: str | None) -> str:
        """The storage URL of a run: its own SQLite file unless another is asked for."""
        return storage or f"sqlite:///{run.database}"

    @classmethod
    def require_free(cls, run: RunDirectory, config: Mapping[str, Any]) -> None:
        """Raises UserMistake when the storage asked for cannot be used, or holds a study of this run's name already."""
        url = config.get("storage")
        if url is None:
            return
        require_place(url)
        try:
            storage = open_storage(url, reading=True)  # nothing is made for a start that may still be refused
            names = [study.study_name for study in storage.get_all_studies()]
        except MissingStudy:
            return
        except DamagedStorage as error:
            raise UserMistake(f"--storage: {error}; give another") from None
        close_storage(storage, url, reading=True)
        if study_name(run) in names:
            raise UserMistake(_taken(run))

    @classmethod
    def create(
        cls,
        run: RunDirectory,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        config: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
    ) -> Study:
        """A new, empty study; ``facts`` is what ``environment.json`` holds, with the run's token under "run".

        Raises UserMistake if the storage already holds a study of this run's name.
        """
        run.require_lock()
        url = cls.url(run, config.get("storage"))
        token = str((facts or {}).get("run") or uuid.uuid4().hex)
        with stop_on_error(f"the study in {run.path}"):
            stored = StoredStudy(run, url, reading=False)
            if stored.broken or stored.identity is not None:
                raise UserMistake(
                    f"--storage: {stored.broken}; give another" if stored.broken else _taken(run)
                )
            stored.make(run, objectives, make_identity(space, objectives, config, facts, token))
            return cls._attach(run, space, objectives, stored, Found(), token)

    @classmethod
    def open(
        cls,
        run: RunDirectory,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        config: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
    ) -> tuple[Study, list[str]]:
        """The study of a run and what had to be mended on the way, one line each.

        A local storage that is damaged, or whose records disagree with their seals, is built again from what is
        whole of it and from the sealed records under ``trials/``; the old file is kept. Damaged records under
        ``trials/`` are written anew from the storage. Raises UserMistake when the space or the objectives have
        changed since, RunStopped when nothing can be written.
        """
        run.require_lock()
        if config.get("join"):
            from nas.joining import JoinedStudy

            return JoinedStudy.reopen(run, space, objectives, config, facts)
        url = cls.url(run, config.get("storage"))
        with stop_on_error(f"the study in {run.path}"):
            stored = StoredStudy(run, url, reading=False)
            token = stored.token(run, facts) or uuid.uuid4().hex
            before = stored.identity or {"config": config, "facts": {}}
            identity = make_identity(space, objectives, before["config"], facts or before["facts"], token)
            stored.require_same(identity, run, space.name)
            found = stored.assemble(run, token, objectives, space)
            lines = stored.complete(run, found, space, objectives, identity)
            study = cls._attach(run, space, objectives, stored, found, token)
            return study, [*_several(lines), *_several(mend_files(study._records, study.trials()))]

    @classmethod
    def _attach(
        cls,
        run: RunDirectory,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        stored: StoredStudy,
        found: Found,
        token: str,
    ) -> Study:
        run.on_release(stored.close)
        return cls(run, space, objectives, stored, found, token, writable=True)

    @classmethod
    def read(
        cls,
        run: RunDirectory,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        config: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
    ) -> Study:
        """The study of a run for reading only; another driver may be at work.

        What is damaged is taken from the other copy, or left out, with a warning in the log; nothing is written.
        Raises DamagedStorage when no trial can be read.
        """
        url = cls.url(run, config.get("storage"))
        stored = StoredStudy(run, url, reading=True, name=config.get("join"))
        token = stored.token(run, facts) or ""
        if stored.identity is not None:  # a recipe can be edited
            given = stored.identity["objectives"]
            objectives = [(str(name), "maximize" if way == "maximize" else "minimize") for name, way in given]
        found = stored.assemble(run, token, objectives, space)
        stored.close()
        if found.problems and not found.trials:
            raise DamagedStorage(found.problems[0])
        left_out = [f"trial {number} is left out: {why}" for number, why in found.lost.items()]
        for line in _several([*found.problems, *left_out]):
            logger.warning("%s", line)
        study = cls(run, space, objectives, stored, found, token, writable=False)
        for trial in study.trials():  # a result that waits for its driver to take it up is one
            if trial.result is None and (result := study._saved_result(trial)) is not None:
                study._remember(trial.finished(result))
        return study

    # -- reading ---------------------------------------------------------------------------------------------------

    def trials(self) -> list[StoredTrial]:
        """All trials in order of their numbers; those whose record is lost are left out."""
        return [self._trials[number] for number in sorted(self._trials)]

    @property
    def size(self) -> int:
        """How many trials are known."""
        return len(self._trials)

    def started_config(self) -> dict[str, Any]:
        """The configuration the study was started or last resumed with; empty when that cannot be read."""
        return dict((self._stored.identity or {}).get("config") or {})

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Record the configuration with which the study is resumed."""
        self._writable()
        with stop_on_error(self._where):
            self._stored.write_identity(
                {**(self._stored.identity or {}), "config": dict(config)}, self.objectives
            )

    def _saved_result(self, trial: StoredTrial) -> TrialResult | None:
        """The sealed result that the candidate's process left, if it is whole and belongs to this architecture."""
        try:
            return self._records.result(trial.number, trial.key)
        except CorruptFile as error:
            logger.warning("%s", error)
            return None

    # -- what other drivers do -------------------------------------------------------------------------------------

    def total(self, wanted: int) -> int:
        """How many trials the study is to have, where this driver was asked for ``wanted``."""
        return wanted

    def controller_seed(self, seed: int) -> int:
        """The seed of this driver's controller."""
        return seed

    def news(self) -> list[StoredTrial]:
        """Trials that other drivers have begun or finished since the last call. May be called as often as one likes."""
        return []

    def take_over(self) -> StoredTrial | None:
        """A trial that another driver has left, to be run here."""
        return None

    def others_at_work(self) -> bool:
        """Whether other drivers still evaluate candidates."""
        return False

    def gather(self) -> None:
        """Take what other drivers have left in their run directories, as far as these can be reached."""

    def stop_waiting(self, stopping: threading.Event) -> None:
        """Once ``stopping`` is set, no longer wait for a server that cannot be reached."""

    # -- writing ---------------------------------------------------------------------------------------------------

    def suggest(
        self, architecture: Architecture, *, name: str | None = None, seed: int | Callable[[int], int] = 0
    ) -> StoredTrial:
        """Record that ``architecture`` is about to be evaluated; durable when this returns.

        ``seed`` may depend on the number that the trial gets. Raises RunStopped, and in a shared study KeyTaken and
        StudyFull.
        """
        ledger = self._writable()
        trial = self._new_trial(architecture, name, seed)
        with stop_on_error(self._where):
            attributes = {"nas": seal(trial.suggestion(self.token).to_dict())}
            trial_id, number = ledger.create("RUNNING", architecture, attributes)
            if number != trial.number:
                raise RunStopped(f"{self._where}: another program has added trials to it")
            trial = self._remember(replace(trial, trial_id=trial_id))
            self._count += 1
            self._records.write_suggestion(trial)
        return trial

    def _new_trial(
        self, architecture: Architecture, name: str | None, seed: int | Callable[[int], int]
    ) -> StoredTrial:
        architecture = self.space.canonical(architecture)
        number = self._count
        chosen = seed if isinstance(seed, int) else seed(number)
        return StoredTrial(number, -1, architecture, self.space.key(architecture), name, chosen, "running")

    def record(self, trial: StoredTrial, result: TrialResult) -> StoredTrial:
        """Record the result of a trial; durable when this returns.

        Raises RunStopped if it is recorded already, and in a shared study TakenOver if another driver has it now.
        """
        ledger = self._writable()
        values = self._finite(result.values) if result.state == "complete" else None
        sealed = seal({**result.to_dict(), "key": trial.key})
        self._records.sweep(trial.number)
        with stop_on_error(self._where):
            saved = self._saved_result(trial)
            if saved is None or not saved.same_as(result):  # one that failed could not write it itself
                self._records.write_result(trial, result)
            if not ledger.update(trial.trial_id, {"result": sealed}, OPTUNA_STATES[result.state], values):
                raise RunStopped(f"trial {trial.number} was recorded by another driver")
        return self._remember(trial.finished(result))

    def park(self, trial: StoredTrial) -> StoredTrial:
        """Put a running trial back into the queue, with its parameters; one that has just left a result is recorded."""
        result = self._saved_result(trial)
        if result is not None:
            return self.record(trial, result)
        self._records.sweep(trial.number)
        with stop_on_error(self._where):
            self._writable().update(trial.trial_id, {}, "WAITING")
        return self._remember(replace(trial, state="waiting"))

    def claim(self, trial: StoredTrial) -> StoredTrial:
        """Take a waiting trial out of the queue. Raises RunStopped if another driver took it."""
        with stop_on_error(self._where):
            if not self._writable().update(trial.trial_id, {}, "RUNNING"):
                raise RunStopped(f"trial {trial.number} was taken by another driver")
        return self._remember(replace(trial, state="running"))

    def recover(self) -> list[StoredTrial]:
        """Settle what a dead driver left unfinished; returns the trials that wait to be run, oldest first.

        A trial whose result was already saved is recorded, not run again; the others go back into the queue, and
        after ``MAX_INTERRUPTIONS`` deaths of the driver into the failures.
        """
        settled = [self._settle(trial) for trial in self.trials() if trial.state in ("running", "waiting")]
        return [trial for trial in settled if trial.state == "waiting"]

    def _settle(self, trial: StoredTrial) -> StoredTrial:
        result = self._saved_result(trial)
        if result is not None:
            return self.record(trial, result)
        if trial.state == "waiting":
            return trial
        count = trial.interruptions + 1
        if count >= MAX_INTERRUPTIONS:
            reason = f"the driver died {count} times while this candidate ran"
            failure = {"kind": "interrupted", "reason": reason, "log_tail": ""}
            return self.record(trial, TrialResult(state="failed", failure=failure))
        with stop_on_error(self._where):
            self._writable().update(trial.trial_id, {"interruptions": count}, "WAITING")
        return self._remember(replace(trial, state="waiting", interruptions=count))

    def _remember(self, trial: StoredTrial) -> StoredTrial:
        self._trials[trial.number] = trial
        return trial

    def _writable(self) -> Ledger:
        self.run.require_lock()
        if self._ledger is None:
            raise RunStopped(f"{self._where} was opened for reading only")
        with stop_on_error(self._where):
            self._stored.require_in_place()
        return self._ledger

    def _finite(self, values: Mapping[str, float]) -> list[float]:
        found = ordered(values, self.objectives)
        if not all(math.isfinite(value) for value in found):
            raise ValueError(f"objectives must be finite numbers, got {dict(values)}")
        return found


def _taken(run: RunDirectory) -> str:
    return f"--storage: a study named {study_name(run)!r} is already there; use another --out or storage"


def _several(lines: Sequence[str]) -> list[str]:
    """The first few lines, how many more there are, and the last one, which says what was done."""
    if len(lines) <= _TOLD + 1:
        return list(lines)
    return [*lines[:_TOLD], f"and {len(lines) - _TOLD - 1} more of this kind", lines[-1]]
