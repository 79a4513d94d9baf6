"""Faults 2, 6, 7 and 8: what a candidate can do to itself costs that candidate and nothing else."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from nas.study import StoredTrial
from tests.nas.faults.bench import TOYS, Bench, Zygote

Expected = dict[str, dict[str, float]]
EVALUATORS = "tests.nas.faults.evaluators"


def failure_of(trial: StoredTrial) -> tuple[str, str]:
    assert trial.state == "failed"
    assert trial.result is not None
    assert trial.result.failure is not None
    return trial.result.failure["kind"], trial.result.failure["reason"]


def run(drivers: Zygote, folder: Path, evaluator: str, *extra: str) -> Bench:
    bench = Bench(folder, evaluator=evaluator, extra=list(extra))
    assert drivers.run(bench) == 0, bench.log.read_text()
    assert [trial.number for trial in bench.stored()] == list(range(bench.trials))
    bench.check_no_leftovers()
    bench.check_no_orphans()
    return bench


@pytest.mark.parametrize(
    ("evaluator", "extra", "kind", "reason"),
    [
        ("first_is_always_killed", [], "killed", "killed by signal 9 (SIGKILL), 3 attempts"),
        ("first_is_always_killed", ["--retries", "0"], "killed", "killed by signal 9 (SIGKILL), 1 attempt"),
        pytest.param(
            "first_hangs", ["--trial-timeout", "5"], "timeout", "ran longer than 5 s", marks=pytest.mark.slow
        ),
        # The limit holds for the others too, which must not exceed it on a busy machine.
        ("first_stops", ["--trial-timeout", "5"], "timeout", "ran longer than 5 s"),
        ("first_allocates", ["--memory-limit", "300M"], "memory", "more than the limit of 286 MB"),
    ],
)
def test_one_bad_candidate(
    drivers: Zygote,
    expected: Expected,
    tmp_path: Path,
    evaluator: str,
    extra: list[str],
    kind: str,
    reason: str,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "".join(f"{extra[i][2:].replace('-', '_')}: {extra[i + 1]}\n" for i in range(0, len(extra), 2))
        or "{}"
    )
    bench = run(drivers, tmp_path, f"{EVALUATORS}:{evaluator}", "--recipe", str(recipe))
    first, *others = bench.stored()
    assert failure_of(first)[0] == kind
    assert reason in failure_of(first)[1]
    assert {trial.state for trial in others} == {"complete"}
    assert first.key not in bench.values()
    assert reason.split(",")[0] in bench.log.read_text()


def test_killed_once_is_tried_again(drivers: Zygote, expected: Expected, tmp_path: Path) -> None:
    bench = run(drivers, tmp_path, f"{TOYS}:dies_once")
    assert bench.values() == expected
    assert list(bench.out.glob("trials/*/died")), "no candidate was killed"


def test_nan_is_a_failure_and_never_on_the_front(drivers: Zygote, tmp_path: Path) -> None:
    bench = run(drivers, tmp_path, f"{EVALUATORS}:nan_when_narrow")
    narrow = [trial for trial in bench.stored() if trial.architecture["width"] == 16]
    assert narrow
    assert {failure_of(trial) for trial in narrow} == {("nan", "objective score is nan")}
    code, text = drivers.start(bench, report=True, arguments=["report", str(bench.out)]).finish()
    assert code == 0, text
    with open(bench.out / "pareto.csv", newline="") as file:
        on_front = {int(row["trial"]) for row in csv.DictReader(file) if row["on_front"] == "1"}
    assert on_front
    assert not on_front & {trial.number for trial in narrow}


def test_a_metric_that_is_missing_names_those_there_are(drivers: Zygote, tmp_path: Path) -> None:
    bench = Bench(tmp_path, evaluator=f"{EVALUATORS}:empties")
    assert drivers.run(bench, report=True) == 1
    assert {failure_of(trial)[1] for trial in bench.stored()} == {
        "objective 'score' is not among the metrics: none"
    }


@pytest.mark.parametrize("trials", [6, 20])
def test_all_fail(drivers: Zygote, tmp_path: Path, trials: int) -> None:
    """No success banner over a failed run: exit code 1, and the commonest reason is the last line."""
    bench = Bench(tmp_path, evaluator=f"{TOYS}:always_fails", trials=trials)
    assert drivers.run(bench, report=True) == 1
    text = bench.log.read_text()
    assert "the data set is on fire" in text.strip().splitlines()[-1], text
    assert "Found" not in text
    bench.check_no_orphans()
    assert len(bench.stored()) == min(trials, 12)
