"""Fault 13: two drivers on one run directory. One works, the other is refused and says who is there."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from tests.nas.faults.bench import Bench, Zygote, wait_until

Expected = dict[str, dict[str, float]]


def race(bench: Bench) -> tuple[str, str]:
    """Start the same command twice at the same moment; the output of the one that worked and of the other."""
    both = [bench.start(), bench.start()]
    texts = [process.communicate(timeout=90)[0] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], f"{codes}:\n{texts[0]}\n{texts[1]}"
    winner = codes.index(0)
    assert f"PID {both[winner].pid}," in texts[1 - winner], texts[1 - winner]
    return texts[winner], texts[1 - winner]


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
        bench = Bench(tmp_path / str(number), "journal" if number % 2 else "sqlite", seconds=0.3)
        _, refused = race(bench)
        check_refusal(bench, refused)
        bench.check_finished(expected)
        assert sum(bench.evaluations().values()) == bench.trials


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.timeout(400)
def test_started_together_on_an_existing_one(
    drivers: Zygote, expected: Expected, tmp_path: Path, rounds: int
) -> None:
    for number in range(rounds):
        bench = Bench(tmp_path / str(number), "journal" if number % 2 else "sqlite", trials=2)
        assert drivers.run(bench) == 0
        bench.trials, bench.seconds = 6, 0.4
        _, refused = race(bench)
        check_refusal(bench, refused)
        bench.check_finished(expected)
        assert sum(bench.evaluations().values()) == bench.trials


def test_second_driver_while_the_first_works_or_is_paused(
    drivers: Zygote, expected: Expected, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, seconds=1.0)
    first = bench.start()
    wait_until(lambda: sum(bench.evaluations().values()) >= 1, 60, "the first evaluation")
    os.kill(first.pid, 19)
    assert drivers.run(bench) == 2
    check_refusal(bench, bench.log.read_text())
    assert f"PID {first.pid}," in bench.log.read_text()
    os.kill(first.pid, 18)
    (tmp_path / "output").unlink()
    first.kill()
    first.communicate()
    bench.seconds = 0
    assert drivers.run(bench) == 0, bench.log.read_text()
    bench.check_finished(expected)
