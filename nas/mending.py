"""One run put together from all copies of it: the storage, and the sealed records under ``trials/``.

Each trial is kept twice, so that no single damage loses one. What the storage says is checked trial by trial; what
cannot be believed there is taken from the files, and what is wrong with the files is known from the storage.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nas.files import CorruptFile, unseal
from nas.records import FINISHED, ForeignRecord, Records, StoredTrial, Suggestion, TrialResult
from nas.salvage import Salvage
from nas.storage import keep_copy

if TYPE_CHECKING:
    from pathlib import Path

    from nas.ledger import Row
    from nas.run_directory import RunDirectory

__all__ = ["STATES", "Believed", "Found", "assemble", "believe", "mend_files", "ordered", "token_of"]

logger = logging.getLogger(__name__)

STATES = {
    "WAITING": "waiting",
    "RUNNING": "running",
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
}
"""Our words for Optuna's states."""


@dataclass
class Found:
    """All that is known of the trials of a run.

    ``lost`` maps numbers to the reason why neither copy says what that trial was. ``problems`` says what in the
    storage cannot be believed (then it must be built again), ``absent`` which trials a sound storage does not have.
    """

    trials: dict[int, StoredTrial] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)

    def count(self) -> int:
        """Trials that the study must have, numbered from 0."""
        return len(self.trials) + len(self.lost)


@dataclass
class Believed:
    """What one row of the storage says that can be believed."""

    suggestion: Suggestion | None = None
    result: TrialResult | None = None
    trial: StoredTrial | None = None
    lost: str | None = None


def assemble(
    records: Records,
    token: str,
    rows: Sequence[Row],
    objectives: Sequence[tuple[str, str]],
    name: str,
    pick: Callable[[], Salvage],
    broken: str | None = None,
) -> Found:
    """Check every row against its seals and fill what is missing from the files.

    ``name`` is what messages call the storage, ``pick`` gives what else can be read of it when it is damaged, and
    ``broken`` says why it could not be read at all.
    """
    found = Found(problems=[broken] if broken else [])
    believed: list[Believed] = []
    for index, row in enumerate(rows):
        one, problem = believe(row, index, token, objectives)
        believed.append(one)
        if problem is not None:
            found.problems.append(f"{name} is damaged: trial {index}: {problem}")
    picked = pick() if found.problems else Salvage()
    for number in range(
        _how_many(records, len(rows), [s.number for s in picked.suggestions if s.run == token])
    ):
        one = believed[number] if number < len(believed) else Believed()
        if one.trial is not None:
            found.trials[number] = one.trial
        elif one.lost is not None:
            found.lost[number] = one.lost
        else:
            _fill(found, number, one, records, picked, token)
            if number >= len(rows) and not found.problems:
                found.absent.append(number)
    return found


def _how_many(records: Records, stored: int, picked: Sequence[int]) -> int:
    """How many trials there are. A folder beyond the last trial that anybody knows counts only if it joins on."""
    numbers = records.numbers()
    count = max([stored, *(number + 1 for number in picked)])
    for number in numbers:
        try:
            if number >= count:
                count = records.suggestion(number).number + 1
        except (CorruptFile, OSError):
            continue
    for number in numbers:
        if number == count and _is_damaged(records, number):
            count += 1
    return count


def _is_damaged(records: Records, number: int) -> bool:
    try:
        records.suggestion(number)
    except ForeignRecord:
        return False
    except CorruptFile:
        return True
    except OSError:
        return records.result_path(number).exists()
    return False


def believe(
    row: Row, index: int, token: str, objectives: Sequence[tuple[str, str]]
) -> tuple[Believed, str | None]:
    """What ``row``, the one at ``index``, says, and what about it cannot be."""
    one = Believed()
    if isinstance(lost := row.attributes.get("lost"), str):
        one.lost = lost
        return one, None
    try:
        one.suggestion = Suggestion.from_dict(
            unseal(row.attributes.get("nas"), "its suggestion"), "its suggestion"
        )
        if one.suggestion.run != token or one.suggestion.number != index:
            one.suggestion = None
            return one, "it was suggested as another trial"
        if (sealed := row.attributes.get("result")) is not None:
            data = unseal(sealed, "its result")
            if data.get("key") != one.suggestion.key:
                return one, "its result is another one's"
            one.result = TrialResult.from_dict(data)
    except CorruptFile as error:
        return one, str(error)
    state = STATES.get(row.state)
    if problem := row.odd or _contradiction(row, index, state, one.suggestion, one.result, objectives):
        return one, problem
    assert state is not None  # else it were a contradiction
    count = row.attributes.get("interruptions", 0)
    one.trial = replace(
        one.suggestion.trial(row.trial_id, state),
        interruptions=count if isinstance(count, int) else 0,
        result=one.result if state in FINISHED else None,
    )
    return one, None


