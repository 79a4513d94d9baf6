"""Beside the time of a model: the memory it needs at its peak, and the energy the device takes, where it tells."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nas.latency.nvml import nvml_device
from nas.latency.target import Target

__all__ = ["EnergyMeter", "PeakMemory", "peak_memory"]

_SAMPLE_SECONDS = 0.001
_OWN_MEMORY = ("onnxruntime", "tensorrt", "openvino", "cudagraph")

_MOST_WATTS = 1000.0
"""More than any package takes: within the range of a counter over this power it cannot have wrapped twice."""


@dataclass(frozen=True)
class PeakMemory:
    """Memory at the peak of a call.

    Attributes:
        bytes: at least 0; None when it cannot be read.
        how: what was read, or why nothing was; figures of different kinds are not compared.
    """

    bytes: int | None
    how: str


def peak_memory(fn: Callable[[], object], target: Target) -> PeakMemory:
    """Call ``fn`` once and tell the memory it needed at its peak.

    On CUDA it is all that torch's allocator had given out at once, so the weights and inputs that are there already
    are among it. On a CPU it is by how much the resident memory of the process grew meanwhile: weights loaded before
    are not among it, and memory that an earlier call left with the allocator may be used again unseen. The most
    faithful figure comes from a fresh process.

    Apart from timing: samples taken meanwhile would be slow. What ``fn`` raises is passed on.
    """
    if target.device.startswith("cuda"):
        if target.runtime in _OWN_MEMORY:
            fn()
            return PeakMemory(None, f"{target.runtime} allocates outside of torch")
        return _cuda_peak(fn, target)
    if target.device != "cpu":
        fn()
        return PeakMemory(None, f"device {target.device} does not tell its peak")
    gc.collect()
    _trim()
    before = _status("VmRSS")
    if before is None or not _reset_high_water():
        return _sampled_peak(fn)
    fn()
    peak = _status("VmHWM")
    if peak is None:
        return PeakMemory(None, "the kernel does not tell VmHWM")
    return PeakMemory(max(0, peak - before), "growth of the resident memory (VmHWM)")


class EnergyMeter:
    """Energy that the device of a target takes while the context lasts, everything that runs on it included.

    The counter of a GPU moves some ten times in a second, that of a CPU a thousand times: measure over a second or
    more, and divide by the calls made.

    >>> meter = EnergyMeter(Target.parse("cpu"))
    >>> with meter:
    ...     pass
    >>> meter.joules is None or meter.joules >= 0
    True

    Attributes:
        joules: after the context, at least 0; None when the machine offers no counter.
        why: one line why it is None; empty otherwise.
        how: which counters were read; empty without any.
        seconds: duration of the context; None before its end.

    Args:
        target: whose device is metered: a CUDA device by NVML (Volta and later), a CPU by its RAPL packages (without
            the memory), all of the machine.
        root: of the file tree with /sys.
    """

    def __init__(self, target: Target, *, root: Path = Path("/")):
        self.joules: float | None = None
        self.seconds: float | None = None
        self.why = "the context has not ended"
        self.how = ""
        self._target = target
        self._root = root
        self._counters: dict[str, _Counter] = {}
        self._begun = math.nan
        self._missing = ""

    def __enter__(self) -> EnergyMeter:
        self.joules = self.seconds = None
        self._counters, self._missing = self._read()
        self._begun = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.seconds = time.monotonic() - self._begun
        after, missing = self._read() if self._counters else ({}, self._missing)
        self.how = ", ".join(sorted(after))
        self.joules, self.why = _difference(self._counters, after, self.seconds, missing)

    def _read(self) -> tuple[dict[str, _Counter], str]:
        """Counters by name, and why there are none."""
        device = self._target.device
        if device.startswith("cuda"):
            return _nvml_counters(device)
        if device == "cpu":
            return _rapl_counters(self._root)
        return {}, f"device {device} has no counter of energy"


@dataclass(frozen=True)
class _Counter:
    """Joules since some moment; ``range`` is where it starts again from 0 (infinite if never)."""

    joules: float
    range: float


def _difference(
    before: dict[str, _Counter], after: dict[str, _Counter], seconds: float, missing: str
) -> tuple[float | None, str]:
    if not after:
        return None, missing or "the counter of energy has gone"
    if before.keys() != after.keys():
        return None, "the counters of energy changed meanwhile"
    total = 0.0
    for name, end in after.items():
        if seconds * _MOST_WATTS >= end.range:
            return None, f"{seconds:.0f} s are too long: the counter {name} may have wrapped more than once"
        used = end.joules - before[name].joules
        total += used if used >= 0 else used + end.range
    if not math.isfinite(total):
        return None, "the counter of energy was set back"
    return total, ""


def _nvml_counters(device: str) -> tuple[dict[str, _Counter], str]:
    with nvml_device(device) as found:
        if found is None:
            return {}, "NVML is not there; pip install nvidia-ml-py"
        nvml, handle = found
        try:
            millijoules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            return {}, f"NVML tells no energy for this device ({error})"
    return {"NVML total energy": _Counter(millijoules / 1e3, math.inf)}, ""


def _rapl_counters(root: Path) -> tuple[dict[str, _Counter], str]:
    """One counter for each package; its parts, and the copies by another interface (mmio), are not added again."""
    found: dict[str, _Counter] = {}
    why = "this machine shows no RAPL counters (/sys/class/powercap)"
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        if not re.fullmatch(r"intel-rapl:[0-9]+", zone.name):
            continue
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            if not name.startswith("package"):
                continue
            joules = int((zone / "energy_uj").read_text(encoding="ascii")) / 1e6
            most = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
        except PermissionError:
            return {}, f"{zone.name}/energy_uj may be read by root only; grant it with chmod a+r"
        except (OSError, ValueError):
            continue
        found[f"RAPL {name}"] = _Counter(joules, most)
    return found, "" if found else why


def _cuda_peak(fn: Callable[[], object], target: Target) -> PeakMemory:
    import torch

    device = target.torch_device()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return PeakMemory(
        torch.cuda.max_memory_allocated(device), "peak of torch's CUDA allocator, weights included"
    )


def _sampled_peak(fn: Callable[[], object]) -> PeakMemory:
    import psutil

    process = psutil.Process()
    before = highest = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(_SAMPLE_SECONDS):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True, name="peak-memory")
    watcher.start()
    try:
        fn()
        highest = max(highest, process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    return PeakMemory(
        max(0, highest - before), f"growth of the resident memory, sampled every {_SAMPLE_SECONDS * 1e3:g} ms"
    )


def _status(name: str) -> int | None:
    """A size of /proc/self/status in bytes."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(rf"^{name}:\s+([0-9]+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _reset_high_water() -> bool:
    try:
        # Not Path.write_text: it would create the file where there is none.
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(descriptor, b"5")
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _trim() -> None:
    """Give memory that glibc keeps for later back to the system; elsewhere nothing happens."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
