"""What one driver sees of a study that others work on too, and its own entry among them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nas.drivers import PREFIX, Watch, poll_seconds
from nas.errors import RunStopped
from nas.mending import Found, believe
from nas.records import StoredTrial, TrialResult
from nas.shared import Lease
from nas.steady import Steady
from nas.study import KeyTaken, Study, StudyFull, TakenOver

if TYPE_CHECKING:
    from nas.ledger import Ledger, Row
    from nas.pareto import Direction
    from nas.run_directory import RunDirectory
    from nas.stored import StoredStudy
    from spaces import SearchSpace

__all__ = ["SharedView"]

_TOTAL = "trials"


class SharedView(Study):
    """Keeps up with a study: which trials there are, who has them, how many there are to be, who is silent."""

    def __init__(
        self,
        run: RunDirectory,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        stored: StoredStudy,
        identity: Mapping[str, Any],
        driver: str,
    ):
        super().__init__(run, space, objectives, stored, Found(), str(identity["run"]), writable=True)
        self._where = f"the study {stored.study!r} that is shared by {run.path}"
        self._driver = driver
        self._lease = float(identity["config"].get("lease") or 60.0)
        self._watch = Watch(self._lease)
        way_back = f"nas resume {run.path}"
        self._steady = Steady(self._where, way_back, (KeyTaken, StudyFull, TakenOver))
        self._last_id = -1
        self._keys: dict[str, int] = {}
        self._unfinished: set[int] = set()
        self._leases: dict[int, Lease | None] = {}
        self._held: dict[int, Lease] = {}
        self._left: dict[int, TrialResult] = {}
        self._news: list[StoredTrial] = []
        self._next_look = 0.0
        self._total = 0
        self._entry: dict[str, Any] = {}

    # -- among others --------------------------------------------------------------------------------------------------

    def _sign_on(self, trials: int) -> None:
        """Enter this driver among the others, and read everything."""
        with self._exclusively() as ledger:
            attributes = ledger.study_attributes()
            entries = {name: value for name, value in attributes.items() if name.startswith(PREFIX)}
            place = {"host": socket.gethostname(), "directory": str(self.run.path.resolve())}
            before = entries.get(PREFIX + self._driver) or {}
            if before and any(before.get(key) != value for key, value in place.items()):
                # A copy of the directory: the driver that has the other one may be alive.
                self._driver, before = uuid.uuid4().hex, {}
            beat = int(before.get("beat", 0)) + 1
            index = before.get("index", len(entries))
            self._entry = {"index": index, "pid": os.getpid(), "beat": beat, **place}
            ledger.set_study_attribute(PREFIX + self._driver, self._entry)
            self._total = int(attributes.get(_TOTAL) or 0)
            self._raise_total(ledger, trials)
            self._absorb(ledger.rows())
        self._news.clear()

    def _ask_for(self, trials: int) -> None:
        """Let the study have at least so many trials."""
        with self._exclusively() as ledger:
            self._total = int(ledger.study_attributes().get(_TOTAL) or 0)
            self._raise_total(ledger, trials)

    def _raise_total(self, ledger: Ledger, trials: int) -> None:
        if trials > self._total:
            ledger.set_study_attribute(_TOTAL, trials)
            self._total = trials

    def _beat(self, number: int) -> None:
        with self._steady.mutex:  # neither the storage nor its lock is for two threads at a time
            entry = {**self._entry, "beat": number}
            self._ledger_here().set_study_attribute(PREFIX + self._driver, entry)
            self._entry = entry

    def total(self, wanted: int) -> int:
        """The largest number that any of the drivers was asked for."""
        return max(self._total, 1)

    def controller_seed(self, seed: int) -> int:
        """The first driver's is the run's own; all others would propose the same otherwise."""
        index = int(self._entry["index"])
        if index == 0:
            return seed
        return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=4).digest(), "big")

    def stop_waiting(self, stopping: threading.Event) -> None:
        self._steady.stopping = stopping

    # -- what they do --------------------------------------------------------------------------------------------------

    def news(self) -> list[StoredTrial]:
        if time.monotonic() >= self._next_look:
            self._steady(self._look)
            self._next_look = time.monotonic() + poll_seconds(self._lease)
        found, self._news = self._news, []
        return found

    def _look(self) -> None:
        ledger = self._ledger_here()
        self._absorb(ledger.rows(self._last_id, self._open_ids()))
        attributes = ledger.study_attributes()
        self._total = max(self._total, int(attributes.get(_TOTAL) or 0))
        entries = {name: value for name, value in attributes.items() if name.startswith(PREFIX)}
        self._watch.look({name.removeprefix(PREFIX): entry.get("beat") for name, entry in entries.items()})

    def others_at_work(self) -> bool:
        return bool(self._news) or any(number not in self._held for number in self._unfinished)

    def _absorb(self, rows: Sequence[Row]) -> None:
        """Believe what was read; what others have begun or finished since is news."""
        for row in rows:
            one, problem = believe(row, row.number, self.token, self.objectives)
            if row.number > self._count or (one.lost is None and (problem or one.trial is None)):
                why = problem or "trials before it are missing"
                raise RunStopped(
                    f"{self._where} is damaged: trial {row.number}: {why}; restore it from a backup"
                )
            self._last_id = max(self._last_id, row.trial_id)
            self._count = max(self._count, row.number + 1)
            if one.trial is not None:
                self._take_in(one.trial, Lease.read(row.attributes.get("lease")), one.result)

    def _take_in(self, trial: StoredTrial, lease: Lease | None, result: TrialResult | None) -> None:
        before = self._trials.get(trial.number)
        self._leases[trial.number] = lease
        if trial.result is None and result is not None:
            self._left[trial.number] = result  # its driver was killed before the last word
        self._remember(trial)
        foreign = lease is None or self._held.get(trial.number) != lease
        ended = before is not None and before.result is None and trial.result is not None
        if foreign and (before is None or ended):
            self._news.append(trial)

    def _remember(self, trial: StoredTrial) -> StoredTrial:
        self._keys[trial.key] = trial.number
        (self._unfinished.discard if trial.result is not None else self._unfinished.add)(trial.number)
        return super()._remember(trial)

    def _open_ids(self) -> list[int]:
        return [self._trials[number].trial_id for number in self._unfinished]

    # -- the storage ---------------------------------------------------------------------------------------------------

    def _ledger_here(self) -> Ledger:
        return self._writable()

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[Ledger]:
        ledger = self._ledger_here()
        with ledger.exclusive():
            yield ledger
