"""The identity of a measurement: what it holds, what it does not reveal, and what may be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nas.environment import cpu_model
from nas.latency import Target, identity
from nas.latency.identity import Identity, comparable, describe_inputs, identity_of

INPUTS = [[[1, 3, 8, 8], "float32"]]


def made(text: str = "cpu:1", key: str | None = "abc", **changes: Any) -> Identity:
    options: dict[str, Any] = {"priority": "nice", "affinity": None, **changes}
    return identity_of(Target.parse(text), INPUTS, key, **options)


def test_a_cpu_identity_names_what_the_figure_depends_on() -> None:
    found = made("cpu:1+bf16@4", affinity=(1, 0), priority="realtime")
    assert (found.device, found.device_name, found.runtime, found.dtype, found.batch) == (
        "cpu",
        cpu_model(),
        "eager",
        "bf16",
        4,
    )
    assert found.versions == {"torch": torch.__version__}
    assert found.inputs == (((1, 3, 8, 8), "float32"),)
    assert (found.threads, found.affinity, found.priority) == (1, (0, 1), "realtime")
    assert len(found.device_uuid) == 16
    assert found.memory_format == "contiguous"
    assert found.attention == ("flash", "math")
    assert found.clock_policy
    assert found.driver


def test_it_round_trips_through_json() -> None:
    for found in (made(), made(affinity=(0,), key=None), made("cpu:1+channels_last")):
        assert Identity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match="Identity: speed missing or unknown"):
        Identity.from_dict({**made().to_dict(), "speed": 1})
    with pytest.raises(ValueError, match="Identity: driver missing or unknown"):
        Identity.from_dict({name: value for name, value in made().to_dict().items() if name != "driver"})


def test_two_models_under_the_same_conditions_have_one_digest() -> None:
    a, b = made(key="a"), made(key="b")
    assert a != b
    assert a.digest() == b.digest()
    assert len(a.digest()) == 16
    assert int(a.digest(), 16) >= 0
    assert comparable(a, b) == []


OTHER: dict[str, Any] = {
    "device": "cuda",
    "device_name": "another",
    "device_uuid": "0" * 16,
    "driver": "another",
    "runtime": "compile",
    "versions": {"torch": "0.1"},
    "dtype": "fp16",
    "batch": 2,
    "inputs": (((2, 3, 8, 8), "float32"),),
    "threads": 2,
    "affinity": (0,),
    "priority": "none",
    "clock_policy": "powersave",
    "memory_format": "channels_last",
    "attention": ("math",),
    "float32_matmul": "medium",
}


def test_every_condition_counts() -> None:
    a = made()
    assert set(OTHER) | {"key"} == set(vars(a))
    for name, value in OTHER.items():
        b = replace(a, **{name: value})
        assert comparable(a, b) == [name]
        assert a.digest() != b.digest()
        assert Identity.from_dict(b.to_dict()) == b


def test_an_engine_has_its_own_memory_format_and_attention() -> None:
    found = made("ort:1", versions={"onnxruntime": "1", "exporter": "dynamo"})
    assert (found.memory_format, found.attention) == ("runtime", ("runtime",))
    assert found.versions == {"exporter": "dynamo", "onnxruntime": "1"}
    assert made("cpu:1+channels_last").memory_format == "channels_last"


def test_the_attention_kernels_are_those_that_are_enabled() -> None:
    was = torch.backends.cuda.flash_sdp_enabled()
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        assert made().attention == ("math",)
    finally:
        torch.backends.cuda.enable_flash_sdp(was)


def test_the_machine_is_known_by_a_hash_that_does_not_reveal_its_identifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files: dict[str, str] = {"/etc/machine-id": "0123456789abcdef0123456789abcdef"}
    monkeypatch.setattr(identity, "_read", lambda path: files.get(str(path)))
    monkeypatch.setattr(identity.socket, "gethostname", lambda: "somewhere")
    first = made().device_uuid
    assert first == made().device_uuid
    assert first not in files["/etc/machine-id"]
    files["/etc/machine-id"] = "fedcba9876543210fedcba9876543210"
    second = made().device_uuid
    files["/etc/machine-id"] = "uninitialized"
    by_name = made().device_uuid
    del files["/etc/machine-id"]
    assert by_name == made().device_uuid
    assert len({first, second, by_name}) == 3
    assert "somewhere" not in str(made())


def test_the_clock_policy_of_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(identity, "_CPU", tmp_path)
    assert made().clock_policy == "unknown"
    for number, governor in enumerate(("powersave", "performance", "performance")):
        folder = tmp_path / f"cpu{number}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
    assert made().clock_policy == "performance/powersave"
    (tmp_path / "cpufreq").mkdir()
    (tmp_path / "cpufreq" / "boost").write_text("1\n")
    assert made().clock_policy == "performance/powersave, boost on"
    (tmp_path / "cpufreq" / "boost").write_text("0\n")
    assert made().clock_policy == "performance/powersave, boost off"


class Nvml:
    """What this module asks NVML for."""

    NVML_CLOCK_GRAPHICS, NVML_CLOCK_MEM = 0, 2

    class NVMLError(Exception):
        pass

    def __init__(self, clocks: dict[int, int] | None):
        self.clocks = clocks
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return uuid

    def nvmlDeviceGetApplicationsClock(self, handle: str, kind: int) -> int:
        if self.clocks is None:
            raise self.NVMLError
        return self.clocks[kind]


def test_a_gpu_identity_asks_torch_and_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H100", uuid="1234")
    )
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92600)
    monkeypatch.setattr(identity, "find_spec", lambda name: object())
    monkeypatch.setattr(identity, "_read", lambda path: None)
    nvml = Nvml({0: 1980, 2: 2619})
    monkeypatch.setattr(identity, "import_module", lambda name: nvml)
    found = made("cuda:0")
    assert (found.device_name, found.device_uuid, found.driver) == ("H100", "1234", "580.1")
    assert found.clock_policy == "application clocks 1980 and 2619 MHz"
    assert set(found.versions) == {"torch", "cuda", "cudnn"}
    assert found.threads is None
    assert {"flash", "math", "mem_efficient"} <= set(found.attention)
    assert found.float32_matmul.startswith("highest, cudnn tf32 o")
    nvml.clocks = None
    assert made("cuda:0").clock_policy == "unknown"
    assert nvml.open == 0
    monkeypatch.setattr(identity, "find_spec", lambda name: None)
    assert made("cuda:0").driver == "unknown"


def test_inputs_are_described_once_per_shape() -> None:
    image, ids = torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, dtype=torch.int64)
    assert describe_inputs((image, ids)) == [[[1, 3, 8, 8], "float32"], [[1, 4], "int64"]]
    assert describe_inputs([(ids,), (ids + 1,), (ids[:, :2],)]) == [[[1, 4], "int64"], [[1, 2], "int64"]]
    assert describe_inputs(()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_tells_its_name_and_uuid() -> None:
    found = made("cuda")
    assert found.device_name == torch.cuda.get_device_name()
    assert found.device_uuid != "unknown"
