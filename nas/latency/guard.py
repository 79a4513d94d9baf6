"""Whether the machine was quiet enough for a measurement: its state before and after, and what speaks against trust.

A measurement with reasons against it is marked untrusted and made again later; it is never kept in silence. The bounds
are constants of this module.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nas.latency import machine, nvml
from nas.latency.target import Target

__all__ = ["Reading", "displaced", "judge", "read_machine", "unsettled"]

WALL_CPU = 1.05
"""Wall over CPU time of a single-threaded call: above, other work ran on the core for more than 5 % of the time. A
plain mean of such times does not rank models (Kendall tau 0.72 between sessions, against 1.00 undisturbed)."""

STEAL_SHARE = 0.05
"""Share of the time in which the hypervisor kept a used core from work it had: the same 5 %."""

LEAST_STEAL_TICKS = 2
"""A tick is 10 ms: a single one in a short session may stand for much less than it says."""

THROTTLED_PERIODS = 0
"""A control group that used up its quota stands still for up to 100 ms, so that no such period is harmless."""

CLOCK_SHARE = 0.75
"""Share of the nominal clock below which times are of another machine, before the session or after it, and share of
the faster one of the two clocks below which the other is; NVBench drops samples by the same bound."""

SWITCHES_PER_SECOND = 50.0
"""Involuntary context switches of a measuring thread. With another process on its core there are 150 to 340 in a
second and 1 to 4 ms are lost in each; at 1 ms each, 50 are the 5 % of ``WALL_CPU``. Under real-time priority there are
next to none: what interrupts then is real-time itself, or the kernel, and is lost time like any other."""

LEAST_SWITCHES = 3
"""So few in the whole session touch too few calls to move a median."""

LEAST_QUIET = 1 / 3
"""Share of the visits with the reference near its fast tenth on both sides. Some 0.95 on an idle machine, 0.5 to 0.7
beside a core that is busy half of the time, which is borne; where only 0.25 was quiet, models were 5 % off (up to 13 %)
and unlike each other, whatever was done with their times."""

BUSY_SECONDS = 0.02
"""How long the reading thread computes before it reads the clocks: drivers set them every 10 ms or so, and a core that
has just rested tells a clock at which nothing was measured."""

LEVEL = 1.15
"""How far the reference may be from its long-run time. Beyond, models were 7 to 27 % off: a machine that is slow
throughout slows models by unlike factors, and a session has nothing faster to notice it by."""


@dataclass(frozen=True)
class Reading:
    """The state of the machine at one moment; counters count from its start, and None means that it does not tell.

    Attributes:
        seconds: time of the reading, on the monotonic clock.
        cores: those that the measuring thread may use.
        machine_cores: how many are switched on in the whole machine, which the load counts for.
        load: processes that ran or waited, averaged over the last minute.
        running: tasks that ran or waited just then, this one included.
        waited_seconds: so far, in which any task of the machine waited for a core (pressure stall information).
        steal_ticks: of each used core, so far; ``ticks_per_second`` of them make a second.
        quota_cpus: cores granted by the control groups.
        throttled, throttled_seconds: periods in which the control groups were stopped, and how long in all.
        governor, mhz, nominal_mhz, boost, smt: clock policy and clocks of the used cores, in MHz.
        temperature: of the processor, degrees Celsius.
        thermal_throttles: how often the used cores were slowed down for heat so far.
        thread_switches, process_switches: involuntary context switches so far.
        gpu: state of the CUDA device; None for other targets and without NVML.
    """

    seconds: float
    cores: tuple[int, ...] | None = None
    machine_cores: int | None = None
    load: float | None = None
    running: int | None = None
    waited_seconds: float | None = None
    steal_ticks: tuple[tuple[int, int], ...] | None = None
    ticks_per_second: int = 100
    quota_cpus: float | None = None
    throttled: int | None = None
    throttled_seconds: float | None = None
    governor: str | None = None
    mhz: float | None = None
    nominal_mhz: float | None = None
    boost: bool | None = None
    smt: bool | None = None
    temperature: float | None = None
    thermal_throttles: int | None = None
    thread_switches: int | None = None
    process_switches: int | None = None
    gpu: nvml.Gpu | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Reading:
        """The inverse of ``to_dict``. Raises ValueError for missing or unknown keys."""
        if wrong := sorted({field.name for field in fields(cls)} ^ data.keys()):
            raise ValueError(f"Reading: {', '.join(wrong)} missing or unknown")
        values = dict(data)
        if values["cores"] is not None:
            values["cores"] = tuple(values["cores"])
        if values["steal_ticks"] is not None:
            values["steal_ticks"] = tuple((core, ticks) for core, ticks in values["steal_ticks"])
        if values["gpu"] is not None:
            gpu = dict(values["gpu"])
            gpu["slowdowns"] = None if gpu["slowdowns"] is None else tuple(gpu["slowdowns"])
            values["gpu"] = nvml.Gpu(**gpu)
        return cls(**values)


def read_machine(
    target: Target,
    *,
    root: Path = Path("/"),
    cores: Collection[int] | None = None,
    ours: Collection[int] = (),
) -> Reading:
    """Read the state of the machine, in some tens of milliseconds.

    Call it in the thread that measures, once warm-up is over and priority and cores are set, and again at once after
    the last sample: the clocks of a device that rests say nothing. The calling thread keeps its core busy for
    ``BUSY_SECONDS`` first; of the used cores the fastest is read, so that it does not matter which of them rest.

    Args:
        target: for a CUDA device its state is read too.
        root: of the file tree with /proc and /sys.
        cores: that are used; by default those that the calling thread may run on.
        ours: ids of processes that hold a context on the CUDA device but rest at the gate meanwhile; without them
            they count as others.
    """
    # First, because the device rests while the core is kept busy.
    gpu = nvml.read_gpu(target.device, ours) if target.device.startswith("cuda") else None
    used = machine.own_cores() if cores is None else tuple(sorted(cores))
    times, running = machine.read_cpu_times(root)
    quota = machine.read_quota(root)
    _compute(BUSY_SECONDS)
    clocks = machine.read_clocks(used, root)
    switches = machine.read_switches()
    steal = tuple((core, times[core].steal) for core in sorted(times) if used is None or core in used)
    return Reading(
        seconds=time.monotonic(),
        cores=used,
        machine_cores=len(times) or os.cpu_count(),
        load=machine.read_load(root),
        running=running,
        waited_seconds=machine.read_pressure(root),
        steal_ticks=steal or None,
        ticks_per_second=os.sysconf("SC_CLK_TCK"),
        quota_cpus=quota.cpus,
        throttled=quota.throttled,
        throttled_seconds=quota.throttled_seconds,
        governor=clocks.governor,
        mhz=clocks.mhz,
        nominal_mhz=clocks.nominal_mhz,
        boost=clocks.boost,
        smt=machine.read_smt(root),
        temperature=machine.read_temperature(root),
        thermal_throttles=machine.read_thermal_throttles(used, root),
        thread_switches=switches.thread,
        process_switches=switches.process,
        gpu=gpu,
    )


def judge(
    before: Reading,
    after: Reading,
    target: Target,
    *,
    clock: str,
    wall_cpu_ratio: float | None,
    priority: str,
) -> list[str]:
    """Reasons not to trust the times taken between two readings, one line each; none means trusted.

    What a reading does not tell cannot speak against the times. A worse reading never removes a reason.

    Args:
        before, after: the readings around the samples.
        target: what was measured.
        clock: of the times: ``wall``, ``events`` or ``cpu``. CPU time does not count waiting for a core (it is a
            flagged substitute), so that load, switches and the wall/CPU ratio do not count against it; what slows the
            core itself does.
        wall_cpu_ratio: of the calls; None where there is none (several threads, CUDA).
        priority: ``realtime``, ``nice`` or ``none``; under the first the load of others does not matter, as long as
            the measuring threads are not interrupted.

    Raises:
        ValueError: the second reading is not later than the first, or ``clock`` or ``priority`` is unknown.
    """
    if clock not in ("wall", "events", "cpu") or priority not in ("realtime", "nice", "none"):
        raise ValueError(f"clock={clock!r}, priority={priority!r}: not known")
    if not after.seconds > before.seconds:
        raise ValueError(f"the reading after ({after.seconds}) is not later than the one before")
    reasons = [*_steal(before, after), *_throttled(before, after), *_clocks(before, after)]
    if clock != "cpu":
        reasons += _ratio(wall_cpu_ratio)
        reasons += _switches(before, after, target, priority)
        # The mean load of a minute still holds what had just stopped; one thread tells by itself.
        if priority != "realtime" and (wall_cpu_ratio is None or before.thread_switches is None):
            reasons += _load(before, after)
    return reasons + _gpu(before.gpu, after.gpu)


def unsettled(quiet_share: float) -> list[str]:
    """The reason not to trust a session of which only this share, 0 to 1, was quiet; none where it is enough.

    It sees what no counter of this system tells: who shares the processor's caches and memory from outside.
    """
    if quiet_share >= LEAST_QUIET:
        return []
    return [
        f"the reference was near its best in {quiet_share:.0%} of the visits only (bound {LEAST_QUIET:.0%}): something "
        "else, here or beside this virtual machine, used the core or its caches"
    ]


def displaced(session_ms: float, long_run_ms: float | None, *, ratios_only: bool = False) -> list[str]:
    """The reason not to trust a session in which the reference took another time than when the scale was set.

    None where there is no scale yet. With ``ratios_only``, of models that are only compared with each other, a session
    that is faster than the scale is not held against them.
    """
    if long_run_ms is None or long_run_ms / LEVEL <= session_ms <= long_run_ms * LEVEL:
        return []
    if session_ms > long_run_ms:
        return [
            f"the reference took {session_ms:.3g} ms, {long_run_ms:.3g} ms in the session that set the scale (bound "
            f"{LEVEL:g} times): the machine was slower throughout"
        ]
    if ratios_only:
        return []
    return [
        f"the reference took {session_ms:.3g} ms, {long_run_ms:.3g} ms in the session that set the scale (bound "
        f"{LEVEL:g} times): that one was slow, so measure what was measured then again, with a new scale"
    ]


def _ratio(ratio: float | None) -> list[str]:
    # Written so that NaN, too, is a reason.
    if ratio is None or ratio <= WALL_CPU:
        return []
    return [f"wall time is {ratio:.2f} times the CPU time (bound {WALL_CPU}): other work ran on the core"]


def _steal(before: Reading, after: Reading) -> list[str]:
    if before.steal_ticks is None or after.steal_ticks is None:
        return []
    earlier = dict(before.steal_ticks)
    elapsed = (after.seconds - before.seconds) * after.ticks_per_second
    stolen = {core: ticks - earlier[core] for core, ticks in after.steal_ticks if core in earlier}
    if not stolen:
        return []
    core = max(stolen, key=lambda one: stolen[one])
    share = stolen[core] / elapsed
    if stolen[core] < LEAST_STEAL_TICKS or share <= STEAL_SHARE:
        return []
    return [f"the hypervisor took {share:.0%} of the time of core {core} (steal, bound {STEAL_SHARE:.0%})"]


def _throttled(before: Reading, after: Reading) -> list[str]:
    reasons = []
    periods = _grown(before.throttled, after.throttled)
    if periods is not None and periods > THROTTLED_PERIODS:
        limit = "" if after.quota_cpus is None else f" of {after.quota_cpus:g} CPUs"
        reasons.append(
            f"the control group's quota{limit} stopped it in {periods:g} periods (bound {THROTTLED_PERIODS})"
        )
    heat = _grown(before.thermal_throttles, after.thermal_throttles)
    if heat is not None and heat > 0:
        at = "" if after.temperature is None else f" at {after.temperature:.0f} degrees"
        reasons.append(f"the processor slowed down for heat {heat:g} times{at} (bound 0)")
    return reasons


def _clocks(before: Reading, after: Reading) -> list[str]:
    governor = "" if after.governor is None else f", governor {after.governor}"
    bound = f"(bound {CLOCK_SHARE:.0%}){governor}"
    reasons = [
        f"the cores {verb} at {reading.mhz:.0f} of {reading.nominal_mhz:.0f} MHz {bound}"
        for reading, verb in ((before, "ran"), (after, "run"))
        if reading.mhz is not None
        and reading.nominal_mhz is not None
        and reading.mhz < CLOCK_SHARE * reading.nominal_mhz
    ]
    if before.mhz is not None and after.mhz is not None:
        if after.mhz < CLOCK_SHARE * before.mhz:
            reasons.append(f"the clock fell from {before.mhz:.0f} to {after.mhz:.0f} MHz {bound}")
        elif before.mhz < CLOCK_SHARE * after.mhz:
            reasons.append(f"the clock rose from {before.mhz:.0f} to {after.mhz:.0f} MHz {bound}")
    return reasons


def _load(before: Reading, after: Reading) -> list[str]:
    loads = [reading.load for reading in (before, after) if reading.load is not None]
    if not loads or after.machine_cores is None or max(loads) <= after.machine_cores:
        return []
    return [
        f"load {max(loads):.1f} on {after.machine_cores} cores (bound {after.machine_cores}) "
        "without real-time priority"
    ]


def _switches(before: Reading, after: Reading, target: Target, priority: str) -> list[str]:
    threads = 1 if target.device != "cpu" else target.cpu_threads()
    counts = [_grown(before.thread_switches, after.thread_switches)]
    if threads > 1:
        whole = _grown(before.process_switches, after.process_switches)
        counts.append(None if whole is None else whole / threads)
    count = max((count for count in counts if count is not None), default=0)
    rate = count / (after.seconds - before.seconds)
    if count <= LEAST_SWITCHES or rate <= SWITCHES_PER_SECOND:
        return []
    with_it = "under" if priority == "realtime" else "without"
    return [
        f"each measuring thread was interrupted {rate:.0f} times a second (involuntary switches, bound "
        f"{SWITCHES_PER_SECOND:.0f}) {with_it} real-time priority"
    ]


def _gpu(before: nvml.Gpu | None, after: nvml.Gpu | None) -> list[str]:
    readings = [reading for reading in (before, after) if reading is not None]
    reasons = []
    if slowdowns := sorted({name for reading in readings for name in reading.slowdowns or ()}):
        reasons.append(f"the GPU holds its clocks back: {', '.join(slowdowns)} (bound: none)")
    others = max((r.other_processes for r in readings if r.other_processes is not None), default=0)
    if others:
        reasons.append(f"{others} other compute process(es) on the GPU (bound 0)")
    hot = [
        f"the GPU is at {reading.temperature:.0f} degrees (it slows down at {reading.slowdown_temperature:.0f})"
        for reading in readings
        if reading.temperature is not None
        and reading.slowdown_temperature
        and reading.temperature >= reading.slowdown_temperature
    ]
    reasons += hot[-1:]
    # The clock before is no measure here: the device may have rested then.
    if after is not None and not after.idle and after.mhz is not None and after.max_mhz is not None:
        low = after.mhz < CLOCK_SHARE * after.max_mhz
        text = f"the GPU runs at {after.mhz:.0f} of {after.max_mhz:.0f} MHz (bound {CLOCK_SHARE:.0%})"
        reasons += [text] if low else []
    return reasons


def _compute(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _grown(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
