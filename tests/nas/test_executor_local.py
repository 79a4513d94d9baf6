"""Executors against real faults of real processes: nothing here pretends to be a worker."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.errors import FailureKind, RunStopped, TrialFailure, UserMistake
from nas.executors import Executor, InlineExecutor, LocalExecutor, Outcome
from nas.executors import local as local_module
from nas.executors import process as process_module
from nas.executors import slot as slot_module
from nas.executors.process import memory_used, out_of_memory_kills
from nas.executors.wire import MAX_BYTES, Decoder, TornMessage, encode
from nas.executors.worker import KINDS
from tests.conformance.executor import JOBS, ExecutorConformance, failure_of, value_of

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 60.0
LIMIT = 300 << 20


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def open_handles() -> int:
    return (
        len(os.listdir("/proc/self/fd")) if sys.platform.startswith("linux") else len(os.listdir("/dev/fd"))
    )


@pytest.fixture
def make() -> Iterator[Callable[..., LocalExecutor]]:
    made: list[LocalExecutor] = []

    def build(workers: int = 1, **options: Any) -> LocalExecutor:
        made.append(LocalExecutor(workers, **{"grace_seconds": 0.5, **options}))
        return made[-1]

    yield build
    for executor in made:
        executor.close(kill=True)


def run(executor: Executor, name: str, payload: dict[str, Any] | None = None, **options: Any) -> Outcome:
    return executor.submit(JOBS + name, payload or {}, **options).result(PATIENCE)


def begin(executor: Executor, name: str, payload: dict[str, Any] | None = None, **options: Any) -> Started:
    started = Started()
    started.future = executor.submit(JOBS + name, payload or {}, on_event=started.hear, **options)
    return started


class Started:
    """A job that runs, and the first event it sent."""

    def __init__(self) -> None:
        self.future: Future[Outcome] = Future()
        self.events: list[dict[str, Any]] = []

    def hear(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def first(self) -> dict[str, Any]:
        wait_until(lambda: self.events or self.future.done())
        assert self.events, self.future.result()
        return self.events[0]


class TestLocalConformance(ExecutorConformance):
    def make_executor(self) -> Executor:
        return LocalExecutor(2, grace_seconds=0.5)


class TestInlineConformance(ExecutorConformance):
    def make_executor(self) -> Executor:
        return InlineExecutor()


# -- wire --------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class TestWire:
    @given(st.lists(st.dictionaries(st.text(), json_values), max_size=4), st.integers(1, 50))
    @settings(max_examples=50, deadline=None)
    def test_messages_arrive_whole_however_the_stream_is_cut(
        self, messages: list[dict[str, Any]], size: int
    ) -> None:
        stream = b"".join(encode("event", message) for message in messages)
        decoder = Decoder()
        arrived = []
        for start in range(0, len(stream), size):
            decoder.feed(stream[start : start + size])
            while (message := decoder.pop()) is not None:
                arrived.append(message["body"])
        assert arrived == messages

    def test_a_message_that_is_cut_anywhere_is_not_a_message(self) -> None:
        frame = encode("done", {"loss": 0.5})
        for length in range(1, len(frame)):
            decoder = Decoder()
            decoder.feed(frame[:length])
            assert decoder.pop() is None
            decoder.feed(frame[length:])
            assert decoder.pop() == {"type": "done", "body": {"loss": 0.5}}

    def test_a_flipped_bit_is_never_taken_for_a_message(self) -> None:
        frame = encode("done", {"loss": 0.5})
        for place, bit in itertools.product(range(len(frame)), range(8)):
            damaged = bytearray(frame)
            damaged[place] ^= 1 << bit
            decoder = Decoder()
            decoder.feed(bytes(damaged))
            try:
                message = decoder.pop()
            except TornMessage:
                continue
            # Case of a hexadecimal digit and a longer length than was sent: not wrong, or not complete.
            assert message is None or message == {"type": "done", "body": {"loss": 0.5}}

    def test_an_absurd_length_is_refused_before_it_is_read(self) -> None:
        decoder = Decoder()
        decoder.feed(b"ffffffff 00000000 {")
        with pytest.raises(TornMessage, match=f"more than {MAX_BYTES}"):
            decoder.pop()


# -- worker processes --------------------------------------------------------------------------------------------------


class TestReuse:
    def test_a_healthy_worker_serves_job_after_job(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(4)  # of which jobs one after the other need one
        pids = {value_of(run(executor, "identify"))["pid"] for _ in range(20)}
        run(executor, "fail")
        pids.add(value_of(run(executor, "identify"))["pid"])
        assert len(pids) == 1

    def test_a_worker_leads_its_own_group_and_session(self, make: Callable[..., LocalExecutor]) -> None:
        found = value_of(run(make(1), "identify"))
        assert found["pid"] == found["group"] == found["session"]
        assert found["group"] != os.getpgrp()

    def test_signals_are_sane_whatever_the_driver_does_with_them(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGCHLD, signal.SIGHUP)}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
        try:
            executor = make(1)
            found = value_of(run(executor, "signals"))
            code = value_of(run(executor, "wait_for_child"))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                signal.signal(number, handler)
        ignored, default = str(signal.SIG_IGN.value), str(signal.SIG_DFL.value)
        assert found["SIGINT"] == ignored
        assert {found["SIGTERM"], found["SIGCHLD"], found["SIGHUP"]} == {default}
        assert found["blocked"] == 0
        assert code == {"code": 7}

    def test_a_job_cannot_spoil_directory_and_signals_for_the_next(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        executor = make(1)
        first = value_of(run(executor, "change_the_process"))
        second = value_of(run(executor, "current_directory"))
        assert second["pid"] == first["pid"]
        assert second["directory"] == os.getcwd()
        assert second["SIGINT"] == str(signal.SIG_IGN.value)
        assert second["SIGTERM"] == str(signal.SIG_DFL.value)

    def test_a_question_that_a_job_leaves_open_is_not_answered_by_the_next_job(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        executor = make(1)
        pids = set()
        for x in range(20):
            pids.add(value_of(run(executor, "leave_an_asking_thread"))["pid"])
            strangers: list[dict[str, Any]] = []
            assert value_of(run(executor, "double", {"x": x}, on_event=strangers.append)) == {"x": 2 * x}
            assert not strangers
        assert len(pids) == 1

    def test_a_worker_starts_without_torch(self, make: Callable[..., LocalExecutor]) -> None:
        found = value_of(
            run(make(1), "loaded_modules", {"names": ["torch", "optuna", "psutil", "matplotlib"]})
        )
        assert not any(found.values()), found

    def test_setup_is_imported_before_the_first_job(self, make: Callable[..., LocalExecutor]) -> None:
        names = {"names": ["this", "xml.dom.minidom"]}
        assert value_of(run(make(1, setup="xml.dom.minidom"), "loaded_modules", names)) == {
            "this": False,
            "xml.dom.minidom": True,
        }

    def test_a_failing_setup_is_the_jobs_failure(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1, setup="no_such_module")
        for _ in range(2):
            failure = failure_of(run(executor, "identify"))
            assert failure.kind == "error"
            assert failure.reason.startswith("setup 'no_such_module' failed: ModuleNotFoundError")
            assert "Traceback" in failure.log_tail

    def test_the_environment_is_extended(
        self, make: Callable[..., LocalExecutor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NAS_TEST_OWN", "driver")
        executor = make(1, environment={"OMP_NUM_THREADS": "1"})
        found = value_of(run(executor, "environment", {"names": ["NAS_TEST_OWN", "OMP_NUM_THREADS"]}))
        assert found == {"NAS_TEST_OWN": "driver", "OMP_NUM_THREADS": "1"}

    def test_warm_starts_all_workers_without_a_job(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(3)
        me = psutil.Process()
        before = {child.pid for child in me.children()}
        executor.warm()
        wait_until(lambda: len({child.pid for child in me.children()} - before) == 3)
        started = {child.pid for child in me.children()} - before
        assert value_of(run(executor, "identify"))["pid"] in started

    def test_a_warm_executor_replaces_a_lost_worker_before_the_next_job(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        executor = make(1, retries=0)
        executor.warm()
        old = value_of(run(executor, "identify"))["pid"]
        run(executor, "exit_at_once", {"code": 1})
        me = psutil.Process()
        wait_until(lambda: [child for child in me.children() if child.pid != old])

    def test_functions_of_a_file_are_found_from_anywhere(
        self, make: Callable[..., LocalExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "my_jobs.py").write_text(
            "def run(payload, channel):\n    return {'name': __name__, **payload}\n"
        )
        executor = make(1)
        run(executor, "identify")  # the worker now runs elsewhere than the file
        monkeypatch.chdir(tmp_path)
        first = value_of(executor.submit("my_jobs.py:run", {"a": 1}).result(PATIENCE))
        second = value_of(executor.submit("./my_jobs.py:run", {"a": 1}).result(PATIENCE))
        assert first == second
        assert first["a"] == 1

    @pytest.mark.parametrize("function", ["no_colon", ":f", "module:", "absent_file.py:f", None])
    def test_a_function_that_no_worker_could_find_is_refused(
        self, make: Callable[..., LocalExecutor], function: Any
    ) -> None:
        with pytest.raises(UserMistake, match="function="):
            make(1).submit(function, {})

    @pytest.mark.parametrize(
        "options", [{"workers": 0}, {"retries": -1}, {"memory_limit_bytes": 0}, {"grace_seconds": math.nan}]
    )
    def test_arguments_out_of_range_are_named(self, make: Callable[..., LocalExecutor], options: Any) -> None:
        with pytest.raises(UserMistake, match=f"{next(iter(options))}=.* must be at least"):
            make(**options)

    def test_the_worker_knows_every_kind_of_failure(self) -> None:
        assert frozenset(get_args(FailureKind)) == KINDS

    def test_a_payload_too_big_to_send_is_refused(self, make: Callable[..., LocalExecutor]) -> None:
        with pytest.raises(UserMistake, match="payload is 70 MB, more than the 64 MB"):
            make(1).submit(JOBS + "echo", {"x": "x" * (70 << 20)})

    def test_a_result_too_big_to_send_is_a_failure(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1)
        assert failure_of(run(executor, "give_megabytes", {"megabytes": 70})).reason.startswith(
            "result is 70 MB"
        )
        assert len(value_of(run(executor, "give_megabytes", {"megabytes": 3}))["text"]) == 3 << 20

    def test_a_payload_bigger_than_a_pipe_arrives(self, make: Callable[..., LocalExecutor]) -> None:
        payload = {"x": "x" * (3 << 20)}
        assert value_of(run(make(1), "echo", payload)) == payload


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
            while not ended.wait(rng.uniform(0.01, 0.3)):
                for child in rng.sample(children := me.children(), min(1, len(children))):
                    kills += 1
                    child.kill()

        killer = threading.Thread(target=kill_at_random)
        killer.start()
        try:
            futures = [executor.submit(JOBS + "sleep", {"seconds": 0.02}) for _ in range(15)]
            done = wait(futures, PATIENCE).done
        finally:
            ended.set()
            killer.join()
        assert len(done) == 15
        assert all(value_of(future.result())["pid"] for future in futures)
        assert kills > 0


# -- time --------------------------------------------------------------------------------------------------------------


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

    def test_what_it_printed_is_shown(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1)
        run(executor, "identify")
        assert failure_of(run(executor, "sleep", time_limit=0.3)).log_tail == "sleeping"

    def test_a_worker_stopped_while_idle_does_not_hold_its_job_for_ever(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        executor = make(1)
        pid = value_of(run(executor, "identify"))["pid"]
        os.kill(pid, signal.SIGSTOP)
        big = {"x": "x" * (3 << 20)}  # more than the pipe takes from a writer that nobody reads
        assert failure_of(run(executor, "echo", big, time_limit=0.3)).kind == "timeout"
        wait_until(lambda: not alive(pid))

    def test_the_start_of_a_worker_does_not_count(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        (tmp_path / "slow_setup_for_test.py").write_text("import time\ntime.sleep(1.0)\n")
        sys.path.append(str(tmp_path))
        try:
            executor = make(1, setup="slow_setup_for_test")
        finally:
            sys.path.remove(str(tmp_path))
        executor.warm()
        assert value_of(run(executor, "sleep", {"seconds": 0.0}, time_limit=0.9))


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


# -- logs --------------------------------------------------------------------------------------------------------------


class TestLogs:
    def test_all_output_goes_to_the_file_that_the_payload_names(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        log = tmp_path / "7" / "log.txt"
        failure = failure_of(run(make(1), "print_lines", {"lines": 2, "fail": True, "log": str(log)}))
        written = log.read_text()
        for text in ("line 0", "line 1", "from stderr", "from a child", "ValueError: printed enough"):
            assert text in written
            assert text in failure.log_tail

    def test_each_job_has_its_own_file_in_the_log_directory(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        executor = make(1, log_directory=tmp_path / "logs")
        for number in range(2):
            run(executor, "print_lines", {"lines": number + 1}, tag=f"trial {number}/../../x")
        files = sorted((tmp_path / "logs").iterdir())
        assert [file.name for file in files] == ["00001-trial-0-..-..-x.log", "00002-trial-1-..-..-x.log"]
        assert [file.read_text().count("line") for file in files] == [1, 2]

    def test_without_a_file_the_last_lines_are_known_all_the_same(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        executor = make(1)
        run(executor, "print_lines", {"lines": 3})
        tail = failure_of(run(executor, "fail")).log_tail
        assert "ValueError" in tail
        assert "line" not in tail.replace("line 1", "").replace(", line", ""), "that is from the job before"

    def test_a_log_that_grows_without_end_is_shortened(
        self, make: Callable[..., LocalExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(process_module, "LOG_BYTES", 100_000)
        monkeypatch.setattr(process_module, "LOG_KEPT_BYTES", 10_000)
        log = tmp_path / "log.txt"
        run(make(1), "print_lines", {"lines": 5000, "width": 100, "log": str(log)})
        assert log.stat().st_size <= 100_000
        # What the job prints in that very moment may come before the note.
        assert "[log longer than" in log.read_text()
        assert log.read_text().endswith("from stderr\nfrom a child\n")

    def test_a_log_that_cannot_be_opened_fails_its_job_only(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        executor = make(1)
        failure = failure_of(run(executor, "identify", {"log": str(tmp_path / "gone" / "7" / "log.txt")}))
        assert failure.kind == "error"
        assert "cannot be opened: No such file or directory" in failure.reason
        assert not (tmp_path / "gone").exists()
        assert value_of(run(executor, "double", {"x": 1})) == {"x": 2}


# -- closing -----------------------------------------------------------------------------------------------------------


class TestClose:
    @pytest.mark.parametrize("kill", [False, True])
    def test_running_and_queued_jobs_are_interrupted(
        self, make: Callable[..., LocalExecutor], kill: bool
    ) -> None:
        executor = make(2)
        running = [begin(executor, "sleep") for _ in range(2)]
        pids = [started.first()["pid"] for started in running]
        queued = [executor.submit(JOBS + "sleep", {}) for _ in range(3)]
        executor.close(kill=kill)
        assert not any(map(alive, pids))
        outcomes = [started.future.result(0) for started in running] + [future.result(0) for future in queued]
        assert {failure_of(outcome).kind for outcome in outcomes} == {"interrupted"}
        assert [outcome.attempts for outcome in outcomes] == [1, 1, 0, 0, 0]

    def test_a_deaf_job_is_killed_without_waiting_for_its_grace(
        self, make: Callable[..., LocalExecutor]
    ) -> None:
        executor = make(1, grace_seconds=1e6)
        started = begin(executor, "sleep_deaf")
        started.first()
        executor.close(kill=True)
        assert failure_of(started.future.result(0)).kind == "interrupted"

    def test_a_second_close_hastens_the_first(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1, grace_seconds=1e6)
        started = begin(executor, "sleep_deaf")
        started.first()
        closing = threading.Thread(target=executor.close)
        closing.start()
        wait_until(lambda: executor.closing)
        executor.close(kill=True)
        closing.join(PATIENCE)
        assert not closing.is_alive()
        assert failure_of(started.future.result(0)).kind == "interrupted"

    def test_a_callback_that_never_returns_does_not_hold_it_up(
        self, make: Callable[..., LocalExecutor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local_module, "_KILL_SECONDS", 0.3)
        executor = make(1)
        entered, release = threading.Event(), threading.Event()

        def block(event: dict[str, Any]) -> None:
            entered.set()
            release.wait()

        future = executor.submit(JOBS + "sleep", {}, on_event=block)
        assert entered.wait(PATIENCE)
        try:
            executor.close(kill=True)
            assert failure_of(future.result(0)).kind == "interrupted"
        finally:
            release.set()

    def test_a_callback_may_close_the_executor(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1)
        future = executor.submit(JOBS + "sleep", {}, on_event=lambda event: executor.close(kill=True))
        assert failure_of(future.result(PATIENCE)).kind == "interrupted"

    def test_a_queued_job_can_be_cancelled(self, make: Callable[..., LocalExecutor], tmp_path: Path) -> None:
        executor = make(1)
        started = begin(executor, "wait_for_file", {"file": str(tmp_path / "go")})
        started.first()
        queued = executor.submit(JOBS + "allocate", {"file": str(tmp_path / "must-not-run")})
        after = executor.submit(JOBS + "double", {"x": 1})
        assert queued.cancel()
        assert not started.future.cancel()
        (tmp_path / "go").touch()
        assert value_of(after.result(PATIENCE)) == {"x": 2}
        assert queued.cancelled()
        assert not (tmp_path / "must-not-run").exists()

    def test_a_forked_copy_of_the_driver_cannot_close_it(
        self, make: Callable[..., LocalExecutor], tmp_path: Path
    ) -> None:
        executor = make(1)
        started = begin(executor, "wait_for_file", {"file": str(tmp_path / "go")})
        started.first()
        child = os.fork()
        if child == 0:
            executor.close(kill=True)
            os._exit(0)
        os.waitpid(child, 0)
        (tmp_path / "go").touch()
        outcome = started.future.result(PATIENCE)
        assert value_of(outcome)
        assert outcome.attempts == 1

    def test_used_as_a_context_it_closes(self) -> None:
        with LocalExecutor(1) as executor:
            pid = value_of(run(executor, "identify"))["pid"]
        assert not alive(pid)


# -- handles and processes ---------------------------------------------------------------------------------------------


class TestScarcity:
    def test_jobs_and_lost_workers_leave_no_handles_open(self, make: Callable[..., LocalExecutor]) -> None:
        executor = make(1, retries=0)
        run(executor, "identify")
        before = open_handles()
        for future in [executor.submit(JOBS + "echo", {}) for _ in range(200)]:
            value_of(future.result(PATIENCE))
        assert open_handles() == before
        for _ in range(3):
            failure_of(run(executor, "exit_at_once", {"code": 1}))
        run(executor, "identify")
        assert open_handles() == before

    def test_a_closed_executor_leaves_no_handles_open(self) -> None:
        before = open_handles()
        for _ in range(3):
            with LocalExecutor(2) as executor:
                wait([executor.submit(JOBS + "echo", {}) for _ in range(4)], PATIENCE)
        assert open_handles() == before

    def test_fewer_workers_where_handles_are_few(self, tmp_path: Path) -> None:
        found = drive(
            tmp_path,
            """
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            executor = LocalExecutor(40)
            futures = [executor.submit(JOBS + "double", {"x": x}) for x in range(60)]
            tell(values=[future.result().value["x"] for future in futures], capacity=executor.capacity)
            open(__file__).close()
            executor.close()
            """,
        )
        assert found["values"] == [2 * x for x in range(60)]
        assert 1 <= found["capacity"] < 40
        assert "of 40 workers: only" in found["stderr"]
        assert "ulimit -n 1024" in found["stderr"]

    def test_no_worker_where_handles_are_fewer(self, tmp_path: Path) -> None:
        found = drive(
            tmp_path,
            """
            resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
            try:
                LocalExecutor(2)
            except UserMistake as error:
                tell(error=str(error))
            """,
        )
        assert "workers=2: only" in found["error"]
        assert "ulimit -n 1024" in found["error"]

    def test_handles_that_run_out_later_stop_the_run_with_a_reason(self, tmp_path: Path) -> None:
        found = drive(
            tmp_path,
            """
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            slot._START_PAUSES = (0.01,)
            executor = LocalExecutor(4)
            held = hold_all_handles()
            futures = [executor.submit(JOBS + "echo", {}) for _ in range(3)]
            errors = [future.exception() for future in futures]
            held.clear()
            kinds = [type(error).__name__ for error in errors]
            try:
                executor.submit(JOBS + "echo", {})
            except RunStopped as error:
                tell(kinds=kinds, errors=[str(error) for error in errors], again=str(error))
            executor.close()
            """,
        )
        assert found["kinds"] == ["RunStopped"] * 3
        assert set(found["errors"]) == {found["again"]}
        assert "no worker process can be started: Too many open files; raise the limit" in found["again"]

    def test_handles_that_run_out_later_leave_the_workers_there_are(self, tmp_path: Path) -> None:
        found = drive(
            tmp_path,
            """
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            slot._START_PAUSES = (0.01,)
            executor = LocalExecutor(3)
            executor.submit(JOBS + "identify", {}).result()
            held = hold_all_handles()
            futures = [executor.submit(JOBS + "sleep", {"seconds": 0.2}) for _ in range(6)]
            pids = {future.result().value["pid"] for future in futures}
            # The other two give up only after some tries, which the first one may outrun.
            while executor.capacity > 1:
                time.sleep(0.01)
            held.clear()
            tell(pids=len(pids), capacity=executor.capacity)
            executor.close()
            """,
        )
        assert found["pids"] == 1
        assert found["capacity"] == 1
        assert "cannot be started: Too many open files; going on with 1" in found["stderr"]

    def test_a_refused_process_is_asked_for_again(
        self, make: Callable[..., LocalExecutor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Root is never refused a process, so the refusal is imitated; the worker is real.
        really = subprocess.Popen
        refusals = iter([errno.EAGAIN, errno.ENOMEM])

        def refuse_at_first(*arguments: Any, **options: Any) -> Any:
            for number in refusals:
                raise OSError(number, os.strerror(number))
            return really(*arguments, **options)

        monkeypatch.setattr(subprocess, "Popen", refuse_at_first)
        before = open_handles()
        executor = make(1)
        assert value_of(run(executor, "double", {"x": 1})) == {"x": 2}
        executor.close()
        assert open_handles() == before

    def test_processes_refused_for_good_stop_the_run_with_a_reason(
        self, make: Callable[..., LocalExecutor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: Any, **options: Any) -> Any:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        monkeypatch.setattr(subprocess, "Popen", refuse)
        monkeypatch.setattr(slot_module, "_START_PAUSES", (0.01,))
        before = open_handles()
        executor = make(3)
        error = executor.submit(JOBS + "echo", {}).exception(PATIENCE)
        assert isinstance(error, RunStopped)
        assert "Resource temporarily unavailable; raise the limit of processes" in str(error)
        assert open_handles() == before


# -- the driver's end --------------------------------------------------------------------------------------------------

PREAMBLE = """
import json, logging, os, resource, signal, sys, time
sys.path.insert(0, {repository!r})
from nas.errors import RunStopped, UserMistake
from nas.executors import LocalExecutor, slot
logging.basicConfig()
JOBS = {jobs!r}

