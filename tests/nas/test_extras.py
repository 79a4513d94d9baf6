"""Peak memory for real on the CPU, energy from counters in the formats of the kernel and of NVML."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.latency import extras
from nas.latency.extras import EnergyMeter, PeakMemory, peak_memory
from nas.latency.target import Target

CPU = Target.parse("cpu:1")
CUDA = Target.parse("cuda")
MIB = 1 << 20


def touch(mib: int) -> None:
    """Take memory that is really there, and give it back."""
    block = bytearray(mib * MIB)
    for start in range(0, len(block), 4096):
        block[start] = 1


class TestPeakMemoryOnCpu:
    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
    def test_memory_given_back_before_the_end_counts(self) -> None:
        def fn() -> None:
            touch(64)
            touch(16)

        for _ in range(2):
            found = peak_memory(fn, CPU)
            assert found.how == "growth of the resident memory (VmHWM)"
            assert found.bytes is not None
            assert 60 * MIB <= found.bytes <= 80 * MIB

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
    def test_an_earlier_peak_does_not_count(self) -> None:
        touch(96)
        found = peak_memory(lambda: touch(32), CPU)
        assert found.bytes is not None
        assert 28 * MIB <= found.bytes <= 48 * MIB

    @pytest.mark.parametrize("refused", [FileNotFoundError, PermissionError])
    def test_sampled_where_the_kernel_keeps_no_peak(
        self, monkeypatch: pytest.MonkeyPatch, refused: type[OSError]
    ) -> None:
        real = os.open

        def refuse(path: Any, *rest: Any, **named: Any) -> int:
            if str(path).endswith("clear_refs"):
                raise refused(path)
            return real(path, *rest, **named)

        monkeypatch.setattr(os, "open", refuse)
        kept = []
        found = peak_memory(lambda: kept.append(bytearray(b"x") * (48 * MIB)), CPU)
        assert found.how == "growth of the resident memory, sampled every 1 ms"
        assert found.bytes is not None
        assert 40 * MIB <= found.bytes <= 64 * MIB

    def test_the_sampler_sees_what_is_given_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import psutil

        sizes = iter([100, 150, 700])
        seen = []

        class Process:
            def memory_info(self) -> Any:
                seen.append(next(sizes, 300))
                return SimpleNamespace(rss=seen[-1])

        monkeypatch.setattr(psutil, "Process", Process)
        monkeypatch.setattr(extras, "_reset_high_water", lambda: False)

        def fn() -> None:
            while len(seen) < 5:
                pass

        assert peak_memory(fn, CPU).bytes == 600

    def test_errors_pass_and_leave_no_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import threading

        monkeypatch.setattr(extras, "_reset_high_water", lambda: False)
        with pytest.raises(ZeroDivisionError):
            peak_memory(lambda: 1 / 0, CPU)
        assert "peak-memory" not in [thread.name for thread in threading.enumerate()]


class TestPeakMemoryElsewhere:
    def test_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        calls: list[str] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
        found = peak_memory(lambda: calls.append("call"), CUDA)
        assert found == PeakMemory(12345, "peak of torch's CUDA allocator, weights included")
        assert calls == ["synchronize", "reset", "call", "synchronize"]

    def test_a_device_without_a_reading(self) -> None:
        calls = []
        target: Any = SimpleNamespace(device="mps")
        found = peak_memory(lambda: calls.append(1), target)
        assert found == PeakMemory(None, "device mps does not tell its peak")
        assert calls == [1]


@pytest.mark.gpu
def test_cuda_for_real() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = peak_memory(lambda: torch.empty(32 * MIB, dtype=torch.uint8, device="cuda"), CUDA)
    assert found.bytes is not None
    assert found.bytes >= 32 * MIB


def zone(root: Path, name: str, label: str, energy: int, most: int = 262_143_328_850) -> Path:
    folder = root / "sys/class/powercap" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


class TestRapl:
    def test_packages_are_added_and_their_parts_are_not(self, tmp_path: Path) -> None:
        def state(first: int, second: int, part: int) -> None:
            (tmp_path / "sys/class/powercap/intel-rapl").mkdir(parents=True, exist_ok=True)
            zone(tmp_path, "intel-rapl:0", "package-0", first)
            zone(tmp_path, "intel-rapl:0:0", "core", part)
            zone(tmp_path, "intel-rapl:1", "package-1", second)
            zone(tmp_path, "intel-rapl:2", "psys", part)
            zone(tmp_path, "intel-rapl-mmio:0", "package-0", part)

        state(1_000_000, 5_000_000, 0)
        meter = EnergyMeter(CPU, root=tmp_path)
        assert (meter.joules, meter.why) == (None, "the context has not ended")
        with meter:
            state(3_500_000, 5_250_000, 9_000_000)
        assert meter.joules == pytest.approx(2.75)
        assert (meter.why, meter.how) == ("", "RAPL package-0, RAPL package-1")
        assert meter.seconds is not None

    def test_a_counter_that_wraps(self, tmp_path: Path) -> None:
        zone(tmp_path, "intel-rapl:0", "package-0", 262_143_000_000)
        with EnergyMeter(CPU, root=tmp_path) as meter:
            zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
        assert meter.joules == pytest.approx(1.32885)

    def test_again_with_the_same_meter(self, tmp_path: Path) -> None:
        meter = EnergyMeter(CPU, root=tmp_path)
        for number in range(2):
            zone(tmp_path, "intel-rapl:0", "package-0", 0)
            with meter:
                zone(tmp_path, "intel-rapl:0", "package-0", (number + 1) * 1_000_000)
            assert meter.joules == number + 1

    def test_none_on_this_machine(self, tmp_path: Path) -> None:
        with EnergyMeter(CPU, root=tmp_path) as meter:
            pass
        assert (meter.joules, meter.how) == (None, "")
        assert meter.why == "this machine shows no RAPL counters (/sys/class/powercap)"

    def test_for_root_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        zone(tmp_path, "intel-rapl:0", "package-0", 0)
        real = Path.read_text

        def refuse(path: Path, *rest: Any, **named: Any) -> str:
            if path.name == "energy_uj":
                raise PermissionError(13, "Permission denied")
            return real(path, *rest, **named)

        monkeypatch.setattr(Path, "read_text", refuse)
        with EnergyMeter(CPU, root=tmp_path) as meter:
            pass
        assert meter.joules is None
        assert meter.why == "intel-rapl:0/energy_uj may be read by root only; grant it with chmod a+r"

    def test_a_counter_that_goes_meanwhile(self, tmp_path: Path) -> None:
        folder = zone(tmp_path, "intel-rapl:0", "package-0", 0)
        with EnergyMeter(CPU, root=tmp_path) as meter:
            (folder / "energy_uj").unlink()
        assert meter.joules is None
        assert meter.why

    def test_too_long_to_be_sure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        times = iter([0.0, 300.0])
        monkeypatch.setattr(extras, "time", SimpleNamespace(monotonic=lambda: next(times)))
        zone(tmp_path, "intel-rapl:0", "package-0", 0)
        with EnergyMeter(CPU, root=tmp_path) as meter:
            pass
        assert meter.joules is None
        assert meter.why == ("300 s are too long: the counter RAPL package-0 may have wrapped more than once")

    @given(start=st.floats(0, 262_000), used=st.floats(0, 260_000))
    def test_wrapping_is_undone(self, start: float, used: float) -> None:
        most = 262_143.0
        before = {"a": extras._Counter(start, most)}
        after = {"a": extras._Counter((start + used) % most, most)}
        joules, why = extras._difference(before, after, 1.0, "")
        assert why == ""
        assert joules == pytest.approx(used, abs=1e-6)


class FakeNvml:
    class NVMLError(Exception):
        pass

    def __init__(self, *energies: int | None):
        self.energies = list(energies)

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        energy = self.energies.pop(0)
        if energy is None:
            raise self.NVMLError("Not Supported")
        return energy


class TestNvml:
    @pytest.fixture(autouse=True)
    def _cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))

    @pytest.mark.parametrize(
        ("energies", "joules", "why"),
        [
            ((1_000_000, 1_250_500), 250.5, ""),
            ((None,), None, "NVML tells no energy for this device (Not Supported)"),
            ((5, None), None, "NVML tells no energy for this device (Not Supported)"),
            ((5, 4), None, "the counter of energy was set back"),
        ],
    )
    def test_difference(
        self, monkeypatch: pytest.MonkeyPatch, energies: tuple[int, ...], joules: float | None, why: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*energies))  # type: ignore[arg-type]
        with EnergyMeter(CUDA) as meter:
            pass
        assert (meter.joules, meter.why) == (joules, why)

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        with EnergyMeter(CUDA) as meter:
            pass
        assert (meter.joules, meter.why) == (None, "NVML is not there; pip install nvidia-ml-py")


def test_a_device_without_a_counter() -> None:
    target: Any = SimpleNamespace(device="mps")
    with EnergyMeter(target) as meter:
        pass
    assert (meter.joules, meter.why) == (None, "device mps has no counter of energy")
