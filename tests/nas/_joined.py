"""Drivers that share a study, in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.joining import JoinedStudy
from nas.recorded import read_recorded, write_start
from nas.run_directory import RunDirectory
from nas.study import StoredTrial, Study
from spaces import SearchSpace
from tests.nas.toys import toy
from tests.nas.toys.runs import OBJECTIVES, toy_config

__all__ = ["LEASE", "Drivers", "drivers", "kill", "look"]


FACTS: dict[str, Any] = {"objective": None, "candidates": {}, "task": {}, "epochs": 1}
LEASE = 3600.0


class Drivers:
    """Drivers of one study in one process, each with its directory."""

    def __init__(self, folder: Path, url: str):
        self.folder = folder
        self.url = url
        self.runs: dict[str, RunDirectory] = {}

    def __call__(self, name: str, *, space: SearchSpace = toy.SPACE, **settings: Any) -> JoinedStudy:
        """A driver that starts, or that comes back to its directory."""
        self.leave(name)
        run = self.runs[name] = RunDirectory(self.folder / name)
        run.acquire()
        if run.holds_run():
            recorded = read_recorded(run)
            study, lines = Study.open(run, space, OBJECTIVES, recorded.config.dump(), recorded.facts)
            assert lines == []
            assert isinstance(study, JoinedStudy)
            return study
        config = toy_config(self.url, **{"join": "shared", "lease": LEASE, "trials": 8, **settings})
        study, facts = JoinedStudy.begin(run, space, OBJECTIVES, config.dump(), FACTS)
        write_start(run, config, facts)
        return study

    def leave(self, name: str) -> None:
        """End a driver as a kill does: what it has reserved stays reserved."""
        if name in self.runs:
            self.runs.pop(name).release()

    def close(self) -> None:
        for name in list(self.runs):
            self.leave(name)


@pytest.fixture(params=["journal:{}/journal", "sqlite+pysqlite:///{}/server.db"])
def drivers(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Drivers]:
    """On a journal, and on a database that stands for one on a server, as nobody writes to it at the same time here."""
    monkeypatch.setattr("nas.joining.require_shareable", lambda url: url)
    made = Drivers(tmp_path, request.param.format(tmp_path))
    yield made
    made.close()


def look(study: JoinedStudy) -> list[StoredTrial]:
    """The news, whether it is time for them or not."""
    study._next_look = 0.0
    return study.news()


def kill(drivers: Drivers, name: str, *watchers: JoinedStudy) -> None:
    """End a driver, and let so much time pass that the others notice."""
    driver = (
        drivers.runs[name] and json.loads((drivers.folder / name / "environment.json").read_text())["driver"]
    )
    drivers.leave(name)
    for watcher in watchers:
        look(watcher)
        watcher._watch._silent[driver] = 2 * LEASE
