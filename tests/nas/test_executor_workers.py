"""Worker processes: they serve job after job, keep the log of each, and end with their executor."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest

from nas.errors import FailureKind, UserMistake
from nas.executors import LocalExecutor
from nas.executors import local as local_module
from nas.executors import process as process_module
from nas.executors.worker import KINDS
from tests.conformance.executor import JOBS, failure_of, value_of
from tests.nas import _executors
from tests.nas._executors import PATIENCE, alive, begin, run, wait_until

make = _executors.make  # a fixture is found by a name in the module of its tests


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
