"""Which of two models is faster, decided only where their intervals allow it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

from nas.latency.result import Pair, Verdict
from nas.latency.rounds import SURE, Rounds
from nas.latency.statistics import enclosing, median_interval
from nas.latency.visits import Track, by_place

__all__ = ["MARGIN", "all_decided", "compare", "compare_all"]

LEAST_PAIRED = 9
"""So many places in memory are seen before a verdict is given."""

MARGIN = 0.01
"""A smaller difference is not called one: two copies of one model may differ by as much on one machine."""

_QUIET_BAND = 1.25
"""What a busy neighbour core adds is more than this; what the reference scatters by itself is less."""


def compare(
    first: Track, second: Track, clock: str, *, ceiling: float = math.inf, margin: float = MARGIN
) -> Pair:
    """The pair's verdict from the rounds in which both were visited while the reference was below ``ceiling``.

    The ratio of each round is taken between the two models' ratios to the reference, so that what the machine did
    between the two visits does not count; between visits with no reference in between it is that of their times. Where
    the models lie in memory makes a copy of a model faster or slower by per cents, for as long as it lies there; so the
    interval is that of the places' medians, from order statistics, and holds at 99.5 %.
    """
    ratios, places = _paired(first, second, clock, ceiling)
    if not ratios:  # they never met
        return Pair(first.name, second.name, math.nan, math.nan, math.nan, "cannot tell", margin, 0)
    apart = by_place(ratios, places)
    low, high = enclosing(median_interval(ratios, SURE), median_interval(apart, SURE))
    # With fewer places no interval is that sure, whatever they say.
    verdict = _verdict(low, high, margin) if len(apart) >= LEAST_PAIRED else "cannot tell"
    return Pair(first.name, second.name, statistics.median(ratios), low, high, verdict, margin, len(ratios))


def compare_all(rounds: Rounds, *, against: str | None = None, margin: float = MARGIN) -> tuple[Pair, ...]:
    """Every two models of a session in the order given, or each against the one named ``against``."""
    clock, ceiling = rounds.clock, rounds.ceiling(_QUIET_BAND)
    return tuple(
        compare(a, b, clock, ceiling=ceiling, margin=margin)
        for a, b in _couples(list(rounds.tracks.values()), against)
    )


def all_decided(rounds: Rounds, precision: float, *, against: str | None, margin: float = MARGIN) -> bool:
    """Whether more rounds would hardly change a verdict.

    Each is clear, or the two are surely equal to within ``margin``, or the ratio is so near the margin that even an
    interval of a quarter of ``precision`` on either side does not tell. Before ``LEAST_PAIRED`` places have been seen
    nothing is: no verdict is given yet.
    """
    if any(len({visit.place for visit in track.visits}) < LEAST_PAIRED for track in rounds.tracks.values()):
        return False
    return all(
        pair.rounds >= rounds.plan.min_rounds
        and (
            pair.verdict != "cannot tell"
            or (1 - margin <= pair.low and pair.high <= 1 + margin)
            or (pair.high - pair.low) / 2 <= precision / 4 * pair.ratio
        )
        for pair in compare_all(rounds, against=against, margin=margin)
    )


def _couples(tracks: Sequence[Track], against: str | None) -> Iterable[tuple[Track, Track]]:
    if against is None:
        return itertools.combinations(tracks, 2)
    base = next(track for track in tracks if track.name == against)
    return [(track, base) for track in tracks if track is not base]


def _paired(first: Track, second: Track, clock: str, ceiling: float) -> tuple[list[float], list[int]]:
    """The ratio of each round in which both were visited, and the place that it was taken in."""
    others = {visit.round: visit for visit in second.visits}
    couples = [(visit, others[visit.round]) for visit in first.visits if visit.round in others]
    noise = [max(visit.noise(clock) for visit in two) for two in couples]
    # Where quiet rounds are of too few places to tell anything, the quietest rounds of further places count.
    best = by_place(noise, [mine.place for mine, _ in couples], min)
    bound = max(ceiling, sorted(best)[min(LEAST_PAIRED, len(best)) - 1]) if best else ceiling
    quiet = [two for two, much in zip(couples, noise, strict=True) if much <= bound]
    ratios = [mine.ratio(clock) / theirs.ratio(clock) for mine, theirs in quiet]
    return ratios, [mine.place for mine, _ in quiet]


def _verdict(low: float, high: float, margin: float) -> Verdict:
    if high < 1 - margin:
        return "faster"
    return "slower" if low > 1 + margin else "cannot tell"
