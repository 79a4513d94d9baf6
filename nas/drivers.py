"""Signs of life of the drivers that share a study, and which of them have fallen silent.

A driver counts a number up in the storage; whoever watches it notes by its own monotonic clock how long the number
has stood still. No clock of one machine is ever compared with that of another, so clocks may differ and jump.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

__all__ = ["PREFIX", "Pulse", "Watch", "poll_seconds"]

logger = logging.getLogger(__name__)

PREFIX = "driver:"
"""Of the names of those attributes of a study under which its drivers are entered."""

_BEATS_PER_LEASE = 5
_POLLS_PER_LEASE = 10
_LONGEST_POLL = 2.0


def poll_seconds(lease: float) -> float:
    """Time between two looks at what the others do."""
    return min(lease / _POLLS_PER_LEASE, _LONGEST_POLL)


class Pulse:
    """Calls ``beat`` with a rising number from a thread of its own until it is stopped.

    A beat that fails is left out: the next one says the same.
    """

    def __init__(self, beat: Callable[[int], None], lease: float, first: int = 1):
        self._beat = beat
        self._interval = lease / _BEATS_PER_LEASE
        self._number = first
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nas-pulse", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; the beat that is on its way is waited for a moment."""
        self._ended.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self._number += 1
            try:
                self._beat(self._number)
            except Exception as error:  # whoever drives the search meets it too, and reports it
                logger.debug("no sign of life could be written: %s", error)


class Watch:
    """How long each driver has been silent, as seen from here.

    Only time during which the watcher itself was awake and reached the storage counts: between two looks at most twice
    the usual time. Otherwise a driver that was paused, or cut off together with all others, would take them for dead.
    """

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic):
        self._lease = lease
        self._most = 2 * poll_seconds(lease)
        self._clock = clock
        self._last: float | None = None
        self._seen: dict[str, object] = {}
        self._silent: dict[str, float] = {}

    def look(self, beats: Mapping[str, object]) -> None:
        """Take in what the storage says now: driver -> its latest sign of life."""
        now = self._clock()
        passed = 0.0 if self._last is None else min(max(0.0, now - self._last), self._most)
        self._last = now
        for driver, beat in beats.items():
            still = driver in self._seen and self._seen[driver] == beat
            self._silent[driver] = self._silent.get(driver, 0.0) + passed if still else 0.0
            self._seen[driver] = beat
        for driver in self._silent.keys() - beats.keys():  # its entry is gone: as silent as can be
            self._silent[driver] += passed

    def lapsed(self, driver: str) -> bool:
        """Whether ``driver`` was silent for a whole lease. One that nobody has entered has to be waited for too."""
        if driver not in self._seen:
            self._seen[driver], self._silent[driver] = None, 0.0
        return self._silent[driver] >= self._lease