def tell(**facts):
    print(json.dumps(facts), flush=True)

def hold_all_handles():
    held = []
    while True:
        try:
            held.append(open(os.devnull))
        except OSError:
            return held
"""


def write_driver(folder: Path, body: str) -> Path:
    """A script that uses an executor at its top level, without a guard, as people write them."""
    script = folder / "driver.py"
    script.write_text(PREAMBLE.format(repository=str(REPOSITORY), jobs=JOBS) + textwrap.dedent(body))
    return script


@contextlib.contextmanager
def running_driver(folder: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """A driver in a session of its own, which is ended here if the test has not done so."""
    driver = subprocess.Popen(
        [sys.executable, str(write_driver(folder, body))],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with driver:
        try:
            yield driver
        finally:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)


def hear(driver: subprocess.Popen[str]) -> dict[str, Any]:
    assert driver.stdout is not None
    facts: dict[str, Any] = json.loads(driver.stdout.readline())
    return facts


def drive(folder: Path, body: str) -> dict[str, Any]:
    """What a driver script told, and its stderr; it must end well and leave nothing running."""
    done = subprocess.run(
        [sys.executable, str(write_driver(folder, body))],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return {**facts, "stderr": done.stderr}


class TestDriver:
    @pytest.mark.parametrize("then", ["sleep", "spin"])
    def test_killed_it_leaves_no_process_behind(self, tmp_path: Path, then: str) -> None:
        with running_driver(
            tmp_path,
            f"""
            executor = LocalExecutor(3)
            executor.warm()
            seen = []
            for _ in range(2):
                executor.submit(JOBS + "breed", {{"count": 2, "then": {then!r}}}, on_event=seen.append)
            while len(seen) < 2:
                time.sleep(0.01)
            if os.fork() == 0:  # a data loader of the driver, say: it must not keep the workers alive
                time.sleep(1e6)
            tell(pids=[pid for event in seen for pid in (event["pid"], *event["descendants"])])
            time.sleep(1e6)
            """,
        ) as driver:
            pids = hear(driver)["pids"]
            family = psutil.Process(driver.pid).children()
            loader = next(
                child for child in family if child.pid not in pids and "driver.py" in str(child.cmdline())
            )
            idle = [child.pid for child in family if child.pid not in pids and child.pid != loader.pid]
            assert len(pids) == 10
            assert all(map(alive, [*pids, *idle]))
            driver.kill()
            driver.wait()
            try:
                wait_until(lambda: not any(map(alive, [*pids, *idle])))
                assert alive(loader.pid)
            finally:
                loader.kill()

    def test_killed_while_workers_start_it_leaves_no_process_behind(self, tmp_path: Path) -> None:
        with running_driver(
            tmp_path,
            """
            executor = LocalExecutor(4)
            executor.warm()
            tell(workers=4)
            time.sleep(1e6)
            """,
        ) as driver:
            hear(driver)
            wait_until(lambda: psutil.Process(driver.pid).children())
            workers = [child.pid for child in psutil.Process(driver.pid).children()]
            driver.kill()
            driver.wait()
            wait_until(lambda: not any(map(alive, workers)))

    def test_killed_it_takes_a_stopped_worker_along(self, tmp_path: Path) -> None:
        with running_driver(
            tmp_path,
            """
            executor = LocalExecutor(1)
            executor.submit(JOBS + "stop_itself", {}, on_event=lambda event: tell(**event))
            time.sleep(1e6)
            """,
        ) as driver:
            pid = hear(driver)["pid"]
            wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
            driver.kill()
            driver.wait()
            wait_until(lambda: not alive(pid))

    def test_ending_without_close_it_leaves_no_process_behind(self, tmp_path: Path) -> None:
        found = drive(
            tmp_path,
            """
            executor = LocalExecutor(2)
            seen = []
            executor.submit(JOBS + "sleep", {}, on_event=seen.append)
            while not seen:
                time.sleep(0.01)
            tell(**seen[0])
            """,
        )
        wait_until(lambda: not alive(found["pid"]))

    def test_ctrl_c_reaches_the_driver_only(self, tmp_path: Path) -> None:
        go = tmp_path / "go"
        with running_driver(
            tmp_path,
            f"""
            interrupted = []
            signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
            with LocalExecutor(1) as executor:
                payload = {{"file": {str(go)!r}}}
                future = executor.submit(JOBS + "wait_for_file", payload, on_event=lambda event: tell(**event))
                outcome = future.result()
            tell(value=outcome.value, attempts=outcome.attempts, interrupted=len(interrupted))
            """,
        ) as driver:
            pid = hear(driver)["pid"]
            # What the terminal does: the signal goes to every process of the driver's group.
            os.killpg(driver.pid, signal.SIGINT)
            go.touch()
            assert hear(driver) == {"value": {"pid": pid}, "attempts": 1, "interrupted": 1}
            assert driver.wait(PATIENCE) == 0

    def test_files_in_the_current_directory_do_not_shadow_the_library(self, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for name in ("json", "signal", "nas", "threading"):
            (elsewhere / f"{name}.py").write_text("raise RuntimeError('shadowed')\n")
        found = drive(
            tmp_path,
            f"""
            os.chdir({str(elsewhere)!r})
            with LocalExecutor(1) as executor:
                tell(value=executor.submit(JOBS + "double", {{"x": 21}}).result().value)
            """,
        )
        assert found["value"] == {"x": 42}


# -- inline ------------------------------------------------------------------------------------------------------------


class TestInline:
    def test_it_takes_what_no_other_process_can_import(self) -> None:
        factor = 3

        def closure(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
            return {"pid": os.getpid(), "x": payload["x"] * factor}

        outcome = InlineExecutor().submit(closure, {"x": 2}).result(0)
        assert value_of(outcome) == {"pid": os.getpid(), "x": 6}

    def test_a_time_limit_is_noticed_when_the_job_talks(self) -> None:
        outcome = run(InlineExecutor(), "chatter", time_limit=0.05)
        assert failure_of(outcome).reason == "ran longer than 0.05 s"
        assert failure_of(outcome).kind == "timeout"

    def test_a_job_that_hides_the_end_of_its_time_has_failed_all_the_same(self) -> None:
        def stubborn(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
            while True:
                try:
                    channel.event({})
                except TrialFailure:
                    return {"fine": True}

        assert failure_of(InlineExecutor().submit(stubborn, {}, time_limit=0.01).result(0)).kind == "timeout"

    def test_closing_it_from_the_callback_interrupts_the_job(self) -> None:
        executor = InlineExecutor()
        outcome = run(executor, "chatter", on_event=lambda event: executor.close())
        assert failure_of(outcome).kind == "interrupted"

    def test_ctrl_c_is_not_swallowed(self) -> None:
        def interrupted(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            InlineExecutor().submit(interrupted, {})

    def test_a_function_that_is_none_is_refused(self) -> None:
        with pytest.raises(UserMistake, match="function=3 must be a callable"):
            InlineExecutor().submit(3, {})  # type: ignore[arg-type]
