"""The guard, on trees in the formats of real kernels and on readings made up for each bound."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.latency import guard, machine, nvml
from nas.latency.guard import Reading, judge, read_machine
from nas.latency.machine import Clocks, CpuTimes, Quota
from nas.latency.nvml import Gpu
from nas.latency.target import Target

CPU = Target.parse("cpu:1")
CUDA = Target.parse("cuda")

STAT = """\
cpu  1650230 691 185825 653667 15382 0 2889 1962 0 0
cpu0 773561 353 83934 390850 4796 0 155 985 0 0
cpu1 876669 337 101890 262817 10586 0 2733 976 0 0
intr 10219074 0 0 0
ctxt 15089928
btime 1700000000
processes 18921
procs_running 3
procs_blocked 0
"""
SERVER = {
    "proc/loadavg": "1.91 1.62 1.51 3/104 9133\n",
    "proc/stat": STAT,
    "proc/pressure/cpu": (
        "some avg10=2.58 avg60=8.64 avg300=10.40 total=6251308131\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    ),
    "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-2.scope\n",
    "sys/fs/cgroup/cpu.stat": "usage_usec 100\nuser_usec 60\nsystem_usec 40\n",
    "sys/fs/cgroup/user.slice/cpu.stat": "usage_usec 90\nnr_periods 10\nnr_throttled 3\nthrottled_usec 250000\n",
    "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
    "sys/fs/cgroup/user.slice/user-1000.slice/cpu.stat": "nr_periods 7\nnr_throttled 2\nthrottled_usec 500000\n",
    "sys/fs/cgroup/user.slice/user-1000.slice/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/user.slice/user-1000.slice/session-2.scope/cpu.stat": "usage_usec 80\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1200000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "3900000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/base_frequency": "2100000\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "9\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "3400123\n",
    "sys/devices/system/cpu/cpu1/cpufreq/cpuinfo_max_freq": "3900000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/base_frequency": "2100000\n",
    "sys/devices/system/cpu/intel_pstate/no_turbo": "0\n",
    "sys/devices/system/cpu/smt/active": "1\n",
    "sys/class/thermal/thermal_zone0/type": "acpitz\n",
    "sys/class/thermal/thermal_zone0/temp": "99000\n",
    "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone1/temp": "61500\n",
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


class TestReading:
    def test_a_server(self, tmp_path: Path) -> None:
        reading = read_machine(CPU, root=tree(tmp_path, SERVER), cores=[0])
        assert reading.cores == (0,)
        assert reading.machine_cores == 2
        assert reading.load == 1.91
        assert reading.running == 3
        assert reading.waited_seconds == pytest.approx(6251.308131)
        assert reading.steal_ticks == ((0, 985),)
        assert reading.ticks_per_second == os.sysconf("SC_CLK_TCK")
        # The tightest limit, and the stops of all groups around this one.
        assert (reading.quota_cpus, reading.throttled, reading.throttled_seconds) == (1.5, 5, 0.75)
        assert (reading.governor, reading.mhz, reading.nominal_mhz) == ("powersave", 1200, 2100)
        assert (reading.boost, reading.smt) == (True, True)
        assert reading.temperature == 61.5
        assert reading.thermal_throttles == 13
        assert reading.gpu is None

    def test_the_fastest_of_several_cores(self, tmp_path: Path) -> None:
        found = machine.read_clocks([0, 1], tree(tmp_path, SERVER))
        assert found == Clocks("performance+powersave", 3400.123, 2100, True)
        assert machine.read_clocks(None, tmp_path) == found

    def test_counters_of_cores(self, tmp_path: Path) -> None:
        times, running = machine.read_cpu_times(tree(tmp_path, SERVER))
        assert running == 3
        assert times[0] == CpuTimes(
            773561 + 353 + 83934 + 155, 773561 + 353 + 83934 + 390850 + 4796 + 155 + 985, 985
        )
        assert sorted(times) == [0, 1]

    def test_an_old_kernel_without_steal(self, tmp_path: Path) -> None:
        times, running = machine.read_cpu_times(tree(tmp_path, {"proc/stat": "cpu0 5 1 2 90\n"}))
        assert (times, running) == ({0: CpuTimes(8, 98, 0)}, None)

    def test_control_groups_of_version_1(self, tmp_path: Path) -> None:
        own = "sys/fs/cgroup/cpu,cpuacct/docker/abc"
        files = {
            "proc/self/cgroup": "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
            f"{own}/cpu.stat": "nr_periods 50\nnr_throttled 7\nthrottled_time 1500000000\n",
            f"{own}/cpu.cfs_quota_us": "200000\n",
            f"{own}/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 0\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        }
        assert machine.read_quota(tree(tmp_path, files)) == Quota(2.0, 7, 1.5)

    def test_a_container_that_cannot_see_its_path(self, tmp_path: Path) -> None:
        """Version 1 without a namespace: the path is the host's, the mount is the container's own group."""
        files = {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n0::/system.slice\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.stat": "nr_periods 5\nnr_throttled 4\nthrottled_time 1000000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        }
        assert machine.read_quota(tree(tmp_path, files)) == Quota(0.5, 4, 0.001)

    def test_both_versions_at_once(self, tmp_path: Path) -> None:
        files = {
            "proc/self/cgroup": "2:cpuacct:/\n1:cpu:/\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 0\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/unified/cpu.stat": "usage_usec 1\n",
        }
        assert machine.read_quota(tree(tmp_path, files)) == Quota(None, 0, 0)

    def test_a_virtual_machine_tells_its_clock_in_cpuinfo(self, tmp_path: Path) -> None:
        text = "processor\t: 0\ncpu MHz\t\t: 2445.406\n\nprocessor\t: 1\ncpu MHz\t\t: 2600.000\n"
        root = tree(tmp_path, {"proc/cpuinfo": text, "sys/devices/system/cpu/cpufreq/boost": "0\n"})
        assert machine.read_clocks([0], root) == Clocks(None, 2445.406, None, False)
        assert machine.read_clocks(None, root).mhz == 2600

    def test_the_nominal_clock_of_the_firmware(self, tmp_path: Path) -> None:
        core = "sys/devices/system/cpu/cpu0"
        files = {f"{core}/acpi_cppc/nominal_freq": "2450\n", f"{core}/cpufreq/cpuinfo_max_freq": "3500000\n"}
        assert machine.read_clocks([0], tree(tmp_path, files)).nominal_mhz == 2450

    def test_a_machine_that_tells_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on macOS: no /proc, no /sys, no affinity."""
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        reading = read_machine(CPU, root=tmp_path)
        told = {name for name, value in dataclasses.asdict(reading).items() if value is not None}
        assert told <= {
            "seconds", "machine_cores", "ticks_per_second", "thread_switches", "process_switches"
        }  # fmt: skip
        later = dataclasses.replace(reading, seconds=reading.seconds + 1)
        assert judge(reading, later, CPU, clock="wall", wall_cpu_ratio=None, priority="none") == []

    @pytest.mark.parametrize("text", ["", "garbage\n", "cpu0\ncpu\nprocs_running \n", "\x00\xff"])
    def test_files_in_other_formats(self, tmp_path: Path, text: str) -> None:
        reading = read_machine(CPU, root=tree(tmp_path, dict.fromkeys(SERVER, text)), cores=[0])
        assert (reading.load, reading.mhz, reading.throttled, reading.temperature) == (None,) * 4

    def test_this_machine(self) -> None:
        before, after = read_machine(CPU), read_machine(CPU)
        assert after.seconds > before.seconds
        assert after.load is not None
        judge(before, after, CPU, clock="wall", wall_cpu_ratio=1.0, priority="none")

    def test_json(self, tmp_path: Path) -> None:
        reading = dataclasses.replace(
            read_machine(CPU, root=tree(tmp_path, SERVER), cores=[0, 1]), gpu=QUIET_GPU
        )
        assert Reading.from_dict(json.loads(json.dumps(reading.to_dict()))) == reading
        with pytest.raises(ValueError, match="Reading: load missing or unknown"):
            Reading.from_dict({key: value for key, value in reading.to_dict().items() if key != "load"})


