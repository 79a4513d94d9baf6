"""The Ray executor on a real Ray of this machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nas.errors import RunStopped, UserMistake
from nas.executors import Executor, Outcome, RayExecutor
from nas.executors.ray_files import listing
from tests.conformance.executor import JOBS, ExecutorConformance, failure_of, value_of
from tests.nas.ray_jobs import RAY_JOBS, NoHost

pytestmark = pytest.mark.alone

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 60.0
STORE = 100 << 20

Make = Callable[..., RayExecutor]


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """A small Ray with 4 processors and one jetson, all of them faked, on this machine."""
    ray = pytest.importorskip("ray", reason="needs pip install 'nas-toolkit[ray]'")
    ray.init(
        num_cpus=4,
        resources={"jetson": 1},
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def make(ray_here: Any) -> Iterator[Make]:
    made: list[RayExecutor] = []

    def build(workers: int | None = 1, **options: Any) -> RayExecutor:
        made.append(RayExecutor(workers, **{"address": "auto", "grace_seconds": 0.5, **options}))
        return made[-1]

    yield build
    for executor in made:
        executor.close(kill=True)


def run(executor: RayExecutor, name: str, payload: dict[str, Any] | None = None, **options: Any) -> Outcome:
    return executor.submit(JOBS + name, payload or {}, **options).result(PATIENCE)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
class TestRayConformance(ExecutorConformance):
    def make_executor(self) -> Executor:
        return RayExecutor(2, address="auto", grace_seconds=0.5)


@pytest.mark.slow
class TestRayExecutor:
    def test_as_many_places_as_the_cluster_has_room_for(self, make: Make) -> None:
        executor = make(None, cpus_per_trial=2)
        assert executor.workers == 2
        wait_until(lambda: executor.capacity == 2)

    def test_never_more_at_a_time_than_places(self, make: Make, tmp_path: Path) -> None:
        executor = make(2)
        futures = [executor.submit(RAY_JOBS + "overlap", {"folder": str(tmp_path)}) for _ in range(8)]
        assert max(value_of(future.result(PATIENCE))["at_a_time"] for future in futures) <= 2

    def test_a_need_that_no_node_has_is_refused(self, make: Make) -> None:
        with pytest.raises(UserMistake, match=r"--cpus-per-trial 64 .*: no node of the cluster has as much"):
            make(None, cpus_per_trial=64)

    def test_a_crash_is_tried_again_and_then_a_failure(self, make: Make) -> None:
        outcome = run(make(1, retries=1), "crash")
        failure = failure_of(outcome)
        assert failure.kind == "killed"
        with pytest.raises(ValueError, match=r"killed by signal 11 \(SIGSEGV\) on node .*, 2 attempts"):
            raise ValueError(failure.reason)
        assert "about to crash" in failure.log_tail
        assert outcome.attempts == 2

    @pytest.mark.parametrize("job", ["sleep", "sleep_deaf", "spin"])
    def test_a_job_that_does_not_end_is_ended(self, make: Make, job: str) -> None:
        executor = make()
        pid = value_of(run(executor, "identify"))["pid"]
        outcome = run(executor, job, time_limit=0.5)
        assert failure_of(outcome).kind == "timeout"
        assert outcome.attempts == 1
        wait_until(lambda: not psutil.pid_exists(pid))
        assert value_of(run(executor, "double", {"x": 1})) == {"x": 2}

    def test_too_much_memory_is_that_jobs_failure(self, make: Make, tmp_path: Path) -> None:
        executor = make(memory_limit_bytes=300 << 20)
        payload = {"file": str(tmp_path / "n"), "gently": True}
        assert failure_of(run(executor, "allocate", payload)).kind == "memory"
        assert value_of(run(executor, "double", {"x": 1})) == {"x": 2}

    def test_a_full_gpu_is_tried_again(self, make: Make) -> None:
        executor = make(2, retries=2)
        outcome = run(executor, "say_it_ran_out_of_memory", {"text": "CUDA out of memory. Tried to allocate"})
        assert failure_of(outcome).kind == "memory"
        assert failure_of(outcome).reason.endswith(", 3 attempts")

    def test_an_actor_that_is_killed_is_replaced_and_its_job_tried_again(
        self, make: Make, tmp_path: Path
    ) -> None:
        executor = make(1)
        pids: list[int] = []
        file = tmp_path / "go"
        future = executor.submit(
            JOBS + "wait_for_file", {"file": str(file)}, on_event=lambda event: pids.append(event["pid"])
        )
        wait_until(lambda: pids)
        actor = executor._slots[0].actor
        executor.kill(actor)
        wait_until(lambda: not psutil.pid_exists(pids[0]))  # or it would see the file in its last moments
        file.touch()
        outcome = future.result(PATIENCE)
        assert value_of(outcome)["pid"] > 0
        assert outcome.attempts == 2

    def test_an_idle_actor_that_is_killed_is_replaced_unasked(self, make: Make) -> None:
        executor = make(1)
        first = value_of(run(executor, "identify"))["pid"]
        slot = executor._slots[0]
        actor = slot.actor
        executor.kill(actor)
        wait_until(lambda: slot.actor is not None and slot.actor is not actor and slot.alive)
        outcome = run(executor, "identify")
        assert value_of(outcome)["pid"] != first
        assert outcome.attempts == 1

    @pytest.mark.parametrize("kill", [True, False])
    def test_close_leaves_no_process_behind(self, make: Make, kill: bool) -> None:
        executor = make(2)
        pids: list[int] = []
        futures = [
            executor.submit(
                JOBS + "breed",
                {"count": 1, "then": "sleep"},
                on_event=lambda event: pids.extend([event["pid"], *event["descendants"]]),
            )
            for _ in range(2)
        ]
        wait_until(lambda: len(pids) == 6)
        executor.close(kill=kill)
        assert [failure_of(future.result(0)).kind for future in futures] == ["interrupted"] * 2
        wait_until(lambda: not any(map(psutil.pid_exists, pids)))

    def test_where_a_trial_runs_is_told_and_noted(self, make: Make, tmp_path: Path) -> None:
        executor = make(1, announce=True)
        told: list[dict[str, Any]] = []
        directory = tmp_path / "trials" / "3"
        directory.mkdir(parents=True)
        payload = {"directory": str(directory), "log": str(directory / "log.txt"), "lines": 2}
        run(executor, "print_lines", payload, on_event=told.append)
        assert [(event["stage"], event["attempt"]) for event in told] == [("placed", 1)]
        assert (directory / "log.txt").read_text().startswith(f"[attempt 1 on node {told[0]['node']} (")
        assert set(listing(directory)) == {"log.txt"}

    def test_data_are_loaded_once_for_many_trials(self, make: Make, tmp_path: Path) -> None:
        executor = make(2)
        futures = [executor.submit(RAY_JOBS + "load_once", {"folder": str(tmp_path)}) for _ in range(40)]
        for future in futures:
            value_of(future.result(PATIENCE))
        assert len(list(tmp_path.iterdir())) <= 2

    def test_one_measurement_at_a_time_on_a_device(self, make: Make, tmp_path: Path) -> None:
        executor = make(2)
        futures = [
            executor.submit(RAY_JOBS + "overlap", {"folder": str(tmp_path)}, where="jetson") for _ in range(4)
        ]
        training = executor.submit(JOBS + "double", {"x": 2})
        assert {value_of(future.result(PATIENCE))["at_a_time"] for future in futures} == {1}
        assert value_of(training.result(PATIENCE)) == {"x": 4}

    def test_a_resource_that_no_node_has_is_refused(self, make: Make) -> None:
        with pytest.raises(
            UserMistake, match=r"no node of the cluster has the resource 'camera'; start one with"
        ):
            make(1).submit(JOBS + "echo", {}, where="camera")

    def test_a_trial_may_ask_for_a_measurement_while_it_runs(self, make: Make) -> None:
        executor = make(1)

        def measure(event: dict[str, Any]) -> dict[str, Any] | None:
            return executor.submit(JOBS + "identify", {}, where="jetson").result(PATIENCE).value

        reply = value_of(run(executor, "ask_once", on_event=measure))["reply"]
        assert reply["pid"] > 0


@pytest.mark.slow
class TestWithoutASharedDisk:
    """``shared=False``: the node is treated as if it did not see the driver's files."""

    def payload(self, tmp_path: Path, **more: Any) -> dict[str, Any]:
        directory = tmp_path / "run" / "trials" / "0"
        directory.mkdir(parents=True)
        scale = tmp_path / "run" / "reference.json"
        return {"directory": str(directory), "log": str(directory / "log.txt"), "scale": str(scale), **more}

    def test_files_come_back(self, make: Make, tmp_path: Path) -> None:
        executor = make(1, shared=False)
        payload = self.payload(tmp_path, megabytes=20)
        value = value_of(executor.submit(RAY_JOBS + "write_files", payload).result(PATIENCE))
        directory = Path(payload["directory"])
        assert Path(value["directory"]).name == "0"
        assert value["directory"] != payload["directory"]
        assert set(listing(directory)) == {"weights.safetensors", "result.json", "sub/note", "log.txt"}
        assert (directory / "weights.safetensors").stat().st_size == 20 << 20
        assert "writing" in (directory / "log.txt").read_text()
        assert not list(directory.rglob("*.tmp"))

    def test_a_trial_that_moves_goes_on_from_its_checkpoint(self, make: Make, tmp_path: Path) -> None:
        executor = make(1, shared=False)
        payload = self.payload(tmp_path, epochs=6)
        epochs: list[int] = []

        def on_event(event: dict[str, Any]) -> None:
            epochs.append(event["epoch"])
            if event["epoch"] == 4 and epochs.count(4) == 1:
                executor.kill(executor._slots[0].actor)
                # Its process goes on until the cluster has passed the kill on, and must not come to the end.
                wait_until(lambda: not psutil.pid_exists(event["pid"]))

        outcome = executor.submit(RAY_JOBS + "train", payload, on_event=on_event).result(PATIENCE)
        assert value_of(outcome) == {"epochs": 6}
        assert outcome.attempts == 2
        again = epochs[epochs.index(4) + 1 :]
        assert 1 not in again, epochs
        assert again[-1] == 6

    def test_nothing_stays_on_the_node(self, make: Make, tmp_path: Path) -> None:
        executor = make(1, shared=False)
        payload = self.payload(tmp_path, megabytes=1)
        value = value_of(executor.submit(RAY_JOBS + "write_files", payload).result(PATIENCE))
        executor.close()
        assert not Path(value["directory"]).parent.exists()

    def test_a_small_object_store_is_enough_for_large_weights(self, make: Make, tmp_path: Path) -> None:
        """Three times the store: parts are carried, each of which fits."""
        executor = make(1, shared=False)
        payload = self.payload(tmp_path, megabytes=3 * (STORE >> 20))
        value_of(executor.submit(RAY_JOBS + "write_files", payload).result(PATIENCE))
        assert (Path(payload["directory"]) / "weights.safetensors").stat().st_size == 3 * STORE

    def test_a_shared_disk_is_recognised(self, make: Make, tmp_path: Path) -> None:
        payload = self.payload(tmp_path, megabytes=1)
        value = value_of(make(1).submit(RAY_JOBS + "write_files", payload).result(PATIENCE))
        assert value["directory"] == payload["directory"]
        assert not list(tmp_path.rglob(".seen-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"--ray 127\.0\.0\.1:1: no answer \(Connection refused\); give the address"),
        ("nowhere", r"--ray nowhere: must be local, auto, HOST:PORT or ray://HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_one_line(address: str, message: str) -> None:
    script = (
        "import sys\nfrom nas.errors import UserMistake\nfrom nas.executors import RayExecutor\n"
        "try:\n    RayExecutor(1, address=sys.argv[1])\nexcept UserMistake as mistake:\n    print(mistake)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, address],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout + done.stderr
    with pytest.raises(ValueError, match=message):
        raise ValueError(lines[0])


@pytest.mark.slow
def test_a_node_without_our_code_is_told_in_one_line(ray_here: Any) -> None:
    executor = RayExecutor(
        1, address="auto", runtime_env={"env_vars": {"PYTHONPATH": ""}}, setup="absent_module"
    )
    try:
        failure = failure_of(executor.submit(JOBS + "echo", {}).result(PATIENCE))
        assert (
            failure.reason
            == "setup 'absent_module' failed: ModuleNotFoundError: No module named 'absent_module'"
        )
    finally:
        executor.close(kill=True)


@pytest.mark.slow
def test_a_start_that_never_succeeds_stops_the_run(ray_here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.executors import ray, ray_slot

    monkeypatch.setattr(ray_slot, "_START_PAUSES", (0.1,))
    monkeypatch.setattr(ray, "Host", NoHost)
    executor = RayExecutor(1, address="auto")
    try:
        future = executor.submit(JOBS + "echo", {})
        with pytest.raises(
            RunStopped, match=r"no worker can be started on the cluster: .*No module named 'mine'"
        ):
            future.result(PATIENCE)
        with pytest.raises(RunStopped, match=r"installed or by ray_runtime_env"):
            executor.submit(JOBS + "echo", {})
    finally:
        executor.close(kill=True)
