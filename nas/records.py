"""What is known of one trial, and the sealed copies of it under ``trials/NUMBER/``.

``architecture.json`` says what was suggested and ``result.json`` what came of it. Each carries its own checksum and
the key of its architecture, so that the storage can be built again from them, and they from the storage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nas.files import CorruptFile, canonical_json, read_record, sweep_temporary, write_record

if TYPE_CHECKING:
    from pathlib import Path

    from nas.run_directory import RunDirectory
    from spaces import Architecture

__all__ = ["FINISHED", "ForeignRecord", "Records", "StoredTrial", "Suggestion", "TrialResult"]

FINISHED = ("complete", "pruned", "failed")


class ForeignRecord(CorruptFile):
    """The record is whole, and not what is looked for."""


@dataclass(frozen=True)
class TrialResult:
    """Outcome of one trial; ``values`` (objective name -> finite number) only when ``state`` is complete."""

    state: str  # complete | pruned | failed
    values: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    failure: dict[str, Any] | None = None
    weights_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialResult:
        """The inverse of ``to_dict``; keys of other versions are ignored."""
        known = cls.__dataclass_fields__
        return cls(**{name: value for name, value in data.items() if name in known})

    def same_as(self, other: TrialResult) -> bool:
        """Whether both are one result once written down as JSON."""
        return canonical_json(self.to_dict()) == canonical_json(other.to_dict())


@dataclass(frozen=True)
class Suggestion:
    """What is recorded before a candidate runs; ``run`` tells runs apart that share a storage."""

    number: int
    architecture: Architecture
    key: str
    name: str | None
    seed: int
    run: str

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: object) -> Suggestion:
        """The inverse of ``to_dict``. Raises CorruptFile, naming ``where``, when something is missing."""
        try:
            return cls(**{name: data[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise CorruptFile(str(where), f"lacks {error}") from None

    def trial(self, trial_id: int, state: str) -> StoredTrial:
        """The trial that is begun with it."""
        return StoredTrial(
            self.number, trial_id, dict(self.architecture), self.key, self.name, self.seed, state
        )


@dataclass(frozen=True)
class StoredTrial:
    """One trial as the study knows it; ``result`` once it is finished."""

    number: int
    trial_id: int
    architecture: Architecture
    key: str
    name: str | None
    seed: int
    state: str  # waiting | running | complete | pruned | failed
    interruptions: int = 0
    result: TrialResult | None = None

    def finished(self, result: TrialResult) -> StoredTrial:
        """This trial with its result."""
        return replace(self, state=result.state, result=result)

    def suggestion(self, run: str) -> Suggestion:
        """What was recorded when it began."""
        return Suggestion(self.number, self.architecture, self.key, self.name, self.seed, run)


class Records:
    """The sealed files of one run; ``token`` is the run's own: records of another run are refused ("" admits any)."""

    def __init__(self, run: RunDirectory, token: str):
        self._run = run
        self._token = token

    def suggestion_path(self, number: int) -> Path:
        """Where a suggestion is."""
        return self._run.trial(number) / "architecture.json"

    def result_path(self, number: int) -> Path:
        """Where a result is."""
        return self._run.trial(number) / "result.json"

    def numbers(self) -> list[int]:
        """Numbers of the trials that have a folder, ascending."""
        if not self._run.trials.is_dir():
            return []
        return sorted(int(entry.name) for entry in self._run.trials.iterdir() if entry.name.isdecimal())

    def suggestion(self, number: int) -> Suggestion:
        """What was suggested as trial ``number``. Raises CorruptFile, or OSError when there is no such record."""
        path = self.suggestion_path(number)
        found = Suggestion.from_dict(read_record(path), path)
        if found.number != number or (self._token and found.run != self._token):
            raise ForeignRecord(path, "it belongs to another trial or another run")
        return found

    def result(self, number: int, key: str) -> TrialResult | None:
        """The saved result of trial ``number``; None when there is none. Raises CorruptFile."""
        path = self.result_path(number)
        try:
            data = read_record(path)
        except FileNotFoundError:
            return None
        if data.get("key") != key or data.get("state") not in FINISHED:
            raise ForeignRecord(path, "it belongs to another architecture")
        return TrialResult.from_dict(data)

    def write_suggestion(self, trial: StoredTrial) -> None:
        """Write ``architecture.json``, making the folder of the trial. Raises OSError."""
        # Never with parents: a run directory that was deleted during the run must not be made anew.
        self._run.trials.mkdir(exist_ok=True)
        self._run.trial(trial.number).mkdir(exist_ok=True)
        write_record(self.suggestion_path(trial.number), trial.suggestion(self._token).to_dict())

    def sweep(self, number: int) -> None:
        """Remove the unfinished files of a process that was killed in the folder of a trial."""
        with contextlib.suppress(OSError):  # without the folder there is nothing to remove
            sweep_temporary(self._run.trial(number))

    def write_result(self, trial: StoredTrial, result: TrialResult) -> None:
        """Write ``result.json``. Raises OSError."""
        self._run.trial(trial.number).mkdir(exist_ok=True)
        write_record(self.result_path(trial.number), {**result.to_dict(), "key": trial.key})
