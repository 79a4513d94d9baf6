"""Readings for the guard: of a server's files, and of a quiet machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nas.latency.guard import Reading
from nas.latency.nvml import Gpu
from nas.latency.target import Target

__all__ = ["CPU", "CUDA", "LATER", "QUIET", "QUIET_GPU", "SERVER", "tree"]


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


QUIET_GPU = Gpu(1980, 1980, 45, 89, False, (), 0)
QUIET = Reading(
    seconds=100, cores=(0, 1), machine_cores=2, load=0.9, running=1, waited_seconds=5, steal_ticks=((0, 10), (1, 50)),
    quota_cpus=None, throttled=3, throttled_seconds=0.1, governor="performance", mhz=3000, nominal_mhz=3000,
    temperature=50, thermal_throttles=2, thread_switches=1000, process_switches=5000, gpu=QUIET_GPU,
)  # fmt: skip
LATER = dataclasses.replace(QUIET, seconds=110)