QUIET_GPU = Gpu(1980, 1980, 45, 89, False, (), 0)
QUIET = Reading(
    seconds=100, cores=(0, 1), machine_cores=2, load=0.9, running=1, waited_seconds=5, steal_ticks=((0, 10), (1, 50)),
    quota_cpus=None, throttled=3, throttled_seconds=0.1, governor="performance", mhz=3000, nominal_mhz=3000,
    temperature=50, thermal_throttles=2, thread_switches=1000, process_switches=5000, gpu=QUIET_GPU,
)  # fmt: skip
LATER = dataclasses.replace(QUIET, seconds=110)


def judged(
    after: Reading = LATER,
    before: Reading = QUIET,
    target: Target = CPU,
    *,
    clock: str = "wall",
    ratio: float | None = 1.0,
    priority: str = "none",
) -> list[str]:
    return judge(before, after, target, clock=clock, wall_cpu_ratio=ratio, priority=priority)


class TestJudge:
    def test_a_quiet_machine_is_trusted(self) -> None:
        for clock in ("wall", "cpu", "events"):
            for priority in ("realtime", "nice", "none"):
                assert judged(clock=clock, priority=priority) == []

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            (
                {"steal_ticks": ((0, 10), (1, 120))},
                "the hypervisor took 7% of the time of core 1 (steal, bound 5%)",
            ),
            ({"throttled": 5}, "the control group's quota stopped it in 2 periods (bound 0)"),
            (
                {"throttled": 4, "quota_cpus": 1.5},
                "the control group's quota of 1.5 CPUs stopped it in 1 periods (bound 0)",
            ),
            ({"thermal_throttles": 4}, "the processor slowed down for heat 2 times at 50 degrees (bound 0)"),
        ],
    )
    def test_what_slows_the_core_counts_by_any_clock(self, changes: dict[str, Any], text: str) -> None:
        after = dataclasses.replace(LATER, **changes)
        for clock in ("wall", "cpu"):
            for priority in ("realtime", "none"):
                assert judged(after, clock=clock, priority=priority) == [text]

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"load": 2.6}, "load 2.6 on 2 cores (bound 2) without real-time priority"),
            (
                {"thread_switches": 1600},
                "each measuring thread was interrupted 60 times a second (involuntary switches, bound 50) "
                "without real-time priority",
            ),
        ],
    )
    def test_others_count_without_priority_and_with_a_wall_clock(
        self, changes: dict[str, Any], text: str
    ) -> None:
        after = dataclasses.replace(LATER, **changes)
        assert judged(after, ratio=None) == [text]
        assert judged(after, priority="nice", ratio=None) == [text]
        assert judged(after, clock="events", ratio=None) == [text]
        assert judged(after, priority="realtime", ratio=None) == []
        assert judged(after, clock="cpu", ratio=None) == []

    def test_the_load_before_counts_too(self) -> None:
        assert judged(before=dataclasses.replace(QUIET, load=4.0), ratio=None) == [
            "load 4.0 on 2 cores (bound 2) without real-time priority"
        ]

    def test_one_thread_tells_by_itself_what_the_mean_load_of_a_minute_only_guesses(self) -> None:
        before, after = (dataclasses.replace(reading, load=4.0) for reading in (QUIET, LATER))
        assert judged(after, before) == []
        assert judged(after, before, ratio=1.2) != []

    def test_wall_over_cpu(self) -> None:
        text = "wall time is 1.30 times the CPU time (bound 1.05): other work ran on the core"
        assert judged(ratio=1.3) == [text]
        assert judged(ratio=1.3, priority="realtime") == [text]
        assert judged(ratio=1.3, clock="cpu") == []
        assert judged(ratio=1.05) == []
        assert judged(ratio=None) == []
        assert len(judged(ratio=float("nan"))) == 1

    def test_clocks(self) -> None:
        slow = dataclasses.replace(LATER, mhz=2000, governor="powersave")
        assert judged(slow, clock="cpu", priority="realtime") == [
            "the cores run at 2000 of 3000 MHz (bound 75%), governor powersave",
            "the clock fell from 3000 to 2000 MHz (bound 75%), governor powersave",
        ]
        assert judged(dataclasses.replace(slow, nominal_mhz=None, governor=None)) == [
            "the clock fell from 3000 to 2000 MHz (bound 75%)"
        ]
        assert judged(dataclasses.replace(slow, mhz=2300)) == []

    def test_one_tick_of_steal_in_a_short_session_is_no_reason(self) -> None:
        short = dataclasses.replace(QUIET, seconds=100.1, steal_ticks=((0, 11), (1, 50)))
        assert judged(short) == []
        assert judged(dataclasses.replace(short, steal_ticks=((0, 12), (1, 50)))) == [
            "the hypervisor took 20% of the time of core 0 (steal, bound 5%)"
        ]

    def test_three_switches_in_a_short_session_are_no_reason(self) -> None:
        short = dataclasses.replace(QUIET, seconds=100.01, thread_switches=1003)
        assert judged(short) == []
        assert len(judged(dataclasses.replace(short, thread_switches=1004))) == 1

    def test_steal_of_cores_used_only_before_pinning_is_ignored(self) -> None:
        assert judged(dataclasses.replace(LATER, steal_ticks=((0, 10),))) == []
        assert len(judged(dataclasses.replace(LATER, steal_ticks=((0, 900),)))) == 1

    def test_switches_of_several_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        after = dataclasses.replace(LATER, process_switches=5000 + 1600)
        assert judged(after) == []
        assert len(judged(after, target=Target.parse("cpu:2"))) == 1
        assert judged(after, target=Target.parse("cpu:4")) == []

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"mhz": 1200}, "the GPU runs at 1200 of 1980 MHz (bound 75%)"),
            (
                {"slowdowns": ("hardware slowdown",)},
                "the GPU holds its clocks back: hardware slowdown (bound: none)",
            ),
            ({"other_processes": 2}, "2 other compute process(es) on the GPU (bound 0)"),
            ({"temperature": 90}, "the GPU is at 90 degrees (it slows down at 89)"),
        ],
    )
    def test_gpu(self, changes: dict[str, Any], text: str) -> None:
        after = dataclasses.replace(LATER, gpu=dataclasses.replace(QUIET_GPU, **changes))
        assert judged(after, target=CUDA, clock="events", ratio=None) == [text]
        assert judged(after, target=CUDA, clock="events", ratio=None, priority="realtime") == [text]

    def test_the_clock_of_a_resting_gpu_says_nothing(self) -> None:
        resting = dataclasses.replace(QUIET_GPU, mhz=345, idle=True)
        assert judged(dataclasses.replace(LATER, gpu=resting), target=CUDA, clock="events") == []
        before = dataclasses.replace(QUIET, gpu=resting)
        assert judged(before=before, target=CUDA, clock="events") == []

    def test_mistakes_of_the_caller(self) -> None:
        with pytest.raises(ValueError, match="is not later"):
            judged(QUIET)
        with pytest.raises(ValueError, match="clock='gpu'"):
            judged(clock="gpu")
        with pytest.raises(ValueError, match="priority='high'"):
            judged(priority="high")


