"""Visits of a model among those of the reference, and what is read from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from nas.latency.runner import Times

__all__ = ["NEVER", "Track", "Visit", "by_place", "calls_of", "median_times", "quietest", "share_out_calls"]

_VISIT_MS = 6.0  # two visits of the reference cost more than this: fewer calls between them would be a waste
_SLOW_MS = 60.0
_MOST_CALLS = 15
_COLD_MS = 2.0  # measured: a model of 0.7 ms needs 1.7, 1.2 and 1.05 of its time in the first calls after another model
_WARM_MS = 6.0  # from here on the first of three calls is 1 to 5 % slow, which their median does not show
_ALIKE = 2.0

_V = TypeVar("_V")
NEVER = Times(math.nan, math.nan, math.nan)
"""Stands for a call that was not made."""


class Visit(NamedTuple):
    """One visit: the median of its calls, and the reference's on both sides of it.

    ``place`` tells where in memory everything lay: visits of one place have that accident in common.
    """

    round: int
    times: Times
    before: Times
    after: Times
    place: int = 0

    def ratio(self, clock: str) -> float:
        """Its time over the mean of the reference's before and after."""
        around = (getattr(self.before, clock) + getattr(self.after, clock)) / 2
        return float(getattr(self.times, clock) / around)

    def noise(self, clock: str) -> float:
        """The slower one of the reference's times around it: what the machine was busy with, seen from outside."""
        return float(max(getattr(self.before, clock), getattr(self.after, clock)))


@dataclass
class Track:
    """What is known of one model in a session.

    A visit is ``cold`` calls that only fetch what the model before threw out of the caches, then ``calls`` that count.
    """

    name: str
    run: Callable[[], Times]
    calls: int = 3
    cold: int = 0
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


def by_place(
    values: Sequence[float],
    places: Sequence[int],
    of: Callable[[list[float]], float] = statistics.median,
) -> list[float]:
    """The median of the values of each place: these are independent of each other, values of one place are not."""
    found: dict[int, list[float]] = {}
    for value, place in zip(values, places, strict=True):
        found.setdefault(place, []).append(value)
    return [of(one) for one in found.values()]


def share_out_calls(tracks: Sequence[Track], times: Mapping[str, Times]) -> None:
    """Give each track its calls in a visit: three, so that one disturbed call does not show; more of a fast model.

    Models of about one speed get as many, that of the fastest of them: the median of few calls is another one than that
    of many, and two copies of a model must not be told apart by that.

    Args:
        times: of a call of each, by name.
    """
    fastest = 0.0
    for track in sorted(tracks, key=lambda one: times[one.name].wall):
        wall = times[track.name].wall
        if wall > _ALIKE * fastest:
            fastest = wall
        track.calls = calls_of(fastest)
        track.cold = 0 if fastest >= _WARM_MS else math.ceil(_COLD_MS / max(fastest, 1e-2))


def calls_of(wall: float) -> int:
    """Calls of a visit that count, for a model whose call takes ``wall`` milliseconds."""
    if wall >= _SLOW_MS:
        return 1
    wanted = math.ceil(_VISIT_MS / max(wall, 1e-3))
    return min(_MOST_CALLS, max(3, wanted + 1 - wanted % 2))


def median_times(calls: Sequence[Times]) -> Times:
    """The median by each clock."""
    return Times(*(statistics.median(column) for column in zip(*calls, strict=True)))
