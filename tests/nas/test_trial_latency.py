"""What a search does with the latency of a candidate: predicted, measured, held against the budget."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import nas
import nas.latency.priority
import nas.session
import nas.trial
from nas import trial_latency
from nas.api import _Silent
from nas.config import SearchConfig
from nas.errors import TrialFailure
from nas.executors import InlineExecutor
from nas.latency import LeaseLost, Session, Target
from nas.latency.prediction import count_work
from nas.report.conditions import differing
from nas.search_jobs import conditions_here
from nas.tasks import make_task
from nas.tasks.base import Task
from nas.trial import measure_trial, run_trial
from nas.trial_latency import (
    against,
    alone_on,
    conditions_of,
    identity_here,
    measure_candidate,
    over_budget,
    predicted_over_budget,
)
from spaces import get_space

ONE = Target.parse("cpu:1")


@pytest.fixture(scope="module")
def task() -> Task:
    torch.set_num_threads(1)
    return make_task("image_classification")


@pytest.fixture(autouse=True)
def any_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which core is the least busy matters to no test here, and looking takes a tenth of a second each time."""
    monkeypatch.setattr(nas.latency.priority, "LOOK_SECONDS", 0.0)


def skeleton(architecture: dict[str, Any], task: Task) -> torch.nn.Module:
    with torch.device("meta"):
        return get_space("efficient_transformer").build(architecture, task.signature)


def here(clock: str = "wall") -> str:
    return conditions_of(identity_here(ONE).to_dict(), clock)


def measured(task: Task, count: int, conditions: str | None = None) -> list[dict[str, Any]]:
    """Latencies that follow from the work: a price for each MAC and each launch."""
    conditions = conditions or here()
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
    mixed = [*measured(task, 15, "there-wall"), *measured(task, 9)]
    assert predicted_over_budget(model, task, payload(1e-3, mixed)) is None


def test_a_prediction_is_made_of_what_this_machine_measured_and_of_nothing_else(task: Task) -> None:
    """After a run went on elsewhere, the other machine's figures must not discard what nobody has measured here."""
    model = skeleton(get_space("efficient_transformer").sample(random.Random(0)), task)
    there = measured(task, 20, "there-wall")
    assert predicted_over_budget(model, task, payload(1e-3, there)) is None
    back = predicted_over_budget(model, task, payload(1e-3, [*measured(task, 12), *there]))
    assert back is not None
    assert "from 12 measured" in back
    clocks = [*measured(task, 15), *measured(task, 11, here("cpu"))]
    by_cpu = predicted_over_budget(model, task, payload(1e-3, clocks))
    assert by_cpu is not None
    assert "from 11 measured" in by_cpu


def test_versions_that_only_a_model_tells_are_known_after_the_first_measurement(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = identity_here(ONE)
    versions = {**told.versions, "exporter": "dynamo"}
    exported = conditions_of({**told.to_dict(), "versions": versions}, "wall")
    assert exported != here()
    model = skeleton(get_space("efficient_transformer").sample(random.Random(0)), task)
    samples = payload(1e-3, measured(task, 10, exported))
    assert predicted_over_budget(model, task, samples) is None
    monkeypatch.setitem(trial_latency._SEEN_VERSIONS, "cpu:1", [versions])
    assert predicted_over_budget(model, task, samples) is not None


def test_the_conditions_told_without_measuring_are_those_of_a_measurement(task: Task) -> None:
    space = get_space("efficient_transformer")
    model = space.build(space.sample(random.Random(3)), task.signature)
    found = measure_candidate(model, task, ONE, payload(None, []), seconds=0.05)
    assert found["conditions"] == here(found["clock"])
    told = conditions_here({"config": {"target": "ray:board/cpu:1"}}, NoChannel())["identity"]
    assert differing(found["identity"], told) == []


class NoChannel:
    def event(self, message: dict[str, Any]) -> None:
        raise AssertionError(message)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError(message)


class AsksNode(NoChannel):
    """A driver that has the candidate measured on the node of the target."""

    def __init__(self, answer: dict[str, Any]):
        self.answer = answer
        self.told: list[str] = []

    def event(self, message: dict[str, Any]) -> None:
        self.told.append(message["stage"])

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert message == {"stage": "measure"}
        return self.answer


def job(target: str, samples: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
    space = get_space("efficient_transformer")
    architecture = space.sample(random.Random(0))
    config = SearchConfig.parse({"space": "efficient_transformer", "target": target, "latency_budget": 1e-3})
    more = {"directory": str(directory), "seed": 0, "architecture": architecture, "named": False}
    run = {"objectives": [], "number": 0, "key": space.key(architecture), "measured": samples}
    return {"config": {**config.dump(), "device": "cpu", "workers": 1}, **more, **run}


def test_the_node_of_the_target_predicts_and_not_the_one_that_trains(task: Task, tmp_path: Path) -> None:
    samples = measured(task, 20)
    over = measure_trial(job("ray:board/cpu:1", samples, tmp_path), NoChannel())["over"]
    assert "not built" in over
    (tmp_path / "here").mkdir()
    told = run_trial(job("cpu:1", samples, tmp_path / "here"), NoChannel())
    assert told["failure"]["reason"] == over
    channel = AsksNode(
        {"over": over}
    )  # the samples are of this machine's conditions, which are not asked for
    (tmp_path / "node").mkdir()
    told = run_trial(job("ray:board/cpu:1", samples, tmp_path / "node"), channel)
    assert channel.told == ["counted"]
    assert (told["state"], told["failure"]["kind"], told["failure"]["reason"]) == ("pruned", "budget", over)


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
    assert other["conditions"] == conditions_of(other["identity"], other["clock"])


@pytest.mark.slow
def test_a_search_discards_by_prediction(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is always quiet, where a latency is the price of the work."""

    def priced(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = measure_candidate(*arguments, **{**options, "seconds": 0.05})
        ms, told = (
            price(found["work"]),
            {"trusted": True, "reasons": [], "clock": "wall", "conditions": here()},
        )
        return {**found, **told, "median_ms": ms, "low_ms": 0.99 * ms, "high_ms": 1.01 * ms}

    monkeypatch.setattr(nas.trial, "measure_candidate", priced)
    budget = sorted(sample["median_ms"] for sample in measured(task, 20))[8]
    settings = {
        "space": "efficient_transformer",
        "trials": 18,
        "epochs": 1,
        "workers": 1,
        "latency_budget": budget,
        "controller": "random",
        "training": {"train_fraction": 0.2},
    }
    report = nas.session.Session(tmp_path / "run", _Silent(), InlineExecutor()).run(settings)
    reasons = [row.failure["reason"] for row in report.trials if row.failure]
    assert any("not built" in reason for reason in reasons)
    kept = report.in_state("complete")
    assert len(kept) >= 3
    assert all(price((row.latency or {})["work"]) * 1.01 <= budget for row in kept)