def _maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


COUNTS = st.integers(0, 2000)
MHZ = st.floats(100, 5000)
SLOWDOWNS = ("hardware slowdown", "power brake")
GPUS = st.builds(
    Gpu, mhz=_maybe(MHZ), max_mhz=_maybe(MHZ), temperature=_maybe(st.floats(20, 110)),
    slowdown_temperature=_maybe(st.floats(80, 95)), idle=_maybe(st.booleans()),
    slowdowns=_maybe(st.sets(st.sampled_from(SLOWDOWNS)).map(tuple)), other_processes=_maybe(st.integers(0, 3)),
)  # fmt: skip


def readings(seconds: st.SearchStrategy[float]) -> st.SearchStrategy[Reading]:
    return st.builds(
        Reading, seconds=seconds, cores=st.just((0, 1)), machine_cores=_maybe(st.integers(1, 8)),
        load=_maybe(st.floats(0, 20)),
        steal_ticks=_maybe(st.tuples(COUNTS, COUNTS).map(lambda both: ((0, both[0]), (1, both[1])))),
        throttled=_maybe(COUNTS), mhz=_maybe(MHZ), nominal_mhz=_maybe(MHZ),
        governor=st.sampled_from([None, "powersave", "performance"]), thermal_throttles=_maybe(COUNTS),
        thread_switches=_maybe(COUNTS), process_switches=_maybe(COUNTS), gpu=_maybe(GPUS),
    )  # fmt: skip


