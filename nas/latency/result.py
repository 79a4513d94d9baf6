"""What a measurement of latency tells, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

__all__ = ["InterleavedResult", "LatencyResult"]

_Result = TypeVar("_Result", "LatencyResult", "InterleavedResult")


@dataclass(frozen=True)
class LatencyResult:
    """Latency of one call, in milliseconds.

    Attributes:
        target: text of the target; latencies of different targets are never compared.
        clock: what the times are made of: ``wall``, ``events`` (CUDA) or ``cpu``. The last is the CPU time of the only
            thread, taken when the core was contended: it comes close to the wall time on a machine left alone.
        median_ms, low_ms, high_ms: median, and its 95 % interval from order statistics (samples taken close together
            are not independent, so it speaks of this session and not of another day).
        p90_ms: 90th percentile of the samples; to be trusted from 100 samples on.
        samples: timed calls, after ``warmup_runs`` untimed ones.
        precise: the half-width of the interval came within the precision asked for before the time was up.
        drift: median of the last third over that of the first third of the samples; 1 when nothing drifted.
        first_call_ms: the very first call (allocation, kernel choice, compilation), not among the samples.
        wall_ms: median wall time on the host, on CUDA with waiting for the result.
        cpu_ms: median CPU time; None unless the target is one CPU thread.
        wall_cpu_ratio: ``wall_ms`` over ``cpu_ms``.
        contended: that ratio is above 1.05, so something else ran on the core; None where it cannot be told.
        threads: CPU threads used; None on CUDA.
        seconds: what the measurement took, the first call included.
    """

    target: str
    clock: str
    median_ms: float
    low_ms: float
    high_ms: float
    p90_ms: float
    samples: int
    precise: bool
    drift: float
    first_call_ms: float
    wall_ms: float
    cpu_ms: float | None
    wall_cpu_ratio: float | None
    contended: bool | None
    threads: int | None
    warmup_runs: int
    seconds: float
    device_name: str
    torch_version: str

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyResult:
        """The inverse of ``to_dict``. Raises ValueError for missing or unknown keys."""
        return _from_dict(cls, data)


@dataclass(frozen=True)
class InterleavedResult:
    """One model among several that were measured together.

    Attributes:
        target: text of the target.
        reference: name of the model that the ratios refer to.
        clock: what the times are made of, as in ``LatencyResult``; the same for all models.
        median_ms, low_ms, high_ms: time of a call over all rounds, with its 95 % interval.
        ratio, ratio_low, ratio_high: median, with its 95 % interval, of this model's time over the mean of the
            reference's times just before and just after it; exactly 1 for the reference. Compare models by these.
        rounds: visits to this model.
        drift: median of the last third over that of the first third of its times.
        contended: other work ran on the core; None where it cannot be told.
    """

    target: str
    reference: str
    clock: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    drift: float
    contended: bool | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InterleavedResult:
        """The inverse of ``to_dict``. Raises ValueError for missing or unknown keys."""
        return _from_dict(cls, data)


def _from_dict(cls: type[_Result], data: Mapping[str, Any]) -> _Result:
    names = {field.name for field in fields(cls)}
    if wrong := sorted(names ^ data.keys()):
        raise ValueError(f"{cls.__name__}: {', '.join(wrong)} missing or unknown")
    return cls(**data)
