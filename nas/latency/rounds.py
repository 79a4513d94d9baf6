"""Rounds of visits in random order, with the reference before and after each: the measuring itself.

It knows callables that return their times, and nothing of models, devices or processes.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nas.latency.runner import Times
from nas.latency.statistics import bootstrap_interval, median_interval, relative_slope, splits

__all__ = ["CONTENDED_ABOVE", "Plan", "Rounds", "Track", "Visit", "median_times"]

CONTENDED_ABOVE = 1.05
"""Wall time over CPU time of a single-threaded call above which other work must have run on its core."""

SURE = 0.995
"""Confidence of an interval by which something is decided: it is looked at several times, 95 % would be too little."""

LEAST_ROUNDS = 6
"""From six values on, the least and the most enclose the median with 95 % confidence."""

_QUIET_SHARE = 0.1
_QUIET_BAND = 1.1
_WARMUP_WINDOW = 5
_WARMUP_SLOPE = 0.01
_WARMUP_SECONDS = 0.2
_WARMUP_LEAST = 3
_WARMUP_SHARE = 0.3
_VISIT_MS = 3.0
_SLOW_MS = 150.0
_MOST_CALLS = 15


_V = TypeVar("_V")
_NEVER = Times(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        max_seconds: for warm-up and rounds of all models together; six rounds are made in any case.
        precision: half-width of the 95 % interval over the median at which a model is done.
        min_rounds: visits before any interval is believed.
        limit_ms: with it a model is done as soon as it is surely above the limit. One that is surely below goes on: its
            figure is wanted.
        most_rounds: visits after which a model is done whatever its interval.
        together: all models are visited until ``Rounds(done=...)`` says so, because they are to be compared.
        seed: of the order of visits.
    """

    max_seconds: float = 2.0
    precision: float = 0.01
    min_rounds: int = 9
    limit_ms: float | None = None
    most_rounds: int = 1000
    together: bool = False
    seed: int = 0


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
    first: Times = _NEVER
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


