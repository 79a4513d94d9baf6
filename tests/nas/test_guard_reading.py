"""What the guard reads, from trees in the formats of real kernels and from NVML's functions."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nas.latency import guard, machine, nvml
from nas.latency.guard import Reading, judge, read_machine
from nas.latency.machine import Clocks, CpuTimes, Quota
from nas.latency.nvml import Gpu
from tests.nas._guard_readings import CPU, CUDA, QUIET_GPU, SERVER, tree


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

    def test_the_core_is_kept_busy_before_its_clock_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[str] = []
        monkeypatch.setattr(guard, "_compute", lambda seconds: done.append(f"busy for {seconds} s"))

        def read(*_: object) -> Clocks:
            done.append("read")
            return Clocks(None, 3000, None, None)

        monkeypatch.setattr(machine, "read_clocks", read)
        assert read_machine(CPU, root=tmp_path).mhz == 3000
        assert done == [f"busy for {guard.BUSY_SECONDS} s", "read"]

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
