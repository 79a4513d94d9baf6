"""Rounds of visits in random order, with the reference before and after each: the measuring itself.

It knows callables that return their times, and nothing of models, devices or processes.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.latency.runner import Times
from nas.latency.statistics import bootstrap_interval, enclosing, median_interval, relative_slope, splits
from nas.latency.visits import NEVER, Track, Visit, by_place, median_times, share_out_calls

__all__ = ["LEAST_PLACES", "LEAST_ROUNDS", "SURE", "Plan", "Rounds"]

SURE = 0.995
"""Confidence of an interval by which something is decided: it is looked at several times, 95 % would be too little."""

LEAST_ROUNDS = 6
"""From six values on, the least and the most enclose the median with 95 % confidence."""

LEAST_PLACES = 6
"""So many places in memory are seen before an interval is believed, for the same reason."""

_QUIET_SHARE = 0.1
_QUIET_BAND = 1.1
_REFERENCE_SECONDS = 0.07
_MOVING_SHARE = 0.15  # of the time between two moves
_MOVING_SHARE_TOGETHER = 1 / 3  # a verdict waits for so many places
_LOOKED_AT = 0.98
_WARMUP_WINDOW = 5
_WARMUP_SLOPE = 0.01
_WARMUP_SECONDS = 0.2
_WARMUP_LEAST = 3
_WARMUP_SHARE = 0.3


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        max_seconds: for warm-up and rounds of all models together; six rounds are made in any case.
        precision: half-width of the 95 % interval over the median at which a model is done.
        min_rounds: visits before any interval is believed.
        limit_ms: with it a model is done as soon as it is surely above the limit. One that is surely below goes on: its
            figure is wanted.
        most_rounds: visits after which a model is done whatever its interval; None: as many as the time allows.
        together: all models are visited until ``Rounds(done=...)`` says so, because they are to be compared. Every
            other round is in the reverse order of the one before, and the reference is visited less often: models
            between the same two visits of it are compared directly, without its noise.
        seed: of the order of visits.
    """

    max_seconds: float = 2.0
    precision: float = 0.01
    min_rounds: int = 9
    limit_ms: float | None = None
    most_rounds: int | None = None
    together: bool = False
    seed: int = 0


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
        relocate: puts all models elsewhere in memory, False where that cannot be done. Where they lie changes the time
            of a call by one per cent and more, so a session sees many places, and what it had in one counts as one.
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
        relocate: Callable[[], bool] = lambda: False,
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
        self._relocate: Callable[[], bool] | None = relocate
        self._place = 0
        self._begun = self._moved = now()
        self._moving = 0.0  # seconds that the last move took
        self._rng = random.Random(plan.seed)
        self._order: list[Track] = []
        self._before = NEVER
        self._reference_at = -math.inf
        self._open: list[tuple[Track, int, int, Times]] = []  # track, round, place, times
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

    def ceiling(self, band: float = _QUIET_BAND) -> float:
        """The reference's time, milliseconds by the session's clock, up to which the machine counts as quiet.

        It is ``band`` times the reference's fast tenth.

        A busy neighbour core slows models by unlike factors (measured: 1.42 and 1.48), so that ratios taken beside it
        are not those of a quiet machine. The reference tells the two states apart; a model's own times never do.
        """

        def compute() -> float:
            return float(np.quantile(self.reference_times(), _QUIET_SHARE))

        found: float = self._once("ceiling", compute)
        return found * band

    def ratios(self, track: Track) -> list[float]:
        """A model's ratios to the reference, of its quiet visits."""
        clock = self.clock
        return [visit.ratio(clock) for visit in track.quiet(clock, self.ceiling(), self.plan.min_rounds)]

    def interval(self, track: Track) -> tuple[float, float]:
        """Of the median of ``ratios``, at 95 %: a bootstrap over visits and one over places, whatever both enclose.

        The bootstraps are taken at 98 %, because whoever stops at the first narrow interval picks one that is narrow by
        chance; simulated sessions (``tests/nas/test_rounds.py``) then hold the truth in about 95 of 100.
        """
        clock = self.clock
        quiet = track.quiet(clock, self.ceiling(), self.plan.min_rounds)
        ratios, apart = self._apart(quiet)
        return enclosing(bootstrap_interval(ratios, _LOOKED_AT), bootstrap_interval(apart, _LOOKED_AT))

    def _apart(self, visits: Sequence[Visit]) -> tuple[list[float], list[float]]:
        """The visits' ratios, and the medians of those of each place."""
        ratios = [visit.ratio(self.clock) for visit in visits]
        return ratios, by_place(ratios, [visit.place for visit in visits])

    def raw_over_corrected(self, track: Track) -> float:
        """The plain median of a model's visits over that of the quiet ones, by the reference's time in this session."""
        raw = statistics.median(getattr(visit.times, self.clock) for visit in track.visits)
        return float(raw / (statistics.median(self.ratios(track)) * self.session_ms()))

    def quiet_share(self) -> float:
        """Share of all visits, 0 to 1, that were quiet on both sides."""
        clock, ceiling = self.clock, self.ceiling()
        visits = [visit for track in self.tracks.values() for visit in track.visits]
        return sum(visit.noise(clock) <= ceiling for visit in visits) / max(1, len(visits))

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
        times = {}
        for track in self._all():
            self._on_visit(track.name)
            times[track.name] = self._warm_up(track, share)
        share_out_calls([self.reference], times)
        share_out_calls(list(self.tracks.values()), times)

    def _all(self) -> list[Track]:
        return [self.reference, *self.tracks.values()]

    def _warm_up(self, track: Track, most_seconds: float) -> Times:
        """Calls until the rule is met; the median of the last ones."""
        begun = self._now()
        made: list[Times] = []
        while True:
            made.append(track.run())
            self._between()
            elapsed = self._now() - begun
            recent = [times.wall for times in made[-_WARMUP_WINDOW:]]
            settled = len(recent) == _WARMUP_WINDOW and relative_slope(recent) < _WARMUP_SLOPE
            if elapsed >= most_seconds or (
                settled and len(made) >= _WARMUP_LEAST and elapsed >= _WARMUP_SECONDS
            ):
                track.warmup_runs = len(made)
                return median_times(made[-_WARMUP_WINDOW:])

    def run(self) -> None:
        """Rounds until every model has stopped. Each track then says why it did."""
        self._move()
        while active := [track for track in self.tracks.values() if track.stopped is None]:
            if reason := self._over():
                self._close_visits()
                for track in active:
                    track.stopped = reason
                return
            share = _MOVING_SHARE_TOGETHER if self.plan.together else _MOVING_SHARE
            if self._now() - self._moved >= self._moving / share:
                self._move()
            self._round(active)
            if self.number < self.plan.min_rounds or self._place < LEAST_PLACES:
                continue
            if not self.plan.together:
                self._judge(active)
                self._reopen()
            elif self.number >= self._next_look:
                # Every look is another chance to be wrong, so they become rarer.
                self._next_look += max(1, self.number // 4)
                self._close_visits()
                if self._done(self):
                    for track in active:
                        track.stopped = "decision"

    def _over(self) -> str | None:
        """Why no further round is made for anybody; None while there is one."""
        plan = self.plan
        if plan.together and plan.most_rounds is not None and self.number >= plan.most_rounds:
            return "rounds"
        late = self._now() - self._begun >= plan.max_seconds
        return "time" if late and self.number >= LEAST_ROUNDS else None

    def _move(self) -> None:
        """Put everything elsewhere; a model with so few calls in a visit that a cold one would show runs once there."""
        now = self._now()
        self._place += 1  # also where nothing moves: then every round is on its own
        if self._relocate is None:
            return
        self._close_visits()
        if not self._relocate():
            self._relocate = None
            self._moving = 0.0
            return
        for track in self.tracks.values():
            if track.calls < _WARMUP_LEAST and track.stopped is None:
                self._on_visit(track.name)
                track.run()
                track.warmup_runs += 1
                self._between()
        self._moved = self._now()
        self._moving = self._moved - now
        self._reference_at = -math.inf  # its last visit was elsewhere

    def _round(self, active: list[Track]) -> None:
        if self.plan.together and self.number % 2:
            self._order.reverse()
        else:
            self._order = self._rng.sample(active, len(active))
        for track in self._order:
            if not self.plan.together or self._now() - self._reference_at >= _REFERENCE_SECONDS:
                self._close_visits()
            self._open.append((track, self.number, self._place, self._visit(track)))
        if not self.plan.together:
            self._close_visits()
        self.number += 1

    def _close_visits(self) -> None:
        """Visit the reference, which ends the stretch of visits since its last one."""
        if not self._open and self._now() - self._reference_at < _REFERENCE_SECONDS:
            return  # nothing but a look at the figures since its last visit, and a short one
        after = self._visit(self.reference)
        self._reference_at = self._now()
        for track, number, place, times in self._open:
            track.visits.append(Visit(number, times, self._before, after, place))
        self._open.clear()
        self._before = after

    def _visit(self, track: Track) -> Times:
        self._known.clear()
        self._on_visit(track.name)
        calls = [track.run() for _ in range(track.cold + track.calls)]
        track.samples += calls
        track.tail += calls[track.cold :]
        times = median_times(calls[track.cold :])
        if track is self.reference:
            self.drift.append((self._now() - self._begun, times))
        self._between()
        return times

    def _judge(self, active: Sequence[Track]) -> None:
        clock, plan, ceiling = self.clock, self.plan, self.ceiling()
        for track in active:
            count = len(track.visits)
            if plan.most_rounds is not None and count >= plan.most_rounds:
                track.stopped = "rounds"
            if count < track.next_look:
                continue
            # An interval looked at after every round is soon narrow by chance.
            track.next_look = count + max(1, count // 6)
            quiet = track.quiet(clock, ceiling, 0)
            if len(quiet) < plan.min_rounds:
                continue
            ratios, apart = self._apart(quiet)
            if len(apart) < LEAST_PLACES:
                continue
            low, high = self.interval(track)
            surely_low, _ = enclosing(median_interval(ratios, SURE), median_interval(apart, SURE))
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
