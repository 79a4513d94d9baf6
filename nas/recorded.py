"""The recipe and the facts of a run, each from whichever of its copies is whole.

``recipe.yaml`` and ``environment.json`` are what people read; the facts hold a copy of the recipe, and the study one
of both.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nas.config import SearchConfig, load_recipe, to_yaml
from nas.errors import UserMistake
from nas.files import CorruptFile, atomic_write_text, read_record, write_record
from nas.resolve import CHANGEABLE, resolved_storage
from nas.storage import keep_copy
from nas.stored import look_up, read_identity, study_name

if TYPE_CHECKING:
    from pathlib import Path

    from nas.run_directory import RunDirectory

__all__ = ["Recorded", "edits", "put_back", "read_recorded", "restore", "write_start"]


@dataclass(frozen=True)
class Recorded:
    """What a run directory says of its run.

    ``damage`` maps a file to what is wrong with it. ``edited`` says what the recipe has differently from what the run
    was started with where that would change the meaning of results; ``config`` has what it was started with.
    """

    config: SearchConfig
    facts: dict[str, Any] | None
    damage: dict[Path, str] = field(default_factory=dict)
    edited: dict[str, str] = field(default_factory=dict)


def write_start(run: RunDirectory, config: SearchConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Write both files of a new run; returns the facts with the recipe and, unless they have one, a token of this
    run added.

    A directory is a run from the moment it has a recipe: from then on the same command resumes it.
    """
    facts = {**facts, "recipe": config.dump(), "run": facts.get("run") or uuid.uuid4().hex}
    write_record(run.environment, facts)
    atomic_write_text(run.recipe, to_yaml(config))
    return facts


def read_recorded(run: RunDirectory) -> Recorded:
    """The recipe and the facts; nothing is written.

    ``facts`` is None when no copy of them is whole. Raises UserMistake when no copy of the recipe is.
    """
    damage: dict[Path, str] = {}
    found: SearchConfig | None = None
    facts: dict[str, Any] | None = None
    try:
        given = load_recipe(run.recipe)
        found = SearchConfig.parse(given)
        missing = [key for key in SearchConfig.model_fields if key not in given]
        if missing:
            # We write every key: one that lacks is a line lost, and the line before it may be cut short.
            damage[run.recipe] = f"it lacks {', '.join(missing[:3])}" + (" and more" if missing[3:] else "")
    except UserMistake as mistake:
        damage[run.recipe] = _reason(str(mistake), run.recipe)
    try:
        facts = read_record(run.environment)
    except CorruptFile as error:
        damage[run.environment] = error.why
    except OSError as error:
        damage[run.environment] = error.strerror or str(error)
    original: dict[str, Any] | None = (facts or {}).get("recipe")
    if damage:
        known = original or (found.dump() if found is not None else {})
        url = str(known.get("storage") or f"sqlite:///{run.database}")
        identity = read_identity(run, url, known.get("join")) or {}
        original = identity.get("config") or original
        facts = facts if facts is not None else identity.get("facts")
    return _merged(run, None if run.recipe in damage else found, original, facts, damage)


def _merged(
    run: RunDirectory,
    found: SearchConfig | None,
    original: dict[str, Any] | None,
    facts: dict[str, Any] | None,
    damage: dict[Path, str],
) -> Recorded:
    if original is None and found is None:
        raise UserMistake(f"{run.recipe}: {damage[run.recipe]}; and no other copy of it can be read")
    if original is None or found is None:
        return Recorded(found or SearchConfig.parse(original or {}, str(run.recipe)), facts, damage)
    edited = {key: text for key, text in edits(found, original).items() if key not in CHANGEABLE}
    kept = {key: original[key] for key in edited}
    return Recorded(SearchConfig.parse({**found.dump(), **kept}), facts, damage, edited)


def edits(config: SearchConfig, original: Mapping[str, Any]) -> dict[str, str]:
    """Key -> ``key: old -> new`` for what ``config`` says differently from the configuration of a study."""
    old = SearchConfig.parse(dict(original)).dump()
    return {key: f"{key}: {old[key]} -> {value}" for key, value in config.dump().items() if value != old[key]}


def put_back(run: RunDirectory, recorded: Recorded) -> list[str]:
    """Write what was damaged anew from its copies, keeping the damaged file; one line each. Raises OSError."""
    lines = []
    for path, why in recorded.damage.items():
        if path == run.environment and recorded.facts is None:
            lines.append(f"{path} is damaged: {why}; there is no copy, and the report will lack what it said")
            continue
        kept = f", the old one is kept as {keep_copy(path).name}" if path.exists() else ""
        if path == run.recipe:
            atomic_write_text(path, to_yaml(recorded.config))
        elif recorded.facts is not None:
            write_record(path, recorded.facts)
        lines.append(f"{path} is damaged: {why}; it was written anew{kept}")
    return lines


def restore(run: RunDirectory, url: str) -> None:
    """Make a run directory that is not there from what its study in the storage ``url`` says of it.

    The study has the name of the directory. What ran lost its weights with the other directory, and nothing else; the
    records of the trials are written by whoever opens the study. Raises UserMistake when there is no such study, or it
    is one to be joined.
    """
    if not run.is_empty():
        raise UserMistake(f"{run.path}: holds files but no run; give a directory that is empty or not there")
    url = resolved_storage(url) or url
    identity, others = look_up(run, url)
    if identity is None:
        there = f"it has {', '.join(others[:5])}" if others else "it has none"
        raise UserMistake(
            f"--storage: there is no study {study_name(run)!r} ({there}); give the run directory the study's name"
        )
    config = SearchConfig.parse({**identity["config"], "storage": url}, "the study")
    if config.join is not None:
        text = f"join it: nas search --join {config.join} --storage ... --out {run.path}"
        raise UserMistake(f"{run.path}: the study {config.join!r} is shared by several drivers; {text}")
    run.acquire()
    try:
        write_start(run, config, {**identity["facts"], "run": identity["run"]})
    finally:
        run.release()


def _reason(text: str, path: Path) -> str:
    for prefix in (f"--recipe {path}: ", f"--recipe {path} ", "configuration: "):
        text = text.removeprefix(prefix)
    return text.split("; known: ")[0]