def _more(value: Any, by: float) -> Any:
    return None if value is None else value + by


def _worse_gpu(gpu: Gpu | None, by: float) -> Gpu | None:
    if gpu is None:
        return None
    return dataclasses.replace(
        gpu,
        mhz=None if gpu.mhz is None else gpu.mhz / (1 + by),
        temperature=_more(gpu.temperature, by),
        slowdowns=None if gpu.slowdowns is None else (*gpu.slowdowns, "power brake"),
        other_processes=_more(gpu.other_processes, 1),
    )


WORSE = {
    "load": lambda r, by: {"load": _more(r.load, by)},
    "steal": lambda r, by: {
        "steal_ticks": r.steal_ticks and tuple((core, ticks + round(by)) for core, ticks in r.steal_ticks)
    },
    "throttled": lambda r, by: {"throttled": _more(r.throttled, 1 + round(by))},
    "heat": lambda r, by: {"thermal_throttles": _more(r.thermal_throttles, 1 + round(by))},
    "clock": lambda r, by: {"mhz": None if r.mhz is None else r.mhz / (1 + by)},
    "thread": lambda r, by: {"thread_switches": _more(r.thread_switches, round(by))},
    "process": lambda r, by: {"process_switches": _more(r.process_switches, round(by))},
    "gpu": lambda r, by: {"gpu": _worse_gpu(r.gpu, by)},
}


