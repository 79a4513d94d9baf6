"""Reports: the front, and what may be claimed of it."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nas.report import TrialRow
from tests.nas._reports import ACCURACY, BASE, LATENCY, PARAMS, failed, run, trial

# -- the front ---------------------------------------------------------------------------------------------------------


def test_the_front_is_sorted_by_cost_and_leaves_out_what_cannot_be_compared() -> None:
    fast, good, dominated = trial(1, 0.95, 0.2), trial(2, 0.99, 0.9), trial(3, 0.94, 0.3)
    broken = trial(4, values={"accuracy": math.nan, "latency_ms": 0.1})
    partial = trial(5, values={"accuracy": 1.0})
    report = run(good, dominated, broken, partial, fast, failed(6))
    assert [row.number for row in report.front()] == [1, 2]
    assert run().front() == []


def test_with_one_objective_the_front_holds_the_best() -> None:
    report = run(trial(1, 0.95), trial(2, 0.99), trial(3, 0.99), objectives=[ACCURACY])
    assert [row.number for row in report.front()] == [2, 3]


def test_the_objectives_are_told_apart_by_name() -> None:
    report = run(objectives=[PARAMS, LATENCY, ACCURACY])
    assert report.quality == ACCURACY
    assert report.cost == LATENCY
    assert run(objectives=[LATENCY]).quality is None
    assert run(objectives=[ACCURACY]).cost is None


# -- the verdict -------------------------------------------------------------------------------------------------------


def test_a_win_names_both_measurements() -> None:
    verdict = run(BASE, trial(17, 0.981, 0.42), trial(18, 0.99, 0.6)).verdict()
    assert verdict == (
        "Found #17: 0.42 ms (0.41-0.43) against softmax_baseline 0.95 ms (0.94-0.96), "
        "validation accuracy 0.9810 against 0.9790."
    )


def test_the_fastest_is_not_chosen_at_worse_accuracy() -> None:
    assert run(BASE, trial(1, 0.97, 0.1), trial(2, 0.979, 0.5)).verdict().startswith("Found #2")


def test_overlapping_intervals_are_no_win() -> None:
    verdict = run(BASE, trial(9, 0.98, 0.93)).verdict()
    assert verdict.startswith(
        "No found architecture beats softmax_baseline: the best at no worse validation accuracy is #9"
    )
    assert verdict.endswith("the intervals overlap.")


def test_a_slower_one_is_no_win() -> None:
    assert run(BASE, trial(9, 0.99, 2.0)).verdict().endswith("it costs more.")


def test_none_reaches_the_quality() -> None:
    verdict = run(BASE, trial(4, 0.975, 0.5), trial(5, 0.97, 0.1)).verdict()
    assert "none reaches its validation accuracy 0.9790; the closest is #4 with 0.9750" in verdict


def test_a_latency_without_an_interval_is_never_a_win() -> None:
    verdict = run(BASE, trial(1, 0.99, 0.1, latency=None)).verdict()
    assert verdict.endswith("no interval was measured, so no difference can be claimed.")


def test_published_architectures_are_not_found_ones() -> None:
    verdict = run(BASE, trial(1, 0.99, 0.1, name="paper_s")).verdict()
    assert verdict == "Nothing was found yet: only 2 given architectures finished."


def test_a_second_measurement_decides() -> None:
    first = run(BASE, trial(17, 0.981, 0.42), test_metric="accuracy")
    again = {
        "number": 0,
        "name": BASE.name,
        "median_ms": 0.5,
        "low_ms": 0.45,
        "high_ms": 0.55,
        "test": {"accuracy": 0.97},
    }
    other = {
        "number": 17,
        "name": None,
        "median_ms": 0.46,
        "low_ms": 0.43,
        "high_ms": 0.49,
        "test": {"accuracy": 0.96},
    }
    slow = dataclasses.replace(first, finalists=[again, other])
    assert first.verdict().startswith("Found #17")
    assert slow.verdict().endswith(
        "0.46 ms (0.43-0.49) against softmax_baseline 0.50 ms (0.45-0.55); the intervals overlap."
    )
    fast = dataclasses.replace(first, finalists=[again, {**other, "high_ms": 0.44, "ratio_high": 0.98}])
    assert fast.verdict().endswith("test accuracy 0.9600 against 0.9700.")
    unsure = dataclasses.replace(first, finalists=[again, {**other, "high_ms": 0.44, "ratio_high": 1.01}])
    assert unsure.verdict().endswith("the interval of their ratio includes 1.")
    absent = dataclasses.replace(first, finalists=[again])
    assert absent.verdict().endswith("it was not measured again beside the baseline.")


def test_counted_costs_need_no_interval() -> None:
    def sized(number: int, params: int, **more: Any) -> TrialRow:
        return trial(number, values={"accuracy": 0.98, "params": params}, **more)

    base = sized(0, 100_000, name="softmax_baseline")
    objectives = [ACCURACY, PARAMS]
    verdict = run(base, sized(1, 34_100), objectives=objectives).verdict()
    assert verdict.startswith(
        "Found #1: parameters 34.1 k against softmax_baseline 100 k, validation accuracy"
    )
    assert run(base, sized(1, 100_000), objectives=objectives).verdict().endswith("they cost the same.")


def test_quality_alone_claims_no_significance() -> None:
    better = run(BASE, trial(1, 0.985), objectives=[ACCURACY]).verdict()
    assert better.startswith("Best found #1: validation accuracy 0.9850 against softmax_baseline 0.9790")
    assert "may be chance" in better
    assert (
        run(BASE, trial(1, 0.979), objectives=[ACCURACY]).verdict().startswith("No found architecture beats")
    )


def test_a_quality_to_minimise() -> None:
    def losing(number: int, loss: float, latency: float, **more: Any) -> TrialRow:
        return trial(number, 0.0, latency, **{"values": {"loss": loss, "latency_ms": latency}, **more})

    objectives = [("loss", "minimize"), LATENCY]
    base = losing(0, 1.5, 0.9, name="softmax_baseline")
    report = run(base, losing(1, 1.6, 0.1), losing(2, 1.4, 0.3), objectives=objectives, task_description={})
    assert report.verdict().startswith("Found #2: 0.30 ms")
    assert report.verdict().endswith("loss 1.400 against 1.500.")


def test_three_objectives_and_latency_alone() -> None:
    def full(row: TrialRow) -> TrialRow:
        return dataclasses.replace(row, values={**row.values, "params": row.metrics["params"]})

    three = run(full(BASE), full(trial(3, 0.98, 0.4)), objectives=[ACCURACY, LATENCY, PARAMS])
    assert three.verdict().startswith("Found #3: 0.40 ms")
    assert run(BASE, trial(3, 0.1, 0.4), objectives=[LATENCY]).verdict().startswith("Found #3: 0.40 ms")


def test_without_a_baseline_the_front_is_described() -> None:
    verdict = run(trial(1, 0.95, 0.2), trial(2, 0.99, 0.9), baseline=None).verdict()
    assert verdict.startswith(
        "The front holds 2 candidates of 2 evaluated: #1 (accuracy 0.9500, 0.2 ms) to #2"
    )
    assert verdict.endswith("no baseline was given to compare with.")
    assert "has not been evaluated yet" in run(trial(1)).verdict()
    broken = dataclasses.replace(failed(0, reason="boom"), name="softmax_baseline")
    assert run(broken, trial(1)).verdict().endswith("as the baseline softmax_baseline failed: boom")
    assert (
        run(trial(1), objectives=[ACCURACY], baseline=None)
        .verdict()
        .startswith("The best of 1 candidate is #1")
    )


def test_no_success_names_the_commonest_reason() -> None:
    verdict = run(failed(1, "nan", "loss is nan"), failed(2, "nan", "loss is nan"), failed(3)).verdict()
    assert verdict == (
        "No candidate succeeded: 3 failed and 0 were stopped early, most often (2 times) with nan: loss is nan"
    )
    over = run(
        failed(1, "budget", "2 ms exceed the latency budget"),
        failed(2, "budget", "2 ms exceed the latency budget"),
    )
    assert "most often (2 times) with budget: 2 ms exceed" in over.verdict()
    assert run().verdict() == "No candidate has been evaluated yet."
    assert run(trial(1, state="running", values={})).verdict() == "No candidate has been evaluated yet."


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.97, 0.979, 0.98]), st.floats(0.01, 3), st.floats(0, 0.5)),
        min_size=1,
        max_size=6,
    )
)
def test_a_claim_always_holds(candidates: list[tuple[float, float, float]]) -> None:
    rows = [trial(i, *pair, width=width) for i, (*pair, width) in enumerate(candidates, start=1)]
    verdict = run(BASE, *rows).verdict()
    assert BASE.latency is not None
    winners = [
        row
        for row in rows
        if row.values["accuracy"] >= 0.979 and row.latency and row.latency["high_ms"] < BASE.latency["low_ms"]
    ]
    assert verdict.startswith("Found") == bool(winners)
    if winners:
        best = min(winners, key=lambda row: row.values["latency_ms"])
        assert verdict.startswith(f"Found #{best.number}:")


def test_importing_the_report_stays_cheap() -> None:
    heavy = ("torch", "matplotlib", "plotly", "sklearn", "optuna", "pandas")
    code = f"import sys, nas.report; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
