"""``nas.search`` from a script: a space in three lines, a function, resume, determinism, evaluators that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nas
from nas.files import read_record
from spaces import Choice, Int, SearchSpace

SPACE = SearchSpace(
    "cell",
    {
        "depth": Int(1, 4),
        "width": Choice([16, 32, 64]),
        "op": Choice(["conv", "attention"], when=lambda a: a["depth"] > 2),
    },
    published={"plain": {"depth": 3, "width": 32, "op": "conv"}},
    baseline="plain",
)
OBJECTIVES = ["score:maximize", "cost:minimize"]


def score(architecture: dict[str, Any]) -> dict[str, float]:
    bonus = 2.0 if architecture.get("op") == "attention" else 1.0
    return {"score": bonus * architecture["depth"], "cost": architecture["depth"] * architecture["width"]}


def search(out: Path, evaluate: Callable[..., Any] = score, **settings: Any) -> Any:
    return nas.search(SPACE, evaluate=evaluate, objectives=OBJECTIVES, out=out, **settings)


def test_a_search_finds_the_front_and_leaves_its_files(tmp_path: Path) -> None:
    report = search(tmp_path / "run", trials=12, seed=3)
    assert [row.state for row in report.trials] == ["complete"] * 12
    assert report.trials[0].name == "plain", "the baseline goes first"
    front = {(row.values["score"], row.values["cost"]) for row in report.front()}
    assert all(not (s >= a and c <= b and (s, c) != (a, b)) for a, b in front for s, c in front), (
        "no member of the front dominates another"
    )
    for name in ("recipe.yaml", "environment.json", "study.db", "pareto.csv", "pareto.png", "report.html"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert (
        read_record(tmp_path / "run/trials/3/architecture.json")["architecture"]
        == report.trials[3].architecture
    )


@pytest.mark.parametrize("controller", ["random", "evolution", "tpe", "nsga2", "local_search"])
def test_one_seed_gives_the_same_trials_also_across_a_resume(tmp_path: Path, controller: str) -> None:
    whole = search(tmp_path / "whole", trials=10, seed=5, controller=controller)
    search(tmp_path / "parts", trials=4, seed=5, controller=controller)
    parts = search(tmp_path / "parts", trials=10)
    assert [row.key for row in parts.trials] == [row.key for row in whole.trials]
    assert [row.seed for row in parts.trials] == [row.seed for row in whole.trials]


def test_nothing_is_evaluated_twice_and_an_exhausted_space_ends_the_search(tmp_path: Path) -> None:
    seen: list[str] = []

    def evaluate(architecture: dict[str, Any]) -> dict[str, float]:
        seen.append(SPACE.key(architecture))
        return score(architecture)

    report = search(tmp_path / "run", evaluate, trials=500)
    assert len(seen) == len(set(seen)) == SPACE.cardinality() == len(report.trials)
    search(tmp_path / "run", evaluate, trials=600)
    assert len(seen) == SPACE.cardinality()


def test_failures_are_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    def evaluate(architecture: dict[str, Any]) -> dict[str, float]:
        if architecture["width"] == 16:
            raise ValueError("too narrow")
        if architecture["depth"] == 1:
            return {"score": float("nan"), "cost": 1.0}
        return {**score(architecture), "note": float("inf")}

    report = search(tmp_path / "run", evaluate, trials=30)
    failed = {row.failure["reason"]: row.failure["kind"] for row in report.in_state("failed") if row.failure}
    assert failed == {"ValueError: too narrow": "error", "objective score is nan": "nan"}
    assert report.front()
    assert all(row.architecture["width"] > 16 and row.architecture["depth"] > 1 for row in report.front())
    assert all(row.metrics["note"] is None for row in report.in_state("complete"))


def test_a_missing_objective_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(nas.RunStopped, match=r"objective 'score' is not among the metrics: acc, cost"):
        search(tmp_path / "run", lambda architecture: {"acc": 1.0, "cost": 2.0}, trials=20)


def test_a_run_in_which_all_fail_stops_and_says_why(tmp_path: Path) -> None:
    def evaluate(architecture: dict[str, Any]) -> dict[str, float]:
        raise RuntimeError("the data set is on fire")

    with pytest.raises(
        nas.RunStopped, match=r"candidates all failed; .*RuntimeError: the data set is on fire"
    ):
        search(tmp_path / "run", evaluate, trials=100)


def test_early_stopping_prunes_the_hopeless(tmp_path: Path) -> None:
    def evaluate(architecture: dict[str, Any], report: Callable[[int, float], bool]) -> dict[str, float]:
        found = score(architecture)
        for step in range(1, 9):
            if report(step, found["score"] * step / 8):
                return {}
        return found

    report = nas.search(
        SPACE, evaluate=evaluate, objectives=["score:maximize"], out=tmp_path / "run", trials=20, epochs=8
    )
    pruned = report.in_state("pruned")
    assert pruned
    best = max(row.values["score"] for row in report.in_state("complete"))
    assert all(row.curve[-1]["score"] < best for row in pruned)


def test_other_settings_on_a_run_are_refused(tmp_path: Path) -> None:
    search(tmp_path / "run", trials=3, seed=1)
    with pytest.raises(nas.UserMistake, match=r"other settings \(seed: 1 -> 2\)"):
        search(tmp_path / "run", trials=3, seed=2)


def test_a_changed_space_is_refused(tmp_path: Path) -> None:
    search(tmp_path / "run", trials=3)
    other = SearchSpace("cell", {**SPACE.parameters, "more": Choice([1, 2])})
    with pytest.raises(nas.UserMistake, match=r"search space 'cell' has changed since"):
        nas.search(other, evaluate=score, objectives=OBJECTIVES, out=tmp_path / "run", trials=5)


def test_a_refused_start_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(nas.UserMistake, match=r"unknown controller 'tp'.*did you mean 'tpe'"):
        search(tmp_path / "run", trials=3, controller="tp")
    assert not (tmp_path / "run").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(nas.UserMistake, match=r"holds files but no run"):
        search(tmp_path / "full", trials=3)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_the_csv_holds_every_complete_trial(tmp_path: Path) -> None:
    import csv

    report = search(tmp_path / "run", trials=8)
    with open(tmp_path / "run" / "pareto.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert sum(row["on_front"] in ("1", "True", "true", "yes") for row in rows) == len(report.front())
    assert [json.loads(row["architecture"]) for row in rows] == [row.architecture for row in report.trials]


def test_a_front_of_unknown_costs_is_not_pruned_on_one_objective(tmp_path: Path) -> None:
    """All are optimal: the cost is not known before a candidate ends, so early stopping must keep out."""
    line = SearchSpace("line", {"a": Int(1, 24)})

    def evaluate(architecture: dict[str, Any], report: Callable[[int, float], bool]) -> dict[str, float]:
        for step in range(1, 9):
            if report(step, architecture["a"] * step / 8):
                return {}
        return {"score": architecture["a"], "cost": architecture["a"]}

    report = nas.search(
        line, evaluate=evaluate, objectives=OBJECTIVES, out=tmp_path / "run", trials=24, epochs=8
    )
    assert len(report.front()) == 24


def test_ctrl_c_in_a_script_is_not_held_against_the_candidate(tmp_path: Path) -> None:
    calls = 0

    def evaluate(architecture: dict[str, Any]) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls <= 4:
            raise KeyboardInterrupt
        return score(architecture)

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "run", evaluate, trials=3)
    report = search(tmp_path / "run", evaluate, trials=3)
    assert [row.state for row in report.trials] == ["complete"] * 3


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    import numpy as np

    report = search(
        tmp_path / "run", lambda architecture: {"score": np.float32(1.5), "cost": np.int64(3)}, trials=2
    )
    assert report.trials[0].values == {"score": 1.5, "cost": 3.0}


def test_an_evaluator_that_does_not_exist_is_refused_at_once(tmp_path: Path) -> None:
    for evaluator, message in (
        ("trian", r"unknown evaluator 'trian' \(did you mean 'train'\?\)"),
        ("none.py:f", r"none\.py"),
    ):
        with pytest.raises(nas.UserMistake, match=message):
            nas.search(
                "efficient_transformer", out=tmp_path / "run", evaluator=evaluator, objectives=OBJECTIVES
            )
        assert not (tmp_path / "run").exists()
