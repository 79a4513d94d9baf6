"""The run directories of the other drivers of a shared study, where this machine can see them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.drivers import PREFIX
from nas.files import CorruptFile, atomic_path
from nas.records import Records, StoredTrial, TrialResult
from nas.run_directory import RunDirectory
from nas.shared import Lease

__all__ = ["Neighbours", "has_weights"]

_WEIGHTS = ("weights.safetensors", "weights.safetensors.sha256")


class Neighbours:
    """What lies in the directories of other drivers.

    Args:
        attributes: of the study, where every driver is entered with its directory.
        driver: this one.
        token: of the study; records of another are not believed.
    """

    def __init__(self, attributes: Mapping[str, Any], driver: str, token: str):
        self._attributes = attributes
        self._driver = driver
        self._token = token

    def result(self, trial: StoredTrial, lease: Lease | None) -> TrialResult | None:
        """The result that the holder of ``lease`` has left and could not record any more."""
        place = self._place_of(lease)
        if place is None:
            return None
        with contextlib.suppress(CorruptFile, OSError):
            return Records(place, self._token).result(trial.number, trial.key)
        return None

    def fetch_weights(self, trial: StoredTrial, lease: Lease | None, folder: Path) -> bool:
        """Put the weights of ``trial`` into ``folder``, which is there; whether they could be had."""
        place = self._place_of(lease)
        if place is None:
            return False
        with contextlib.suppress(CorruptFile, OSError):
            if Records(place, self._token).suggestion(trial.number).key == trial.key:
                for name in _WEIGHTS:
                    _link(place.trial(trial.number) / name, folder / name)
                return True
        return False

    def _place_of(self, lease: Lease | None) -> RunDirectory | None:
        if lease is None or lease.driver == self._driver:
            return None
        entry = self._attributes.get(PREFIX + lease.driver) or {}
        path = Path(str(entry.get("directory") or ""))
        return RunDirectory(path) if path.is_absolute() and path.is_dir() else None


def has_weights(folder: Path, sha256: str) -> bool:
    """Whether the weights in ``folder`` say of themselves that they are those of a result; a late one leaves others."""
    try:
        return (folder / _WEIGHTS[0]).exists() and sha256 in (folder / _WEIGHTS[1]).read_text(
            encoding="utf-8"
        )
    except OSError:
        return False


def _link(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except FileNotFoundError:
            raise
        except OSError:  # another file system
            os.symlink(source, temporary)
