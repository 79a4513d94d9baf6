"""Executors against real faults of real processes: nothing here pretends to be a worker."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import psutil
import pytest

from nas.executors import Executor, LocalExecutor, Outcome
from nas.executors import slot as slot_module
from nas.executors.process import memory_used, out_of_memory_kills
from tests.conformance.executor import JOBS, ExecutorConformance, failure_of, value_of
from tests.nas import _executors
from tests.nas._executors import PATIENCE, alive, begin, run, wait_until
from tests.nas.faults.bench import pause

make = _executors.make  # a fixture is found by a name in the module of its tests
LIMIT = 300 << 20


class TestLocalConformance(ExecutorConformance):
    def make_executor(self) -> Executor:
        return LocalExecutor(2, grace_seconds=0.5)


# -- death of a worker -------------------------------------------------------------------------------------------------


class TestKilled:
    def test_killed_in_the_middle_is_tried_again(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        outcome = run(make(1), "kill_itself", {"file": str(tmp_path / "n"), "times": 2})
        assert value_of(outcome) == {"survived": True}
        assert outcome.attempts == 3

    def test_killed_from_outside_every_time_is_a_failure(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1, retries=2)
        outcome = run(executor, "sleep", on_event=lambda event: os.kill(event["pid"], signal.SIGKILL))
        failure = failure_of(outcome)
        assert (failure.kind, failure.reason) == ("killed", "killed by signal 9 (SIGKILL), 3 attempts")
        assert outcome.attempts == 3
        assert value_of(run(executor, "double", {"x": 1})) == {"x": 2}

    @pytest.mark.parametrize(
        ("name", "payload", "reason"),
        [
            ("exit_at_once", {"code": 3}, "exited with code 3, 1 attempt"),
            ("exit_at_once", {"code": 0}, "exited with code 0, 1 attempt"),
            ("crash", {}, "killed by signal 11 (SIGSEGV), 1 attempt"),
        ],
    )
    def test_how_it_ended_is_said(
        self, make: Callable[..., LocalExecutor], name: str, payload: dict[str, Any], reason: str
    ) -> None:
        failure = failure_of(run(make(1, retries=0), name, payload))
        assert (failure.kind, failure.reason) == ("killed", reason)

    def test_a_crash_leaves_its_trace_in_the_log(self, make: Callable[..., LocalExecutor]) -> None:
        tail = failure_of(run(make(1, retries=0), "crash")).log_tail
        assert "about to crash" in tail
        assert "Fatal Python error: Segmentation fault" in tail

    @pytest.mark.parametrize("size", [1, 17, 18, 40, 1000])
    def test_killed_while_reporting_is_tried_again(
        self, make: Callable[..., LocalExecutor], tmp_path: Path, size: int
    ) -> None:
        outcome = run(
            make(1), "die_while_reporting", {"file": str(tmp_path / "n"), "times": 1, "bytes": size}
        )
        assert value_of(outcome) == {"survived": True}
        assert outcome.attempts == 2

    def test_killed_while_reporting_every_time(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        payload = {"file": str(tmp_path / "n"), "times": 9, "bytes": 30}
        failure = failure_of(run(make(1, retries=1), "die_while_reporting", payload))
        assert (failure.kind, failure.reason) == ("killed", "killed by signal 9 (SIGKILL), 2 attempts")

    def test_noise_in_the_pipe_is_not_a_result(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1, retries=0)
        failure = failure_of(run(executor, "scribble_into_every_descriptor"))
        assert failure.kind == "killed"
        assert failure.reason.startswith("sent something that is not a message")
        assert value_of(run(executor, "double", {"x": 1})) == {"x": 2}

    def test_killed_while_starting_is_tried_again(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        (tmp_path / "dies_at_first_for_test.py").write_text(
            "import os, pathlib\n"
            "mark = pathlib.Path(__file__).with_suffix('.mark')\n"
            "if not mark.exists():\n    mark.touch()\n    os.kill(os.getpid(), 9)\n"
        )
        sys.path.append(str(tmp_path))
        try:
            executor = make(1, setup="dies_at_first_for_test")
        finally:
            sys.path.remove(str(tmp_path))
        outcome = run(executor, "double", {"x": 1})
        assert value_of(outcome) == {"x": 2}
        assert outcome.attempts == 2

    def test_killed_while_idle_costs_nobody_an_attempt(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1)
        old = value_of(run(executor, "identify"))["pid"]
        os.kill(old, signal.SIGKILL)
        # A process counts as ended when its last thread has, which may be after it has become a zombie.
        wait_until(lambda: os.waitid(os.P_PID, old, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        outcome = run(executor, "identify")
        assert value_of(outcome)["pid"] != old
        assert outcome.attempts == 1

    def test_a_forked_copy_of_a_job_reports_nothing(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1)
        value = value_of(run(executor, "fork_and_return_twice"))
        assert value_of(run(executor, "identify"))["pid"] == value["pid"]

    def test_a_dead_worker_is_noticed_while_its_child_holds_the_pipes(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        failure = failure_of(run(make(1, retries=0), "fork_holding_pipes"))
        assert failure.reason == "killed by signal 9 (SIGKILL), 1 attempt"

    def test_no_job_is_lost_when_workers_are_killed_at_random(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        executor = make(2, retries=1000)
        rng = random.Random(0)
        me = psutil.Process()
        ended = threading.Event()
        kills = 0

        def kill_at_random() -> None:
            nonlocal kills
            # Not without end: where a worker takes longer to start than it is left alive no job would ever be done.
            while kills < 10 and not ended.wait(rng.uniform(0.01, 0.3)):
                for child in rng.sample(children := me.children(), min(1, len(children))):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                        kills += 1

        killer = threading.Thread(target=kill_at_random)
        killer.start()
        futures: list[Future[Outcome]] = []
        try:
            while killer.is_alive():  # there is work as long as there are kills
                futures += [executor.submit(JOBS + "sleep", {"seconds": 0.02}) for _ in range(15)]
                assert not wait(futures, PATIENCE).not_done
        finally:
            ended.set()
            killer.join()
        assert all(value_of(future.result())["pid"] for future in futures)
        assert kills == 10


# -- time --------------------------------------------------------------------------------------------------------------


class Clock:
    """The clock by which an executor limits its jobs, put forward as a test wants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._ahead = 0.0
        monkeypatch.setattr(slot_module, "time", self)
        self.sleep = time.sleep

    def advance(self, seconds: float) -> None:
        self._ahead += seconds

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead


