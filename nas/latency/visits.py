"""Visits of a model among those of the reference, and what is read from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from nas.latency.runner import Times

__all__ = ["NEVER", "Track", "Visit", "calls_of", "median_times", "quietest"]

_VISIT_MS = 6.0  # two visits of the reference cost more than this: fewer calls between them would be a waste
_SLOW_MS = 60.0
_MOST_CALLS = 15

_V = TypeVar("_V")
NEVER = Times(math.nan, math.nan, math.nan)
"""Stands for a call that was not made."""


class Visit(NamedTuple):
    """One visit: the median of its calls, and the reference's on both sides of it."""

    round: int
    times: Times
    before: Times
    after: Times

    def ratio(self, clock: str) -> float:
        """Its time over the mean of the reference's before and after."""
        around = (getattr(self.before, clock) + getattr(self.after, clock)) / 2
        return float(getattr(self.times, clock) / around)

    def noise(self, clock: str) -> float:
        """The slower one of the reference's times around it: what the machine was busy with, seen from outside."""
        return float(max(getattr(self.before, clock), getattr(self.after, clock)))


@dataclass
class Track:
    """What is known of one model in a session."""

    name: str
    run: Callable[[], Times]
    calls: int = 3
    first: Times = NEVER
    warmup_runs: int = 0
    visits: list[Visit] = field(default_factory=list)
    samples: list[Times] = field(default_factory=list)
    tail: list[Times] = field(default_factory=list)
    stopped: str | None = None
    next_look: int = 0

    @property
    def runs(self) -> int:
        """Calls in all."""
        return 1 + self.warmup_runs + len(self.samples)

    def quiet(self, clock: str, ceiling: float, least: int) -> list[Visit]:
        """Visits with the reference at most ``ceiling`` on both sides; if they are too few, the quietest ``least``."""
        return quietest(self.visits, lambda visit: visit.noise(clock), ceiling, least)


def quietest(visits: Sequence[_V], noise: Callable[[_V], float], ceiling: float, least: int) -> list[_V]:
    """Those with at most ``ceiling`` of noise, or the ``least`` quietest where these are more; order is kept."""
    ordered = sorted(noise(visit) for visit in visits)
    bound = max(ceiling, ordered[min(least, len(ordered)) - 1]) if ordered and least else ceiling
    return [visit for visit in visits if noise(visit) <= bound]


def calls_of(times: Times) -> int:
    """Calls in one visit: three, so that one disturbed call does not show; more of a fast model, one of a slow one."""
    if times.wall >= _SLOW_MS:
        return 1
    return min(_MOST_CALLS, max(3, math.ceil(_VISIT_MS / max(times.wall, 1e-3))))


def median_times(calls: Sequence[Times]) -> Times:
    """The median by each clock."""
    return Times(*(statistics.median(column) for column in zip(*calls, strict=True)))
