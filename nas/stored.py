"""The study of a run in its Optuna storage: found, checked, made, made anew from what is whole."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserMistake
from nas.files import CorruptFile, seal, unseal
from nas.ledger import Ledger, make_ledger
from nas.mending import STATES, Found, assemble, ordered, token_of
from nas.records import FINISHED, Records, StoredTrial
from nas.salvage import Salvage, salvage
from nas.storage import (
    DamagedStorage,
    MissingStudy,
    close_storage,
    error_text,
    is_damage,
    local_file,
    open_storage,
    replace_storage,
)

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy

    from nas.run_directory import RunDirectory
    from spaces import SearchSpace

__all__ = [
    "OPTUNA_STATES",
    "StoredStudy",
    "append_trials",
    "look_up",
    "make_identity",
    "make_study",
    "read_identity",
    "study_name",
]

logger = logging.getLogger(__name__)

OPTUNA_STATES = {ours: theirs for theirs, ours in STATES.items()}
_METRIC_NAMES = "study:metric_names"


def study_name(run: RunDirectory) -> str:
    """The name of a run's study in its storage."""
    return run.path.resolve().name


def make_identity(
    space: SearchSpace,
    objectives: Sequence[tuple[str, str]],
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None,
    token: str,
) -> dict[str, Any]:
    """What a study records of its run: all that must not change, and copies of the recipe and of the facts."""
    return {
        "run": token,
        "fingerprint": space.fingerprint(),
        "objectives": [list(objective) for objective in objectives],
        "config": dict(config),
        "facts": dict(facts or {}),
    }


