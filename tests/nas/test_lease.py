"""Leases on a device: given once, lost by a holder that is paused; with processes that are stopped and killed."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nas.errors import UserMistake
from nas.latency import gate as gate_module
from nas.latency.gate import DeviceGate, GateTimeout
from nas.latency.lease import LeaseLost, LockFiles, try_lock
from tests.nas.faults.bench import pause

pytestmark = pytest.mark.alone

PRELUDE = """
import contextlib, os, sys, time
from pathlib import Path
from nas.latency.gate import DeviceGate, LeaseLost
place = Path(sys.argv[1])
gate = DeviceGate("cpu", place, stale_after=float(sys.argv[2]))
def flag(name, text=""):
    (place / f"{name}.tmp").write_text(text)
    (place / f"{name}.tmp").rename(place / name)
def log(kind, token, begin, end):
    with open(place / f"{os.getpid()}.log", "a") as file:
        file.write(f"{kind} {token} {begin} {end}\\n")
def measure(seconds):
    with gate.exclusive() as lease:
        begin = end = time.monotonic_ns()
        while end - begin < seconds * 1e9:
            time.sleep(0.002)
            end = time.monotonic_ns()
            lease.check()
    log("measured", lease.token, begin, end)  # not reached when the lease was lost
"""
MEASURER = """
flag(f"up-{os.getpid()}")
for _ in range(int(sys.argv[3])):
    measure(0.01)
"""
RETRYING_MEASURER = """
while not (place / "stop").exists():
    with contextlib.suppress(LeaseLost):
        measure(0.02)
"""
HOLDER = """
try:
    with gate.exclusive() as lease:
        flag("held", str(lease.token))
        while True:
            time.sleep(0.002)
            lease.check()
except LeaseLost as error:
    flag("lost", str(error))
"""
SHARER = """
with gate.shared():
    flag(f"sharing-{os.getpid()}")
    while not (place / "stop").exists():
        begin = time.monotonic_ns()
        time.sleep(0.002)
        log("shared", 0, begin, time.monotonic_ns())
        gate.breathe()
