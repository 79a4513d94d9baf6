"""What the machine says of itself just now, read from the kernel's files.

Every reader takes the root of the file tree, so that trees recorded on other machines can be read. What a machine does
not tell (no /proc, no permission) is None; nothing here raises because of that.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Clocks",
    "CpuTimes",
    "Quota",
    "Switches",
    "own_cores",
    "read_clocks",
    "read_cpu_times",
    "read_load",
    "read_pressure",
    "read_quota",
    "read_siblings",
    "read_smt",
    "read_switches",
    "read_temperature",
    "read_thermal_throttles",
    "read_top_frequencies",
]


@dataclass(frozen=True)
class CpuTimes:
    """Counters of one core since the start of the machine, in ticks (``SC_CLK_TCK`` a second).

    Attributes:
        busy: everything but idling, waiting for a disk, and being kept away by the hypervisor.
        total: all of it.
        steal: the core had work, but the hypervisor ran something else.
    """

    busy: int
    total: int
    steal: int


@dataclass(frozen=True)
class Quota:
    """CPU limit of the own control group and of those around it.

    Attributes:
        cpus: cores that the tightest limit grants; None when there is none.
        throttled: periods so far in which one of these groups was stopped because its share was used up.
        throttled_seconds: for how long, in the sum over groups.
    """

    cpus: float | None
    throttled: int | None
    throttled_seconds: float | None


@dataclass(frozen=True)
class Clocks:
    """How fast the cores run.

    Attributes:
        governor: that of the used cores; several different ones are joined with ``+``.
        mhz: the fastest of the used cores just now; the others may be idle.
        nominal_mhz: what they reach without turbo, or their maximum where only that is told.
        boost: whether turbo is allowed.
    """

    governor: str | None
    mhz: float | None
    nominal_mhz: float | None
    boost: bool | None


@dataclass(frozen=True)
class Switches:
    """Involuntary context switches so far: of the calling thread, and of all threads of the process."""

    thread: int | None
    process: int | None


def own_cores() -> tuple[int, ...] | None:
    """Cores that the calling thread may run on, sorted; None where the system does not tell (macOS)."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return tuple(sorted(os.sched_getaffinity(0)))


def read_load(root: Path = Path("/")) -> float | None:
    """Processes that ran or waited, averaged over the last minute."""
    text = _text(root / "proc/loadavg")
    if text is not None:
        return _number(text.split(" ")[0])
    if root == Path("/") and hasattr(os, "getloadavg"):
        with contextlib.suppress(OSError):
            return os.getloadavg()[0]
    return None


def read_cpu_times(root: Path = Path("/")) -> tuple[dict[int, CpuTimes], int | None]:
    """Counters of every core that is switched on, and how many tasks run or wait just now (this one included)."""
    times: dict[int, CpuTimes] = {}
    running = None
    for line in (_text(root / "proc/stat") or "").splitlines():
        if match := re.match(r"cpu([0-9]+) +(.*)", line):
            # user nice system idle iowait irq softirq steal; guest times are already within user and nice.
            ticks = [int(field) for field in match[2].split() if field.isdecimal()][:8]
            if len(ticks) >= 4:
                ticks += [0] * (8 - len(ticks))
                total, steal = sum(ticks), ticks[7]
                times[int(match[1])] = CpuTimes(total - ticks[3] - ticks[4] - steal, total, steal)
        elif line.startswith("procs_running "):
            running = _whole(line.split()[1])
    return times, running


def read_pressure(root: Path = Path("/")) -> float | None:
    """Seconds so far during which at least one task of the machine waited for a core."""
    match = re.search(r"^some .*\btotal=([0-9]+)", _text(root / "proc/pressure/cpu") or "", re.MULTILINE)
    return int(match[1]) / 1e6 if match else None


def read_quota(root: Path = Path("/")) -> Quota:
    """The limits on the own control group and those above it, of version 2 and version 1."""
    limits: list[float] = []
    throttled: list[int] = []
    seconds: list[float] = []
    for group, second_version in _groups(root):
        limit = _limit_v2(group) if second_version else _limit_v1(group)
        if limit is not None:
            limits.append(limit)
        stat = dict(
            line.split(" ", 1) for line in (_text(group / "cpu.stat") or "").splitlines() if " " in line
        )
        if (count := _whole(stat.get("nr_throttled"))) is not None:
            throttled.append(count)
        name, unit = ("throttled_usec", 1e6) if second_version else ("throttled_time", 1e9)
        if (stopped := _whole(stat.get(name))) is not None:
            seconds.append(stopped / unit)
    return Quota(
        min(limits) if limits else None,
        sum(throttled) if throttled else None,
        sum(seconds) if seconds else None,
    )


def read_clocks(cores: Collection[int] | None, root: Path = Path("/")) -> Clocks:
    """Governor and frequencies of the given cores (None: of all)."""
    folders = _core_folders(cores, root)
    governors = {text for folder in folders if (text := _text(folder / "cpufreq/scaling_governor"))}
    current = [mhz for folder in folders if (mhz := _khz(folder / "cpufreq/scaling_cur_freq")) is not None]
    nominal = [mhz for folder in folders if (mhz := _nominal(folder)) is not None]
    if not current:
        current = _cpuinfo_mhz(cores, root)
    return Clocks(
        "+".join(sorted(governors)) or None,
        max(current, default=None),
        max(nominal, default=None),
        _boost(root),
    )


