"""Under which conditions a latency was measured. Figures of different identities are never compared or pooled."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.environment import cpu_model
from nas.latency.runtimes import RUNTIMES
from nas.latency.target import Target

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Identity", "comparable", "describe_inputs", "identity_of"]

_UNKNOWN = "unknown"
_CPU = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Identity:
    """Everything that a figure depends on, as far as the machine tells it; ``unknown`` where it does not.

    Attributes:
        device: kind of device: ``cpu``, ``cuda`` or ``mps``.
        device_name: as the processor or the driver calls it.
        device_uuid: the GPU's own; of a CPU a hash of the machine's identifier, which does not reveal it.
        driver: of the GPU; on a CPU the operating system's kernel.
        runtime: as in the target.
        versions: of the runtime and of what it rests on, by name.
        dtype: as in the target.
        batch: samples in one call.
        inputs: shape and dtype of every input, of every set where sets of several shapes take turns.
        threads: of the computation on a CPU, else ``None``.
        affinity: the cores that the measuring threads were bound to, ``None`` when they were not.
        priority: ``realtime``, ``nice`` or ``none``.
        clock_policy: governor and boost of a CPU, application clocks of a GPU.
        memory_format: ``contiguous``, ``channels_last`` or ``runtime`` (the engine's own choice).
        attention: the kernels of ``scaled_dot_product_attention`` that torch may choose from, or ``runtime``. Which
            one it takes depends on the shapes of each call.
        float32_matmul: torch's setting for products in fp32, and whether cuDNN may use TF32.
        key: of the architecture; ``None`` when it has none. Not part of the conditions.
    """

    device: str
    device_name: str
    device_uuid: str
    driver: str
    runtime: str
    versions: dict[str, str]
    dtype: str
    batch: int
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    threads: int | None
    affinity: tuple[int, ...] | None
    priority: str
    clock_policy: str
    memory_format: str
    attention: tuple[str, ...]
    float32_matmul: str
    key: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        # Through JSON, so that tuples are the lists which a reader of the file will see.
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Identity:
        """The inverse of ``to_dict``. Raises ValueError for missing or unknown keys."""
        names = {field.name for field in dataclasses.fields(cls)}
        if names != set(data):
            raise ValueError(f"Identity: {', '.join(sorted(names ^ set(data)))} missing or unknown")
        affinity = data["affinity"]
        return cls(
            **{
                **data,
                "versions": dict(data["versions"]),
                "inputs": _frozen(data["inputs"]),
                "affinity": None if affinity is None else tuple(affinity),
                "attention": tuple(data["attention"]),
            }
        )

    def digest(self) -> str:
        """16 hex digits of the conditions: two models measured under the same ones have one digest.

        Which cores they were does not count, only how many: a measurement is given cores of one kind.
        """
        conditions = {name: _condition(self, name) for name in self.to_dict() if name != "key"}
        return _hash(json.dumps(conditions, sort_keys=True, separators=(",", ":")))


def comparable(a: Identity, b: Identity) -> list[str]:
    """Names of the conditions in which two identities differ; empty when their figures may be compared."""
    return [
        field.name
        for field in dataclasses.fields(Identity)
        if field.name != "key" and _condition(a, field.name) != _condition(b, field.name)
    ]


def _condition(identity: Identity, name: str) -> Any:
    value = getattr(identity, name)
    return len(value) if name == "affinity" and value is not None else value


def identity_of(
    target: Target,
    inputs_described: Iterable[Sequence[Any]],
    key: str | None,
    *,
    priority: str,
    affinity: tuple[int, ...] | None,
    versions: Mapping[str, str] | None = None,
) -> Identity:
    """The identity of a measurement that is made now, on this machine.

    Args:
        target: which has been checked.
        inputs_described: ``describe_inputs`` of what the model is called with.
        key: of the architecture, if it has one.
        priority: what the measuring threads were granted: ``realtime``, ``nice`` or ``none``.
        affinity: the cores they were bound to, or None.
        versions: a runner's ``runtime_versions``; by default those that its runtime names for any model.
    """
    kind = RUNTIMES.get(target.runtime)
    name, uuid, driver = _device(target)
    return Identity(
        device=target.device_kind,
        device_name=name,
        device_uuid=uuid,
        driver=driver,
        runtime=target.runtime,
        versions=dict(sorted((versions or kind.versions(target)).items())),
        dtype=target.dtype,
        batch=target.batch,
        inputs=_frozen(inputs_described),
        threads=target.cpu_threads() if target.device_kind == "cpu" else None,
        affinity=None if affinity is None else tuple(sorted(affinity)),
        priority=priority,
        clock_policy=_clock_policy(target, uuid),
        memory_format="runtime"
        if kind.own_layout
        else "channels_last"
        if target.channels_last
        else "contiguous",
        attention=("runtime",) if kind.own_layout else _attention(target),
        float32_matmul=_float32_matmul(target),
        key=key,
    )


def describe_inputs(inputs: Any) -> list[list[Any]]:
    """``[shape, dtype]`` of every tensor of one set of inputs, or of every different set of several.

    >>> import torch
    >>> describe_inputs((torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, dtype=torch.int64)))
    [[[1, 3, 8, 8], 'float32'], [[1, 4], 'int64']]
    """
    import torch

    rows = list(inputs)
    sets = [rows] if not rows or isinstance(rows[0], torch.Tensor) else rows
    found: list[list[list[Any]]] = []
    for tensors in sets:
        described = [_described(x) for x in tensors]
        if described not in found:
            found.append(described)
    return [entry for described in found for entry in described]


def _described(x: Tensor) -> list[Any]:
    return [list(x.shape), str(x.dtype).removeprefix("torch.")]


def _frozen(described: Iterable[Sequence[Any]]) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple((tuple(shape), dtype) for shape, dtype in described)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# -- device ------------------------------------------------------------------------------------------------------------


def _device(target: Target) -> tuple[str, str, str]:
    """Name, uuid and driver."""
    if not target.is_cuda:
        return cpu_model(), _machine_id(), f"{platform.system()} {platform.release()}"
    import torch

    facts: Any = torch.cuda.get_device_properties(target.torch_device())
    return str(facts.name), str(getattr(facts, "uuid", _UNKNOWN)), _nvidia_driver()


def _machine_id() -> str:
    """A hash, because the identifier itself is meant to stay on the machine (man 5 machine-id)."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        found = _read(Path(path))
        if found and found != "uninitialized":
            return _hash(f"nas-latency:{found}")
    return _hash(f"nas-latency:{socket.gethostname()}")


