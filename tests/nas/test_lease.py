"""Leases on a device: given once, lost by a holder that is paused; with processes that are stopped and killed."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.errors import UserMistake
from nas.latency import gate as gate_module
from nas.latency.gate import DeviceGate, GateTimeout
from nas.latency.lease import Lease, LeaseLost, LockFiles, Owner, Watch, try_lock

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
    holder.send_signal(signal.SIGSTOP)
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
    holder.send_signal(signal.SIGSTOP)
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
        waiter.send_signal(signal.SIGSTOP)
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


# -- signs of life -----------------------------------------------------------------------------------------------------


def held(place: Path, patience: float) -> tuple[LockFiles, Lease]:
    files = LockFiles(place, "cpu")
    lease = files.grant("cpu", files.latest() + 1, patience)
    assert lease is not None
    return files, lease


def test_silence_is_counted_from_the_first_look_and_ends_with_a_sign_of_life(tmp_path: Path) -> None:
    files, lease = held(tmp_path, 10.0)
    watch = Watch(files)
    assert [watch.stale(1, now) for now in (100.0, 101.0, 105.0, 106.0)] == [False] * 4
    assert not any(watch.stale(1, 106.0 + second) for second in range(1, 7))
    os.utime(files.path(1), (1.0, 1.0))  # any change is a sign, also with a clock that was set back
    assert not any(watch.stale(1, 120.0 + second) for second in range(10))
    assert watch.stale(1, 131.0) is False
    assert watch.stale(1, 132.0) is True
    lease.close()


def test_a_waiter_that_was_paused_itself_counts_no_more_than_one_look(tmp_path: Path) -> None:
    files, lease = held(tmp_path, 10.0)
    watch = Watch(files)
    assert not watch.stale(1, 0.0)
    assert not watch.stale(1, 1e6)
    assert not any(watch.stale(1, 1e6 + second) for second in range(1, 10))
    assert watch.stale(1, 1e6 + 11)
    lease.close()


def test_a_check_may_ask_for_more_patience_until_the_next_one(tmp_path: Path) -> None:
    files, lease = held(tmp_path, 10.0)

    def seconds_until_stale() -> int:
        watch = Watch(files)
        return next(second for second in range(5000) if watch.stale(1, float(second)))

    assert seconds_until_stale() == 11
    watch = Watch(files)
    assert not any(watch.stale(1, float(second)) for second in range(5))
    lease.check(patience=1000.0)
    assert not any(watch.stale(1, float(second)) for second in range(5, 900))
    assert (owner := files.owner(1)) is not None
    assert owner.patience == 1000.0
    lease.check()
    assert seconds_until_stale() == 11
    lease.check(patience=3.0)
    assert seconds_until_stale() == 11, "less than what the gate was made with is not a promise"
    lease.close()


def test_a_check_gives_a_sign_of_life_at_most_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("nas.latency.lease.time.monotonic", lambda: now[0])
    files, lease = held(tmp_path, 60.0)
    os.utime(files.path(1), (1.0, 1.0))
    for now[0] in (1000.5, 1000.9):
        lease.check()
        assert files.beat(1) == 10**9
    now[0] = 1001.1
    lease.check()
    assert files.beat(1) != 10**9
    os.utime(files.path(1), (1.0, 1.0))
    now[0] = 1001.9
    lease.check()
    assert files.beat(1) == 10**9
    lease.close()


def test_a_process_that_took_over_the_number_of_another_is_not_the_owner() -> None:
    owner = Owner.of_this_process(60.0)
    assert owner.started is not None
    assert owner.boot
    assert owner.namespace
    assert not owner.gone()
    assert dataclasses.replace(owner, started=owner.started - 1).gone()
    assert dataclasses.replace(owner, pid=2**22 + 1).gone()
    for unknown in ({"boot": "another"}, {"namespace": 1}, {"started": None}, {"boot": None}):
        changes = {"pid": 2**22 + 1, **unknown}
        assert not dataclasses.replace(owner, **changes).gone(), "who cannot know does not say so"


def test_the_owner_record_is_read_back_and_damage_is_no_owner() -> None:
    owner = Owner.of_this_process(60.0)
    data = owner.to_bytes()
    assert Owner.from_bytes(data, owner.heartbeat) == owner
    for damaged in (
        b"",
        data[:20],
        data[:-5],
        b"x" + data[1:],
        data[:14] + b"[]",
        data[:14] + b"{}",
        b"\xff" * 99,
    ):
        assert Owner.from_bytes(damaged, 0.0) is None


# -- the files ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "break", "leave", "share"]), st.integers(0, 2)), max_size=25)
)
def test_at_most_one_lease_holds_and_tokens_rise_whatever_happens(steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        files = LockFiles(Path(place), "cpu")
        leases: dict[int, Lease] = {}
        tokens = [0]
        for step, who in steps:
            number = files.latest()
            if step == "leave" and who in leases:
                leases.pop(who).close()
            elif step == "share" and number and (descriptor := files.share(number)) is not None:
                assert not any(holds(lease) for lease in leases.values())
                os.close(descriptor)
            elif who not in leases and (
                step == "break" or (step == "take" and (not number or files.over(number)))
            ):
                lease = files.grant("cpu", number + 1, 60.0)
                assert lease is not None
                assert lease.token > max(tokens)
                assert files.grant("cpu", number + 1, 60.0) is None, "a number is given once"
                assert files.drained(lease.token)
                tokens.append(lease.token)
                leases[who] = lease
            assert sum(holds(lease) for lease in leases.values()) <= 1
        assert len(files.numbers()) <= 1
        for lease in leases.values():
            lease.close()


def holds(lease: Lease) -> bool:
    try:
        lease.check()
    except LeaseLost:
        return False
    return True


def test_a_sharer_that_locks_a_number_too_late_does_not_get_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LockFiles(tmp_path, "cpu")
    files.begin(1)
    granted: list[Lease] = []

    def measurer_comes_between_opening_and_locking(descriptor: int, kind: int) -> bool:
        if not granted:
            lease = files.grant("cpu", 2, 60.0) if kind == fcntl.LOCK_SH else None
            if lease is not None:
                granted.append(lease)
                assert files.drained(2)
        return try_lock(descriptor, kind)

    monkeypatch.setattr("nas.latency.lease.try_lock", measurer_comes_between_opening_and_locking)
    with pytest.raises(GateTimeout), DeviceGate("cpu", tmp_path).shared(timeout=0.0):
        pass
    granted[0].check()
    granted[0].close()
    with DeviceGate("cpu", tmp_path).shared(timeout=0.0):
        pass


def test_a_measurer_that_misread_the_directory_does_not_get_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LockFiles(tmp_path, "cpu")
    lease = files.grant("cpu", 5, 60.0)
    assert lease is not None
    misreadings = iter([0])
    latest = LockFiles.latest
    monkeypatch.setattr(LockFiles, "latest", lambda self: next(misreadings, latest(self)))
    gate = DeviceGate("cpu", tmp_path)
    with pytest.raises(GateTimeout), gate.exclusive(timeout=0.05):
        pass
    lease.check()
    lease.close()


def test_numbers_are_removed_upwards_so_that_a_sharer_sees_the_next_one(tmp_path: Path) -> None:
    files = LockFiles(tmp_path, "cpu")
    files.begin(1)
    sharer = files.share(1)
    assert sharer is not None
    assert not files.superseded(sharer, 1)
    for number in (2, 3):
        lease = files.grant("cpu", number, 60.0)
        assert lease is not None
        assert not files.drained(number)
        assert files.superseded(sharer, 1)
        lease.close()
    os.close(sharer)
    assert files.drained(3)
    assert files.numbers() == [3]


def test_what_a_killed_process_left_half_made_is_swept_when_it_is_old(tmp_path: Path) -> None:
    for name, age in ((".cpu.7-1-1.tmp", 7200), (".cpu.8-1-1.tmp", 60), (".cuda-0.7-1-1.tmp", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with DeviceGate("cpu", tmp_path).exclusive():
        left = {path.name for path in tmp_path.glob(".*.tmp")}
    assert left == {".cpu.8-1-1.tmp", ".cuda-0.7-1-1.tmp"}


def test_other_files_in_the_directory_are_no_leases(tmp_path: Path) -> None:
    for name in (
        "cpu.turn.lock",
        "cpu.use.lock",
        "cuda-0.9.lock",
        "cpu.9.lock.bak",
        "cpu.x9.lock",
        "cpu.9.log",
    ):
        (tmp_path / name).touch()
    with DeviceGate("cpu", tmp_path).exclusive() as lease:
        assert lease.token == 1
