"""Sealed records picked out of a storage that cannot be opened as a whole any more."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.files import CorruptFile, unseal
from nas.journal import journal_records
from nas.records import FINISHED, Suggestion, TrialResult
from nas.storage import local_file

__all__ = ["Salvage", "salvage"]

_MOST_ERRORS = 2_000
_TABLES = {
    "study_user_attributes": "study_user_attribute_id",
    "trial_user_attributes": "trial_user_attribute_id",
}


@dataclass
class Salvage:
    """What could still be read, whatever run it belongs to; results by the key of their architecture."""

    studies: list[dict[str, Any]] = field(default_factory=list)
    suggestions: list[Suggestion] = field(default_factory=list)
    results: dict[str, TrialResult] = field(default_factory=dict)

    def suggestion(self, number: int, run: str) -> Suggestion | None:
        """The suggestion of one trial of one run."""
        return next((found for found in self.suggestions if (found.number, found.run) == (number, run)), None)


def salvage(url: str) -> Salvage:
    """Everything with a seal that holds in the local storage at ``url``; nothing is written."""
    found = Salvage()
    path = local_file(url)
    if path is None or not path.exists():
        return found
    sealed = _from_journal(path) if url.startswith("journal:") else _from_sqlite(path)
    for value in sealed:
        with contextlib.suppress(CorruptFile):
            _sort(found, unseal(value, path))
    return found


def _sort(found: Salvage, record: dict[str, Any]) -> None:
    if "fingerprint" in record:
        found.studies.append(record)
    elif "architecture" in record:
        found.suggestions.append(Suggestion.from_dict(record, "suggestion"))
    elif record.get("state") in FINISHED and "key" in record:
        found.results[str(record["key"])] = TrialResult.from_dict(record)


def _from_journal(path: Path) -> Iterator[Any]:
    for _, record in journal_records(path):
        if isinstance(record, dict):
            for name in ("user_attrs", "user_attr"):
                attributes = record.get(name)
                if isinstance(attributes, dict):
                    yield from attributes.values()


def _from_sqlite(path: Path) -> Iterator[Any]:
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)
    except sqlite3.Error:
        return
    connection.text_factory = bytes
    try:
        for table, identifier in _TABLES.items():
            for text in _rows(connection, table, identifier):
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    yield json.loads(text)
    finally:
        connection.close()


def _rows(connection: sqlite3.Connection, table: str, identifier: str) -> Iterator[Any]:
    """Row by row, because one bad page would end a query over all of them.

    A bad page has an end somewhere: it takes many bad rows in a row to give up.
    """
    last = errors = 0
    query = (
        f"SELECT {identifier}, value_json FROM {table} WHERE {identifier} > ? ORDER BY {identifier} LIMIT 1"
    )
    while errors < _MOST_ERRORS:
        try:
            row = connection.execute(query, (last,)).fetchone()
        except sqlite3.Error as error:
            if any(text in str(error) for text in ("no such table", "not a database", "unable to open")):
                return
            errors += 1
            last += 1
            continue
        except UnicodeError:  # SQLite quotes the damaged definition of a table, and Python cannot decode that
            return
        if row is None or not isinstance(row[0], int):
            return
        last, errors = row[0], 0
        yield row[1]
