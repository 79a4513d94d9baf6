"""Fault 1: kill -9 of the driver, at every durable step. The same command is typed again and must finish the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.nas.faults.bench import Bench, Zygote, wait_until

Expected = dict[str, dict[str, float]]
EVALUATORS = "tests.nas.faults.evaluators"


def moments(drivers: Zygote, folder: Path, storage: str, *, report: bool = False) -> list[str]:
    """Names of the moments of an undisturbed run."""
    bench = Bench(folder, storage)
    names = folder / "names"
    assert drivers.run(bench, 0, names=names, report=report) == 0, bench.log.read_text()
    return names.read_text().splitlines()


def kill_and_resume(
    drivers: Zygote, bench: Bench, moment: int, expected: Expected, *, report: bool = False
) -> None:
    """Kill the driver at ``moment``, run the same command again, and check everything that must hold."""
    code = drivers.run(bench, moment, report=report)
    assert code in (-signal.SIGKILL, 0), bench.log.read_text()
    bench.check_no_orphans()
    before, recorded = bench.evaluations(), bench.recorded()
    assert drivers.run(bench, report=report) == 0, bench.log.read_text()
    bench.check_finished(expected)
    bench.check_evaluations(before, recorded, kills=1 if code else 0)


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_driver_killed_at_some_durable_steps(
    drivers: Zygote, expected: Expected, tmp_path: Path, storage: str
) -> None:
    count = len(moments(drivers, tmp_path / "names", storage))
    assert count > 50
    for moment in range(5, count, count // 3):
        kill_and_resume(drivers, Bench(tmp_path / str(moment), storage), moment, expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_driver_killed_at_every_durable_step(
    drivers: Zygote, expected: Expected, tmp_path: Path, storage: str
) -> None:
    names = moments(drivers, tmp_path / "names", storage)
    for moment, name in enumerate(names, 1):
        try:
            kill_and_resume(drivers, Bench(tmp_path / str(moment), storage), moment, expected)
        except AssertionError as error:
            raise AssertionError(f"killed at moment {moment} of {len(names)}, {name}: {error}") from error


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_driver_killed_at_every_durable_step_of_the_report(
    drivers: Zygote, expected: Expected, tmp_path: Path
) -> None:
    """A run that is complete is taken up again, and killed while it writes its report."""
    count = len(moments(drivers, tmp_path / "names", "sqlite", report=True))
    without = len(moments(drivers, tmp_path / "plain", "sqlite"))
    assert count > without + 6
    for moment in range(without - 3, count + 1):
        bench = Bench(tmp_path / str(moment))
        kill_and_resume(drivers, bench, moment, expected, report=True)
        assert {"pareto.csv", "pareto.png", "report.html"} <= set(os.listdir(bench.out))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_driver_killed_twice(drivers: Zygote, expected: Expected, tmp_path: Path, storage: str) -> None:
    """The second driver is killed while it takes up what the first one left."""
    count = len(moments(drivers, tmp_path / "names", storage))
    for first in range(10, count, count // 5):
        for second in range(1, 20, 3):
            bench = Bench(tmp_path / f"{first}-{second}", storage)
            drivers.run(bench, first)
            drivers.run(bench, second)
            before, recorded = bench.evaluations(), bench.recorded()
            assert drivers.run(bench) == 0, bench.log.read_text()
            bench.check_finished(expected)
            bench.check_evaluations(before, recorded, kills=2)


def strike_all(drivers: Zygote, folder: Path, target: str, every: list[int]) -> list[tuple[int, Bench, int]]:
    """Runs in which the target was struck while a worker saved a result: moment, run, exit code."""
    found = []
    for moment in every:
        bench = Bench(folder / str(moment), evaluator=f"{EVALUATORS}:struck_while_saving")
        struck = folder / f"struck-{moment}"
        bench.extra_environment = {
            "NAS_FAULTS_STRIKE": f"{target}:{moment}",
            "NAS_FAULTS_STRUCK": str(struck),
        }
        code = drivers.run(bench)
        if not struck.exists():
            return found
        found.append((moment, bench, code))
    return found


ALL_MOMENTS = list(range(1, 30))


@pytest.mark.parametrize(
    "every", [[2, 5], pytest.param(ALL_MOMENTS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_driver_killed_at_durable_steps_of_a_worker(
    drivers: Zygote, expected: Expected, tmp_path: Path, every: list[int]
) -> None:
    found = strike_all(drivers, tmp_path, "driver", every)
    assert len(found) >= (5 if every is ALL_MOMENTS else 2)
    for _, bench, code in found:
        assert code == -signal.SIGKILL
        bench.check_no_orphans()
        before, recorded = bench.evaluations(), bench.recorded()
        assert drivers.run(bench) == 0, bench.log.read_text()
        bench.check_finished(expected)
        bench.check_evaluations(before, recorded, kills=1)
    # Early strikes find no result yet, late ones find it whole.
    assert {sum(bench.evaluations().values()) for _, bench, _ in found} == {6, 7}


@pytest.mark.parametrize(
    "every", [[2, 5], pytest.param(ALL_MOMENTS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_worker_killed_at_durable_steps(
    drivers: Zygote, expected: Expected, tmp_path: Path, every: list[int]
) -> None:
    """Fault 2, "also during its result write": the attempt that is made again finds what is whole."""
    found = strike_all(drivers, tmp_path, "worker", every)
    assert len(found) >= (5 if every is ALL_MOMENTS else 2)
    for moment, bench, code in found:
        assert code == 0, f"moment {moment}: {bench.log.read_text()}"
        bench.check_finished(expected)
    assert {sum(bench.evaluations().values()) for _, bench, _ in found} == {6, 7}


@pytest.mark.parametrize("storage", ["sqlite", pytest.param("journal", marks=pytest.mark.slow)])
def test_real_command_killed_in_the_middle(expected: Expected, tmp_path: Path, storage: str) -> None:
    """No zygote: the command itself, killed while its third candidate runs."""
    bench = Bench(tmp_path, storage, seconds=0.3)
    process = bench.start()
    wait_until(lambda: sum(bench.evaluations().values()) >= 3, 60, "the third evaluation")
    process.kill()
    process.communicate()
    bench.check_no_orphans()
    before, recorded = bench.evaluations(), bench.recorded()
    bench.seconds = 0
    code, text = bench.run()
    assert code == 0, text
    assert "resuming: " in text
    bench.check_finished(expected)
    bench.check_evaluations(before, recorded, kills=1)


def test_interrupted_too_often_is_given_up(drivers: Zygote, tmp_path: Path) -> None:
    """A candidate that is there whenever the driver dies is suspected, and not run for ever."""
    bench = Bench(tmp_path, evaluator=f"{EVALUATORS}:struck_while_saving")
    for attempt in range(3):
        struck = tmp_path / f"struck-{attempt}"
        bench.extra_environment = {"NAS_FAULTS_STRIKE": "driver:1", "NAS_FAULTS_STRUCK": str(struck)}
        assert drivers.run(bench) == -signal.SIGKILL
    assert drivers.run(bench) == 0, bench.log.read_text()
    trial = bench.stored()[2]
    assert trial.state == "failed"
    assert trial.result is not None
    assert trial.result.failure is not None
    assert trial.result.failure["reason"] == "the driver died 3 times while this candidate ran"
    assert [found.state for found in bench.stored()].count("complete") == 5