def _nvidia_driver() -> str:
    return _read(Path("/sys/module/nvidia/version")) or _with_nvml(
        lambda nvml: nvml.nvmlSystemGetDriverVersion()
    )


def _clock_policy(target: Target, uuid: str) -> str:
    if target.is_cuda:
        return _with_nvml(lambda nvml: _gpu_clocks(nvml, uuid))
    governors = {found for path in _CPU.glob("cpu[0-9]*/cpufreq/scaling_governor") if (found := _read(path))}
    boost, no_turbo = _read(_CPU / "cpufreq/boost"), _read(_CPU / "intel_pstate/no_turbo")
    parts = ["/".join(sorted(governors)) or _UNKNOWN]
    if boost is not None or no_turbo is not None:
        parts.append("boost on" if boost == "1" or no_turbo == "0" else "boost off")
    return ", ".join(parts)


def _gpu_clocks(nvml: Any, uuid: str) -> str:
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    graphics = nvml.nvmlDeviceGetApplicationsClock(handle, nvml.NVML_CLOCK_GRAPHICS)
    memory = nvml.nvmlDeviceGetApplicationsClock(handle, nvml.NVML_CLOCK_MEM)
    return f"application clocks {graphics} and {memory} MHz"


def _with_nvml(ask: Any) -> str:
    """What NVML answers; ``unknown`` without it, or when the driver does not tell."""
    if find_spec("pynvml") is None:
        return _UNKNOWN
    nvml = import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return _UNKNOWN
    try:
        found = ask(nvml)
        return found.decode() if isinstance(found, bytes) else str(found)
    except nvml.NVMLError:
        return _UNKNOWN
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _attention(target: Target) -> tuple[str, ...]:
    """Kernels of torch's attention that are enabled and exist for the device; ``math`` is the plain one."""
    import torch

    if target.device_kind == "mps":
        return ("mps",)
    cuda: Any = torch.backends.cuda
    enabled = {"flash": cuda.flash_sdp_enabled(), "math": cuda.math_sdp_enabled()}
    if target.is_cuda:
        enabled["mem_efficient"] = cuda.mem_efficient_sdp_enabled()
        enabled["cudnn"] = bool(getattr(cuda, "cudnn_sdp_enabled", bool)())
    return tuple(sorted(name for name, on in enabled.items() if on))


def _float32_matmul(target: Target) -> str:
    import torch

    found = torch.get_float32_matmul_precision()
    if not target.is_cuda:
        return found
    return f"{found}, cudnn tf32 {'on' if torch.backends.cudnn.allow_tf32 else 'off'}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
