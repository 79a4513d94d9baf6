"""Real clusters of several nodes on this machine, and what is done to them while they search."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from nas.executors import RayExecutor
from nas.reader import read_run
from tests.conformance.executor import failure_of, value_of
from tests.nas.data_jobs import DATA_JOBS
from tests.nas.faults.bench import Bench, pause, wait_until
from tests.nas.ray_jobs import RAY_JOBS, EvenHost, SlowHost

ROOT = Path(__file__).parents[3]
PATIENCE = 60.0

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(180)]

NewCluster = Callable[..., Any]


@pytest.fixture
def new_cluster() -> Iterator[NewCluster]:
    """Clusters with a head without processors, so that only other nodes work, and any of them can be lost."""
    ray = pytest.importorskip("ray", reason="needs pip install 'nas-toolkit[ray]'")
    from ray.cluster_utils import Cluster

    made = []

    def build(nodes: int, *, store: int = 80 << 20, **first: Any) -> Any:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": store, "include_dashboard": False},
        )
        made.append(cluster)
        cluster.workers = [
            cluster.add_node(
                num_cpus=1,
                object_store_memory=store,
                env_vars={"NAS_TEST_NODE": str(number)},
                **(first if number == 0 else {}),
            )
            for number in range(nodes)
        ]
        cluster.wait_for_nodes()
        return cluster

    yield build
    ray.shutdown()
    for cluster in made:
        cluster.shutdown()


@pytest.fixture
def make() -> Iterator[Callable[..., RayExecutor]]:
    made: list[RayExecutor] = []

    def build(cluster: Any, workers: int | None = None, **options: Any) -> RayExecutor:
        made.append(RayExecutor(workers, address=cluster.address, **{"grace_seconds": 0.5, **options}))
        return made[-1]

    yield build
    for executor in made:
        executor.close(kill=True)


def check_results(out: Path, trials: int) -> None:
    """Every trial is complete, once, and its record is whole."""
    stored = read_run(out).study.trials()
    assert [trial.number for trial in stored] == list(range(trials))
    assert [trial.state for trial in stored] == ["complete"] * trials
    assert len({trial.key for trial in stored}) == trials


# -- losing nodes ------------------------------------------------------------------------------------------------------


def test_work_of_a_lost_node_is_done_elsewhere(new_cluster: NewCluster, make: Any, tmp_path: Path) -> None:
    cluster = new_cluster(3)
    executor = make(cluster)
    assert executor.workers == 3
    wait_until(lambda: executor.capacity == 3, PATIENCE, "three places")
    places: dict[int, list[str]] = {number: [] for number in range(12)}
    lost = cluster.workers[1].node_id
    held, removed = threading.Event(), threading.Event()

    def submit(number: int) -> Any:
        directory = tmp_path / str(number)
        directory.mkdir()

        def on_event(event: dict[str, Any]) -> None:
            if event["stage"] == "placed":
                places[number].append(event["node_id"])
            elif places[number][-1] == lost and event["epoch"] >= 3:
                held.set()
                removed.wait(PATIENCE)  # so that the node is lost in the midst of a trial

        executor.announce = True
        payload = {"directory": str(directory), "epochs": 8}
        return executor.submit(RAY_JOBS + "train", payload, on_event=on_event, tag=f"trial {number}")

    futures = [submit(number) for number in range(12)]
    assert held.wait(PATIENCE)
    try:
        cluster.remove_node(cluster.workers[1], allow_graceful=False)
    finally:
        removed.set()
    outcomes = [future.result(PATIENCE) for future in futures]
    assert [value_of(outcome) for outcome in outcomes] == [{"epochs": 8}] * 12
    moved = [number for number in places if len(places[number]) > 1]
    assert [number for number in moved if lost not in places[number][:-1]] == []
    assert len(moved) == 1
    assert places[moved[0]][-1] != lost
    assert sorted(outcome.attempts for outcome in outcomes) == [1] * 11 + [2]
    # The places that are left were told, and a node that joins later is used.
    assert executor.capacity == 2
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    wait_until(lambda: executor.capacity == 3, PATIENCE, "the new node's place")


def test_a_hanging_node_is_given_up(
    new_cluster: NewCluster, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its actor is stopped: it neither works nor dies, as on a machine that swaps itself to death."""
    from nas.executors import ray_slot

    cluster = new_cluster(2)
    executor = make(cluster, retries=1)
    wait_until(lambda: executor.capacity == 2, PATIENCE, "two places")
    monkeypatch.setattr(ray_slot.RaySlot._result, "__defaults__", (8.0,))
    pids: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        pids.append(event["actor"])
        if len(pids) == 1:
            pause(event["actor"])

    outcome = executor.submit(RAY_JOBS + "name_actor", {}, on_event=stop).result(PATIENCE)
    assert value_of(outcome) == {}
    assert outcome.attempts == 2
    assert len(set(pids)) == 2


