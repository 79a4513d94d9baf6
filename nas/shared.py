"""What drivers agree on before they share a study: where it may be, what it is, and who has which trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.config import SearchConfig
from nas.errors import UserMistake
from nas.files import seal, unseal
from nas.resolve import CHANGEABLE, changed_keys
from nas.storage import require_place
from nas.stored import StoredStudy, make_study

if TYPE_CHECKING:
    from nas.run_directory import RunDirectory
    from spaces import SearchSpace

__all__ = ["Lease", "agree", "joined_settings", "require_shareable", "require_shared", "shared_identity"]

_OWN = frozenset({"space", "evaluator", "data", "storage"})
"""Keys that say where something is, which each machine may know under another path."""
_OF_A_MACHINE = frozenset(
    {
        "workers",
        "time_budget",
        "memory_limit",
        "ray",
        "cpus_per_trial",
        "gpus_per_trial",
        "ray_runtime_env",
    }
)
"""Keys that are never taken from another driver."""


@dataclass(frozen=True)
class Lease:
    """Which driver has a trial; ``claim`` is different each time that somebody takes it."""

    driver: str
    claim: str

    @classmethod
    def read(cls, data: Any) -> Lease | None:
        """From what is stored; None for what is no lease."""
        if not isinstance(data, Mapping):
            return None
        return cls(str(data.get("driver", "")), str(data.get("claim", "")))


def require_shareable(url: str | None) -> str:
    """``url`` if several drivers can share a study there. Raises UserMistake."""
    way_out = "give --storage postgresql://..., mysql://... or journal:FILE where all of them reach it"
    if url is None:
        raise UserMistake(f"--join: needs a storage that all drivers reach; {way_out}")
    if url.startswith("sqlite"):
        reason = "its locks hold on one machine only, and a paused driver keeps all others out"
        raise UserMistake(
            f"--join: --storage {url}: drivers cannot share a SQLite file ({reason}); {way_out}"
        )
    require_place(url)
    return url


def shared_identity(run: RunDirectory, url: str, name: str) -> dict[str, Any] | None:
    """What the shared study ``name`` records of itself; None while nobody has begun it. Nothing is written.

    Raises UserMistake when it cannot be read, or is not one to be shared.
    """
    stored = StoredStudy(run, url, reading=True, name=name)
    try:
        if stored.broken is not None:
            raise UserMistake(f"--storage: {stored.broken}; repair it, or give another")
        if stored.identity is not None:
            require_shared(stored.identity, name)
        return stored.identity
    finally:
        stored.close()


def joined_settings(given: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a driver that joins: the study's, with what each driver may choose for itself from ``given``.

    Raises UserMistake when ``given`` asks for anything else that the study has differently.
    """
    config = SearchConfig.parse(identity["config"], "the study")
    changes = [change for change in changed_keys(given, config) if change.split(":")[0] not in _OWN]
    for key in ("evaluator", "data"):
        old, new = str(getattr(config, key)), str(given.get(key) or getattr(config, key))
        if Path(old).name != Path(new).name:
            changes.append(f"{key}: {old} -> {new}")
    if changes:
        raise UserMistake(
            f"--join {config.join}: the study there has other settings ({'; '.join(changes)}); leave them out, "
            "or give another name"
        )
    shared = {key: value for key, value in config.dump().items() if key not in _OF_A_MACHINE}
    return {**shared, **{key: given[key] for key in given if key in CHANGEABLE | _OWN}}


def require_shared(identity: Mapping[str, Any], name: str) -> None:
    """Raises UserMistake when a study is one whose driver is alone."""
    if (identity.get("config") or {}).get("join") != name:
        text = "was not begun with --join, and its driver counts on being alone"
        raise UserMistake(f"--join {name}: the study of this name in --storage {text}; use another name")


def agree(
    stored: StoredStudy,
    run: RunDirectory,
    space: SearchSpace,
    objectives: Sequence[tuple[str, str]],
    wanted: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of the study, which is ``wanted`` if nobody was faster. Raises UserMistake when they do not match."""
    if stored.study_id is None:
        assert stored.storage is not None  # it was just opened
        try:
            stored.study_id = make_study(stored.storage, stored.study, objectives)
        except UserMistake:  # at the same moment somebody else did
            stored.find(run)
    if stored.identity is None:
        stored.name_metrics(objectives)
    ledger = stored.ledger(space)
    with ledger.exclusive():
        sealed = ledger.study_attributes().get("nas")
        if sealed is None:
            ledger.set_study_attribute("nas", seal(wanted))
        identity = dict(wanted) if sealed is None else unseal(sealed, "the record of the study")
    stored.identity = identity
    require_shared(identity, stored.study)
    for key, what in (("fingerprint", "search space"), ("objectives", "objectives")):
        if identity[key] != wanted[key]:
            text = (
                f"the study there has another {what}" if key == "fingerprint" else f"it has {identity[key]}"
            )
            raise UserMistake(
                f"--join {stored.study}: {text}; give the same --space and --objective, or another name"
            )
    joined_settings(wanted["config"], identity)  # both may have begun at the same moment
    return identity
