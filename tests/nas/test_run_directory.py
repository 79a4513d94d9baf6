"""The run directory: who holds it, what is left when a start is refused."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from nas.errors import RunStopped, UserMistake
from nas.run_directory import RunDirectory


def test_a_second_owner_is_refused_by_name(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.acquire()
    with pytest.raises(
        UserMistake,
        match=rf"run: in use by another driver \(host {socket.gethostname()}, PID {os.getpid()}, started \d+ s ago\); "
        "wait for it, stop it, or use another --out",
    ):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_acquiring_twice_is_no_conflict_with_oneself(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    run.acquire()
    run.release()
    with pytest.raises(RunStopped, match="without holding its lock"):
        run.require_lock()


def test_the_lock_of_a_dead_process_is_free_and_its_name_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.run_directory._OWNER_SECONDS", 0.1)
    code = (
        "import os, sys; from pathlib import Path; from nas.run_directory import RunDirectory; "
        "run = RunDirectory(Path(sys.argv[1])); run.acquire(); os.kill(os.getpid(), 9)"
    )
    dead = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")])
    dead.wait(timeout=60)
    run = RunDirectory(tmp_path / "run")
    assert json.loads((run.path / "driver.lock").read_text())["pid"] == dead.pid
    # Another driver has just taken the lock and has not written its name yet.
    with open(run.path / "driver.lock", "r+") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        with pytest.raises(UserMistake, match=r"in use by another driver; wait"):
            run.acquire()
    run.acquire()
    run.release()


def test_what_a_killed_driver_was_just_starting_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its fork and its exec a worker has the driver's handles, the lock among them."""
    monkeypatch.setattr("nas.run_directory._OWNER_SECONDS", 30.0)
    code = (
        "import os, sys, time; from pathlib import Path; from nas.run_directory import RunDirectory; "
        "run = RunDirectory(Path(sys.argv[1])); run.acquire(); go = Path(sys.argv[2]);\n"
        "if os.fork() == 0:\n"
        "    while not go.exists(): time.sleep(0.01)\n"
        "    os._exit(0)\n"
        "os.kill(os.getpid(), 9)"
    )
    dead = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "go")])
    dead.wait(timeout=60)
    run, begun = RunDirectory(tmp_path / "run"), threading.Event()

    def take() -> None:
        begun.set()
        run.acquire()

    with ThreadPoolExecutor() as threads:
        taken = threads.submit(take)
        assert begun.wait(60)
        assert not wait([taken], 0.2).done
        (tmp_path / "go").touch()
        taken.result(60)
    run.release()


def test_the_lock_of_a_removed_directory_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused start removes its directory while the next driver has the old lock file open already."""
    run = RunDirectory(tmp_path / "run")
    real = fcntl.flock
    removed = []

    def remove_once(handle: object, operation: int) -> None:
        if not removed:
            removed.append(True)
            (run.path / "driver.lock").unlink()
            run.path.rmdir()
        real(handle, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", remove_once)
    run.acquire()
    monkeypatch.undo()
    with pytest.raises(UserMistake, match="in use by another driver"):
        RunDirectory(run.path).acquire()
    run.release()


def test_leftovers_of_dead_writers_go_and_others_stay(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    (run.trials / "3").mkdir(parents=True)
    for name in (".recipe.yaml.999999999-1.tmp", "trials/3/.result.json.999999999-7.tmp"):
        (run.path / name).write_text("")
    (run.path / ".export-3.999999999.tmp").mkdir()
    (run.path / ".export-3.999999999.tmp" / "weights.safetensors").write_text("")
    alive = run.path / f".pareto.csv.{os.getppid()}-1.tmp"
    alive.write_text("")
    (run.path / "notes.tmp").write_text("mine")
    run.acquire()
    run.release()
    names = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    assert names == {"driver.lock", "notes.tmp", alive.name}


def test_a_start_that_was_refused_leaves_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "run")
    run.acquire()
    (run.path / ".environment.json.123-1.tmp").write_text("")
    assert run.is_empty()
    run.discard_if_empty()
    run.release()
    assert not run.path.exists()


def test_a_run_or_foreign_files_are_never_discarded(tmp_path: Path) -> None:
    for name in ("recipe.yaml", "thesis.txt"):
        run = RunDirectory(tmp_path / name)
        run.acquire()
        (run.path / name).write_text("")
        run.discard_if_empty()
        run.release()
        assert (run.path / name).exists()
        assert not run.is_empty()


def test_a_directory_that_vanished_is_no_error_at_the_end(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    (run.path / "driver.lock").unlink()
    run.path.rmdir()
    run.discard_if_empty()
    run.release()
    assert not run.path.exists()


def test_what_is_open_is_closed_before_the_lock_is_given_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    seen = []
    run.on_release(lambda: seen.append((run.path / "driver.lock").read_text()))
    run.release()
    assert json.loads(seen[0])["pid"] == os.getpid()
    assert (run.path / "driver.lock").read_text() == ""


@pytest.mark.parametrize(
    ("names", "holds"),
    [
        (["recipe.yaml"], True),
        (["study.db", "environment.json"], True),
        (["study.db"], False),
        (["environment.json"], False),
        ([], False),
    ],
)
def test_what_counts_as_a_run(tmp_path: Path, names: list[str], holds: bool) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    assert RunDirectory(tmp_path).holds_run() == holds
    if not holds:
        with pytest.raises(UserMistake, match="not a run directory"):
            RunDirectory.existing(tmp_path)


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserMistake, match=r"--out .*file: cannot be written \(.*\); choose another directory"
    ):
        RunDirectory(tmp_path / "file").acquire()
