"""By which clock a session's times are read: what other work on the same core does to each of them."""

from __future__ import annotations

from collections.abc import Sequence

from nas.latency.runner import Times
from nas.latency.target import Target
from nas.latency.visits import median_times

__all__ = ["CONTENDED_ABOVE", "clock_of", "wall_cpu_ratio", "worst_ratio"]

CONTENDED_ABOVE = 1.05
"""Wall time over CPU time of a single-threaded call above which other work must have run on its core."""


def wall_cpu_ratio(target: Target, times: Sequence[Times]) -> float | None:
    """Median wall time over median CPU time; None where the CPU time of one thread does not tell the whole."""
    if target.device != "cpu" or target.cpu_threads() != 1 or not times:
        return None
    # Of medians, not of sums: a preempted call among many short ones does not make their median wrong.
    middle = median_times(times)
    return middle.wall / max(middle.cpu, 1e-9)


def worst_ratio(target: Target, calls: Sequence[Sequence[Times]]) -> float | None:
    """The largest ``wall_cpu_ratio`` among models. Each by itself: the middle of all calls lies between two models."""
    found = [wall_cpu_ratio(target, times) for times in calls]
    return max((ratio for ratio in found if ratio is not None), default=None)


def clock_of(target: Target, calls: Sequence[Sequence[Times]]) -> str:
    """``events`` on CUDA; else ``wall``, or ``cpu`` when other work was seen on the core of the only thread."""
    if target.is_cuda:
        return "events"
    ratio = worst_ratio(target, calls)
    return "cpu" if ratio is not None and ratio > CONTENDED_ABOVE else "wall"