"""
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes: list[subprocess.Popen[bytes]] = []

    def run(code: str, *arguments: object, stale_after: float = 60.0) -> subprocess.Popen[bytes]:
        words = [str(tmp_path), str(stale_after), *map(str, arguments)]
        processes.append(subprocess.Popen([sys.executable, "-c", PRELUDE + textwrap.dedent(code), *words]))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


def wait_for(path: Path, seconds: float = 30.0) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.005)
    return path.read_text()


def spans(directory: Path, kind: str) -> list[tuple[int, int, int]]:
    """(begin, end, token) of what all processes did, in order of time."""
    lines = [line.split() for path in directory.glob("*.log") for line in path.read_text().splitlines()]
    return sorted(
        (int(begin), int(end), int(token)) for what, token, begin, end in lines if what == kind and end
    )


def assert_turns_were_taken(measured: list[tuple[int, int, int]]) -> None:
    for (_, end, token), (begin, _, next_token) in itertools.pairwise(measured):
        assert end <= begin
        assert token < next_token


# -- real processes ----------------------------------------------------------------------------------------------------


def test_processes_that_measure_at_once_take_turns_and_tokens_rise(tmp_path: Path, start: Start) -> None:
    assert [process.wait(30) for process in [start(MEASURER, 6) for _ in range(3)]] == [0, 0, 0]
    measured = spans(tmp_path, "measured")
    assert len(measured) == 18
    assert_turns_were_taken(measured)


def test_a_killed_holder_does_not_block(tmp_path: Path, start: Start) -> None:
    holder = start(HOLDER)
    token = int(wait_for(tmp_path / "held"))
    files = LockFiles(tmp_path, "cpu")
    owner = files.owner(token)
    assert owner is not None
    assert owner.pid == holder.pid
    assert not owner.gone()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert owner.gone()
    with DeviceGate("cpu", tmp_path).exclusive(timeout=20.0) as lease:
        assert lease.token > token


def test_a_stopped_holder_is_passed_over_and_fenced_off_when_it_comes_back(
    tmp_path: Path, start: Start
) -> None:
    holder = start(HOLDER, stale_after=0.3)
    token = int(wait_for(tmp_path / "held"))
    pause(holder.pid)
    with DeviceGate("cpu", tmp_path).exclusive(timeout=20.0) as lease:
        assert lease.token > token
        assert not (tmp_path / "lost").exists()
        holder.send_signal(signal.SIGCONT)
        text = wait_for(tmp_path / "lost")
        lease.check()
    assert holder.wait(30) == 0
    assert text == (
        f"device 'cpu' was given to process {os.getpid()} (lease {lease.token}) because process {holder.pid}, which "
        f"held lease {token}, gave no sign of life for 0.3 s; discard what was measured under it and measure again"
    )


def test_waiters_that_race_for_a_stale_device_get_it_one_at_a_time_while_sharers_wait(
    tmp_path: Path, start: Start
) -> None:
    holder = start(HOLDER, stale_after=0.3)
    token = int(wait_for(tmp_path / "held"))
    pause(holder.pid)
    sharers = [start(SHARER) for _ in range(2)]
    measurers = [start(MEASURER, 2) for _ in range(3)]
    assert [process.wait(60) for process in measurers] == [0, 0, 0]
    for sharer in sharers:
        wait_for(tmp_path / f"sharing-{sharer.pid}")
    holder.send_signal(signal.SIGCONT)
    wait_for(tmp_path / "lost")
    (tmp_path / "stop").touch()
    assert [process.wait(30) for process in sharers] == [0, 0]
    measured, shared = spans(tmp_path, "measured"), spans(tmp_path, "shared")
    assert len(measured) == 6
    assert measured[0][2] > token
    assert_turns_were_taken(measured)
    for begin, end, _ in measured:
        assert not any(one < end and other > begin for one, other, _ in shared)


def test_a_stopped_measurer_that_still_waits_for_sharers_is_passed_over(tmp_path: Path, start: Start) -> None:
    sharer = DeviceGate("cpu", tmp_path)
    with sharer.shared():
        waiter = start(HOLDER, stale_after=0.3)
        files = LockFiles(tmp_path, "cpu")
        while files.owner(files.latest()) is None:
            time.sleep(0.005)
        pause(waiter.pid)
        token = files.latest()
    with DeviceGate("cpu", tmp_path).exclusive(timeout=20.0) as lease:
        assert lease.token > token
        waiter.send_signal(signal.SIGCONT)
    assert int(wait_for(tmp_path / "held")) > lease.token, "it queued up again"


def test_a_child_that_c_code_forked_does_not_keep_what_its_killed_parent_held(
    tmp_path: Path, start: Start
) -> None:
    holder = start("""
        import ctypes
        libc = ctypes.CDLL(None)
        with gate.exclusive():
            child = libc.fork()
            if child == 0:
                libc.pause()
            flag("child", str(child))
            time.sleep(1000)
    """)
    child = int(wait_for(tmp_path / "child"))
    try:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not LockFiles(tmp_path, "cpu").over(1), "the child holds the lock"
        with DeviceGate("cpu", tmp_path).exclusive(timeout=20.0) as lease:
            assert lease.token == 2
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_has_no_lease(tmp_path: Path, start: Start) -> None:
    process = start("""
        with gate.exclusive() as lease:
            if (child := os.fork()) == 0:
                try:
                    lease.check()
                except LeaseLost as error:
                    flag("child", str(error))
                os._exit(0)
            os.waitpid(child, 0)
            lease.check()
    """)
    assert process.wait(30) == 0
    assert (tmp_path / "child").read_text() == "lease 1 on device 'cpu' has ended in this process"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_turns_are_taken_while_measurers_and_sharers_are_killed_and_stopped_at_random(
    tmp_path: Path, start: Start, seed: int
) -> None:
    choices = random.Random(seed)
    codes = [RETRYING_MEASURER] * 4 + [SHARER]
    processes = [start(code, stale_after=0.1) for code in codes]
    for _ in range(60):
        time.sleep(choices.uniform(0.0, 0.2))
        number = choices.randrange(len(codes))
        if codes[number] is SHARER or choices.random() < 0.3:
            processes[number].kill()
            processes[number].wait()
            processes[number] = start(codes[number], stale_after=0.1)
        else:
            processes[number].send_signal(choices.choice([signal.SIGSTOP, signal.SIGCONT]))
    for process in processes:
        process.send_signal(signal.SIGCONT)
    while len(spans(tmp_path, "measured")) < 10:
        time.sleep(0.05)
    (tmp_path / "stop").touch()
    assert [process.wait(60) for process in processes] == [0] * len(processes)
    measured, shared = spans(tmp_path, "measured"), spans(tmp_path, "shared")
    assert_turns_were_taken(measured)
    for begin, end, _ in measured:
        assert not any(one < end and other > begin for one, other, _ in shared)
    with DeviceGate("cpu", tmp_path).exclusive(timeout=20.0) as lease:
        assert len(LockFiles(tmp_path, "cpu").numbers()) == 1
        assert lease.token > measured[-1][2]


# -- one process -------------------------------------------------------------------------------------------------------


def test_nothing_measured_under_a_lost_lease_gets_out_even_without_a_check(tmp_path: Path) -> None:
    slow, other = DeviceGate("cpu", tmp_path, stale_after=0.05), DeviceGate("cpu", tmp_path)
    with (
        pytest.raises(LeaseLost, match="discard what was measured"),
        slow.exclusive(),
        other.exclusive(timeout=20.0),
    ):
        pass
    with slow.exclusive(timeout=0.0):
        pass


def test_an_error_in_the_block_is_not_hidden_by_the_loss(tmp_path: Path) -> None:
    slow, other = DeviceGate("cpu", tmp_path, stale_after=0.05), DeviceGate("cpu", tmp_path)
    with pytest.raises(KeyError), slow.exclusive(), other.exclusive(timeout=20.0):
        raise KeyError


def test_a_sharer_passes_a_stale_holder_over_and_is_seen_by_the_next_measurer(tmp_path: Path) -> None:
    slow, sharer, other = (DeviceGate("cpu", tmp_path, stale_after=0.05) for _ in range(3))
    with contextlib.suppress(LeaseLost), slow.exclusive() as lease:
        with sharer.shared(timeout=20.0):
            with pytest.raises(LeaseLost, match=r"was given to others \(lease 2\)"):
                lease.check()
            with pytest.raises(GateTimeout), other.exclusive(timeout=0.02):
                pass
        with other.exclusive(timeout=0.0):
            pass


def test_a_lease_is_lost_with_its_directory(tmp_path: Path) -> None:
    place = tmp_path / "locks"
    place.mkdir()
    with (
        pytest.raises(LeaseLost, match="the lock file of lease 1 was removed; discard"),
        DeviceGate("cpu", place).exclusive(),
    ):
        shutil.rmtree(place)
        place.mkdir()


def test_a_lease_ends_with_its_block(tmp_path: Path) -> None:
    gate = DeviceGate("cpu", tmp_path)
    with gate.exclusive() as lease:
        with gate.exclusive() as same:
            assert same is lease
        lease.check()
        assert lease.device == "cpu"
        assert lease.owner.pid == os.getpid()
    with pytest.raises(LeaseLost, match="lease 1 on device 'cpu' has ended"):
        lease.check()


def test_a_free_device_is_left_to_the_first_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = DeviceGate("cpu", tmp_path)
    queue = LockFiles(tmp_path, "cpu").queue()
    assert try_lock(queue, fcntl.LOCK_EX)
    monkeypatch.setattr(gate_module, "_COURTESY_SECONDS", 1e9)
    with pytest.raises(GateTimeout), gate.exclusive(timeout=0.05):
        pass
    monkeypatch.setattr(gate_module, "_COURTESY_SECONDS", 0.04)
    with gate.exclusive(timeout=20.0):
        pass  # the first does not take it: it may be stopped
    os.close(queue)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_patience_that_is_none_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(UserMistake, match=r"stale_after: .* is not a number of seconds above 0 and below"):
        DeviceGate("cpu", tmp_path, stale_after=seconds)
