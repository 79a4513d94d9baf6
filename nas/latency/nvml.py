"""A CUDA device as its driver's management library (NVML, package nvidia-ml-py) sees it.

What a device does not tell is None; without the package or a driver there is no reading at all, and nothing raises.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Gpu", "nvml_device", "read_gpu"]

logger = logging.getLogger(__name__)

# NVML, "clocks event reasons". A power cap is no fault: large batches run into it all the time; what it costs is seen
# in the clock. An idle device has low clocks by nature.
_GPU_IDLE = 0x1
_GPU_SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as NVML sees it; None for what it does not tell.

    Attributes:
        mhz, max_mhz: clock of the multiprocessors, and the highest there is.
        temperature: degrees Celsius.
        slowdown_temperature: at which the device slows itself down.
        idle: nothing ran when it was asked, so that its clock means nothing.
        slowdowns: why the device holds its clocks back, faults only (a power cap is not among them).
        other_processes: processes with a compute context on it, without this one.
    """

    mhz: float | None
    max_mhz: float | None
    temperature: float | None
    slowdown_temperature: float | None
    idle: bool | None
    slowdowns: tuple[str, ...] | None
    other_processes: int | None


def read_gpu(device: str, ours: Collection[int] = ()) -> Gpu | None:
    """The state of a CUDA device; None without NVML (package nvidia-ml-py) or when it does not know the device.

    Args:
        device: ``cuda`` or ``cuda:INDEX``, as torch counts.
        ours: ids of processes that hold a context there but are known to rest; they are not counted as others.
    """
    with nvml_device(device) as found:
        if found is None:
            return None
        nvml, handle = found
        mask = _ask(nvml, _event_reasons(nvml), handle)
        return Gpu(
            mhz=_ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            max_mhz=_ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
            temperature=_ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            slowdown_temperature=_ask(
                nvml,
                nvml.nvmlDeviceGetTemperatureThreshold,
                handle,
                nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN,
            ),
            idle=None if mask is None else bool(mask & _GPU_IDLE),
            slowdowns=None
            if mask is None
            else tuple(name for bit, name in _GPU_SLOWDOWNS.items() if mask & bit),
            other_processes=_others(_ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle), ours),
        )


@contextlib.contextmanager
def nvml_device(device: str) -> Iterator[tuple[Any, Any] | None]:
    """The NVML module, opened, with the handle of torch's device ``cuda`` or ``cuda:INDEX``; None if there is none."""
    nvml = _nvml_module()
    if nvml is None:
        yield None
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        logger.info("NVML cannot be opened: %s", error)
        yield None
        return
    try:
        uuid = _uuid(device)
        handle = None if uuid is None else _ask(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid)
        yield None if handle is None else (nvml, handle)
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _nvml_module() -> Any | None:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def _uuid(device: str) -> str | None:
    # By uuid, since CUDA numbers devices in its own order and CUDA_VISIBLE_DEVICES renumbers them.
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return None
    found = str(getattr(torch.cuda.get_device_properties(torch.device(device)), "uuid", ""))
    return None if not found else found if found.startswith(("GPU-", "MIG-")) else f"GPU-{found}"


def _event_reasons(nvml: Any) -> Callable[..., Any]:
    # Renamed by driver 535; the old name stays, but only the new one is in all later releases.
    name = "nvmlDeviceGetCurrentClocksEventReasons"
    found: Callable[..., Any] = getattr(nvml, name, None) or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    return found


def _ask(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except nvml.NVMLError:  # not supported by this device, or not allowed
        return None


def _others(processes: Collection[Any] | None, ours: Collection[int]) -> int | None:
    if processes is None:
        return None
    pids = {int(process.pid) for process in processes}
    others = len(pids - {os.getpid(), *ours})
    torch = sys.modules.get("torch")
    # In a container the driver tells the ids of the host, under which this process is there but not to be recognised.
    hidden = os.getpid() not in pids and torch is not None and torch.cuda.is_initialized()
    return max(0, others - 1) if hidden else others