@given(
    before=readings(st.just(50.0)),
    after=readings(st.floats(50.001, 80)),
    target=st.sampled_from([CPU, Target.parse("cpu:2"), CUDA]),
    clock=st.sampled_from(["wall", "cpu", "events"]),
    ratio=_maybe(st.floats(0.5, 3)),
    priority=st.sampled_from(["realtime", "nice", "none"]),
    how=st.sampled_from([*WORSE, "ratio", "priority", "clock name"]),
    by=st.floats(0, 1000),
)
def test_worse_never_becomes_trusted(
    before: Reading,
    after: Reading,
    target: Target,
    clock: str,
    ratio: float | None,
    priority: str,
    how: str,
    by: float,
) -> None:
    first = judged(after, before, target, clock=clock, ratio=ratio, priority=priority)
    assert all(reason and "\n" not in reason for reason in first)
    if how == "ratio":
        ratio = _more(ratio, by)
    elif how == "priority":
        priority = "none"
    elif how == "clock name":
        clock = "wall"
    else:
        after = dataclasses.replace(after, **WORSE[how](after, by))
    second = judged(after, before, target, clock=clock, ratio=ratio, priority=priority)
    assert len(second) >= len(first)


@given(
    after=readings(st.floats(50.001, 80)),
    before=readings(st.just(50.0)),
    field=st.sampled_from(sorted(WORSE)),
)
def test_what_is_not_told_is_no_reason(after: Reading, before: Reading, field: str) -> None:
    names = {
        "load": "load", "steal": "steal_ticks", "throttled": "throttled", "heat": "thermal_throttles", "clock": "mhz",
        "thread": "thread_switches", "process": "process_switches", "gpu": "gpu",
    }  # fmt: skip
    silent = dataclasses.replace(after, **{names[field]: None})
    assert len(judged(silent, before)) <= len(judged(after, before))


class FakeNvml:
    """The functions of nvidia-ml-py that are used, with its names; the numbers are a warm H100's."""

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1

    class NVMLError(Exception):
        pass

    def __init__(self, *, pids: list[int] | None = None, reasons: int = 0, broken: tuple[str, ...] = ()):
        self.pids = pids or []
        self.reasons = reasons
        self.broken = broken
        self.open = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "broken"):
            return object.__getattribute__(self, "_fail")
        return object.__getattribute__(self, name)

    def _fail(self, *_: object) -> None:
        raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1234":
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1755}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1980}[kind]

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return {0: 51}[sensor]

    def nvmlDeviceGetTemperatureThreshold(self, handle: str, kind: int) -> int:
        return {1: 89}[kind]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=1 << 20) for pid in self.pids]


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml, *, initialised: bool = False) -> FakeNvml:
    import torch

    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return fake


class TestGpuReading:
    def test_all_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, FakeNvml(pids=[os.getpid(), 1, 2, 3], reasons=0x4 | 0x20 | 0x40))
        assert read_machine(CUDA, ours=[3]).gpu == Gpu(
            1755, 1980, 51, 89, False, ("software thermal slowdown", "hardware thermal slowdown"), 2
        )
        assert fake.open == 0

    def test_a_power_cap_and_idling_are_no_faults(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, FakeNvml(reasons=0x1 | 0x4))
        found = nvml.read_gpu("cuda:0")
        assert found is not None
        assert (found.idle, found.slowdowns) == (True, ())

    @pytest.mark.parametrize(("initialised", "others"), [(True, 0), (False, 1)])
    def test_own_process_under_a_number_of_the_host(
        self, monkeypatch: pytest.MonkeyPatch, initialised: bool, others: int
    ) -> None:
        install(monkeypatch, FakeNvml(pids=[2**22 + 1]), initialised=initialised)
        found = nvml.read_gpu("cuda")
        assert found is not None
        assert found.other_processes == others

    def test_what_the_device_does_not_support(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = [name for name in vars(FakeNvml) if name.startswith("nvmlDeviceGet") and "UUID" not in name]
        fake = install(monkeypatch, FakeNvml(broken=tuple(names)))
        assert nvml.read_gpu("cuda") == Gpu(None, None, None, None, None, None, None)
        assert fake.open == 0

    def test_no_driver_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, FakeNvml(broken=("nvmlInit",)))
        assert nvml.read_gpu("cuda") is None
        fake = install(monkeypatch, FakeNvml(broken=("nvmlDeviceGetHandleByUUID",)))
        assert nvml.read_gpu("cuda") is None
        assert fake.open == 0

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert nvml.read_gpu("cuda") is None
        assert read_machine(CUDA).gpu is None


def test_bounds_are_those_of_the_text() -> None:
    assert (guard.WALL_CPU, guard.STEAL_SHARE, guard.CLOCK_SHARE) == (1.05, 0.05, 0.75)
