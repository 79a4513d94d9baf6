"""The count of ``nas chaos`` must be able to be something else than zero."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nas.chaos import SPACE, Chaos, Count, evaluate, true_values
from nas.cli.main import main
from nas.config import SearchConfig
from nas.records import StoredTrial, TrialResult

pytestmark = pytest.mark.alone


def stored(number: int, seed: int, state: str = "complete") -> StoredTrial:
    architecture = {f"gate{index}": (seed >> index) % 4 for index in range(10)}
    trial = StoredTrial(number, number, architecture, SPACE.key(architecture), None, 0, "running")
    if state == "running":
        return trial
    values = true_values(architecture)
    failure = None if state == "complete" else {"kind": "error", "reason": "?", "log_tail": ""}
    return trial.finished(TrialResult(state, values=values if state == "complete" else {}, failure=failure))


FAMILY = """
import subprocess, sys, time
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(5)]
print("born", flush=True)
time.sleep(60)
"""
"""A process with more children than any candidate has lives."""


@pytest.fixture
def chaos(tmp_path: Path) -> Chaos:
    return Chaos(tmp_path)


def mark(chaos: Chaos, trial: StoredTrial) -> None:
    with open(chaos._marks, "a") as file:
        file.write(f"{trial.key}\n")


def test_nothing_wrong_counts_nothing(chaos: Chaos) -> None:
    first, second = stored(0, 5), stored(1, 77, "running")
    mark(chaos, first)
    chaos._compare({0: first, 1: second})
    mark(chaos, second)
    mark(chaos, second)
    chaos._compare({0: first, 1: stored(1, 77)})
    assert chaos.count.sound
    assert chaos.count.finished == 2
    assert chaos.count.line() == "kills 0, lost 0, duplicated 0, unreadable 0"


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda trial: {}, "lost 1, duplicated 0"),
        (lambda trial: {0: stored(0, 5, "running")}, "lost 1, duplicated 0"),
        (
            lambda trial: {0: replace(trial, result=replace(trial.result, seconds=9.0))},
            "lost 1, duplicated 0",
        ),
        (lambda trial: {0: trial, 1: replace(trial, number=1, result=None)}, "lost 0, duplicated 1"),
        (lambda trial: {0: trial, 1: stored(1, 9, "failed")}, "lost 1, duplicated 0"),
    ],
)
def test_what_is_lost_or_there_twice_is_counted(
    chaos: Chaos, spoil: Callable[[StoredTrial], dict[int, StoredTrial]], line: str
) -> None:
    first = stored(0, 5)
    chaos._compare({0: first})
    chaos._compare(spoil(first))
    assert f"kills 0, {line}, unreadable 0" == chaos.count.line()
    assert not chaos.count.sound
    assert len(chaos.count.problems) == 1


def test_what_ran_again_is_counted(chaos: Chaos) -> None:
    first = stored(0, 5)
    mark(chaos, first)
    chaos._compare({0: first})
    mark(chaos, first)
    chaos._compare({0: first})
    chaos._compare({0: first})
    assert chaos.count.duplicated == 1


def test_a_value_that_is_not_true_is_counted(chaos: Chaos) -> None:
    first = stored(0, 5)
    assert first.result is not None
    chaos._compare({0: first.finished(replace(first.result, values={"score": 0.0, "cost": 0.0}))})
    assert chaos.count.lost == 1


def test_a_run_that_cannot_be_read_is_counted(chaos: Chaos) -> None:
    chaos.out.mkdir()
    (chaos.out / "recipe.yaml").write_text("space: [")
    (chaos.out / "trials").mkdir()
    chaos._check_run()
    assert chaos.count.line().endswith("unreadable 1")


def test_orphans_and_leftovers_are_in_the_line() -> None:
    count = Count(driver_kills=3, candidate_kills=1)
    count.blame("orphans", "processes [7]")
    count.blame("leftovers", "x.tmp")
    assert count.line() == "kills 4, lost 0, duplicated 0, unreadable 0, orphans 1, leftovers 1"


def test_candidates_are_not_killed_until_they_are_given_up(
    chaos: Chaos, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_luck = iter([0.0] * 20 + [1.0])
    monkeypatch.setattr(chaos._rng, "random", lambda: next(bad_luck))
    with subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as family:
        try:
            assert family.stdout is not None
            family.stdout.readline()
            chaos._kill_candidates(family)
        finally:
            os.killpg(family.pid, signal.SIGKILL)
    assert chaos.count.candidate_kills == SearchConfig(space="nas.chaos:SPACE").retries


def test_evaluations_leave_marks_and_tell_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_CHAOS_MARKS", str(tmp_path / "marks"))
    architecture = stored(0, 12345).architecture
    assert evaluate(architecture) == true_values(architecture)
    evaluate(architecture)
    assert (tmp_path / "marks").read_text().split() == [SPACE.key(architecture)] * 2


def test_the_command_is_hidden_and_refuses_unknown_storages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["chaos", "--storage", "tape"])
    assert ended.value.code == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "chaos" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_half_a_minute_of_it(tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chaos.json"
    with pytest.raises(SystemExit) as ended:
        main(
            ["chaos", "--minutes", "0.4", "--seed", str(os.getpid()), "--storage", storage, "--out", str(out)]
        )
    text = capsys.readouterr().out
    assert ended.value.code == 0, text
    found = json.loads(out.read_text())[storage]
    assert found["line"] == text.strip().splitlines()[-1]
    assert found["driver_kills"] > 2
    assert found["finished"] > 0
