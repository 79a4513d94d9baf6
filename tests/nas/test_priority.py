"""Real-time priority: granted, pinned and put back for real where this machine permits it, refused by injection."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.errors import UserMistake
from nas.latency import machine, priority
from nas.latency.cores import choose_cores, fastest_kind
from nas.latency.machine import CpuTimes
from nas.latency.priority import Granted, undisturbed

PRELUDE = """
import json, os, sys, threading
from nas.latency.priority import undisturbed

def state():
    tids = sorted(int(name) for name in os.listdir("/proc/self/task"))
    return {tid: [os.sched_getscheduler(tid), os.sched_getparam(tid).sched_priority,
                  os.getpriority(os.PRIO_PROCESS, tid), sorted(os.sched_getaffinity(tid))] for tid in tids}

started, stop = threading.Event(), threading.Event()
def start():
    started.clear()
    thread = threading.Thread(target=lambda: (started.set(), stop.wait()), daemon=True)
    thread.start()
    started.wait()
    return thread.native_id

out = {"early": start()}
"""
FIFO = 1
RESET_ON_FORK = 0x40000000
needs_linux = pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="needs Linux")


def permitted(what: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import os; {what}"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def _realtime_permitted() -> None:
    if not permitted("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))"):
        pytest.skip("this machine permits no real-time priority")


@pytest.fixture(scope="module")
def _nice_permitted() -> None:
    if not permitted("os.setpriority(os.PRIO_PROCESS, 0, -20)"):
        pytest.skip("this machine permits no negative niceness")


def in_process(body: str) -> dict[str, Any]:
    code = f"{PRELUDE}\n{body}\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@needs_linux
@pytest.mark.usefixtures("_realtime_permitted")
class TestRealtime:
    def test_all_threads_get_it_and_all_give_it_back(self) -> None:
        out = in_process("""
out["before"] = state()
with undisturbed(1) as granted:
    out |= {"kind": granted.kind, "affinity": granted.affinity, "why": granted.why, "inside": state()}
    out["late"] = start()
    out["started"] = state()
    granted.renew()
    out["renewed"] = state()
    out["last"] = start()
out["after"] = state()
""")
        assert out["kind"] == "realtime"
        assert out["why"] == ""
        assert len(out["affinity"]) == 1
        wanted = [FIFO | RESET_ON_FORK, 10, 0, out["affinity"]]
        assert out["inside"].keys() == out["before"].keys()
        assert all(found == wanted for found in out["inside"].values())
        # A new thread begins as a normal one; renew() takes it in.
        assert out["started"][str(out["late"])][0] == 0
        assert all(found == wanted for found in out["renewed"].values())
        assert len(out["after"]) == len(out["before"]) + 2
        original = next(iter(out["before"].values()))
        assert all(found == original for found in out["after"].values())

    def test_an_exception_restores(self) -> None:
        out = in_process("""
out["before"] = state()
try:
    with undisturbed(1) as granted:
        out["kind"] = granted.kind
        raise KeyboardInterrupt
except KeyboardInterrupt:
    out["after"] = state()
""")
        assert out["kind"] == "realtime"
        assert out["after"] == out["before"]

    def test_own_settings_of_a_thread_come_back(self) -> None:
        out = in_process("""
os.sched_setscheduler(out["early"], os.SCHED_BATCH, os.sched_param(0))
os.setpriority(os.PRIO_PROCESS, out["early"], 7)
os.sched_setaffinity(out["early"], {max(os.sched_getaffinity(0))})
out["before"] = state()
with undisturbed(1):
    out["inside"] = state()
out["after"] = state()
""")
        assert out["inside"] != out["before"]
        assert out["after"] == out["before"]

    def test_a_real_time_process_keeps_its_rank(self) -> None:
        out = in_process("""
os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(20))
out["main"] = str(os.getpid())
out["before"] = state()
with undisturbed(1) as granted:
    out["kind"] = granted.kind
    out["inside"] = state()
