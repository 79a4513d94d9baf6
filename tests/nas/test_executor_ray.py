"""The Ray executor on a real Ray of this machine, and its parts that need none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nas.config import SearchConfig
from nas.errors import RunStopped, UserMistake
from nas.executors import Executor, Outcome, RayExecutor
from nas.executors.ray_cluster import Cluster, Need, _mistake
from nas.executors.ray_files import CHUNK, Mirror, carried, listing, read_part, write_all
from nas.executors.ray_slot import RayJob, _is_gpu_full
from nas.executors.ray_targets import split_ray_target
from nas.resolve import changed_keys, resolve
from tests.conformance.executor import JOBS, ExecutorConformance, failure_of, value_of
from tests.nas.ray_jobs import RAY_JOBS, NoHost

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


# -- without Ray -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cpu:1", (None, "cpu:1")),
        (" cuda:0+bf16@8/224 ", (None, "cuda:0+bf16@8/224")),
        ("ray:jetson/cpu", ("jetson", "cpu")),
        ("ray:my-phone_2.b/cpu:4+onnxruntime@8/224x192", ("my-phone_2.b", "cpu:4+onnxruntime@8/224x192")),
        ("rays", (None, "rays")),
    ],
)
def test_the_resource_of_a_target(text: str, parts: tuple[str | None, str]) -> None:
    assert split_ray_target(text) == parts


@pytest.mark.parametrize(
    "text", ["ray:", "ray:jetson", "ray:/cpu", "ray:jetson/", "ray:a b/cpu", "ray:2x/cpu"]
)
def test_a_target_without_resource_or_rest_is_refused(text: str) -> None:
    with pytest.raises(UserMistake, match=r"must be ray:RESOURCE/TARGET"):
        split_ray_target(text)


def test_a_processor_is_no_custom_resource() -> None:
    with pytest.raises(
        UserMistake, match=r"GPU is not a custom resource; name one that a node was started with"
    ):
        split_ray_target("ray:GPU/cuda")


@pytest.mark.parametrize(
    ("need", "resources", "times"),
    [
        (Need(1), {"CPU": 4.0}, 4),
        (Need(3), {"CPU": 8.0}, 2),
        (Need(0.1), {"CPU": 0.3}, 3),  # 0.3 / 0.1 is 2.9999999999999996
        (Need(1, 0.25), {"CPU": 16.0, "GPU": 2.0}, 8),
        (Need(1, 1), {"CPU": 16.0}, 0),
        (Need(2, 0, "jetson"), {"CPU": 16.0, "jetson": 1.0}, 1),
        (Need(0, 0, "jetson"), {"jetson": 3.0}, 3),
        (Need(0), {"CPU": 4.0}, 0),
    ],
)
def test_how_often_a_need_fits(need: Need, resources: dict[str, float], times: int) -> None:
    assert need.times_in(resources) == times


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, r"workers=0 must be from 1 to 4096"),
        ({"cpus_per_trial": 0}, r"cpus_per_trial=0 must be more than 0"),
        ({"gpus_per_trial": -1}, r"gpus_per_trial=-1 must be 0, a fraction below 1, or a whole number"),
        ({"gpus_per_trial": 1.5}, r"gpus_per_trial=1\.5 must be"),
        ({"retries": -1}, r"retries=-1 must be at least 0"),
        ({"grace_seconds": -1}, r"grace_seconds=-1 must be at least 0"),
        ({"memory_limit_bytes": 0}, r"memory_limit_bytes=0 must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused_before_ray_is_asked(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserMistake, match=message):
        RayExecutor(**options)


def test_without_ray_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserMistake, match=r"--ray auto: Ray is not installed; pip install 'nas-toolkit\[ray\]'"
    ):
        Cluster("auto")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            ConnectionError("Could not find any running Ray instance. Please specify the one to connect to."),
            "--ray auto: no Ray runs on this machine; start one with 'ray start --head', or give --ray local",
        ),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9\n    Python: 3.10"),
            "--ray auto: Version mismatch: The cluster was started with: Ray: 2.9 Python: 3.10; allowed: local, auto, "
            "HOST:PORT or ray://HOST:PORT",
        ),
    ],
)
def test_what_ray_says_becomes_one_line(raised: Exception, told: str) -> None:
    assert str(_mistake("auto", raised)) == told


@pytest.mark.parametrize(
    "text", ["CUDA out of memory. Tried", "CUDA error: out of memory", "x CUBLAS_STATUS_ALLOC_FAILED"]
)
def test_a_full_gpu_is_told_from_a_full_machine(text: str) -> None:
    assert _is_gpu_full(f"OutOfMemoryError: {text}")
    assert not _is_gpu_full("used 300 MB of memory, more than the limit of 200 MB")


def test_the_order_of_a_job_survives_as_json() -> None:
    payload = {"text": "\ud800 ä", "loss": float("inf"), "directory": "runs/a"}
    job = RayJob("m:f", payload, "trial 3", None, 5.0, None)
    order = json.loads(job.order("[attempt 1]"))
    assert (order["function"], order["payload"], order["time_limit"], order["note"]) == (
        "m:f",
        payload,
        5.0,
        "[attempt 1]",
    )
    assert job.directory == Path.cwd() / "runs/a"


class TestResolve:
    """What the cluster changes of a configuration before it is reached."""

    def resolve(self, **given: Any) -> SearchConfig:
        return resolve(SearchConfig.parse({"space": "toy", "ray": "auto", **given}))

    def test_the_workers_stay_open_until_the_room_is_known(self) -> None:
        assert self.resolve().workers is None
        assert self.resolve(workers=3).workers == 3
        assert self.resolve(ray=None).workers is not None

    def test_the_gpus_of_the_nodes_are_not_looked_for_here(self) -> None:
        config = self.resolve(device="cuda")
        assert (config.gpus_per_trial, config.target) == (1.0, "cuda")
        assert self.resolve(device="cuda", gpus_per_trial=0.25).gpus_per_trial == 0.25

    def test_a_target_keeps_its_resource(self) -> None:
        assert self.resolve(target="ray:jetson/cpu:1+bf16").target == "ray:jetson/cpu:1+bf16"
        with pytest.raises(
            UserMistake, match=r"--target ray:jetson/cpu: needs a cluster; give --ray ADDRESS as well"
        ):
            self.resolve(ray=None, target="ray:jetson/cpu")

    def test_a_run_may_go_on_with_another_cluster(self) -> None:
        recorded = self.resolve(target="ray:jetson/cpu")
        assert changed_keys({"ray": "10.0.0.1:6379", "target": "ray:jetson/cpu"}, recorded) == []
        assert changed_keys({"target": "ray:phone/cpu"}, recorded) == [
            "target: ray:jetson/cpu -> ray:phone/cpu"
        ]

    def test_the_working_directory_is_written_down_absolute(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert self.resolve(ray_runtime_env={"working_dir": "."}).ray_runtime_env == {
            "working_dir": str(tmp_path)
        }

    @pytest.mark.parametrize("values", [{"cpus_per_trial": 0}, {"gpus_per_trial": -1}, {"ray": ""}])
    def test_values_out_of_range(self, values: dict[str, Any]) -> None:
        with pytest.raises(UserMistake, match=next(iter(values))):
            self.resolve(**values)


class TestMirror:
    """Both sides of the carrying of files, in one process."""

    @pytest.fixture
    def here(self, tmp_path: Path) -> Path:
        (tmp_path / "here").mkdir()
        return tmp_path / "here"

    @pytest.fixture
    def there(self, tmp_path: Path) -> Path:
        (tmp_path / "there" / "checkpoint").mkdir(parents=True)
        return tmp_path / "there"

    def pull(self, mirror: Mirror, there: Path, small: dict[str, bytes] | None = None) -> list[str]:
        asked: list[str] = []

        def read(name: str, stamp: tuple[int, int], offset: int) -> bytes | None:
            asked.append(name)
            return read_part(there / name, stamp, offset)

        mirror.pull(listing(there), small or {}, read)
        return asked

    def test_files_of_any_size_arrive_whole(self, here: Path, there: Path) -> None:
        data = os.urandom(CHUNK + 17)
        (there / "weights.safetensors").write_bytes(data)
        (there / "checkpoint" / "epoch-0001.json").write_bytes(b"{}")
        (there / "empty").touch()
        assert self.pull(Mirror(here), there).count("weights.safetensors") == 2
        assert (here / "weights.safetensors").read_bytes() == data
        assert set(listing(here)) == {"weights.safetensors", "checkpoint/epoch-0001.json", "empty"}

    def test_records_come_after_what_they_speak_of_and_the_result_last(self, here: Path, there: Path) -> None:
        for name in ("result.json", "a.json", "z.safetensors", "checkpoint/epoch-0001.json"):
            (there / name).write_text("x")
        assert self.pull(Mirror(here), there) == [
            "z.safetensors",
            "a.json",
            "checkpoint/epoch-0001.json",
            "result.json",
        ]

    def test_what_has_come_already_is_not_asked_for_again(self, here: Path, there: Path) -> None:
        mirror = Mirror(here)
        (there / "a").write_text("1")
        assert self.pull(mirror, there, {"a": b"1"}) == []
        assert self.pull(mirror, there) == []
        (there / "a").write_text("12")
        assert self.pull(mirror, there) == ["a"]
        assert (here / "a").read_text() == "12"

    def test_files_that_were_taken_along_do_not_come_back_unchanged(self, here: Path, there: Path) -> None:
        (here / "checkpoint").mkdir()
        (here / "checkpoint" / "epoch-0003.json").write_text("3")
        write_all(there, carried(here))
        assert (there / "checkpoint" / "epoch-0003.json").read_text() == "3"
        assert self.pull(Mirror(here), there) == []

    def test_an_old_checkpoint_goes_on_both_sides_and_what_is_ours_stays(
        self, here: Path, there: Path
    ) -> None:
        (here / "ours").touch()
        mirror = Mirror(here)
        (there / "checkpoint" / "epoch-0001.json").write_text("1")
        self.pull(mirror, there)
        (there / "checkpoint" / "epoch-0001.json").unlink()
        self.pull(mirror, there)
        assert set(listing(here)) == {"ours"}

    def test_a_file_that_changes_while_it_is_read_is_left_out(self, here: Path, there: Path) -> None:
        (there / "a").write_bytes(b"1" * (CHUNK + 5))

        def read(name: str, stamp: tuple[int, int], offset: int) -> bytes | None:
            part = read_part(there / name, stamp, offset)
            (there / name).write_bytes(b"2" * 9)
            return part

        Mirror(here).pull(listing(there), {}, read)
        assert list(here.iterdir()) == []

    @pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
    def test_nothing_is_written_outside_the_directory(self, here: Path, name: str) -> None:
        Mirror(here).pull({name: (1, 1)}, {name: b"x"}, lambda *_: b"x")
        assert [path.name for path in here.parent.rglob("*") if path.is_file()] == []

    def test_unfinished_files_are_nobodys_business(self, there: Path) -> None:
        (there / ".a.123-1.tmp").touch()
        assert listing(there) == {}


# -- with Ray ----------------------------------------------------------------------------------------------------------


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
        pids: list[int] = []
        outcome = run(executor, job, time_limit=0.5, on_event=lambda event: pids.append(event["pid"]))
        assert failure_of(outcome).kind == "timeout"
        assert outcome.attempts == 1
        wait_until(lambda: not psutil.pid_exists(pids[0]))
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
        begun = threading.Event()
        file = tmp_path / "go"
        future = executor.submit(
            JOBS + "wait_for_file", {"file": str(file)}, on_event=lambda event: begun.set()
        )
        assert begun.wait(PATIENCE)
        actor = executor._slots[0].actor
        executor.kill(actor)
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
