"""Fault 3: Ctrl-C once and twice, SIGTERM, SIGHUP. What is finished stays, what ran goes back into the queue."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.nas.faults.bench import HELD, Bench, Driver, Zygote, wait_until

pytestmark = pytest.mark.alone

Expected = dict[str, dict[str, float]]
EVALUATORS = "tests.nas.faults.evaluators"


def started(drivers: Zygote, bench: Bench, evaluations: int) -> Driver:
    process = drivers.start(bench, report=True)
    wait_until(lambda: sum(bench.evaluations().values()) >= evaluations, 60, "the first evaluations")
    return process


@pytest.mark.parametrize(
    ("number", "storage"), [(signal.SIGINT, "journal"), (signal.SIGTERM, "sqlite"), (signal.SIGHUP, "sqlite")]
)
def test_one_signal_parks_what_runs(
    drivers: Zygote, expected: Expected, tmp_path: Path, number: signal.Signals, storage: str
) -> None:
    bench = Bench(tmp_path, storage, evaluator=f"{EVALUATORS}:never_ends", workers=2)
    process = started(drivers, bench, 4)
    began = time.monotonic()
    process.send_signal(number)
    code, text = process.finish(30)
    assert time.monotonic() - began < 10, text
    assert code == 128 + number
    assert text.strip().splitlines()[-1] == f"stopped by {number.name}; go on with: nas resume {bench.out}"
    bench.check_no_orphans()
    trials = bench.stored()
    assert [trial.state for trial in trials] == ["complete", "complete", "waiting", "waiting"]
    assert {trial.interruptions for trial in trials} == {0}


def test_resumed_after_a_signal(drivers: Zygote, expected: Expected, tmp_path: Path) -> None:
    bench = Bench(tmp_path, evaluator=HELD)
    process = started(drivers, bench, 3)
    process.send_signal(signal.SIGINT)
    code, text = process.finish(30)
    assert code == 130, text
    before, recorded = bench.evaluations(), bench.recorded()
    bench.go.touch()
    assert drivers.run(bench) == 0, bench.log.read_text()
    bench.check_finished(expected)
    bench.check_evaluations(before, recorded, kills=1)


def test_second_signal_ends_at_once(drivers: Zygote, expected: Expected, tmp_path: Path) -> None:
    bench = Bench(tmp_path, evaluator=HELD)
    process = started(drivers, bench, 3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, text = process.finish(30)
    assert time.monotonic() - began < 5
    assert code == 130
    assert "Traceback" not in text
    bench.check_no_orphans()
    before, recorded = bench.evaluations(), bench.recorded()
    bench.go.touch()
    assert drivers.run(bench) == 0, bench.log.read_text()
    bench.check_finished(expected)
    bench.check_evaluations(before, recorded, kills=1)


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
def test_signal_while_the_run_is_being_set_up(
    drivers: Zygote, expected: Expected, tmp_path: Path, delay: float
) -> None:
    bench = Bench(tmp_path, evaluator=HELD)
    process = drivers.start(bench)
    wait_until(lambda: "space" in process.text(), 60, "the first line")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    code, text = process.finish(30)
    assert code == 130, text
    assert "Traceback" not in text
    assert "stopped by SIGINT" in text.strip().splitlines()[-1]
    bench.check_no_orphans()
    bench.go.touch()
    assert drivers.run(bench) == 0, bench.log.read_text()
    bench.check_finished(expected)


@pytest.mark.slow
def test_signal_before_the_run_directory_is_made_leaves_nothing(tmp_path: Path) -> None:
    """As early as the command can be told: a traceback would be as wrong as a half-made directory."""
    for delay in (0.15, 0.3, 0.45, 0.6, 0.9):
        bench = Bench(tmp_path / str(delay), evaluator=HELD)
        process = bench.start()
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=30)
        assert process.returncode in (-signal.SIGTERM, 143), (process.returncode, text)
        assert "Traceback" not in text
        bench.check_no_orphans()
        assert not bench.out.exists() or (bench.out / "recipe.yaml").exists()
