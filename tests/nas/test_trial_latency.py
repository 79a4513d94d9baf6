"""What a search does with the latency of a candidate: predicted, measured, held against the budget."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import nas
from nas.errors import TrialFailure
from nas.latency import LeaseLost, Session, Target
from nas.latency.prediction import count_work
from nas.tasks import make_task
from nas.tasks.base import Task
from nas.trial_latency import against, alone_on, measure_candidate, over_budget, predicted_over_budget
from spaces import get_space

ONE = Target.parse("cpu:1")


@pytest.fixture(scope="module")
def task() -> Task:
    torch.set_num_threads(1)
    return make_task("image_classification")


def skeleton(architecture: dict[str, Any], task: Task) -> torch.nn.Module:
    with torch.device("meta"):
        return get_space("efficient_transformer").build(architecture, task.signature)


def measured(task: Task, count: int, conditions: str = "here") -> list[dict[str, Any]]:
    """Latencies that follow from the work: a price for each MAC and each launch."""
    space, rng, found = get_space("efficient_transformer"), random.Random(0), []
    for _ in range(count):
        work = count_work(
            skeleton(space.sample(rng), task), task.example_inputs(1, torch.device("cpu"))
        ).to_dict()
        found.append({"work": work, "median_ms": price(work), "conditions": conditions, "trusted": True})
    return found


def price(work: dict[str, float]) -> float:
    return 0.05 + 2e-8 * (work["linear_macs"] + work["attention_macs"]) + 2e-3 * work["launches"]


def payload(budget: float | None, samples: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"config": {"latency_budget": budget, "target": "cpu:1"}, "measured": samples, **more}


def test_only_the_upper_end_holds_a_budget() -> None:
    found = {"median_ms": 1.0, "low_ms": 0.9, "high_ms": 1.1}
    assert over_budget(None, found) is None
    assert over_budget(1.1, found) is None
    assert over_budget(1.05, found) == "1 ms (0.9-1.1) may exceed the latency budget of 1.05 ms"
    assert over_budget(0.8, found) == "1 ms (0.9-1.1) exceed the latency budget of 0.8 ms"


def test_what_is_surely_over_is_not_built(task: Task) -> None:
    space, samples = get_space("efficient_transformer"), measured(task, 20)
    rng, wrong, discarded = random.Random(1), 0, 0
    budget = sorted(sample["median_ms"] for sample in samples)[10]
    for _ in range(20):
        model = skeleton(space.sample(rng), task)
        truth = price(count_work(model, task.example_inputs(1, torch.device("cpu"))).to_dict())
        reason = predicted_over_budget(model, task, payload(budget, samples))
        wrong += reason is not None and truth <= budget
        discarded += reason is not None
    assert wrong == 0
    assert discarded >= 5
    model = skeleton(space.sample(random.Random(0)), task)  # one of those measured, so within their range
    reason = predicted_over_budget(model, task, payload(1e-3, samples))
    assert reason is not None
    assert "at 95%, from 20 measured), over the latency budget of 0.001 ms; not built" in reason
    for count in (10, 18, 19):
        assert predicted_over_budget(model, task, payload(1e-3, samples[:count])) is not None
    doubtful = [{**sample, "trusted": False} for sample in samples]
    assert predicted_over_budget(model, task, payload(1e-3, doubtful)) is None
    assert predicted_over_budget(model, task, payload(None, samples)) is None
    assert predicted_over_budget(model, task, payload(1e-3, samples[:9])) is None
    assert predicted_over_budget(model, task, payload(1e-3, samples, named=True)) is None


def test_measurements_under_other_conditions_do_not_count(task: Task) -> None:
    model = skeleton(get_space("efficient_transformer").sample(random.Random(2)), task)
    mixed = [*measured(task, 15, "there"), *measured(task, 9, "here")]
    assert predicted_over_budget(model, task, payload(1e-3, mixed)) is None


def test_a_measurement_holds_what_a_prediction_needs(task: Task) -> None:
    space = get_space("efficient_transformer")
    architecture = space.sample(random.Random(3))
    model = space.build(architecture, task.signature)
    found = measure_candidate(model, task, ONE, payload(None, [], key="0" * 16), seconds=0.05)
    assert found["work"] == count_work(model, task.example_inputs(1, torch.device("cpu"))).to_dict()
    assert found["conditions"].endswith(("-wall", "-cpu"))
    assert found["identity"]["key"] == "0" * 16


def test_a_device_that_is_always_lost_fails_the_trial() -> None:
    calls = 0

    def lose(lease: object) -> None:
        nonlocal calls
        calls += 1
        raise LeaseLost("taken")

    with pytest.raises(TrialFailure, match="taken over 3 times"):
        alone_on(ONE, lose)
    assert calls == 3


def test_ratios_to_the_baseline_replace_those_to_the_reference() -> None:
    x = (torch.randn(1, 8),)
    models = {"base": (torch.nn.Linear(8, 8), x), "other": (torch.nn.Linear(8, 8), x)}
    found: Session = nas.latency.measure_together(models, ONE, plan=nas.latency.Plan(0.05), against="base")
    assert against(found, "base", "base")["ratio"] == 1.0
    other = against(found, "other", "base")
    assert other["ratio"] == found.pair("other", "base").ratio
    assert other["verdict"] in ("faster", "slower", "cannot tell")


@pytest.mark.slow
def test_a_search_discards_by_prediction(tmp_path: Path) -> None:
    report = nas.search(
        "efficient_transformer",
        out=tmp_path / "run",
        trials=24,
        epochs=1,
        workers=1,
        latency_budget=0.6,
        controller="random",
    )
    reasons = [row.failure["reason"] for row in report.trials if row.failure]
    assert any("not built" in reason for reason in reasons)
    assert all(row.latency["high_ms"] <= 0.6 for row in report.in_state("complete"))
