"""Latency of models on a target.

The caller keeps the device free meanwhile (``nas.latency.DeviceGate``) and may hand over its lease. Nothing of a model
is touched: a copy is converted, compiled and run. The recipe: real-time priority where it is granted; warm-up by rule;
rounds in random order with a fixed reference workload before and after each visit; the median of the ratios; an
interval; a look at the machine before and after. What was out of bounds is measured again once, then marked.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nas.errors import UserMistake
from nas.latency import extras
from nas.latency.clocks import CONTENDED_ABOVE, clock_of, wall_cpu_ratio, worst_ratio
from nas.latency.compare import MARGIN, all_decided, compare_all
from nas.latency.guard import Reading, displaced, judge, read_machine, unsettled
from nas.latency.guard_session import unsteady
from nas.latency.identity import Identity, describe_inputs, identity_of
from nas.latency.priority import Granted, undisturbed
from nas.latency.reference import ReferenceTimes, reference_workload
from nas.latency.result import LatencyResult, Session
from nas.latency.rounds import LEAST_ROUNDS, Plan, Rounds
from nas.latency.runner import Runner, Times, make_runner, relocate, session
from nas.latency.statistics import drift, median_interval, percentile
from nas.latency.target import Target
from nas.latency.visits import Track, median_times

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Lease", "Options", "measure", "measure_together"]

_ENERGY_SECONDS = 1.5
_REST_SECONDS = 1.0
_BUILD_SECONDS = 900.0  # for exporting or compiling one model
_REFERENCE = object()  # no model can have this name

Progress = Callable[[dict[str, Any]], None]


class Lease(Protocol):
    """The right to use the device; see ``nas.latency.gate``."""

    def check(self, patience: float | None = None) -> None:
        """Raises when somebody else has the device by now; the next check comes within ``patience`` seconds."""


@dataclass(frozen=True)
class Options:
    """How to measure, beside ``Plan``.

    Attributes:
        priority: ``auto`` asks the system for real time, then niceness; ``off`` asks for nothing.
        retries: further attempts when the machine was out of bounds.
        scale: where the reference's long-run times are kept; None: each session is its own scale.
        keys: name -> architecture key, for the identity.
        memory, energy: measure these as well, before the rounds.
        ours: processes that hold the device too, but rest now; all others on a GPU are out of bounds.
    """

    priority: str = "auto"
    retries: int = 1
    scale: Path | None = None
    keys: Mapping[str, str] | None = None
    memory: bool = False
    energy: bool = False
    ours: tuple[int, ...] = ()


def measure(
    model: nn.Module,
    inputs: Sequence[Tensor],
    target: Target,
    *,
    max_seconds: float = 2.0,
    precision: float = 0.01,
    min_rounds: int = 9,
    limit_ms: float | None = None,
    options: Options | None = None,
    lease: Lease | None = None,
) -> LatencyResult:
    """Measure one model against the reference workload.

    Args:
        model: on any device, in any mode; it is not changed.
        inputs: what it is called with; the first dimension of each is ``target.batch``. Copies with permuted contents
            take turns, so that no cache serves the same values twice.
        target: where and how to run it.
        max_seconds: for warm-up and rounds; a model so slow that six rounds take longer gets them all the same.
        precision: the half-width of the 95 % interval, relative to the median, at which to stop.
        min_rounds: visits before an interval is believed.
        limit_ms: stop as soon as the latency is surely below or surely above.
        options: priority, retries, scale, memory and energy.
        lease: checked after every visit.

    Raises:
        UserMistake: the target is not there, a number is impossible, or the inputs are of another batch size.
    """
    found = measure_together(
        {"model": (model, inputs)},
        target,
        plan=Plan(max_seconds, precision, min_rounds, limit_ms),
        options=options,
        lease=lease,
    )
    return found.results["model"]


def measure_together(
    models: Mapping[str, tuple[Any, Any]],
    target: Target,
    *,
    plan: Plan | None = None,
    pairs: bool = False,
    against: str | None = None,
    margin: float = MARGIN,
    options: Options | None = None,
    lease: Lease | None = None,
    progress: Progress | None = None,
) -> Session:
    """Measure several models in the same rounds, so that whatever the machine does touches all alike.

    Args:
        models: name -> model (or ONNX file) and inputs, as for ``measure``; or several sets of inputs, of other
            lengths for instance, as ``nas.latency.runner.inputs_for`` makes them.
        target: where and how to run them.
        plan: how much; ``Plan(max_seconds=30)`` by default.
        pairs: compare them; the rounds then go on until every pair is clear, surely equal to within ``margin``, or
            known to a quarter of ``plan.precision``.
        against: compare each with this one only.
        margin: a smaller difference than this share is not called one.
        options, lease: as for ``measure``.
        progress: told ``{"visit": name}`` before a model is touched and ``{"round": number}`` after each round.

    Raises:
        UserMistake: no models, an unknown ``against``, a target that is not there, inputs of another batch size.
    """
    plan, options = plan or Plan(max_seconds=30.0), options or Options()
    _check(target, models, plan, against)
    if len(models) > 1 and (pairs or against is not None):
        plan = replace(plan, together=True)
    best: Session | None = None
    for attempt in range(1 + options.retries):
        if attempt and target.device == "cpu":
            time.sleep(_REST_SECONDS)  # what disturbed may have been short
        again = replace(plan, seed=plan.seed + attempt)
        found = _Measurement(models, target, again, options, against, margin, lease, progress).run()
        reasons = _reasons(found)
        if best is None or len(reasons) < len(_reasons(best)):
            best = found
        if not reasons:
            break
    assert best is not None  # at least one attempt was made
    return best


def _reasons(found: Session) -> set[str]:
    return {reason for result in found.results.values() for reason in result.reasons}


class _Measurement:
    """One attempt."""

    def __init__(
        self,
        models: Mapping[str, tuple[Any, Any]],
        target: Target,
        plan: Plan,
        options: Options,
        against: str | None,
        margin: float,
        lease: Lease | None,
        progress: Progress | None,
    ):
        self.models, self.target, self.plan, self.options = models, target, plan, options
        self.against, self.margin, self.lease = against, margin, lease
        self.tell: Progress = progress or (lambda event: None)
        self.versions: dict[str, dict[str, str]] = {}
        self.first: dict[str, Times] = {}
        self.extra: dict[str, dict[str, Any]] = {name: {} for name in models}

    def run(self) -> Session:
        target, began = self.target, time.perf_counter()
        threads = target.cpu_threads() if target.device == "cpu" else 1
        runners: dict[Any, Any] = {}
        with session(target, len(self.models) + 1):
            try:
                # Compilers start processes, which must not inherit the cores of a measurement: first calls come before.
                for name, (model, inputs) in self.models.items():
                    self.tell({"visit": name})
                    self._hold(_BUILD_SECONDS)
                    runners[name] = make_runner(model, inputs, target)
                    self.versions[name] = runners[name].runtime_versions
                    self.first[name] = runners[name]()
                    self._hold()
                    self.extra[name] = self._extras(runners[name])
                plain = self._plain()
                runners[_REFERENCE] = reference = make_runner(*reference_workload(plain), plain)
                with undisturbed(threads, self.options.priority) as granted:
                    models = {name: runners[name] for name in self.models}
                    rounds, before = self._rounds(models, reference, granted)
                    after = read_machine(target, cores=granted.affinity, ours=self.options.ours)
            finally:
                for runner in runners.values():
                    runner.close()
        return self._session(rounds, granted, before, after, time.perf_counter() - began)

    def _rounds(
        self, runners: Mapping[str, Runner], reference: Runner, granted: Granted
    ) -> tuple[Rounds, Reading]:
        scale, digest = ReferenceTimes(self.options.scale), self._scale_digest(granted)
        rounds = Rounds(
            runners,
            reference,
            self.plan,
            lambda calls: clock_of(self.target, calls),
            scale_of=lambda clock: scale.get(f"{digest}-{clock}"),
            between=lambda: self._between(granted),
            done=lambda found: all_decided(
                found, self.plan.precision, against=self.against, margin=self.margin
            ),
            on_visit=lambda name: self.tell({"visit": name}),
            first=self.first,
            relocate=lambda: relocate(list(runners.values()), reference),
        )
        rounds.warm_up(granted.renew)
        # Objects of the warm-up are collected now, and not by chance in somebody's visit: the collector rests.
        gc.collect()
        before = read_machine(self.target, cores=granted.affinity, ours=self.options.ours)
        rounds.run()
        return rounds, before

    def _between(self, granted: Granted) -> None:
        self._hold()
        granted.pause()

    def _hold(self, patience: float | None = None) -> None:
        if self.lease is not None:
            self.lease.check(patience)

    def _extras(self, runner: Callable[[], Times]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.options.memory:
            peak = extras.peak_memory(runner, self.target)
            found |= {"peak_memory_bytes": peak.bytes, "peak_memory_how": peak.how}
        if self.options.energy:
            found["energy_mj"] = _energy_per_call(runner, self.target)
        return found

    def _scale_digest(self, granted: Granted) -> str:
        """Of the conditions that the reference runs under, whatever the models and their runtime are."""
        plain = self._plain()
        inputs = describe_inputs(reference_workload(plain)[1])
        return identity_of(plain, inputs, None, priority=granted.kind, affinity=granted.affinity).digest()

    def _plain(self) -> Target:
        return replace(self.target, runtime="eager", channels_last=False, batch=1, size=None)

    def _identity(self, name: str, granted: Granted) -> Identity:
        inputs = self.models[name][1]
        key = (self.options.keys or {}).get(name)
        return identity_of(
            self.target,
            describe_inputs(inputs),
            key,
            priority=granted.kind,
            affinity=granted.affinity,
            versions=self.versions[name],
        )

    def _session(
        self, rounds: Rounds, granted: Granted, before: Reading, after: Reading, seconds: float
    ) -> Session:
        clock = rounds.clock
        ratio = worst_ratio(self.target, rounds.calls())
        found = judge(before, after, self.target, clock=clock, wall_cpu_ratio=ratio, priority=granted.kind)
        scale, digest = ReferenceTimes(self.options.scale), f"{self._scale_digest(granted)}-{clock}"
        known = scale.get(digest)
        moved = displaced(rounds.session_ms(), known, ratios_only=self.plan.together)
        times = rounds.reference_times()
        shown = unsteady(
            drift=drift(times),
            splits=rounds.splits,
            visits=len(times),
            raw_over_corrected=[rounds.raw_over_corrected(track) for track in rounds.tracks.values()],
        )
        reasons = (*found, *unsettled(rounds.quiet_share()), *shown, *moved)
        if not reasons and known is None:  # a disturbed session must not be everybody's scale
            scale.put(digest, rounds.session_ms())
        results = {
            name: self._result(track, rounds, clock, granted, reasons, seconds)
            for name, track in rounds.tracks.items()
        }
        return Session(
            target=str(self.target),
            results=results,
            pairs=compare_all(rounds, against=self.against, margin=self.margin) if self.plan.together else (),
            drift=tuple((at, getattr(times, clock)) for at, times in rounds.drift),
        )

    def _result(
        self,
        track: Track,
        rounds: Rounds,
        clock: str,
        granted: Granted,
        reasons: tuple[str, ...],
        seconds: float,
    ) -> LatencyResult:
        ratios = rounds.ratios(track)
        raw = [getattr(visit.times, clock) for visit in track.visits]
        tail = [getattr(times, clock) for times in track.tail]
        ratio, (low, high) = statistics.median(ratios), rounds.interval(track)
        scale, here = rounds.long_run_ms(), rounds.session_ms()
        raw_low, raw_high = median_interval(raw)
        wall = median_times(track.samples)
        wall_cpu = wall_cpu_ratio(self.target, track.samples)
        return LatencyResult(
            target=str(self.target),
            clock=clock,
            median_ms=ratio * scale,
            low_ms=low * scale,
            high_ms=high * scale,
            raw_median_ms=statistics.median(raw),
            raw_low_ms=raw_low,
            raw_high_ms=raw_high,
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
            reference_ms=scale,
            session_reference_ms=here,
            p90_ms=percentile(tail, 0.9),
            p99_ms=percentile(tail, 0.99),
            samples=len(track.samples),
            rounds=len(track.visits),
            quiet_rounds=len(track.quiet(clock, rounds.ceiling(), 0)),
            runs=track.runs,
            warmup_runs=track.warmup_runs,
            stopped=track.stopped or "time",
            half_width=(high - low) / 2 / ratio,
            drift=drift(rounds.reference_times()),
            splits=rounds.splits,
            first_call_ms=track.first.wall,
            wall_ms=wall.wall,
            cpu_ms=None if wall_cpu is None else wall.cpu,
            wall_cpu_ratio=wall_cpu,
            contended=None if wall_cpu is None else wall_cpu > CONTENDED_ABOVE,
            threads=self.target.cpu_threads() if self.target.device == "cpu" else None,
            priority=granted.kind,
            trusted=not reasons,
            reasons=reasons,
            identity=self._identity(track.name, granted).to_dict(),
            seconds=seconds,
            **self.extra[track.name],
        )


def _energy_per_call(runner: Callable[[], Times], target: Target) -> float | None:
    """Millijoules of the whole device over a second of calls; None where it does not tell."""
    runner()
    meter, calls, deadline = extras.EnergyMeter(target), 0, time.perf_counter() + _ENERGY_SECONDS
    with meter:
        while not calls or time.perf_counter() < deadline:
            runner()
            calls += 1
    return None if meter.joules is None else 1000 * meter.joules / calls


def _check(target: Target, models: Mapping[str, tuple[Any, Any]], plan: Plan, against: str | None) -> None:
    numbers = {"max_seconds": plan.max_seconds, "precision": plan.precision, "min_rounds": plan.min_rounds}
    for name in ("limit_ms", "most_rounds"):
        if (value := getattr(plan, name)) is not None:
            numbers[name] = value
    for name, value in numbers.items():
        least = LEAST_ROUNDS if name.endswith("_rounds") else 0
        if not (math.isfinite(value) and value >= least and value > 0):
            raise UserMistake(
                f"{name}={value} must be finite and {f'at least {least}' if least else 'above 0'}"
            )
    if not models:
        raise UserMistake("models: there is none to measure; give at least one")
    if against is not None and against not in models:
        raise UserMistake(f"against={against!r} is not among the models: {', '.join(models)}")
    target.check()
    for name, (_, inputs) in models.items():
        for number, (shape, _dtype) in enumerate(describe_inputs(inputs)):
            if shape and shape[0] != target.batch:
                raise UserMistake(
                    f"inputs[{number}] of {name} has batch {shape[0]}, but target {str(target)!r} means "
                    f"{target.batch}; write the batch size into the target, as in cpu@{shape[0]}"
                )
