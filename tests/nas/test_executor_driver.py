"""The process that owns the workers: when it lacks handles or processes, and when it ends."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import psutil
import pytest

from nas.errors import RunStopped
from nas.executors import LocalExecutor
from nas.executors import slot as slot_module
from tests.conformance.executor import JOBS, failure_of, value_of
from tests.nas import _executors
from tests.nas._executors import PATIENCE, alive, run, wait_until

make = _executors.make  # a fixture is found by a name in the module of its tests

REPOSITORY = Path(__file__).parents[2]


def open_handles() -> int:
    gc.collect()  # what earlier tests left in cycles holds handles too
    return (
        len(os.listdir("/proc/self/fd")) if sys.platform.startswith("linux") else len(os.listdir("/dev/fd"))
    )


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
            submitted = threading.Event()
            # The second try, after which no job is taken any more, comes when all jobs are there.
            slot.time = types.SimpleNamespace(
                sleep=lambda seconds: submitted.wait(), monotonic=time.monotonic
            )
            executor = LocalExecutor(4)
            held = hold_all_handles()
            futures = [executor.submit(JOBS + "echo", {}) for _ in range(3)]
            submitted.set()
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
            said = []
            handler = logging.Handler()
            handler.emit = lambda record: said.append(record.getMessage())
            logging.getLogger("nas").addHandler(handler)
            executor = LocalExecutor(3)
            executor.submit(JOBS + "identify", {}).result()
            held = hold_all_handles()
            futures = [executor.submit(JOBS + "sleep", {"seconds": 0.2}) for _ in range(6)]
            pids = {future.result().value["pid"] for future in futures}
            # The other two give up only after some tries, which the first one may outrun, and say so after that.
            while not any("going on with 1" in text for text in said):
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
import json, logging, os, resource, signal, sys, threading, time, types
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
