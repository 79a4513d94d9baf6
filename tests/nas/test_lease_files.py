"""The files of leases: signs of life, owners, numbers that rise, and what is left behind."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.latency.gate import DeviceGate, GateTimeout
from nas.latency.lease import Lease, LeaseLost, LockFiles, Owner, Watch, try_lock

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