class TestTimeLimit:
    @pytest.mark.parametrize("name", ["sleep", "spin", "stop_itself", "sleep_deaf", "chatter"])
    def test_a_job_that_does_not_end_is_ended(self, make: Callable[..., LocalExecutor], name: str) -> None:
        executor = make(1)
        run(executor, "identify")
        started = begin(executor, name, time_limit=0.4)
        outcome = started.future.result(PATIENCE)
        failure = failure_of(outcome)
        assert (failure.kind, failure.reason) == ("timeout", "ran longer than 0.4 s")
        assert outcome.attempts == 1
        assert outcome.seconds >= 0.4
        assert value_of(run(executor, "double", {"x": 1})) == {"x": 2}

    def test_what_it_printed_is_shown(
        self, make: Callable[..., LocalExecutor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        # The limit is reached when the job has printed, and not before on a busy machine.
        outcome = run(make(1), "sleep", time_limit=1e3, on_event=lambda event: clock.advance(1e4))
        assert failure_of(outcome).kind == "timeout"
        assert failure_of(outcome).log_tail == "sleeping"

    def test_a_worker_stopped_while_idle_does_not_hold_its_job_for_ever(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        executor = make(1)
        pid = value_of(run(executor, "identify"))["pid"]
        pause(pid)
        big = {"x": "x" * (3 << 20)}  # more than the pipe takes from a writer that nobody reads
        assert failure_of(run(executor, "echo", big, time_limit=0.3)).kind == "timeout"
        wait_until(lambda: not alive(pid))

    def test_the_start_of_a_worker_does_not_count(
        self, make: Callable[..., LocalExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "slow_setup_for_test.py").write_text(
            "import pathlib, time\n"
            "here = pathlib.Path(__file__).parent\n"
            "(here / 'begun').touch()\n"
            "while not (here / 'go').exists():\n    time.sleep(0.01)\n"
        )
        sys.path.append(str(tmp_path))
        try:
            executor = make(1, setup="slow_setup_for_test")
        finally:
            sys.path.remove(str(tmp_path))
        clock = Clock(monkeypatch)
        future = executor.submit(JOBS + "sleep", {"seconds": 0.0}, time_limit=90)
        wait_until((tmp_path / "begun").exists)
        clock.advance(100)  # more than the job may take, less than a start may
        (tmp_path / "go").touch()
        assert value_of(future.result(PATIENCE))


# -- descendants -------------------------------------------------------------------------------------------------------


class TestDescendants:
    def test_they_end_with_a_job_that_is_killed(self, make: Callable[..., LocalExecutor]) -> None:
        pids: list[int] = []

        def stop(event: dict[str, Any]) -> None:
            pids.extend(event["descendants"])
            raise ValueError("enough")

        payload = {"count": 4, "then": "sleep", "own_session": True}
        assert failure_of(run(make(1), "breed", payload, on_event=stop)).kind == "error"
        assert len(pids) == 9
        wait_until(lambda: not any(map(alive, pids)))

    def test_they_end_with_a_job_that_returns(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1)
        started = begin(executor, "breed", {"count": 2, "then": "return"})
        pids = started.first()["descendants"]
        old = value_of(started.future.result(PATIENCE))["pid"]
        wait_until(lambda: not any(map(alive, pids)))
        assert value_of(run(executor, "identify"))["pid"] != old

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are adopted on Linux only")
    def test_they_end_with_a_job_that_left_them_in_the_background(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        executor = make(1)
        started = begin(executor, "start_in_background")
        old = value_of(started.future.result(PATIENCE))["pid"]
        assert len(started.events) == 2
        wait_until(lambda: not any(alive(event["pid"]) for event in started.events))
        assert value_of(run(executor, "identify"))["pid"] != old

    def test_they_end_with_a_worker_that_is_killed(self, make: Callable[..., LocalExecutor]) -> None:
        started = begin(make(1, retries=0), "breed", {"count": 2, "then": "sleep"})
        event = started.first()
        os.kill(event["pid"], signal.SIGKILL)
        assert failure_of(started.future.result(PATIENCE)).kind == "killed"
        wait_until(lambda: not any(map(alive, event["descendants"])))

    def test_they_end_on_close(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1)
        started = begin(executor, "breed", {"count": 2, "then": "sleep"})
        event = started.first()
        executor.close()
        assert failure_of(started.future.result(0)).kind == "interrupted"
        wait_until(lambda: not any(map(alive, [event["pid"], *event["descendants"]])))


# -- memory ------------------------------------------------------------------------------------------------------------


class TestMemory:
    def test_the_watchdog_kills_a_job_that_takes_too_much(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        counter = tmp_path / "n"
        executor = make(1, memory_limit_bytes=LIMIT)
        outcome = run(executor, "allocate", {"file": str(counter), "gently": True})
        failure = failure_of(outcome)
        assert failure.kind == "memory"
        assert failure.reason.endswith("more than the limit of 300 MB")
        assert outcome.attempts == 1
        assert counter.read_text() == "x", "a job that lacked memory must not be tried again"
        assert value_of(run(executor, "double", {"x": 1})) == {"x": 2}

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited on Linux only")
    def test_the_system_refuses_memory_with_a_traceback(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        executor = make(1, memory_limit_bytes=LIMIT, address_space_limit=True)
        old = value_of(run(executor, "identify"))["pid"]
        failure = failure_of(run(executor, "allocate", {"file": str(tmp_path / "n")}))
        assert (failure.kind, failure.reason) == ("memory", "MemoryError")
        assert "in allocate" in failure.log_tail
        assert value_of(run(executor, "identify"))["pid"] != old, "its memory may be in pieces"

    def test_memory_of_children_counts(self, make: Callable[..., LocalExecutor]) -> None:
        failure = failure_of(run(make(1, memory_limit_bytes=LIMIT), "allocate_in_child"))
        assert failure.kind == "memory"

    @pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="shared pages are told apart on Linux only"
    )
    def test_pages_shared_with_forked_children_count_once(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1, memory_limit_bytes=LIMIT)
        measured: list[int] = []

        def look(event: dict[str, Any]) -> None:
            measured.append(memory_used(event["pid"], LIMIT))

        outcome = run(executor, "share_with_forks", {"megabytes": 150, "forks": 4}, on_event=look)
        assert value_of(outcome) == {"held": 150 << 20}
        assert 150 << 20 < measured[0] < LIMIT

    def test_a_kill_for_want_of_memory_is_not_tried_again(
        self, make: Callable[..., LocalExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The kernel's own kill cannot be provoked without endangering the machine; the kill here is real, the
        # kernel's count of them is not.
        counts = itertools.count()
        monkeypatch.setattr(slot_module, "out_of_memory_kills", lambda: next(counts))
        outcome = run(make(1), "kill_itself", {"file": str(tmp_path / "n"), "times": 9})
        failure = failure_of(outcome)
        assert (failure.kind, failure.reason) == ("memory", "killed by the system, which ran out of memory")
        assert outcome.attempts == 1

    def test_the_kernels_count_can_be_read(self) -> None:
        assert out_of_memory_kills() >= 0