def test_a_straggler_holds_nobody_up(
    new_cluster: NewCluster, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs out of time on a node that is slower than the others is done elsewhere; the others do not wait."""
    from nas.executors import ray as executor_module

    monkeypatch.setattr(executor_module, "Host", SlowHost)
    cluster = new_cluster(3)
    executor = make(cluster)
    wait_until(lambda: executor.capacity == 3, PATIENCE, "three places")
    payload = {"seconds": 0.1, "slow": "0"}
    futures = [executor.submit(RAY_JOBS + "name_node", payload, time_limit=3.0) for _ in range(12)]
    outcomes = [future.result(PATIENCE) for future in futures]
    assert {value_of(outcome)["node"] for outcome in outcomes} == {"1", "2"}
    assert sorted(outcome.attempts for outcome in outcomes)[-1] == 2
    assert sum(outcome.attempts == 1 for outcome in outcomes) >= 10


def test_what_is_too_slow_everywhere_fails_at_once(
    new_cluster: NewCluster, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nas.executors import ray as executor_module

    monkeypatch.setattr(executor_module, "Host", EvenHost)
    executor = make(new_cluster(2))
    wait_until(lambda: executor.capacity == 2, PATIENCE, "two places")
    outcome = executor.submit(RAY_JOBS + "name_node", {"seconds": 100.0}, time_limit=1.0).result(PATIENCE)
    assert failure_of(outcome).kind == "timeout"
    assert outcome.attempts == 1


def test_a_full_object_store_spills_and_nothing_is_lost(
    new_cluster: NewCluster, make: Any, tmp_path: Path
) -> None:
    """The driver sends a checkpoint that is larger than the store of the node, and gets weights that are too."""
    cluster = new_cluster(2, store=76 << 20)
    executor = make(cluster, shared=False)
    futures = []
    for number in range(4):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "earlier").write_bytes(b"e" * (100 << 20))
        payload = {"directory": str(directory), "megabytes": 100}
        futures.append(executor.submit(RAY_JOBS + "write_files", payload))
    for number, future in enumerate(futures):
        value_of(future.result(PATIENCE))
        assert (tmp_path / str(number) / "weights.safetensors").stat().st_size == 100 << 20


def test_training_stays_off_the_node_that_measures(new_cluster: NewCluster, make: Any) -> None:
    cluster = new_cluster(3, resources={"jetson": 1})
    executor = make(cluster, measure_on="jetson")
    assert executor.workers == 2
    jetson = cluster.workers[0].node_id
    measured = [executor.submit(RAY_JOBS + "name_node", {}, where="jetson") for _ in range(3)]
    trained = [executor.submit(RAY_JOBS + "name_node", {"seconds": 0.3}) for _ in range(8)]
    assert {value_of(future.result(PATIENCE))["node"] for future in measured} == {"0"}
    assert {value_of(future.result(PATIENCE))["node"] for future in trained} == {"1", "2"}
    assert {slot.node for slot in executor._slots if slot.where == "jetson"} == {jetson}


def test_data_are_decoded_once_on_each_node(new_cluster: NewCluster, make: Any, tmp_path: Path) -> None:
    """Two nodes with a cache each, two places on each of them, every trial asking for the data."""
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    for number in range(20):
        path = data / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    executor = make(new_cluster(2), cpus_per_trial=0.5)
    assert executor.workers == 4
    wait_until(lambda: executor.capacity == 4, PATIENCE, "four places")
    payload = {"data": str(data), "folder": str(tmp_path), "places": 4}
    futures = [executor.submit(f"{DATA_JOBS}load", payload) for _ in range(12)]
    found = [value_of(future.result(PATIENCE)) for future in futures]
    decodings = [line.split()[0] for line in (tmp_path / "marks").read_text().splitlines()]
    assert sorted(decodings) == ["0", "1"]
    by_node = {node: [one for one in found if one["node"] == node] for node in ("0", "1")}
    for ones in by_node.values():
        assert len({one["pid"] for one in ones}) == 2
        assert len({one["inode"] for one in ones}) == 1
    assert len({one["inode"] for one in found}) == 2
    assert len({one["sum"] for one in found}) == 1
    assert {one["own_kib"] for one in found} == {0}


# -- the whole program -------------------------------------------------------------------------------------------------


def digits(cluster: Any, out: Path, *more: str) -> list[str]:
    return [
        "search", "--space", "efficient_transformer", "--task", "image_classification", "--epochs", "2",
        "--trials", "6", "--pruner", "none", "--ray", cluster.address, "--out", str(out), *more,
    ]  # fmt: skip


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment.pop("RAY_ADDRESS", None)
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "nas", *arguments],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def finished(out: Path) -> int:
    return len(list(out.glob("trials/*/result.json")))


@pytest.mark.timeout(300)
def test_search_on_digits_loses_a_node_and_nothing_else(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(4)
    out, log = tmp_path / "run", tmp_path / "log"
    driver = start(digits(cluster, out), log)
    try:
        wait_until(lambda: finished(out) >= 1 or driver.poll() is not None, 200, "the first result")
        cluster.remove_node(cluster.workers[2], allow_graceful=False)
        assert driver.wait(200) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    check_results(out, 6)
    assert "Traceback" not in log.read_text()
    assert {trial.result.latency is not None for trial in read_run(out).study.trials() if trial.result} == {
        True
    }


def test_killed_driver_is_resumed(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(3)
    bench = Bench(tmp_path / "bench", trials=12, workers=3, seconds=0.7, extra=["--ray", cluster.address])
    driver = start_bench(bench)
    wait_until(lambda: finished(bench.out) >= 4, 90, "the first results")
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    bench.check_no_orphans()
    recorded, before = bench.recorded(), bench.evaluations()
    code, text = bench.nas("resume", str(bench.out))
    assert code == 0, text
    check_results(bench.out, 12)
    again = {key for key in recorded if bench.evaluations()[key] > before[key]}
    assert not again
    assert sum(bench.evaluations().values()) <= 12 + 3
    bench.check_no_leftovers()
    bench.check_no_orphans()


def test_a_lost_head_is_told(new_cluster: NewCluster) -> None:
    """In a program of its own: Ray ends those that have no head any more."""
    cluster = new_cluster(1)
    script = (
        "import sys\nfrom nas.errors import RunStopped\nfrom nas.executors import ray\n"
        "ray._HEADLESS_SECONDS = 8.0\n"
        "executor = ray.RayExecutor(1, address=sys.argv[1])\n"
        f"executor.submit('{RAY_JOBS}name_node', {{}}).result(60)\n"
        f"running = [executor.submit('{RAY_JOBS}name_node', {{'seconds': 60.0}}) for _ in range(3)]\n"
        "print('ready', flush=True)\n"
        "for future in running:\n"
        "    try:\n        future.result(60)\n    except RunStopped as stopped:\n        print(stopped, flush=True)\n"
        "executor.close(kill=True)\nprint('closed', flush=True)\nimport os\nos._exit(0)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script, cluster.address], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "ready\n"
    cluster.head_node.all_processes["gcs_server"][0].process.kill()
    text, _ = driver.communicate(timeout=PATIENCE)
    lines = text.splitlines()
    assert len(lines) == 4, text
    assert len(set(lines[:3])) == 1
    with pytest.raises(
        ValueError, match=r"the head of the Ray cluster has not answered for \d+ s; go on with 'nas resume"
    ):
        raise ValueError(lines[0])
    assert lines[3] == "closed"


def test_ctrl_c_leaves_nothing_on_the_cluster(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(2)
    bench = Bench(tmp_path / "bench", trials=50, workers=2, seconds=0.5, extra=["--ray", cluster.address])
    driver = start_bench(bench)
    wait_until(lambda: finished(bench.out) >= 2, 90, "the first results")
    driver.send_signal(signal.SIGINT)
    text, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130, text
    assert "stopped by SIGINT; go on with: nas resume" in text
    bench.check_no_orphans()
    wait_until(lambda: not actors(cluster), 30, "the last actor to end")


def test_ctrl_c_in_a_terminal_ends_a_local_ray(tmp_path: Path) -> None:
    """The terminal interrupts every process of the group, those of Ray among them."""
    pytest.importorskip("ray", reason="needs pip install 'nas-toolkit[ray]'")
    bench = Bench(tmp_path / "bench", trials=50, workers=2, seconds=0.5, extra=["--ray", "local"])
    driver = bench.start()
    wait_until(lambda: finished(bench.out) >= 1, 90, "the first result")
    os.killpg(driver.pid, signal.SIGINT)
    text, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130, text
    assert "stopped by SIGINT; go on with: nas resume" in text
    assert "Traceback" not in text
    wait_until(lambda: not session(driver.pid), 30, "the last process of the cluster to end")


def test_a_local_ray_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs pip install 'nas-toolkit[ray]'")
    bench = Bench(tmp_path / "bench", trials=50, workers=2, seconds=0.5, extra=["--ray", "local"])
    driver = bench.start()
    wait_until(lambda: finished(bench.out) >= 1, 90, "the first result")
    assert any("raylet" in command for command in session(driver.pid))
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    wait_until(lambda: not session(driver.pid), 30, "the last process of the cluster to end")


def session(number: int) -> list[str]:
    """Commands of living processes of a session; not Ray's agents, which take up to a minute to give up the head."""
    found = []
    for process in psutil.process_iter(["name", "status"]):
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return [command for command in found if "Agent" not in command]


def start_bench(bench: Bench) -> subprocess.Popen[str]:
    """The nodes were started before the bench: what their processes need goes by the runtime environment."""
    recipe = bench.folder / "recipe.yaml"
    variables = "".join(f"    {name}: '{value}'\n" for name, value in bench.environment().items())
    recipe.write_text(f"space: unused\nray_runtime_env:\n  env_vars:\n{variables}", encoding="utf-8")
    bench.extra += ["--recipe", str(recipe)]
    return bench.start()


def actors(cluster: Any) -> list[int]:
    """Processes of actors of ours that run on the nodes of ``cluster``."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.info["cmdline"] or []).startswith("ray::Host") and _is_of(process, cluster):
                found.append(process.pid)
    return found


def _is_of(process: psutil.Process, cluster: Any) -> bool:
    raylets = {
        node.all_processes["raylet"][0].process.pid
        for node in cluster.list_all_nodes()
        if node.all_processes.get("raylet")
    }
    return bool(raylets & {parent.pid for parent in process.parents()})