class StoredStudy:
    """What a storage holds of a run, before any of it is believed.

    ``storage`` is None when it cannot be read, and ``broken`` says why. ``study_id`` is None while there is no such
    study. ``identity`` is its record, None when there is none.

    Args:
        run: the run directory.
        url: its storage.
        reading: open it for reading only.
        name: the study's; by default that of the run directory.

    Raises UserMistake when the storage cannot be reached, or is damaged and on a server; not for ``reading``.
    """

    def __init__(self, run: RunDirectory, url: str, *, reading: bool, name: str | None = None):
        self.url = url
        self.study = name or study_name(run)
        self.name = Path(path).name if (path := local_file(url)) else "the storage"
        self.storage: BaseStorage | None = None
        self.study_id: int | None = None
        self.identity: dict[str, Any] | None = None
        self.broken: str | None = None
        self._directions: list[str] = []
        self._metric_names: Any = None
        self._file: os.stat_result | None = None
        self._picked: Salvage | None = None
        self._reading = reading
        self._open(run, reading=reading)

    def _open(self, run: RunDirectory, *, reading: bool) -> None:
        try:
            self.storage = open_storage(self.url, reading=reading)
            self.require_in_place()
            self.find(run)
        except MissingStudy:
            return
        except DamagedStorage as error:
            self._give_up(str(error), reading=reading)

    def find(self, run: RunDirectory) -> None:
        """Look for the study in the storage that is open. Raises DamagedStorage."""
        assert self.storage is not None  # it was just opened
        try:
            studies = self.storage.get_all_studies()
            found = _of_run(studies, self.study, run, self.url)
            if found is None:
                return
            if "nas" not in found.user_attrs and not self.storage.get_all_trials(
                found._study_id, deepcopy=False
            ):
                self.study_id = found._study_id  # killed while it was made
                return
            self.identity = unseal(found.user_attrs.get("nas"), f"{self.name}: the record of the study")
        except CorruptFile as error:
            raise DamagedStorage(str(error)) from None
        except Exception as error:  # whatever a damaged file makes Optuna stumble over
            raise DamagedStorage(f"{self.name} is damaged: {error_text(error)}") from error
        self.study_id = found._study_id
        self._directions = [direction.name.lower() for direction in found.directions]
        self._metric_names = found.system_attrs.get(_METRIC_NAMES)

    def _give_up(self, why: str, *, reading: bool) -> None:
        if local_file(self.url) is None and not reading:
            raise UserMistake(f"--storage: {why}; repair it on its server, or start another run with --out")
        self.close()
        self.broken = why

    def _pick(self) -> Salvage:
        if self._picked is None:
            self._picked = salvage(self.url)
        return self._picked

    def require_in_place(self) -> None:
        """Raises OSError when the file of the storage is no longer the one that was opened: SQLite would go on
        writing to a file that has been deleted."""
        path = local_file(self.url)
        if path is None or self.storage is None:
            return
        now = path.stat()
        self._file = self._file or now
        if not os.path.samestat(now, self._file):
            raise OSError(errno.ESTALE, "it was replaced by another file", str(path))

    def close(self) -> None:
        """Let go of the storage."""
        if self.storage is not None:
            close_storage(self.storage, self.url, reading=self._reading)
        self.storage = self.study_id = None

    def token(self, run: RunDirectory, facts: Mapping[str, Any] | None) -> str | None:
        """The run's token, from whatever still says it. Of a damaged storage the record of that run is found then."""
        studies = {study["run"]: study for study in self._pick().studies} if self.broken else {}
        alone = next(iter(studies)) if len(studies) == 1 else None
        found = token_of(run, [(facts or {}).get("run"), (self.identity or {}).get("run")]) or alone
        if self.broken:  # others may have their studies in it too
            self.identity = studies.get(found)
        return found

    def require_same(self, identity: Mapping[str, Any], run: RunDirectory, space: str) -> None:
        """Raises UserMistake when this study is another run's, or was started with another space or objectives."""
        if self.identity is None:
            return
        if self.identity["run"] != identity["run"]:
            raise UserMistake(
                f"--storage: the study {self.study!r} there belongs to another run; use another storage, "
                "or give the run directory another name"
            )
        if self.identity["fingerprint"] != identity["fingerprint"]:
            raise UserMistake(
                f"{run.path}: the search space {space!r} has changed since this run was started; "
                "restore it, or start another run with --out"
            )
        if self.identity["objectives"] != identity["objectives"]:
            raise UserMistake(
                f"{run.path}: started with objectives {self.identity['objectives']}; use another --out"
            )

    def assemble(
        self, run: RunDirectory, token: str, objectives: Sequence[tuple[str, str]], space: SearchSpace
    ) -> Found:
        """All that is known of the trials; ``problems`` of it says what cannot be believed here."""
        rows = []
        broken = self.broken
        if self.storage is not None and self.study_id is not None:
            if self.identity is not None and self._directions != [direction for _, direction in objectives]:
                broken = f"{self.name} is damaged: its directions are {', '.join(self._directions)}"
            elif self.identity is not None and self._metric_names != [name for name, _ in objectives]:
                broken = f"{self.name} is damaged: its names of the objectives are {self._metric_names!r}"
            try:
                rows = self.ledger(space).rows()
            except Exception as error:  # whatever a damaged file makes the database stumble over
                broken = f"{self.name} is damaged: {error_text(error)}"
        return assemble(Records(run, token), token, rows, objectives, self.name, self._pick, broken)

    def ledger(self, space: SearchSpace) -> Ledger:
        """The trials, for reading and writing."""
        assert self.storage is not None  # asked for only when it is there
        assert self.study_id is not None
        return make_ledger(self.storage, self.study_id, distributions_of(space))

    def make(
        self, run: RunDirectory, objectives: Sequence[tuple[str, str]], identity: Mapping[str, Any]
    ) -> None:
        """Make the study in the storage, or finish the making of it.

        Raises UserMistake if another study of its name is there.
        """
        assert self.storage is not None  # asked for only when it is there
        if self.study_id is None:
            self.study_id = make_study(self.storage, self.study, objectives)
        self.write_identity(identity, objectives)

    def complete(
        self,
        run: RunDirectory,
        found: Found,
        space: SearchSpace,
        objectives: Sequence[tuple[str, str]],
        identity: Mapping[str, Any],
    ) -> list[str]:
        """Let the storage hold everything that is in ``found``: what a sound one lacks is added, one that is not sound
        is built anew. Returns what was wrong and what was done, one line each."""
        if not found.problems:
            self._add_what_lacks(run, found, space, objectives, identity)
        lines = list(found.problems)
        if lines and local_file(self.url) is None:
            raise UserMistake(
                f"--storage: {lines[0]}; repair it on its server, or start another run with --out"
            )
        told = (
            found.lost if found.problems else {n: why for n, why in found.lost.items() if n in found.absent}
        )
        lines += [f"trial {number} is lost: {why}" for number, why in told.items()]
        if found.problems:
            kept = self._rebuild(run, found, space, objectives, identity)
            copy = f"; the old file is kept as {kept.name}" if kept else ""
            lines.append(f"{self.name} was built again with {len(found.trials)} trials{copy}")
            self.broken = self._file = None
            self._open(run, reading=False)
        elif found.absent:
            lines.append(f"{self.name} lacked {len(found.absent)} trials, restored from their records")
        return lines

    def _add_what_lacks(
        self,
        run: RunDirectory,
        found: Found,
        space: SearchSpace,
        objectives: Sequence[tuple[str, str]],
        identity: Mapping[str, Any],
    ) -> None:
        try:
            self.make(run, objectives, identity)
            append_trials(self.ledger(space), found, found.absent, objectives, str(identity["run"]))
        except Exception as error:
            if local_file(self.url) is None or not is_damage(error):
                raise
            found.problems.append(f"{self.name} is damaged: {error_text(error)}")

    def write_identity(self, identity: Mapping[str, Any], objectives: Sequence[tuple[str, str]]) -> None:
        """Record what the study is, unless it is recorded already."""
        assert self.storage is not None  # asked for only when it is there
        assert self.study_id is not None
        self.name_metrics(objectives)
        if self.identity != identity:
            self.storage.set_study_user_attr(self.study_id, "nas", seal(identity))
        self.identity = dict(identity)

    def name_metrics(self, objectives: Sequence[tuple[str, str]]) -> None:
        """Record the names of the objectives where dashboards look for them, unless they are recorded already."""
        assert self.storage is not None  # asked for only when it is there
        assert self.study_id is not None
        names = [name for name, _ in objectives]
        if self._metric_names != names:
            self.storage.set_study_system_attr(self.study_id, _METRIC_NAMES, names)
        self._metric_names = names

    def _rebuild(
        self,
        run: RunDirectory,
        found: Found,
        space: SearchSpace,
        objectives: Sequence[tuple[str, str]],
        identity: Mapping[str, Any],
    ) -> Path | None:
        """Put a new storage with everything in ``found`` in the place of this one; where the old file is kept."""
        self.close()

        def fill(storage: BaseStorage) -> None:
            study_id = make_study(storage, self.study, objectives)
            storage.set_study_system_attr(study_id, _METRIC_NAMES, [name for name, _ in objectives])
            storage.set_study_user_attr(study_id, "nas", seal(identity))
            ledger = make_ledger(storage, study_id, distributions_of(space))
            append_trials(ledger, found, range(found.count()), objectives, str(identity["run"]))

        return replace_storage(self.url, fill)


