"""Medians, their intervals, tails and trends of timings; nothing here knows what was timed."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np

__all__ = [
    "bootstrap_interval",
    "drift",
    "enclosing",
    "median_interval",
    "percentile",
    "relative_slope",
    "splits",
]

_RESAMPLES = 1000
_ENOUGH_FOR = {0.9: 100, 0.99: 1000}


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Percentile-bootstrap interval of the median (Efron and Tibshirani 1993, ch. 13); the same for the same values.

    With fewer than six values the smallest and the largest are returned.
    """
    if len(values) < 6:
        return min(values), max(values)
    array = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(len(array)).integers(0, len(array), (_RESAMPLES, len(array)))
    medians = np.median(array[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median from order statistics, without any assumption on the distribution.

    With fewer than six values no 95 % interval exists; the smallest and the largest are returned.
    """
    ordered = sorted(values)
    rank = _rank(len(ordered), confidence)
    return ordered[rank], ordered[len(ordered) - 1 - rank]


def enclosing(*intervals: tuple[float, float]) -> tuple[float, float]:
    """The smallest interval that holds all of them."""
    lows, highs = zip(*intervals, strict=True)
    return min(lows), max(highs)


@functools.lru_cache(maxsize=4096)
def _rank(count: int, confidence: float) -> int:
    """The largest r such that the r-th smallest and the r-th largest (from 0) enclose the median so surely."""
    if count > 400:
        quantile = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
        return max(0, math.floor((count - quantile * math.sqrt(count)) / 2) - 1)
    below, rank = 0, 0
    while True:
        below += math.comb(count, rank)
        if 2 * below > (1 - confidence) * 2**count:
            return max(0, rank - 1)
        rank += 1


def percentile(values: Sequence[float], share: float) -> float | None:
    """The ``share`` quantile (0.9 or 0.99) of all samples, none removed; None from fewer than 100 or 1,000 of them."""
    if len(values) < _ENOUGH_FOR[share]:
        return None
    return sorted(values)[math.ceil(share * len(values)) - 1]


def relative_slope(times: Sequence[float]) -> float:
    """Size of the least-squares slope per call, relative to the mean."""
    return abs(statistics.linear_regression(range(len(times)), times).slope) / statistics.fmean(times)


def drift(times: Sequence[float]) -> float:
    """Median of the last third over that of the first third; 1 when nothing drifted."""
    third = max(1, len(times) // 3)
    return statistics.median(times[-third:]) / statistics.median(times[:third])


def splits(times: Sequence[float], *, change: float = 0.05, window: int = 9) -> list[int]:
    """Positions at which the level of ``times`` has moved by more than ``change`` since the last such position.

    The level is the median of ``window`` values in a row, so that single outliers make no split.
    """
    found: list[int] = []
    if len(times) < 2 * window:
        return found
    level = statistics.median(times[:window])
    for start in range(window, len(times) - window + 1):
        here = statistics.median(times[start : start + window])
        if abs(here / level - 1) > change and (not found or start - found[-1] >= window):
            found.append(start)
            level = here
    return found