def _contradiction(
    row: Row,
    index: int,
    state: str | None,
    suggestion: Suggestion,
    result: TrialResult | None,
    objectives: Sequence[tuple[str, str]],
) -> str | None:
    if row.number != index:
        return f"its number is {row.number}"
    if state is None:
        return f"its state is {row.state!r}"
    if row.params != suggestion.architecture:
        return "its parameters are not those suggested"
    if state in FINISHED:
        if result is None or result.state != state:
            return f"it is {state} without a result that says so"
        if state == "complete" and row.values != ordered(result.values, objectives):
            return "its values disagree with its result"
    return None


def ordered(values: Mapping[str, float], objectives: Sequence[tuple[str, str]]) -> list[float]:
    """The values in the order of the objectives. Raises CorruptFile when one is missing."""
    try:
        return [float(values[name]) for name, _ in objectives]
    except KeyError as error:
        raise CorruptFile("a result", f"it lacks the objective {error}") from None


def _fill(found: Found, number: int, one: Believed, records: Records, picked: Salvage, token: str) -> None:
    """Take what the storage does not say about a trial from its files, or from what was salvaged."""
    suggestion = one.suggestion or picked.suggestion(number, token)
    if suggestion is None:
        try:
            suggestion = records.suggestion(number)
        except (CorruptFile, OSError) as error:
            found.lost[number] = str(error)
            return
    result = one.result or picked.results.get(suggestion.key)
    if result is None:
        try:
            result = records.result(number, suggestion.key)
        except (CorruptFile, OSError) as error:
            logger.warning("%s; the candidate runs again", error)
    trial = suggestion.trial(-1, "waiting")
    found.trials[number] = trial if result is None else trial.finished(result)


def mend_files(records: Records, trials: Sequence[StoredTrial]) -> list[str]:
    """Write the sealed files that are missing or damaged anew; a line for each damaged one, which is kept.

    What a trial without a result has left is not looked at here. Raises OSError.
    """
    lines: list[str] = []
    for trial in trials:
        _mend_suggestion(records, trial, lines)
        if trial.result is not None:
            _mend_result(records, trial, trial.result, lines)
    return lines


def _mend_suggestion(records: Records, trial: StoredTrial, lines: list[str]) -> None:
    path = records.suggestion_path(trial.number)
    try:
        if records.suggestion(trial.number).key == trial.key:
            return
        lines.append(_set_aside(path, "it belongs to another architecture"))
    except CorruptFile as error:
        lines.append(_set_aside(path, error.why))
    except FileNotFoundError:  # the driver was killed between the two writes
        pass
    records.write_suggestion(trial)


def _mend_result(records: Records, trial: StoredTrial, result: TrialResult, lines: list[str]) -> None:
    path = records.result_path(trial.number)
    try:
        saved = records.result(trial.number, trial.key)
    except CorruptFile as error:
        lines.append(_set_aside(path, error.why))
        saved = None
    if saved is None or not saved.same_as(result):
        records.write_result(trial, result)


def _set_aside(path: Path, why: str) -> str:
    copy = keep_copy(path)
    return f"{path} is damaged: {why}; it was written anew, the old one is kept as {copy.name}"


def token_of(run: RunDirectory, known: Sequence[object]) -> str | None:
    """The run's own token: the first of ``known`` that is one, else what most of its sealed suggestions say."""
    for value in known:
        if isinstance(value, str) and value:
            return value
    votes: Counter[str] = Counter()
    for number in Records(run, "").numbers():
        try:
            votes[Records(run, "").suggestion(number).run] += 1
        except (CorruptFile, OSError):
            continue
    return votes.most_common(1)[0][0] if votes else None
