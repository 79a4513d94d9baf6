"""Fault 13: two drivers on one run directory. One works, the other is refused and says who is there."""

from __future__ import annotations

import copy
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nas.faults.bench import HELD, Bench, Zygote, wait_until

Expected = dict[str, dict[str, float]]


def race(bench: Bench, drivers: Zygote | None = None) -> tuple[str, str]:
    """Start the same command twice at the same moment; the output of the one that worked and of the other.

    The one that works is held until the other has ended, which may be late to start.
    """
    if drivers is not None:
        other = copy.copy(bench)
        other.log = bench.folder / "output of the other"
        pair = [drivers.start(bench), drivers.start(other)]
        release_when(bench, lambda: any("in use by" in process.text() for process in pair))
        codes, texts = zip(*(process.finish() for process in pair), strict=True)
        pids = [process.pid for process in pair]
    else:
        both = [bench.start(), bench.start()]
        release_when(bench, lambda: any(process.poll() is not None for process in both))
        texts = tuple(process.communicate(timeout=90)[0] for process in both)
        codes = tuple(process.returncode for process in both)
        pids = [process.pid for process in both]
    assert sorted(codes) == [0, 2], f"{codes}:\n{texts[0]}\n{texts[1]}"
    winner = codes.index(0)
    assert f"PID {pids[winner]}," in texts[1 - winner], texts[1 - winner]
    return texts[winner], texts[1 - winner]


def release_when(bench: Bench, condition: Callable[[], bool]) -> None:
    try:
        wait_until(condition, 60, "the end of one of the two")
    finally:
        bench.go.touch()


def check_refusal(bench: Bench, text: str) -> None:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    owner = re.escape(f"error: {bench.out}: in use by another driver (host {socket.gethostname()}, PID ")
    assert re.fullmatch(
        owner + r"\d+, started \d+ s ago\); wait for it, stop it, or use another --out", lines[0]
    ), text


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.timeout(400)
def test_started_together_on_a_new_directory(
    drivers: Zygote, expected: Expected, tmp_path: Path, rounds: int
) -> None:
    for number in range(rounds):
        bench = Bench(tmp_path / str(number), "journal" if number % 2 else "sqlite", evaluator=HELD)
        _, refused = race(bench, drivers if rounds == 1 else None)
        check_refusal(bench, refused)
        bench.check_finished(expected)
        assert sum(bench.evaluations().values()) == bench.trials


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.timeout(400)
def test_started_together_on_an_existing_one(
    drivers: Zygote, expected: Expected, tmp_path: Path, rounds: int
) -> None:
    for number in range(rounds):
        storage = "journal" if number % 2 else "sqlite"
        bench = Bench(tmp_path / str(number), storage, trials=2, evaluator=HELD)
        assert drivers.run(bench) == 0
        bench.trials = 6
        bench.log.unlink()
        _, refused = race(bench, drivers if rounds == 1 else None)
        check_refusal(bench, refused)
        bench.check_finished(expected)
        assert sum(bench.evaluations().values()) == bench.trials


def test_second_driver_while_the_first_works_or_is_paused(
    drivers: Zygote, expected: Expected, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, seconds=1.0)
    first = drivers.start(bench)
    wait_until(lambda: sum(bench.evaluations().values()) >= 1, 60, "the first evaluation")
    os.kill(first.pid, 19)
    second = copy.copy(bench)
    second.log = tmp_path / "output of the other"
    assert drivers.run(second) == 2
    check_refusal(bench, second.log.read_text())
    assert f"PID {first.pid}," in second.log.read_text()
    os.kill(first.pid, 18)
    os.kill(first.pid, 9)
    first.finish()
    bench.seconds = 0
    assert drivers.run(bench) == 0, bench.log.read_text()
    bench.check_finished(expected)