class Rounds:
    """A session of measuring.

    Args:
        models: name -> callable that runs the model once and returns its times.
        reference: the same of the reference workload.
        plan: how much to measure.
        clock_of: picks the clock from the calls made so far, one list for each model and the reference.
        scale_of: the reference's long-run time by a clock; None means that of this session.
        between: called after every visit, e.g. to check a lease and to rest.
        done: called from ``min_rounds`` on, more and more rarely; True ends the session: every decision is clear.
        on_visit: called with a model's name before it is touched, so that a crash can be blamed.
        first: times of first calls that were made before, by name.
    """

    def __init__(
        self,
        models: Mapping[str, Callable[[], Times]],
        reference: Callable[[], Times],
        plan: Plan,
        clock_of: Callable[[Sequence[Sequence[Times]]], str],
        *,
        scale_of: Callable[[str], float | None] = lambda clock: None,
        between: Callable[[], None] = lambda: None,
        done: Callable[[Rounds], bool] = lambda rounds: False,
        on_visit: Callable[[str], None] = lambda name: None,
        first: Mapping[str, Times] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.first = dict(first or {})
        self.tracks = {name: Track(name, run) for name, run in models.items()}
        self.reference = Track("reference", reference)
        self.plan = plan
        self.number = 0
        self._scale_of = scale_of
        self._known: dict[str, Any] = {}
        self._next_look = plan.min_rounds
        self.drift: list[tuple[float, Times]] = []
        self._clock_of = clock_of
        self._between, self._done, self._on_visit, self._now = between, done, on_visit, now
        self._begun = now()
        self._rng = random.Random(plan.seed)
        self._splits = 0

    @property
    def clock(self) -> str:
        """The clock that the times so far are to be read by."""
        found: str = self._once("clock", lambda: self._clock_of(self.calls()))
        return found

    def calls(self) -> list[list[Times]]:
        """The timed calls of the reference and of each model."""
        return [track.samples for track in self._all() if track.samples]

    def reference_times(self) -> list[float]:
        """The reference's visits by the session's clock, in order, milliseconds."""

        def read() -> list[float]:
            clock = self.clock
            return [getattr(times, clock) for _, times in self.drift]

        found: list[float] = self._once("reference", read)
        return found

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What follows from all calls is computed once after each round: a long session has thousands."""
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def ceiling(self) -> float:
        """The reference's time, milliseconds by the session's clock, up to which the machine counts as quiet.

        A busy neighbour core slows models by unlike factors (measured: 1.42 and 1.48), so that ratios taken beside it
        are not those of a quiet machine. The reference tells the two states apart; a model's own times never do.
        """

        def compute() -> float:
            return float(np.quantile(self.reference_times(), _QUIET_SHARE)) * _QUIET_BAND

        found: float = self._once("ceiling", compute)
        return found

    def ratios(self, track: Track) -> list[float]:
        """A model's ratios to the reference, of its quiet visits."""
        clock = self.clock
        return [visit.ratio(clock) for visit in track.quiet(clock, self.ceiling(), self.plan.min_rounds)]

    def session_ms(self) -> float:
        """The reference's median in the quiet part of this session."""
        ceiling = self.ceiling()
        return statistics.median(ms for ms in self.reference_times() if ms <= ceiling)

    def long_run_ms(self) -> float:
        """What ratios are multiplied with."""
        return self._scale_of(self.clock) or self.session_ms()

    def warm_up(self, renew: Callable[[], None] = lambda: None) -> None:
        """First calls, where none were made, and calls until the times no longer get shorter or longer.

        ``renew`` is called when all models have run once, for instance to reach threads that they created.
        """
        share = self.plan.max_seconds * _WARMUP_SHARE / (len(self.tracks) + 1)
        for track in self._all():
            self._on_visit(track.name)
            track.first = self.first.get(track.name) or track.run()
            self._between()
        renew()
        for track in self._all():
            self._on_visit(track.name)
            track.calls = calls_of(self._warm_up(track, share))

    def _all(self) -> list[Track]:
        return [self.reference, *self.tracks.values()]

    def _warm_up(self, track: Track, most_seconds: float) -> Times:
        begun = self._now()
        walls: list[float] = []
        while True:
            times = track.run()
            self._between()
            walls.append(times.wall)
            elapsed = self._now() - begun
            recent = walls[-_WARMUP_WINDOW:]
            settled = len(recent) == _WARMUP_WINDOW and relative_slope(recent) < _WARMUP_SLOPE
            if elapsed >= most_seconds or (
                settled and len(walls) >= _WARMUP_LEAST and elapsed >= _WARMUP_SECONDS
            ):
                track.warmup_runs = len(walls)
                return times

    def run(self) -> None:
        """Rounds until every model has stopped. Each track then says why it did."""
        while active := [track for track in self.tracks.values() if track.stopped is None]:
            late = self._now() - self._begun >= self.plan.max_seconds
            if late and self.number >= LEAST_ROUNDS:
                for track in active:
                    track.stopped = "time"
                return
            self._round(active)
            if self.number < self.plan.min_rounds:
                continue
            if not self.plan.together:
                self._judge(active)
                self._reopen()
            elif self.number >= self._next_look:
                # Every look is another chance to be wrong, so they become rarer.
                self._next_look += max(1, self.number // 4)
                if self._done(self):
                    for track in active:
                        track.stopped = "decision"

    def _round(self, active: list[Track]) -> None:
        self._rng.shuffle(active)
        before = self._visit(self.reference)
        for track in active:
            times = self._visit(track)
            after = self._visit(self.reference)
            track.visits.append(Visit(self.number, times, before, after))
            before = after
        self.number += 1
        self._known.clear()

    def _visit(self, track: Track) -> Times:
        self._on_visit(track.name)
        calls = [track.run() for _ in range(track.calls)]
        track.samples += calls
        track.tail += calls[1:] or calls
        times = median_times(calls)
        if track is self.reference:
            self.drift.append((self._now() - self._begun, times))
        self._between()
        return times

    def _judge(self, active: Sequence[Track]) -> None:
        clock, plan, ceiling = self.clock, self.plan, self.ceiling()
        for track in active:
            count = len(track.visits)
            if count >= plan.most_rounds:
                track.stopped = "time"
            if count < track.next_look:
                continue
            # An interval looked at after every round is soon narrow by chance.
            track.next_look = count + max(1, count // 4)
            quiet = track.quiet(clock, ceiling, 0)
            if len(quiet) < plan.min_rounds:
                continue
            ratios = [visit.ratio(clock) for visit in quiet]
            low, high = bootstrap_interval(ratios)
            surely_low, _ = median_interval(ratios, SURE)
            if plan.limit_ms is not None and surely_low > plan.limit_ms / self.long_run_ms():
                track.stopped = "decision"
            elif (high - low) / 2 <= plan.precision * statistics.median(ratios):
                track.stopped = "precision"

    def _reopen(self) -> None:
        """After a change of the machine's level the models that were done are visited again on its other side."""
        if self.splits > self._splits:
            self._splits = self.splits
            for track in self.tracks.values():
                if track.stopped == "precision":
                    track.stopped = None
                    track.next_look = len(track.visits) + self.plan.min_rounds // 2

    @property
    def splits(self) -> int:
        """How often the reference's level changed."""
        found: int = self._once("splits", lambda: len(splits(self.reference_times())))
        return found


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