def _of_run(studies: Sequence[FrozenStudy], name: str, run: RunDirectory, url: str) -> FrozenStudy | None:
    named = [study for study in studies if study.study_name == name]
    # A run directory may have been renamed since; its own file holds one study whatever its name.
    if not named and len(studies) == 1 and local_file(url) == run.database:
        return studies[0]
    return named[0] if named else None


def make_study(storage: BaseStorage, name: str, objectives: Sequence[tuple[str, str]]) -> int:
    """A new study without trials; its id. Raises UserMistake if its name is taken."""
    from optuna.exceptions import DuplicatedStudyError
    from optuna.study import StudyDirection

    directions = [StudyDirection[direction.upper()] for _, direction in objectives]
    try:
        return storage.create_new_study(directions, study_name=name)
    except DuplicatedStudyError:
        raise UserMistake(
            f"--storage: a study named {name!r} is already there; use another --out or storage"
        ) from None


def append_trials(
    ledger: Ledger, found: Found, numbers: Sequence[int], objectives: Sequence[tuple[str, str]], token: str
) -> None:
    """Write trials that are known from elsewhere to the end of a study; ``found`` learns their ids."""
    for number in numbers:
        trial = found.trials.get(number)
        if trial is None:
            ledger.create("FAIL", {}, {"lost": found.lost[number]})
        else:
            trial_id = _append(ledger, trial, objectives, token)
            found.trials[number] = replace(trial, trial_id=trial_id)


def _append(ledger: Ledger, trial: StoredTrial, objectives: Sequence[tuple[str, str]], token: str) -> int:
    attributes: dict[str, Any] = {"nas": seal(trial.suggestion(token).to_dict())}
    values = None
    state = trial.state if trial.state in FINISHED else "waiting"
    if trial.result is not None:
        attributes["result"] = seal({**trial.result.to_dict(), "key": trial.key})
        values = ordered(trial.result.values, objectives) if state == "complete" else None
    if trial.interruptions:
        attributes["interruptions"] = trial.interruptions
    return ledger.create(OPTUNA_STATES[state], trial.architecture, attributes, values)[0]


def distributions_of(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The parameters of a space in Optuna's words."""
    return {name: _distribution(parameter) for name, parameter in space.parameters.items()}


def _distribution(parameter: object) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from spaces import Choice, Float, Int

    if isinstance(parameter, Choice):
        return CategoricalDistribution(list(parameter.values))
    if isinstance(parameter, Int):
        return IntDistribution(parameter.low, parameter.high, step=parameter.step)
    if isinstance(parameter, Float):
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
    raise TypeError(f"no Optuna distribution for {parameter!r}")


def look_up(run: RunDirectory, url: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The record of a run's study, None when there is none, and the names of all studies in the storage.

    Raises UserMistake when it cannot be read.
    """
    stored = StoredStudy(run, url, reading=True)
    try:
        if stored.broken is not None:
            raise UserMistake(f"--storage: {stored.broken}; give the storage of the study")
        studies = stored.storage.get_all_studies() if stored.storage is not None else []
        return stored.identity, sorted(study.study_name for study in studies)
    finally:
        stored.close()


def read_identity(run: RunDirectory, url: str, name: str | None = None) -> dict[str, Any] | None:
    """The record of a run's study, for what else has been lost; None when it cannot be read either."""
    with contextlib.suppress(UserMistake):
        stored = StoredStudy(run, url, reading=True, name=name)
        stored.token(run, None)
        stored.close()
        return stored.identity
    return None
