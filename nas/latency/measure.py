"""Latency of a model on a target: warm-up by rule, samples until the median is known well enough, honest extras.

The caller keeps the device free meanwhile (``nas.latency.DeviceGate``). Nothing of the model is touched: a copy is
converted, compiled and run. Time is that of one call, by a clock that every result names: on CUDA two events on the
stream (with an idle queue they contain the launching of the kernels); on a CPU the wall clock, or the CPU time of the
thread when it is the only one and other work was seen to run on its core.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nas.errors import UserMistake
from nas.latency.result import InterleavedResult, LatencyResult
from nas.latency.runner import Runner, Times, session
from nas.latency.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["measure", "measure_interleaved", "median_interval"]

CONTENDED_ABOVE = 1.05
"""Wall time over CPU time of a single-threaded call above which other work must have run on its core."""

_WARMUP_WINDOW = 5
_WARMUP_SLOPE = 0.02
_WARMUP_SECONDS = 0.1
_WARMUP_SHARE = 0.3
_LEAST_SAMPLES = 3
_LEAST_SECONDS = 0.25
_VISIT_CALLS = 3


def measure(
    model: nn.Module,
    inputs: Sequence[Tensor],
    target: Target,
    *,
    max_seconds: float = 2.0,
    precision: float = 0.02,
    min_samples: int = 20,
) -> LatencyResult:
    """Measure one model.

    Args:
        model: on any device, in any mode; it is not changed.
        inputs: what it is called with; the first dimension of each is ``target.batch``. Four copies with permuted
            contents take turns, so that no cache serves the same values twice.
        target: where and how to run it.
        max_seconds: for warm-up and samples together, not for the first call; a model so slow that three samples
            take longer gets them all the same.
        precision: the half-width of the median's 95 % interval, relative to the median, at which to stop.
        min_samples: timed calls before the interval is believed.

    Raises:
        UserMistake: the target is not there, or the inputs are of another batch size.
    """
    _check(target, {"model": inputs}, max_seconds=max_seconds, precision=precision, min_samples=min_samples)
    with session(target, 1):
        started = time.perf_counter()
        runner = Runner(model, inputs, target)
        first = runner()
        deadline = time.perf_counter() + max_seconds
        warmup = _warm_up(runner, max_seconds * _WARMUP_SHARE)
        earliest = time.perf_counter() + min(_LEAST_SECONDS, max_seconds / 4)
        times: list[Times] = []
        while not _enough(target, times, earliest, deadline, precision, min_samples):
            times.append(runner())
        seconds = time.perf_counter() - started
    return _result(target, first, warmup, times, seconds, _precise(target, times, precision, min_samples))


def measure_interleaved(
    models: Mapping[str, tuple[nn.Module, Sequence[Tensor]]],
    target: Target,
    rounds: int = 25,
    *,
    reference: str | None = None,
    max_seconds: float = 30.0,
    seed: int = 0,
) -> dict[str, InterleavedResult]:
    """Measure several models against one of them, so that a drift of the machine touches all alike.

    Each round visits all models in random order, with the reference before and after each.

    Args:
        models: name -> model and inputs, as for ``measure``.
        target: where and how to run them.
        rounds: at least 3; 9 or more for an interval worth the name.
        reference: a name in ``models``; the first by default.
        max_seconds: no further round is begun after this, once three are done.
        seed: of the order.

    Raises:
        UserMistake: no models, an unknown reference, a target that is not there, inputs of another batch size.
    """
    _check(
        target, {name: inputs for name, (_, inputs) in models.items()}, max_seconds=max_seconds, rounds=rounds
    )
    if reference is None:
        reference = next(iter(models))
    if reference not in models:
        raise UserMistake(f"reference={reference!r} is not among the models: {', '.join(models)}")
    with session(target, len(models)):
        runners = {name: Runner(model, inputs, target) for name, (model, inputs) in models.items()}
        for runner in runners.values():
            runner()
            _warm_up(runner, 0.5)
        visits = _rounds(runners, reference, rounds, max_seconds, random.Random(seed))
    return {name: _interleaved(target, reference, name, visits) for name in models}


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median from order statistics, without any assumption on the distribution.

    With fewer than six values no 95 % interval exists; the smallest and the largest are returned.
    """
    ordered = sorted(values)
    rank = _rank(len(ordered), confidence)
    return ordered[rank], ordered[len(ordered) - 1 - rank]


class _Visit(NamedTuple):
    """One visit to a model within a round, with the reference's times on both sides (equal to its own for itself)."""

    times: Times
    before: Times
    after: Times


def _warm_up(runner: Runner, most_seconds: float) -> int:
    """Run until the last calls no longer get faster or slower, or the time is up; returns the number of calls."""
    begun = time.perf_counter()
    times: list[float] = []
    while True:
        times.append(runner().wall)
        elapsed = time.perf_counter() - begun
        settled = len(times) >= _WARMUP_WINDOW and _relative_slope(times[-_WARMUP_WINDOW:]) < _WARMUP_SLOPE
        if elapsed >= most_seconds or (settled and elapsed >= _WARMUP_SECONDS):
            return len(times)


def _relative_slope(times: Sequence[float]) -> float:
    """Size of the least-squares slope per call, relative to the mean."""
    slope = statistics.linear_regression(range(len(times)), times).slope
    return abs(slope) / statistics.fmean(times)


