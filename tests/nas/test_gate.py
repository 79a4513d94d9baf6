"""The gate of a device, with real processes."""

from __future__ import annotations

import itertools
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nas.errors import UserMistake
from nas.latency.gate import DeviceGate, GateTimeout, _file_name, _private_directory

PRELUDE = """
import os, sys, time
from pathlib import Path
from nas.latency.gate import DeviceGate
place = Path(sys.argv[1])
gate = DeviceGate("cpu", place)
def log(kind, event):
    with open(place / f"{os.getpid()}.log", "a") as file:
        file.write(f"{kind} {event} {time.monotonic_ns()}\\n")
def flag(name):
    (place / name).touch()
def wait(name):
    while not (place / name).exists():
        time.sleep(0.005)
"""
SHARER = """
with gate.shared():
    flag(f"sharing-{sys.argv[2]}")
    inside = False
    while not (place / "stop").exists():
        log("shared", "enter")
        end = time.monotonic() + 0.002
        while time.monotonic() < end:
            pass
        log("shared", "leave")
        gate.breathe()
"""
MEASURER = """
for _ in range(3):
    with gate.exclusive():
        log("exclusive", "enter")
        time.sleep(0.05)
        log("exclusive", "leave")
flag("measured")
"""
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes: list[subprocess.Popen[bytes]] = []

    def run(code: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(tmp_path), *arguments]
        processes.append(subprocess.Popen(command))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


def wait_for(path: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.005)


def spans(directory: Path) -> list[tuple[str, int, int]]:
    """(kind, entered, left) of all processes."""
    found = []
    for path in directory.glob("*.log"):
        lines = [line.split() for line in path.read_text().splitlines()]
        for enter, leave in zip(lines[::2], lines[1::2], strict=False):
            assert (enter[1], leave[1]) == ("enter", "leave")
            found.append((enter[0], int(enter[2]), int(leave[2])))
    return found


def test_a_measurer_gets_in_among_spinning_sharers_and_nobody_overlaps_it(
    tmp_path: Path, start: Start
) -> None:
    sharers = [start(SHARER, str(number)) for number in range(2)]
    for number in range(2):
        wait_for(tmp_path / f"sharing-{number}")
    start(MEASURER)
    wait_for(tmp_path / "measured")
    # One that had to wait is back when it has logged more; told to stop before, it might never come back.
    logs = [tmp_path / f"{sharer.pid}.log" for sharer in sharers]
    sizes = [log.stat().st_size for log in logs]
    deadline = time.monotonic() + 30.0
    while any(log.stat().st_size == size for log, size in zip(logs, sizes, strict=True)):
        assert time.monotonic() < deadline, "a sharer did not go on"
        time.sleep(0.005)
    (tmp_path / "stop").touch()
    assert [sharer.wait(30) for sharer in sharers] == [0, 0]
    found = spans(tmp_path)
    exclusive = [span for span in found if span[0] == "exclusive"]
    shared = [span for span in found if span[0] == "shared"]
    assert len(exclusive) == 3
    for _, entered, left in exclusive:
        assert not any(begin < left and end > entered for _, begin, end in shared)
    assert max(end for _, _, end in shared) > max(left for _, _, left in exclusive), (
        "sharers went on afterwards"
    )


def test_measurers_exclude_one_another(tmp_path: Path, start: Start) -> None:
    assert [process.wait(30) for process in [start(MEASURER) for _ in range(3)]] == [0, 0, 0]
    exclusive = sorted((entered, left) for _, entered, left in spans(tmp_path))
    assert len(exclusive) == 9
    assert all(left <= entered for (_, left), (entered, _) in itertools.pairwise(exclusive))


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_a_killed_holder_frees_the_device(tmp_path: Path, start: Start, kind: str) -> None:
    holder = start(f"with gate.{kind}():\n    flag('held')\n    time.sleep(1000)\n")
    wait_for(tmp_path / "held")
    gate = DeviceGate("cpu", tmp_path)
    with pytest.raises(GateTimeout), gate.exclusive(timeout=0.05):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with gate.exclusive(timeout=5.0):
        pass


def test_a_forked_child_does_not_keep_what_its_killed_parent_held(tmp_path: Path, start: Start) -> None:
    holder = start("""
        with gate.exclusive():
            if os.fork() == 0:
                (place / "child").write_text(str(os.getpid()))
                wait("end")
                os._exit(0)
            wait("child")
            flag("held")
            time.sleep(1000)
    """)
    wait_for(tmp_path / "held")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with DeviceGate("cpu", tmp_path).exclusive(timeout=5.0):
        pass
    (tmp_path / "end").touch()