def read_smt(root: Path = Path("/")) -> bool | None:
    """Whether two hardware threads share a core."""
    return {"1": True, "0": False}.get(_text(root / "sys/devices/system/cpu/smt/active") or "")


def read_top_frequencies(cores: Collection[int], root: Path = Path("/")) -> dict[int, int]:
    """The highest frequency of each core, kHz, by which kinds of cores are told apart; without those not known."""
    found = {}
    for core in cores:
        path = root / f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq"
        with contextlib.suppress(ValueError):
            found[core] = int(_text(path) or "")
    return found


def read_siblings(cores: Collection[int], root: Path = Path("/")) -> dict[int, frozenset[int]]:
    """Hardware threads that share a core with each of the given ones, as the kernel lists them ("0,4" or "0-1")."""
    found = {}
    for core in cores:
        path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        with contextlib.suppress(ValueError):
            found[core] = frozenset(_core_list(_text(path) or ""))
    return found


def read_temperature(root: Path = Path("/")) -> float | None:
    """Degrees Celsius of the processor; of the hottest sensor of the machine where none says what it measures."""
    found: list[tuple[bool, float]] = []
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = _number(_text(zone / "temp"))
        if value is not None:
            kind = (_text(zone / "type") or "").lower()
            found.append(("cpu" in kind or "x86_pkg" in kind or "soc" in kind, value / 1000))
    of_cpu = [value for is_cpu, value in found if is_cpu]
    return max(of_cpu or [value for _, value in found], default=None)


def read_thermal_throttles(cores: Collection[int] | None, root: Path = Path("/")) -> int | None:
    """How often the given cores and their packages were slowed down for heat so far (Intel only)."""
    counts = [
        count
        for folder in _core_folders(cores, root)
        for name in ("core_throttle_count", "package_throttle_count")
        if (count := _whole(_text(folder / "thermal_throttle" / name))) is not None
    ]
    return sum(counts) if counts else None


def read_switches() -> Switches:
    """Involuntary context switches of the calling thread and of its process."""
    try:
        import resource
    except ImportError:  # Windows
        return Switches(None, None)
    of_thread = getattr(resource, "RUSAGE_THREAD", None)  # Linux only
    thread = None if of_thread is None else resource.getrusage(of_thread).ru_nivcsw
    return Switches(thread, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def _groups(root: Path) -> list[tuple[Path, bool]]:
    """Folders of the own control group and all above it, each with whether it is of version 2."""
    found: list[tuple[Path, bool]] = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        second_version = number == "0" and not controllers
        if not second_version and "cpu" not in controllers.split(","):
            continue
        names = ("unified", "") if second_version else (controllers, "cpu", "cpu,cpuacct")
        mount = next((m for name in names if (m := root / "sys/fs/cgroup" / name).is_dir()), None)
        if mount is None:
            continue
        # A container may see paths of the host that it cannot open; then the mount's root is its own group.
        parts = [part for part in path.split("/") if part and part != ".."]
        folders = [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
        found += [(folder, second_version) for folder in folders if (folder / "cpu.stat").exists()]
    return found


def _limit_v2(group: Path) -> float | None:
    quota, _, period = (_text(group / "cpu.max") or "").partition(" ")
    return _ratio(_whole(quota), _whole(period))


def _limit_v1(group: Path) -> float | None:
    return _ratio(_whole(_text(group / "cpu.cfs_quota_us")), _whole(_text(group / "cpu.cfs_period_us")))


def _ratio(quota: int | None, period: int | None) -> float | None:
    return quota / period if quota and period else None


def _core_folders(cores: Collection[int] | None, root: Path) -> list[Path]:
    place = root / "sys/devices/system/cpu"
    if cores is not None:
        return [place / f"cpu{core}" for core in sorted(cores)]
    return sorted(path for path in place.glob("cpu[0-9]*") if path.name[3:].isdecimal())


def _core_list(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _nominal(folder: Path) -> float | None:
    """Frequency without turbo in MHz: as intel_pstate or the firmware tells it, else the driver's maximum."""
    base = _khz(folder / "cpufreq/base_frequency")
    if base is None:
        base = _number(_text(folder / "acpi_cppc/nominal_freq")) or None
    return _khz(folder / "cpufreq/cpuinfo_max_freq") if base is None else base


def _cpuinfo_mhz(cores: Collection[int] | None, root: Path) -> list[float]:
    found: list[float] = []
    core = None
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "processor":
            core = _whole(value.strip())
        elif name.strip() == "cpu MHz" and (cores is None or core in cores):
            mhz = _number(value.strip())
            found += [] if mhz is None else [mhz]
    return found


def _boost(root: Path) -> bool | None:
    place = root / "sys/devices/system/cpu"
    if (boost := _text(place / "cpufreq/boost")) in ("0", "1"):
        return boost == "1"
    if (no_turbo := _text(place / "intel_pstate/no_turbo")) in ("0", "1"):
        return no_turbo == "0"
    return None


def _khz(path: Path) -> float | None:
    value = _number(_text(path))
    return None if not value else value / 1000


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _whole(text: str | None) -> int | None:
    """A whole number that is not negative (-1 and ``max`` stand for no limit)."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]+", text) else None


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None
