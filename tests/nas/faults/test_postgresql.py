"""Several real drivers on one study, on PostgreSQL and on Optuna's journal: nothing twice, nothing lost."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from nas.reader import read_run
from nas.study import StoredTrial
from tests.nas.faults.bench import HELD, TOYS, Bench, pause, wait_until
from tests.nas.faults.postgresql import Server, start_server

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = start_server()
    yield made
    made.remove()


@pytest.fixture(params=["postgresql", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "journal":
        return f"journal:{tmp_path}/journal.log"
    made: Server = request.getfixturevalue("server")
    return made.create(f"study_{abs(hash(str(tmp_path)))}")


class Joined(Bench):
    """One of several drivers on the study "shared"; each has a folder, the marks of all are in one file."""

    def __init__(self, folder: Path, url: str, trials: int, seconds: float, lease: float = 2, **options: Any):
        super().__init__(folder, trials=trials, seconds=seconds, **options)
        self.url = url
        self.marks = folder.parent / "marks"
        self.go = folder.parent / "go"
        self.extra = ["--storage", url, "--join", "shared", "--lease", f"{lease:g}"]

    def resume(self, *words: str) -> tuple[int, str]:
        return self.run(["resume", str(self.out), *words])


def await_both(drivers: list[Joined]) -> None:
    """Wait until each of two drivers is held at a candidate; one that starts late has missed nothing then."""
    wait_until(lambda: sum(drivers[0].evaluations().values()) >= 4, 90, "both to be at work")


def end(process: Popen[str], seconds: float = 90) -> str:
    text, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, text
    assert "Traceback" not in text, text
    return text


def check_whole(drivers: list[Joined], trials: int, *, kills: int = 0) -> list[StoredTrial]:
    """Every driver sees the same, whole study; nothing was evaluated twice except once for each kill."""
    seen = [[(t.number, t.key, t.state) for t in driver.stored()] for driver in drivers]
    assert all(one == seen[0] for one in seen)
    stored = drivers[0].stored()
    assert [trial.number for trial in stored] == list(range(trials))
    assert {trial.state for trial in stored} == {"complete"}
    assert len({trial.key for trial in stored}) == trials
    counted = drivers[0].evaluations()
    assert set(counted) == {trial.key for trial in stored}
    assert sum(counted.values()) <= trials + kills, counted
    for driver in drivers:
        driver.check_no_orphans()
    return stored


def places(drivers: list[Joined]) -> list[int]:
    """How many results lie in the run directory of each driver."""
    return [len(driver.recorded()) for driver in drivers]


def test_two_drivers_started_together(url: str, tmp_path: Path) -> None:
    drivers = [Joined(tmp_path / name, url, trials=24, seconds=0.2, evaluator=HELD) for name in ("a", "b")]
    processes = [driver.start() for driver in drivers]
    await_both(drivers)
    drivers[0].go.touch()
    for process in processes:
        text = end(process)
        assert "24 complete" in text, text
    check_whole(drivers, 24)
    counts = places(drivers)
    assert sum(counts) == 24
    assert min(counts) >= 4, f"one did nearly everything: {counts}"
    for driver in drivers:
        assert (driver.out / "report.html").exists()
        assert len((driver.out / "pareto.csv").read_text().splitlines()) >= 2


def test_four_drivers_that_all_propose_the_same(url: str, tmp_path: Path) -> None:
    """The space has few architectures left at the end, and every driver asks for the same first ones."""
    words = ["--controller", "random"]
    drivers = [Joined(tmp_path / name, url, trials=40, seconds=0, workers=2) for name in "abcd"]
    for driver in drivers:
        driver.extra += words
    for process in [driver.start() for driver in drivers]:
        end(process)
    check_whole(drivers, 40)
    assert sum(places(drivers)) == 40


def test_a_database_that_isolates_more(server: Server, tmp_path: Path) -> None:
    """What a transaction reads after it got the lock must not be older than the lock."""
    url = server.create("isolated", "repeatable read")
    drivers = [Joined(tmp_path / name, url, trials=40, seconds=0, workers=2) for name in "abc"]
    for process in [driver.start() for driver in drivers]:
        end(process)
    check_whole(drivers, 40)


def test_a_killed_driver_loses_its_trials_to_the_other(url: str, tmp_path: Path) -> None:
    first, second = drivers = [
        Joined(tmp_path / name, url, trials=16, seconds=0.1, evaluator=HELD) for name in ("a", "b")
    ]
    killed, other = first.start(), second.start()
    await_both(drivers)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    first.go.touch()
    text = end(other)
    assert "16 complete" in text, text
    check_whole(drivers, 16, kills=1)
    assert places(drivers)[1] > 8
    code, text = first.resume()
    assert code == 0, text
    check_whole(drivers, 16, kills=1)


def test_a_killed_driver_comes_back_by_the_same_command(url: str, tmp_path: Path) -> None:
    bench = Joined(tmp_path / "a", url, trials=8, seconds=0.5, lease=3600)
    killed = bench.start()
    wait_until(lambda: len(bench.recorded()) >= 2, 60, "two results")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    end(bench.start())  # it need not wait for a lease of its own
    check_whole([bench], 8, kills=1)


def test_a_paused_driver_that_comes_back_is_refused_its_late_result(url: str, tmp_path: Path) -> None:
    first, second = drivers = [Joined(tmp_path / name, url, trials=6, seconds=0.4) for name in ("a", "b")]
    first.seconds = 6.0
    paused = first.start()
    wait_until(lambda: sum(first.evaluations().values()) >= 1, 60, "the first evaluation")
    pause(paused.pid)
    other = second.start()
    text = end(other)
    assert "6 complete" in text, text
    os.kill(paused.pid, signal.SIGCONT)
    text = end(paused)
    assert "was taken over by another driver" in text, text
    assert "6 complete" in text, text
    check_whole(drivers, 6, kills=1)
    assert len(list(first.out.glob("trials/*/result.refused.json"))) == 1
    assert places(drivers) == [0, 6]


def test_a_stopped_driver_leaves_its_trials_to_the_other(url: str, tmp_path: Path) -> None:
    first, second = drivers = [
        Joined(tmp_path / name, url, trials=10, seconds=0.1, lease=3600, evaluator=HELD)
        for name in ("a", "b")
    ]
    stopped, other = first.start(), second.start()
    await_both(drivers)
    stopped.send_signal(signal.SIGINT)
    text, _ = stopped.communicate(timeout=30)
    assert stopped.returncode == 130, text
    second.go.touch()
    end(other)
    check_whole(drivers, 10, kills=1)


def test_the_total_is_shared_and_may_grow(url: str, tmp_path: Path) -> None:
    first, second = drivers = [Joined(tmp_path / name, url, trials=5, seconds=0) for name in ("a", "b")]
    end(first.start())
    end(
        second.start(
            ["search", "--join", "shared", "--storage", url, "--out", str(second.out), "--trials", "9"]
        )
    )
    check_whole([second], 9)
    assert places(drivers) == [5, 4]
    code, text = first.resume()
    assert code == 0, text
    assert "9 complete" in text
    check_whole(drivers, 9)


def test_a_lost_run_directory_is_made_again_from_the_study(url: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "a", trials=4)
    bench.extra = ["--storage", url]
    code, text = bench.run()
    assert code == 0, text
    before = [(t.number, t.key, t.result) for t in bench.stored()]
    os.rename(bench.out, tmp_path / "lost")
    code, text = bench.run(["resume", str(bench.out), "--storage", url, "--trials", "6"])
    assert code == 0, text
    after = [(t.number, t.key, t.result) for t in bench.stored()]
    assert after[:4] == before
    assert len(after) == 6
    assert sum(bench.evaluations().values()) == 6
    assert len(bench.recorded()) == 6


def test_the_server_restarts_in_the_middle(server: Server, tmp_path: Path) -> None:
    url = server.create("restarted")
    drivers = [Joined(tmp_path / name, url, trials=16, seconds=0.4, evaluator=HELD) for name in ("a", "b")]
    processes = [driver.start() for driver in drivers]
    await_both(drivers)
    server.stop(at_once=True)
    wait_until(lambda: "cannot be reached" in log_of(drivers[0]), 30, "the first to notice")
    drivers[0].go.touch()
    server.start()
    for process in processes:
        end(process)
    check_whole(drivers, 16)


def log_of(driver: Joined) -> str:
    return (driver.out / "run.log").read_text()


def test_a_server_that_stays_away_stops_a_lonely_driver_cleanly(server: Server, tmp_path: Path) -> None:
    url = server.create("away")
    bench = Bench(tmp_path / "a", trials=8, seconds=0.4, evaluator=HELD)
    bench.extra = ["--storage", url]
    process = bench.start()
    wait_until(lambda: sum(bench.evaluations().values()) >= 3, 60, "the third evaluation")
    server.stop(at_once=True)
    bench.go.touch()
    text, _ = process.communicate(timeout=60)
    server.start()
    assert process.returncode == 1, text
    assert "Traceback" not in text, text
    assert "what was recorded before is safe" in text, text
    before = bench.evaluations()
    code, text = bench.run()
    assert code == 0, text
    assert [trial.state for trial in bench.stored()] == ["complete"] * 8
    assert sum((bench.evaluations() - before).values()) <= 8 - 1


def test_making_the_tables_together(server: Server, tmp_path: Path) -> None:
    """Optuna's own drivers lose this race."""
    for number in range(3):
        url = server.create(f"made_together_{number}")
        drivers = [Joined(tmp_path / str(number) / name, url, trials=3, seconds=0) for name in "abcd"]
        for process in [driver.start() for driver in drivers]:
            end(process)
        check_whole(drivers, 3)


def test_curves_of_all_drivers_reach_the_pruners(url: str, tmp_path: Path) -> None:
    drivers = [
        Joined(tmp_path / name, url, trials=20, seconds=0, evaluator=f"{TOYS}:curve") for name in ("a", "b")
    ]
    for process in [driver.start() for driver in drivers]:
        end(process)
    states = Counter(trial.state for trial in read_run(drivers[0].out).study.trials())
    assert sum(states.values()) == 20
    assert set(states) <= {"complete", "pruned"}
