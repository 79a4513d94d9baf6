"""What a measurement of latency tells, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

__all__ = ["LatencyResult", "Pair", "Session", "Verdict"]

_Result = TypeVar("_Result", "LatencyResult", "Pair", "Session")
Verdict = Literal["faster", "slower", "cannot tell"]


@dataclass(frozen=True)
class LatencyResult:
    """Latency of one call of one model, in milliseconds.

    The model was visited in rounds, a fixed reference workload before and after each visit. ``median_ms`` is the
    median of the visits' ratios to the reference times ``reference_ms``, so a machine that slows down and recovers
    meanwhile does not show in it; ``raw_median_ms`` is the plain median of the same visits.

    Attributes:
        target: text of the target; latencies of different targets are never compared.
        clock: what the times are made of: ``wall``, ``events`` (CUDA, time on the device) or ``cpu``. The last is the
            CPU time of the only thread, taken when other work was seen on its core: a substitute for the wall time
            on a machine left alone, to be shown as such.
        median_ms, low_ms, high_ms: corrected by the reference, with the 95 % bootstrap interval of the ratio.
        raw_median_ms, raw_low_ms, raw_high_ms: by the clock alone, of all visits, quiet or not.
        ratio, ratio_low, ratio_high: the model's time over the reference's, with its 95 % bootstrap interval.
        reference_ms: the reference's long-run time that the ratio was multiplied with: the first trusted one of a run,
            or that of this session. Its own uncertainty is not in the interval.
        session_reference_ms: the reference's median in the quiet part of this session.
        p90_ms, p99_ms: of all timed calls but, of a model below 6 ms, the first of each visit, which find the caches
            filled by another model; None from fewer than 100 or 1,000 of them.
        samples: timed calls; ``runs``: calls of the model in all, warm-up included.
        rounds: visits; ``quiet_rounds``: those while the reference ran within 10 % of its fastest tenth. They make the
            ratio and its interval; where they were too few, the quietest visits do.
        stopped: why no more was measured: the interval was ``precision`` narrow, the ``decision`` was clear, the
            ``time`` was up, or all ``rounds`` that the plan allows were made.
        half_width: half of the interval over the median.
        drift: the reference's last third over its first third; 1 when the machine did not drift.
        splits: how often the reference's level changed by more than 5 %.
        first_call_ms: the very first call (allocation, kernel choice, compilation), not among the samples.
        wall_ms, cpu_ms: median wall and CPU time of a call on the host; ``cpu_ms`` is None unless one CPU thread runs.
        wall_cpu_ratio: their ratio; ``contended``: it is above 1.05, so something else ran on the core.
        threads: CPU threads used; None on another device.
        priority: ``realtime``, ``nice`` or ``none``: what the system granted.
        trusted: nothing was out of bounds; otherwise ``reasons`` says what was, with figures.
        peak_memory_bytes, energy_mj: of one call, where asked for and offered; millijoules. ``peak_memory_how`` says
            what was read, or why nothing was; figures of different kinds are not to be compared.
        identity: the conditions of the measurement; see ``nas.latency.identity``.
        seconds: what the measurement took.
    """

    target: str
    clock: str
    median_ms: float
    low_ms: float
    high_ms: float
    raw_median_ms: float
    raw_low_ms: float
    raw_high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    reference_ms: float
    session_reference_ms: float
    p90_ms: float | None
    p99_ms: float | None
    samples: int
    rounds: int
    quiet_rounds: int
    runs: int
    warmup_runs: int
    stopped: str
    half_width: float
    drift: float
    splits: int
    first_call_ms: float
    wall_ms: float
    cpu_ms: float | None
    wall_cpu_ratio: float | None
    contended: bool | None
    threads: int | None
    priority: str
    trusted: bool
    reasons: tuple[str, ...]
    identity: dict[str, Any]
    seconds: float
    peak_memory_bytes: int | None = None
    peak_memory_how: str = ""
    energy_mj: float | None = None

    @property
    def precise(self) -> bool:
        """Whether neither the time nor the number of rounds ended the measurement."""
        return self.stopped not in ("time", "rounds")

    def holds(self, limit_ms: float) -> bool:
        """Whether the latency is surely at most ``limit_ms``: the upper end of its interval is."""
        return self.high_ms <= limit_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "reasons": list(self.reasons), "precise": self.precise}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyResult:
        """The inverse of ``to_dict``. Raises ValueError for missing or unknown keys."""
        given = {name: value for name, value in data.items() if name != "precise"}
        return _from_dict(cls, {**given, "reasons": tuple(given.get("reasons", ()))})


@dataclass(frozen=True)
class Pair:
    """Two models of one session against each other.

    Attributes:
        first, second: names.
        ratio, low, high: time of the first over that of the second, both over the reference in the same round, with
            the distribution-free 99.5 % interval of its median.
        verdict: ``faster``: the first one surely is, by more than ``margin``; ``slower`` likewise; or ``cannot tell``.
        margin: differences up to this share are not called differences: copies of one model differ as much.
        rounds: in which both were visited.
    """

    first: str
    second: str
    ratio: float
    low: float
    high: float
    verdict: Verdict
    margin: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pair:
        """The inverse of ``to_dict``. Raises ValueError for missing or unknown keys."""
        return _from_dict(cls, data)


@dataclass(frozen=True)
class Session:
    """Several models measured together.

    Attributes:
        target: text of the target.
        results: name -> result, in the order given; models that failed are not among them.
        failures: name -> reason of a model that could not be measured.
        pairs: every two of them (or each against the baseline) where a comparison was asked for.
        drift: the reference over time, as [seconds since the beginning, milliseconds].
    """

    target: str
    results: dict[str, LatencyResult]
    failures: dict[str, str] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    drift: tuple[tuple[float, float], ...] = ()

    @property
    def reference_ms(self) -> float | None:
        """The reference's long-run time in this session; None when nothing could be measured."""
        return next((result.reference_ms for result in self.results.values()), None)

    def pair(self, first: str, second: str) -> Pair:
        """The comparison of two models, in the order asked for. Raises KeyError when they were not compared."""
        for pair in self.pairs:
            if (pair.first, pair.second) == (first, second):
                return pair
            if (pair.first, pair.second) == (second, first):
                return _turned(pair)
        raise KeyError((first, second))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "target": self.target,
            "results": {name: result.to_dict() for name, result in self.results.items()},
            "failures": dict(self.failures),
            "pairs": [pair.to_dict() for pair in self.pairs],
            "drift": [list(point) for point in self.drift],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Session:
        """The inverse of ``to_dict``. Raises ValueError for missing or unknown keys."""
        parts = dict(data)
        parts["results"] = {
            name: LatencyResult.from_dict(result) for name, result in data.get("results", {}).items()
        }
        parts["pairs"] = tuple(Pair.from_dict(pair) for pair in data.get("pairs", ()))
        parts["drift"] = tuple((float(at), float(ms)) for at, ms in data.get("drift", ()))
        return _from_dict(cls, parts)


def _turned(pair: Pair) -> Pair:
    verdicts: dict[Verdict, Verdict] = {"faster": "slower", "slower": "faster", "cannot tell": "cannot tell"}
    return Pair(
        pair.second,
        pair.first,
        1 / pair.ratio,
        1 / pair.high,
        1 / pair.low,
        verdicts[pair.verdict],
        pair.margin,
        pair.rounds,
    )


def _from_dict(cls: type[_Result], data: Mapping[str, Any]) -> _Result:
    names = {field.name for field in fields(cls)}
    if wrong := sorted(names ^ data.keys()):
        raise ValueError(f"{cls.__name__}: {', '.join(wrong)} missing or unknown")
    return cls(**data)
