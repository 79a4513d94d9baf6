"""The machine and the versions a measurement was made with, as JSON without user names or paths."""

from __future__ import annotations

import importlib
import logging
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["cpu_model", "describe_environment", "usable_cpus"]

logger = logging.getLogger(__name__)

_DISTRIBUTIONS = (
    "nas-toolkit", "torch", "torchvision", "timm", "optuna", "numpy", "scikit-learn", "safetensors", "pydantic",
    "tokenizers", "sacrebleu", "ray", "nni", "onnx", "onnxruntime", "triton",
)  # fmt: skip


def describe_environment(*, gpu: bool = False) -> dict[str, Any]:
    """Hardware, operating system, versions and commit.

    Args:
        gpu: import torch to ask it for its devices. Otherwise they are listed only if torch is imported already,
            and ``cuda`` is ``None``, which means: not asked.

    Returns:
        JSON: cpu (model, cores, usable_cores, threads), memory_bytes, os, machine, python, versions (of what is
        installed), cuda, commit (of the toolkit's checkout, with ``-dirty`` when files differ; None outside of one).
    """
    return {
        "cpu": {
            "model": cpu_model(),
            "cores": _physical_cores(),
            "threads": os.cpu_count(),
            "usable_cores": usable_cpus(),
        },
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: found for name in _DISTRIBUTIONS if (found := _version(name)) is not None},
        "cuda": _cuda() if gpu or "torch" in sys.modules else None,
        "commit": _commit(Path(__file__).resolve().parent.parent),
    }


def usable_cpus() -> int:
    """Physical cores that this process may really use: its affinity and its control group's quota count; at least 1."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    quota = _cgroup_cpus()
    return max(1, min(allowed, _physical_cores() or allowed, math.ceil(quota) if quota else allowed))


def _cgroup_cpus() -> float | None:
    """CPUs that the control group grants (version 2, then 1); None when it sets no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text(encoding="ascii")
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text(encoding="ascii")
        except OSError:
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except ValueError:  # "max": unlimited
        return None


def cpu_model() -> str:
    """Name of the processor, as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _physical_cores() -> int | None:
    import psutil

    cores: int | None = psutil.cpu_count(logical=False)
    return cores


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {"devices": [], "runtime": torch.version.cuda}
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = f"{facts.major}.{facts.minor}"
        devices.append({"name": facts.name, "memory_bytes": facts.total_memory, "capability": capability})
    return {"devices": devices, "runtime": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def _commit(root: Path) -> str | None:
    # Inside site-packages a parent directory may be somebody else's repository; ours has .git at its root.
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("the commit of the toolkit is not known: %s", type(error).__name__)
        return None
    return found.stdout.strip() or None