out["after"] = state()
""")
        assert out["kind"] == "realtime"
        assert out["inside"][out["main"]][:2] == [2, 20]
        assert out["inside"][str(out["early"])][:2] == [FIFO | RESET_ON_FORK, 10]
        assert out["after"] == out["before"]

    def test_a_forked_child_is_free(self) -> None:
        out = in_process("""
out["before"] = state()[os.getpid()]
read, write = os.pipe()
with undisturbed(1):
    child = os.fork()
    if child == 0:
        os.write(write, json.dumps(state()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    out["child"] = list(json.loads(os.read(read, 10000)).values())
""")
        assert out["child"] == [out["before"]]

    def test_nested_use_changes_nothing(self) -> None:
        out = in_process("""
out["before"] = state()
with undisturbed(1) as outer:
    inside = state()
    with undisturbed(2) as inner:
        out["same"] = inner is outer and state() == inside
    out["still"] = state() == inside
out["after"] = state()
""")
        assert out["same"]
        assert out["still"]
        assert out["after"] == out["before"]

    def test_refused_pinning_leaves_the_priority(self) -> None:
        out = in_process("""
def refuse(*_):
    raise OSError(22, "Invalid argument")
os.sched_setaffinity, real = refuse, os.sched_setaffinity
import nas.latency.priority as p
p.own_cores = lambda: (0, 1, 2)
out["before"] = state()
with undisturbed(1) as granted:
    out |= {"kind": granted.kind, "affinity": granted.affinity, "why": granted.why, "inside": state()}
out["after"] = state()
""")
        assert out["kind"] == "realtime"
        assert out["affinity"] is None
        assert out["why"] == "pinning to cores was refused (Invalid argument)"
        assert all(found[:2] == [FIFO | RESET_ON_FORK, 10] for found in out["inside"].values())
        assert out["after"] == out["before"]


@needs_linux
@pytest.mark.usefixtures("_nice_permitted")
def test_niceness_when_real_time_is_refused() -> None:
    out = in_process("""
def refuse(*_):
    raise PermissionError(1, "Operation not permitted")
os.sched_setscheduler = refuse
out["before"] = state()
with undisturbed(1) as granted:
    out |= {"kind": granted.kind, "affinity": granted.affinity, "why": granted.why, "inside": state()}
    start()
    granted.renew()
    out["pause"] = granted.pause()
out["after"] = state()
""")
    assert out["kind"] == "nice"
    assert out["affinity"] is None
    assert "refused (Operation not permitted); it needs root" in out["why"]
    assert out["why"].endswith("niceness -20 instead")
    # Without priority no pinning: the thread could not leave a core that others use.
    assert [found[2:] for found in out["inside"].values()] == [
        [-20, cores] for _, _, _, cores in out["before"].values()
    ]
    assert out["pause"] == 0
    assert len(out["after"]) == len(out["before"]) + 1
    assert {tuple(found[:3]) for found in out["after"].values()} == {(0, 0, 0)}


class FakeKernel:
    """One thread with a niceness; real time refused, niceness permitted down to a bound, as by RLIMIT_NICE."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lowest: int):
        self.nice = 0
        self.lowest = lowest
        monkeypatch.setattr(os, "sched_setscheduler", self.refuse, raising=False)
        monkeypatch.setattr(os, "getpriority", lambda which, who: self.nice)
        monkeypatch.setattr(os, "setpriority", self.set)

    def refuse(self, *_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def set(self, which: int, who: int, value: int) -> None:
        if value < self.nice and value < self.lowest:
            raise PermissionError(errno.EACCES, "Permission denied")
        self.nice = value


@pytest.mark.parametrize("lowest", [-20, -5, -1])
def test_the_lowest_niceness_permitted(monkeypatch: pytest.MonkeyPatch, lowest: int) -> None:
    kernel = FakeKernel(monkeypatch, lowest)
    with undisturbed(1) as granted:
        assert granted.kind == "nice"
        assert granted.why.endswith(f"niceness {lowest} instead")
        assert kernel.nice == lowest
    assert kernel.nice == 0


def test_nothing_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(monkeypatch, 0)
    with undisturbed(1) as granted:
        assert granted.kind == "none"
        assert granted.affinity is None
        assert "lower niceness was refused too" in granted.why
        granted.renew()
    assert kernel.nice == 0


def test_a_system_without_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: no scheduling by thread, no /proc."""
    kernel = FakeKernel(monkeypatch, -20)
    for name in ("sched_setscheduler", "sched_getscheduler", "sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name, raising=False)

    def nothing(path: object = ".") -> list[str]:
        raise FileNotFoundError(errno.ENOENT, "No such file", path)

    monkeypatch.setattr(os, "listdir", nothing)
    with undisturbed(1) as granted:
        assert granted.kind == "nice"
        assert granted.why.startswith("this system has no real-time priority")
        assert kernel.nice == -20
    assert kernel.nice == 0


@needs_linux
def test_who_may_not_take_the_flag_off_still_leaves_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's rule for a user who has real time by 'ulimit -r' only (EPERM on clearing RESET_ON_FORK)."""
    calls = []

    def set_scheduler(tid: int, policy: int, param: object) -> None:
        if not policy & RESET_ON_FORK:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        calls.append(policy)

    monkeypatch.setattr(os, "sched_setscheduler", set_scheduler)
    before = priority._Settings(0, 0, 0, None)
    priority._write(0, before, priority._Settings(FIFO | RESET_ON_FORK, 10, 0, None))
    assert calls == [RESET_ON_FORK]


@needs_linux
def test_an_interrupted_restoration_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(monkeypatch, -20)
    calls = []

    def interrupted(which: int, who: int, value: int) -> None:
        if value == 0 and not calls:
            calls.append(value)
            raise KeyboardInterrupt
        kernel.set(which, who, value)

    monkeypatch.setattr(os, "setpriority", interrupted)
    with pytest.raises(KeyboardInterrupt), undisturbed(1):
        assert kernel.nice == -20
    assert calls
    assert kernel.nice == 0


def test_the_last_of_several_threads_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(monkeypatch, -20)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with undisturbed(1):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with undisturbed(1):
        thread.start()
        inside.wait(10)
    assert kernel.nice == -20
    leave.set()
    thread.join(10)
    assert kernel.nice == 0


def test_off_and_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(monkeypatch, -20)
    with undisturbed(1, "off") as granted:
        assert (granted.kind, granted.affinity) == ("none", None)
        assert granted.why == "priority was switched off"
        assert kernel.nice == 0
    with pytest.raises(UserMistake, match="threads=0 must be at least 1"), undisturbed(0):
        pass
    with (
        pytest.raises(UserMistake, match="'always' is not known; allowed: auto, off"),
        undisturbed(1, "always"),
    ):
        pass


class TestPause:
    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock()

    @given(calls=st.lists(st.floats(0.0001, 0.5), min_size=50, max_size=400))
    def test_in_every_second_others_get_a_tenth(self, calls: list[float]) -> None:
        clock = FakeClock()
        granted = Granted("realtime", (0,), "", clock=clock.now, sleep=clock.sleep)
        for seconds in calls:
            clock.run(seconds)
            granted.pause()
        # By running and resting from one rest to the next; no stretch is longer than a call and RUN_SECONDS.
        for ran, rested in clock.stretches():
            assert rested == 0 or ran / (ran + rested) <= 0.9
            # Added up another way than on the clock, 0.1 s may be the last bit more than 0.1 s.
            assert rested > 0 or ran < priority.RUN_SECONDS + 1e-9

    def test_short_runs_do_not_rest(self, clock: FakeClock) -> None:
        granted = Granted("realtime", (0,), "", clock=clock.now, sleep=clock.sleep)
        clock.run(0.05)
        assert granted.pause() == 0
        clock.run(0.06)
        assert granted.pause() == pytest.approx(0.11 / 8)
        clock.run(30)
        assert granted.pause() == priority.LONGEST_REST

    def test_others_never_rest(self, clock: FakeClock) -> None:
        granted = Granted("nice", None, "", clock=clock.now, sleep=clock.sleep)
        clock.run(30)
        assert granted.pause() == 0


class FakeClock:
    def __init__(self) -> None:
        self.time = 0.0
        self.log: list[tuple[str, float]] = []

    def now(self) -> float:
        return self.time

    def run(self, seconds: float) -> None:
        self.time += seconds
        self.log.append(("run", seconds))

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.log.append(("rest", seconds))

    def stretches(self) -> list[tuple[float, float]]:
        found, ran = [], 0.0
        for kind, seconds in self.log:
            if kind == "run":
                ran += seconds
            else:
                found.append((ran, seconds))
                ran = 0.0
        return [*found, (ran, 0.0)]


def busy(**cores: int) -> dict[int, CpuTimes]:
    return {int(name[1:]): CpuTimes(work, 100, 0) for name, work in cores.items()}


class TestChoice:
    before = busy(c0=0, c1=0, c2=0, c3=0) | {core: CpuTimes(0, 0, 0) for core in range(4)}

    def test_least_busy(self) -> None:
        assert choose_cores(1, range(4), self.before, busy(c0=90, c1=20, c2=5, c3=50), {}) == (2,)
        assert choose_cores(2, range(4), self.before, busy(c0=90, c1=20, c2=5, c3=50), {}) == (1, 2)

    def test_only_allowed_ones(self) -> None:
        assert choose_cores(1, [0, 3], self.before, busy(c0=90, c1=20, c2=5, c3=50), {}) == (3,)
        assert choose_cores(8, [0, 3], self.before, busy(c0=90, c1=20, c2=5, c3=50), {}) == (0, 3)

    def test_one_hardware_thread_of_each_core(self) -> None:
        pairs = {core: frozenset({core % 2, core % 2 + 2}) for core in range(4)}
        after = busy(c0=0, c1=10, c2=1, c3=10)
        assert choose_cores(2, range(4), self.before, after, pairs) == (0, 1)
        assert choose_cores(3, range(4), self.before, after, pairs) == (0, 1, 2)

    def test_work_on_the_sibling_counts(self) -> None:
        pairs = {core: frozenset({core % 2, core % 2 + 2}) for core in range(4)}
        assert choose_cores(1, range(4), self.before, busy(c0=0, c1=20, c2=90, c3=20), pairs) == (1,)

    def test_stolen_time_counts(self) -> None:
        after = {0: CpuTimes(10, 100, 50), 1: CpuTimes(40, 100, 0)}
        assert choose_cores(1, [0, 1], self.before, after, {}) == (1,)

    def test_unknown_cores(self) -> None:
        assert choose_cores(2, [4, 5, 6], {}, {}, {}) == (4, 5)

    def test_siblings_as_the_kernel_lists_them(self, tmp_path: Path) -> None:
        for core, text in {0: "0,4\n", 1: "1-2\n", 3: "garbage\n"}.items():
            folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(text)
        found = machine.read_siblings([0, 1, 3, 7], tmp_path)
        assert found == {0: frozenset({0, 4}), 1: frozenset({1, 2})}


def test_cores_of_the_fastest_kind_are_chosen_where_they_are_enough() -> None:
    top = {0: 5_000_000, 1: 5_000_000, 2: 3_800_000, 3: 3_800_000}
    assert fastest_kind(2, [0, 1, 2, 3], top) == (0, 1)
    assert fastest_kind(3, [0, 1, 2, 3], top) == (0, 1, 2, 3)
    assert fastest_kind(1, [2, 3], top) == (2, 3)
    assert fastest_kind(1, [0, 1], {}) == (0, 1)