def _enough(
    target: Target,
    times: Sequence[Times],
    earliest: float,
    deadline: float,
    precision: float,
    min_samples: int,
) -> bool:
    if len(times) < _LEAST_SAMPLES:
        return False
    now = time.perf_counter()
    # Sorting after every call would take longer than the calls of a small model.
    due = len(times) % max(5, len(times) // 20) == 0
    return now >= deadline or (due and now >= earliest and _precise(target, times, precision, min_samples))


def _precise(target: Target, times: Sequence[Times], precision: float, min_samples: int) -> bool:
    if len(times) < max(min_samples, 6):
        return False
    values = _by(_clock(target, times), times)
    low, high = median_interval(values)
    return (high - low) / 2 <= precision * statistics.median(values)


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


def _drift(times: Sequence[float]) -> float:
    third = max(1, len(times) // 3)
    return statistics.median(times[-third:]) / statistics.median(times[:third])


def _wall_cpu_ratio(target: Target, times: Sequence[Times]) -> float | None:
    if target.is_cuda or target.cpu_threads() != 1:
        return None
    # Of medians, not of sums: a preempted call among many short ones does not make their median wrong.
    return statistics.median(_by("wall", times)) / max(statistics.median(_by("cpu", times)), 1e-9)


def _contended(target: Target, times: Sequence[Times]) -> bool | None:
    ratio = _wall_cpu_ratio(target, times)
    return None if ratio is None else ratio > CONTENDED_ABOVE


def _clock(target: Target, times: Sequence[Times]) -> str:
    if target.is_cuda:
        return "events"
    return "cpu" if _contended(target, times) else "wall"


def _by(clock: str, times: Sequence[Times]) -> list[float]:
    return [getattr(t, clock) for t in times]


def _result(
    target: Target, first: Times, warmup: int, times: Sequence[Times], seconds: float, precise: bool
) -> LatencyResult:
    import torch

    clock = _clock(target, times)
    values = _by(clock, times)
    low, high = median_interval(values)
    ratio = _wall_cpu_ratio(target, times)
    return LatencyResult(
        target=str(target),
        clock=clock,
        median_ms=statistics.median(values),
        low_ms=low,
        high_ms=high,
        p90_ms=sorted(values)[math.ceil(0.9 * len(values)) - 1],
        samples=len(values),
        precise=precise,
        drift=_drift(values),
        first_call_ms=first.wall,
        wall_ms=statistics.median(_by("wall", times)),
        cpu_ms=None if ratio is None else statistics.median(_by("cpu", times)),
        wall_cpu_ratio=ratio,
        contended=_contended(target, times),
        threads=None if target.is_cuda else target.cpu_threads(),
        warmup_runs=warmup,
        seconds=seconds,
        device_name=_device_name(target),
        torch_version=str(torch.__version__),
    )


def _device_name(target: Target) -> str:
    if not target.is_cuda:
        from nas.environment import cpu_model

        return cpu_model()
    import torch

    return torch.cuda.get_device_name(target.torch_device())


def _rounds(
    runners: Mapping[str, Runner], reference: str, rounds: int, max_seconds: float, rng: random.Random
) -> dict[str, list[_Visit]]:
    visits: dict[str, list[_Visit]] = {name: [] for name in runners}
    others = [name for name in runners if name != reference]
    begun = time.perf_counter()
    for number in range(rounds):
        if number >= _LEAST_SAMPLES and time.perf_counter() - begun > max_seconds:
            break
        rng.shuffle(others)
        before = _visit(runners[reference])
        visits[reference].append(_Visit(before, before, before))
        for name in others:
            times = _visit(runners[name])
            after = _visit(runners[reference])
            visits[name].append(_Visit(times, before, after))
            visits[reference].append(_Visit(after, after, after))
            before = after
    return visits


def _visit(runner: Runner) -> Times:
    # The other model has just filled the caches; the first call brings the weights back as in steady use.
    runner()
    calls = [runner() for _ in range(_VISIT_CALLS)]
    return Times(*(statistics.median(column) for column in zip(*calls, strict=True)))


def _interleaved(
    target: Target, reference: str, name: str, visits: Mapping[str, Sequence[_Visit]]
) -> InterleavedResult:
    everything = [visit.times for each in visits.values() for visit in each]
    clock = _clock(target, everything)
    own = visits[name]
    values, before, after = (_by(clock, column) for column in zip(*own, strict=True))
    ratios = [value / ((b + a) / 2) for value, b, a in zip(values, before, after, strict=True)]
    return InterleavedResult(
        str(target),
        reference,
        clock,
        statistics.median(values),
        *median_interval(values),
        statistics.median(ratios),
        *median_interval(ratios),
        rounds=len(own),
        drift=_drift(values),
        contended=_contended(target, everything),
    )


def _check(target: Target, inputs: Mapping[str, Sequence[Tensor]], **numbers: float) -> None:
    for name, value in numbers.items():
        least = _LEAST_SAMPLES if name == "rounds" else 1 if name == "min_samples" else 0
        if not (math.isfinite(value) and value >= least and value > 0):
            raise UserMistake(
                f"{name}={value} must be finite and {f'at least {least}' if least else 'above 0'}"
            )
    if not inputs:
        raise UserMistake("models: there is none to measure; give at least one")
    target.check()
    for name, tensors in inputs.items():
        for number, tensor in enumerate(tensors):
            if tensor.dim() and tensor.shape[0] != target.batch:
                raise UserMistake(
                    f"inputs[{number}] of {name} has batch {tensor.shape[0]}, but target {str(target)!r} means "
                    f"{target.batch}; write the batch size into the target, as in cpu@{tensor.shape[0]}"
                )