def test_sharers_share(tmp_path: Path) -> None:
    with DeviceGate("cpu", tmp_path).shared(timeout=0.0), DeviceGate("cpu", tmp_path).shared(timeout=0.0):
        pass


def test_other_devices_are_other_gates(tmp_path: Path) -> None:
    with (
        DeviceGate("cpu", tmp_path).exclusive(),
        DeviceGate("cuda:0", tmp_path).exclusive(timeout=0.0),
        DeviceGate("cuda:1", tmp_path).exclusive(timeout=0.0),
        pytest.raises(GateTimeout),
        DeviceGate("cuda", tmp_path).shared(timeout=0.0),
    ):
        pass


def test_the_timeout_names_device_time_and_who_measures(tmp_path: Path, start: Start) -> None:
    holder = start("with gate.exclusive():\n    flag('held')\n    time.sleep(1000)\n")
    wait_for(tmp_path / "held")
    expected = (
        rf"device 'cpu' was not free within 0.03 s: .*\(the last that measured is process {holder.pid}\)"
    )
    gate = DeviceGate("cpu", tmp_path)
    with pytest.raises(GateTimeout, match=expected), gate.shared(timeout=0.03):
        pass
    with pytest.raises(GateTimeout, match=expected), gate.exclusive(timeout=0.03):
        pass


def test_measuring_within_sharing_gives_the_share_back_meanwhile(tmp_path: Path) -> None:
    gate, other = DeviceGate("cpu", tmp_path), DeviceGate("cpu", tmp_path)

    def others_may_measure() -> bool:
        try:
            with other.exclusive(timeout=0.0):
                return True
        except GateTimeout:
            return False

    def others_may_share() -> bool:
        try:
            with other.shared(timeout=0.0):
                return True
        except GateTimeout:
            return False

    with gate.shared(), gate.shared():
        assert not others_may_measure()
        with gate.exclusive(), gate.exclusive():
            assert not others_may_share()
            with gate.shared():
                assert not others_may_share()
            assert not others_may_share()
        assert others_may_share()
        assert not others_may_measure()
    assert others_may_measure()


def test_a_measurement_that_times_out_keeps_the_share(tmp_path: Path) -> None:
    gate, other = DeviceGate("cpu", tmp_path), DeviceGate("cpu", tmp_path)
    with gate.shared():
        with other.shared(), pytest.raises(GateTimeout), gate.exclusive(timeout=0.02):
            pass
        with pytest.raises(GateTimeout), other.exclusive(timeout=0.0):
            pass
    with other.exclusive(timeout=0.0):
        pass


def test_an_error_inside_frees_the_device(tmp_path: Path) -> None:
    gate, other = DeviceGate("cpu", tmp_path), DeviceGate("cpu", tmp_path)
    with pytest.raises(KeyboardInterrupt), gate.exclusive():
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), gate.shared():
        raise KeyboardInterrupt
    with other.exclusive(timeout=0.0):
        pass


def test_breathing_outside_of_a_share_does_nothing(tmp_path: Path) -> None:
    gate = DeviceGate("cpu", tmp_path)
    gate.breathe()
    with gate.exclusive():
        gate.breathe()
    with DeviceGate("cpu", tmp_path).exclusive(timeout=0.0):
        pass


def test_file_names_follow_the_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _file_name("cpu") == _file_name("cpu:4") == "cpu"
    assert _file_name("cuda") == _file_name("cuda:0") == "cuda-0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc/../x")
    assert _file_name("cuda") == "cuda-3"
    assert _file_name("cuda:1") == "cuda-GPU-abc----x"
    assert _file_name("../../etc") == "------etc"


def test_the_default_directory_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = _private_directory()
    assert place == tmp_path / f"nas-toolkit-{os.getuid()}"
    place.chmod(0o777)
    assert stat.S_IMODE(_private_directory().stat().st_mode) == 0o700
    with DeviceGate("cpu").exclusive():
        assert sorted(entry.name for entry in place.iterdir()) == ["cpu.1.lock", "cpu.queue.lock"]


def test_somebody_elses_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"nas-toolkit-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserMistake, match="is not a directory of this user; remove it or set TMPDIR"):
        DeviceGate("cpu")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(
            UserMistake, match=r"cpu\.\*\.lock cannot be used: No such file or directory; set TMPDIR"
        ),
        DeviceGate("cpu", tmp_path / "gone").shared(),
    ):
        pass
