"""Reports: what may be claimed, how it looks in a terminal, and that no text from outside can act on a reader."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import html
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from nas.report import (
    RunReport,
    TrialRow,
    candidate_line,
    failures_table,
    finalists_table,
    front_table,
    write_html,
    write_pareto_csv,
    write_pareto_png,
)
from nas.report.formats import (
    as_number,
    format_count,
    format_interval,
    format_ms,
    format_seconds,
    format_value,
    objective_label,
    one_line,
)
from nas.report.html import render_html
from nas.report.importance import importance_figure, parallel_figure, parameter_importance
from nas.report.picture import focus
from nas.report.plots import curves_figure, front_figure
from nas.report.tables import trial_columns
from nas.report.words import abbreviate, summarize

ACCURACY, LATENCY, PARAMS = ("accuracy", "maximize"), ("latency_ms", "minimize"), ("params", "minimize")
MARKUP = "</script><script>alert('x')</script><img src=\"http://evil.example/\"> &"
HOSTILE = f"{MARKUP} \u2028\u2029 \x1b[31m $\\frac \udc80"


def architecture(rng: random.Random, depth: int | None = None) -> dict[str, Any]:
    depth = depth or rng.randint(2, 6)
    made: dict[str, Any] = {"embed_dim": rng.choice([32, 48, 64, 96]), "depth": depth}
    for layer in range(depth):
        made[f"layer{layer}.attention"] = rng.choice(["softmax", "cosformer"])
        made[f"layer{layer}.heads"] = rng.choice([2, 4])
        made[f"layer{layer}.ffn"] = rng.choice([64, 128, 256])
    return made


def trial(
    number: int,
    accuracy: float = 0.98,
    ms: float = 0.5,
    *,
    width: float = 0.02,
    name: str | None = None,
    **more: Any,
) -> TrialRow:
    """A complete trial whose latency interval reaches ``width`` (a share of the latency) to both sides."""
    bounds = {"low_ms": ms * (1 - width), "high_ms": ms * (1 + width)}
    measured = {"median_ms": ms, **bounds, "samples": 50, "precise": True}
    row = TrialRow(
        number=number,
        architecture=architecture(random.Random(number)),
        key=f"{number:016x}",
        state="complete",
        name=name,
        values={"accuracy": accuracy, "latency_ms": ms},
        metrics={"params": 34_100 + number, "macs": 1_250_000, "accuracy": accuracy},
        latency=measured,
        curve=[{"epoch": e, "train_loss": 2.0 / e, "accuracy": accuracy * (1 - 0.5**e)} for e in range(1, 5)],
        seconds=3.2,
        seed=number,
    )
    return dataclasses.replace(row, **more)


def failed(
    number: int, kind: str = "memory", reason: str = "cannot allocate", log: str = "Traceback"
) -> TrialRow:
    failure = {"kind": kind, "reason": reason, "log_tail": log}
    state = "pruned" if kind in ("pruned", "budget") else "failed"
    return trial(number, state=state, values={}, latency=None, curve=[], failure=failure)


def run(*trials: TrialRow, **more: Any) -> RunReport:
    report = RunReport(
        name="demo",
        space="efficient_transformer",
        task_description={"name": "image_classification", "train": 1077, "validation": 360},
        target="cpu:1",
        objectives=[ACCURACY, LATENCY],
        trials=list(trials),
        environment={"cpu": "some CPU", "versions": {"torch": "2.9"}},
        recipe={"space": "efficient_transformer", "trials": 32, "training": {"amp": "auto"}},
        started="2026-01-01T10:00:00",
        finished="2026-01-01T10:03:00",
        wall_seconds=180.0,
        baseline="softmax_baseline",
    )
    return dataclasses.replace(report, **more)


BASE = trial(0, 0.979, 0.95, width=0.015, name="softmax_baseline")


def many(count: int, seed: int = 0) -> RunReport:
    rng = random.Random(seed)
    rows = [BASE]
    for number in range(1, count):
        if rng.random() < 0.1:
            rows.append(failed(number, rng.choice(["memory", "nan", "pruned"])))
            continue
        made = architecture(rng)
        softmax = sum(value == "softmax" for value in made.values())
        latency = 0.1 * made["depth"] + 0.02 * softmax + rng.gauss(0, 0.003)
        accuracy = 0.9 + 0.0006 * made["embed_dim"] + 0.002 * softmax + rng.gauss(0, 0.002)
        rows.append(trial(number, accuracy, latency, architecture=made))
    return run(*rows)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (512, "512"), (999, "999"), (999.6, "1 k"), (34_100, "34.1 k"), (3_400_000, "3.4 M"),
     (999_999, "1 M"), (1_250_000_000, "1.25 G"), (2e12, "2 T"), (5e15, "5,000 T")],
)  # fmt: skip
def test_counts_carry_a_unit(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4213, "0.421 ms"), (12.345, "12.3 ms"), (123.4, "123 ms"), (999.7, "1,000 ms"), (1234.5, "1,234 ms")],
)
def test_latencies_carry_three_digits(value: float, text: str) -> None:
    assert format_ms(value) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((0.4213, 0.4102, 0.4301), "0.42 (0.41-0.43)"), ((0.4213, 0.4205, 0.4221), "0.421 (0.420-0.422)"),
     ((12.345, 12.2, 12.51), "12.3 (12.2-12.5)"), ((1234.5, 1200.0, 1301.0), "1,234 (1,200-1,301)"),
     ((0.42, None, 0.5), "0.42"), ((0.42, math.nan, 0.5), "0.42"), ((0.0, 0.0, 0.0), "0.0000 (0.0000-0.0000)")],
)  # fmt: skip
def test_intervals_show_what_they_support(
    arguments: tuple[float, float | None, float | None], text: str
) -> None:
    assert format_interval(*arguments) == text


def test_other_values() -> None:
    assert format_value("accuracy", 0.98124) == "0.9812"
    assert format_value("bleu", 27.431) == "27.43"
    assert format_value("loss", 1.23456) == "1.235"
    assert format_value("params", 34_100) == "34.1 k"
    assert format_value("latency_ms", 0.42) == "0.42 ms"
    assert format_value("rate", 1e-6) == "1e-06"
    assert [format_seconds(s) for s in (None, 0.44, 12, 200, 7500)] == [
        "",
        "0.4 s",
        "12 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert objective_label("latency_ms") == "latency (ms)"
    assert [as_number(x) for x in (True, None, "1", math.nan, math.inf, 2)] == [
        None,
        None,
        None,
        None,
        None,
        2.0,
    ]


def test_text_from_outside_stays_on_one_line() -> None:
    assert one_line("a\nb\x1b[2J\tc\u2028d") == "a b [2J c d"
    assert one_line("abcdef", 4) == "abc…"


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


# -- architectures in words --------------------------------------------------------------------------------------------


def test_layers_are_summarised_by_parameter() -> None:
    made = {
        "embed": 64,
        "layer0.attention": "cosformer",
        "layer1.attention": "softmax",
        "layer2.attention": "softmax",
    }
    made |= {f"layer{i}.ffn": 128 for i in range(3)}
    assert summarize(made) == "embed=64 attention=cosformer,softmax,softmax ffn=128×3"
    assert (
        summarize(made, abbreviate(["softmax", "cosformer"])) == "embed=64 attention=cosf,soft,soft ffn=128×3"
    )


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            {"encoder0.heads": 4, "encoder1.heads": 8, "decoder0.heads": 2},
            "encoder.heads=4,8 decoder.heads=2",
        ),
        ({"width": 8, "block1.width": 16}, "width=8 block.width=16"),
        ({"ffn0": 1, "ffn1": 2}, "ffn=1,2"),
        ({"layer": 1, "layer0": 2}, "layer=1 layer*=2"),
        ({"stage1.block0.k": 3, "stage1.block1.k": 5}, "k=3,5"),
        ({"dropout": 0.12345, "norm": True, "extra": None}, "dropout=0.123 norm=yes extra=none"),
        ({}, ""),
    ],
)
def test_summaries_of_any_flat_dictionary(made: dict[str, Any], text: str) -> None:
    assert summarize(made) == text


def test_abbreviations_stay_apart() -> None:
    short = abbreviate(["linear_relu", "linear_elu", "softmax", "soft", "performer"])
    assert short["performer"] == "perf"
    assert short["softmax"] != "soft"
    assert len(set(short.values()) | {"soft"}) == 5


@given(st.sets(st.text("abcd_", min_size=1, max_size=12), max_size=12))
def test_an_abbreviation_stands_for_one_word(words: set[str]) -> None:
    short = abbreviate(words)
    written = [short.get(word, word) for word in words]
    assert len(set(written)) == len(words)


# -- terminal ----------------------------------------------------------------------------------------------------------


def printed(item: Any, width: int) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(item)
    return capture.get().splitlines()


def finalists(report: RunReport) -> RunReport:
    rows = [BASE, *report.front()]
    found = [
        {"number": r.number, "name": r.name, "median_ms": 0.4, "low_ms": 0.39, "high_ms": 0.41, "ratio": 0.44,
         "ratio_low": 0.43, "ratio_high": 0.45, "test": {"accuracy": 0.97}}
        for r in rows
    ]  # fmt: skip
    return dataclasses.replace(report, finalists=found, test_metric="accuracy")


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(width: int) -> None:
    report = finalists(many(60))
    for table in (front_table(report), finalists_table(report), failures_table(report)):
        lines = printed(table, width)
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines).replace(" …", "")


def test_the_front_table_shows_figures_and_the_baseline() -> None:
    report = run(
        BASE,
        trial(17, 0.981, 0.42, metrics={"params": 34_100, "macs": 1_250_000, "final": {"accuracy": 0.97}}),
    )
    text = "\n".join(printed(front_table(dataclasses.replace(report, test_metric="accuracy")), 100))
    assert re.search(r"#17 +0\.9810 +0\.42 \(0\.41-0\.43\) +34\.1 k +1\.25 M +0\.9700", text)
    assert re.search(r"#0 softmax_baseline +0\.9790 +0\.95 \(0\.94-0\.96\)", text)
    assert re.search(r"#17 +embed_dim=\d+ depth=\d", text)
    assert "so there is no front" in "\n".join(printed(front_table(run()), 80))


def test_a_long_front_is_thinned_and_says_so() -> None:
    rows = [trial(i, 0.5 + i / 1000, 0.1 + i / 1000) for i in range(1, 101)]
    text = "\n".join(printed(front_table(run(*rows)), 100))
    assert "20 of 100 are shown; all are in pareto.csv" in text
    assert "#1 " in text
    assert "#100" in text


def test_each_candidate_is_one_line() -> None:
    row = trial(17, 0.9812, 0.4213)
    line = candidate_line(row, [ACCURACY, LATENCY], mark="best", short={"softmax": "soft"}, width=100).plain
    assert line.startswith("#17   best   accuracy 0.9812  0.421 ms ±2.0%  34.1 k  3.2 s")
    assert "softmax" not in line
    for width in (40, 80, 100):
        assert len(candidate_line(row, [ACCURACY, LATENCY], width=width).plain) <= width
    assert "0.421 ms" in candidate_line(row, [ACCURACY]).plain
    assert "softmax_baseline" in candidate_line(BASE, [ACCURACY, LATENCY]).plain


def test_a_failed_candidate_says_why() -> None:
    line = candidate_line(failed(3, reason="cannot\nallocate [bold]\x1b[2J"), [ACCURACY]).plain
    assert re.match(r"#3 +failed +3\.2 s +memory: cannot allocate \[bold\] \[2J", line)
    assert "\x1b" not in line


def test_failures_are_counted_by_reason() -> None:
    rows = [failed(i) for i in range(5)] + [failed(9, "nan", "loss is nan"), failed(10, "pruned", "slow")]
    text = "\n".join(printed(failures_table(run(*rows)), 100))
    assert re.search(r"5 +memory +#0, #1, #2 … +cannot allocate", text)
    assert re.search(r"1 +nan +#9 +loss is nan", text)
    assert "slow" not in text


# -- pareto.csv --------------------------------------------------------------------------------------------------------


def test_the_csv_holds_every_complete_trial(tmp_path: Path) -> None:
    win = trial(2, 0.99, 0.4, metrics={"params": 34_100, "macs": 5, "final": {"accuracy": 0.97}})
    write_pareto_csv(run(win, BASE, failed(3)), tmp_path / "pareto.csv")
    with open(tmp_path / "pareto.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["0", "2"]
    assert [row["on_front"] for row in rows] == ["0", "1"]
    assert rows[0]["name"] == "softmax_baseline"
    assert float(rows[1]["latency_low_ms"]) == pytest.approx(0.392)
    assert (rows[0]["test_accuracy"], rows[1]["test_accuracy"]) == ("", "0.97")
    assert rows[1]["latency_precise"] == "1"
    assert rows[1]["key"] == win.key
    assert json.loads(rows[1]["architecture"]) == win.architecture
    assert [path.name for path in tmp_path.iterdir()] == ["pareto.csv"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(tmp_path: Path, text: str) -> None:
    write_pareto_csv(run(trial(1, name=text, key=text), objectives=[ACCURACY]), tmp_path / "pareto.csv")
    with open(tmp_path / "pareto.csv", newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert row["name"].startswith("'")
    assert row["name"].endswith(text.strip())
    assert row["key"] == row["name"]


def test_negative_numbers_stay_numbers(tmp_path: Path) -> None:
    write_pareto_csv(run(trial(1, -0.5)), tmp_path / "pareto.csv")
    with open(tmp_path / "pareto.csv", newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["accuracy"] == "-0.5"


# -- pictures ----------------------------------------------------------------------------------------------------------


CASES = {
    "two": many(30),
    "one objective": dataclasses.replace(many(20), objectives=[ACCURACY]),
    "quality alone, no baseline": dataclasses.replace(many(20), objectives=[ACCURACY], baseline=None),
    "latency alone": dataclasses.replace(many(20), objectives=[LATENCY]),
    "one trial": run(BASE),
    "nothing": run(),
    "failures only": run(failed(1), failed(2)),
    "log axis": run(BASE, trial(1, 0.9, 0.01), trial(2, 0.99, 50.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_drawn_for_any_run(tmp_path: Path, case: str) -> None:
    write_pareto_png(CASES[case], tmp_path / "pareto.png")
    with Image.open(tmp_path / "pareto.png") as image:
        image.load()
        assert image.size == (900, 600)
        colors = image.convert("RGB").getcolors(1 << 24)
    assert colors is not None
    assert len(colors) > 10


def test_the_picture_shows_front_and_baseline_in_their_colours(tmp_path: Path) -> None:
    write_pareto_png(run(BASE, trial(1, 0.99, 0.3)), tmp_path / "pareto.png")
    with Image.open(tmp_path / "pareto.png") as image:
        found = {color for _, color in image.convert("RGB").getcolors(1 << 24) or ()}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= found


@pytest.mark.parametrize(
    ("objectives", "shape", "corners"),
    [
        ([("q", "maximize"), ("c", "minimize")], "hv", [(1, 1), (2, 2)]),
        ([("q", "minimize"), ("c", "minimize")], "hv", [(1, 1)]),
        ([("q", "maximize"), ("c", "maximize")], "vh", [(2, 2)]),
        ([("q", "minimize"), ("c", "maximize")], "vh", [(1, 1), (2, 2)]),
    ],
)
def test_the_line_joins_the_front_in_all_directions(
    objectives: list[tuple[str, str]], shape: str, corners: list[tuple[float, float]]
) -> None:
    points = [(1.0, 1.0), (2.0, 2.0)]
    rows = [trial(i, values={"c": c, "q": q}) for i, (c, q) in enumerate(points)]
    line = front_figure(run(*rows, objectives=objectives))["data"][0]
    assert line["line"]["shape"] == shape
    assert list(zip(line["x"], line["y"], strict=True)) == corners


def test_a_few_bad_trials_do_not_squeeze_the_picture() -> None:
    values = [0.97 + i / 1000 for i in range(10)] + [0.1]
    shown = focus(values, [0.979], "maximize")
    assert shown is not None
    assert 0.9 < shown[0] < 0.97
    assert shown[1] > 0.979
    assert focus(values[:-1], [0.979], "maximize") is None
    assert focus([1.0, 1.0], [1.0], "minimize") is None


def test_hovering_shows_the_architecture_and_the_interval() -> None:
    traces = {trace.get("name"): trace for trace in front_figure(run(BASE, trial(7, 0.99, 0.4)))["data"]}
    text = traces["front"]["text"][0]
    assert text.startswith("<b>#7</b><br>accuracy: 0.9900<br>latency: 0.40 (0.39-0.41) ms<br>embed_dim=")
    assert traces["front"]["error_x"]["array"] == pytest.approx([0.008])
    assert traces["softmax_baseline"]["marker"]["symbol"] == "star"


def test_curves_fall_back_to_the_validation_loss() -> None:
    full = curves_figure(run(BASE))
    assert full is not None
    assert full["layout"]["yaxis1"]["title"]["text"] == "validation accuracy"
    nested = [{"epoch": e, "metrics": {"loss": 1.0 / e}, "train_loss": math.nan} for e in (1, 2, 3)]
    quick = curves_figure(run(trial(1, curve=nested)))
    assert quick is not None
    assert [trace["y"] for trace in quick["data"]] == [[1.0, 0.5, 1.0 / 3]]
    assert quick["layout"]["yaxis1"]["title"]["text"] == "validation loss"
    assert curves_figure(run(trial(1, curve=[]))) is None


# -- importance --------------------------------------------------------------------------------------------------------


def sampled(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [architecture(rng) for _ in range(count)]


def test_the_parameter_that_decides_comes_first() -> None:
    rows = sampled(40)
    estimate = parameter_importance("accuracy", rows, [0.01 * row["embed_dim"] for row in rows])
    assert estimate.reason == ""
    assert next(iter(estimate.scores)) == "embed_dim"
    assert estimate.r2 > 0.9
    assert estimate == parameter_importance("accuracy", rows, [0.01 * row["embed_dim"] for row in rows])
    kinds = parameter_importance(
        "accuracy", rows, [float(row["layer0.attention"] == "softmax") for row in rows]
    )
    assert next(iter(kinds.scores)) == "layer0.attention"


@pytest.mark.parametrize(
    ("count", "value", "reason"),
    [
        (14, lambda i: float(i), "14 complete trials are too few; at least 15"),
        (30, lambda i: 1.0, "the same value"),
        (60, lambda i: random.Random(i).random(), r"cannot be told from these trials \(cross-validated R² -"),
    ],
)
def test_importance_is_left_out_with_the_reason(count: int, value: Any, reason: str) -> None:
    estimate = parameter_importance("accuracy", sampled(count), [value(i) for i in range(count)])
    assert re.search(reason, estimate.reason)
    assert estimate.scores == {}
    assert importance_figure([estimate]) is None


def test_one_and_the_same_architecture_decides_nothing() -> None:
    estimate = parameter_importance("accuracy", [{"a": 1, "b": "x"}] * 20, [float(i) for i in range(20)])
    assert "all architectures are the same" in estimate.reason


def test_parallel_coordinates_show_the_important_parameters_and_what_is_absent() -> None:
    report = many(60)
    rows = report.comparable()
    estimate = parameter_importance(
        "accuracy", [r.architecture for r in rows], [r.values["accuracy"] for r in rows]
    )
    figure = parallel_figure(report, [estimate])
    assert figure is not None
    dimensions = {dimension["label"]: dimension for dimension in figure["data"][0]["dimensions"]}
    assert len(dimensions) == 14
    assert "embed dim" in dimensions
    assert {"accuracy", "latency (ms)"} <= dimensions.keys()
    deep = next(d for label, d in dimensions.items() if label.startswith("layer5"))
    assert deep["ticktext"][0] == "–"
    shallow = [row.architecture["depth"] < 6 for row in rows]
    assert [value == -1.0 for value in deep["values"]] == shallow
    assert parallel_figure(run(BASE), []) is None


def test_wide_ranges_keep_their_scale() -> None:
    rows = [trial(i, architecture={"rate": 0.5 + i} if i % 5 else {}) for i in range(40)]
    figure = parallel_figure(run(*rows), [])
    assert figure is not None
    rate = figure["data"][0]["dimensions"][0]
    assert rate["ticktext"][0] == "–"
    assert len(rate["ticktext"]) == 6
    assert rate["values"][0] < rate["values"][1] == 1.5


# -- report.html -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements with their attributes, scripts with their contents, and the visible text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._inside is None:
            self.text += data

    def figures(self) -> dict[str, Any]:
        return dict(
            json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "figures"))
        )


ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "section", "div", "span", "b", "p", "pre", "table",
    "thead", "tbody", "tr", "th", "td", "button", "details", "summary", "noscript", "script",
}  # fmt: skip


def check_page(text: str) -> Page:
    """What holds for every page: known elements only, nothing fetched, no script but those that the policy names."""
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= ALLOWED
    known = {
        "charset",
        "http-equiv",
        "content",
        "name",
        "lang",
        "class",
        "id",
        "style",
        "type",
        "scope",
        "data-v",
    }
    assert {name for _, attributes in page.elements for name in attributes} <= known
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    running = [script for attributes, script in page.scripts if attributes.get("type") != "application/json"]
    for script in running:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.count("sha256-") == len(running)
    return page


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_self_contained_for_any_run(case: str) -> None:
    report = CASES[case]
    page = check_page(render_html(report))
    assert report.verdict() in page.text
    assert set(page.figures()) == {
        attributes["id"] for tag, attributes in page.elements if tag == "div" and attributes.get("id")
    }
    assert sum(len(script) > 1_000_000 for _, script in page.scripts) == bool(page.figures())


def test_the_page_holds_every_section() -> None:
    report = finalists(many(60))
    page = check_page(render_html(report))
    headings = [
        "Front",
        "Finalists",
        "Architectures",
        "Parameter importance (estimated)",
        "Learning curves",
        "All trials",
    ]
    headings += ["Failed and stopped trials", "Hardware and versions", "Task", "Recipe"]
    positions = [page.text.index(heading) for heading in headings]
    assert positions == sorted(positions)
    assert set(page.figures()) == {"figure-front", "figure-parallel", "figure-importance", "figure-curves"}
    assert "an estimate by a random forest, cross-validated R²" in page.text
    assert "versions · torch" in page.text
    assert page.text.count("cannot allocate") == 3  # one group for each kind, not one line for each trial
    rows = [attributes for tag, attributes in page.elements if tag == "tr"]
    assert sum(attributes.get("class") == "baseline" for attributes in rows) == 2


def test_the_recipe_can_be_copied_from_the_page() -> None:
    text = render_html(run(recipe={"space": "a: b", "note": HOSTILE[:40], "list": [1, 2]}))
    found = re.search(r"<h2>Recipe</h2><pre>(.*?)</pre>", text, re.DOTALL)
    assert found is not None
    assert yaml.safe_load(html.unescape(found[1])) == {"space": "a: b", "note": HOSTILE[:40], "list": [1, 2]}


def hostile() -> RunReport:
    quality = f"q{HOSTILE}"
    rows = []
    for row in many(40).trials:
        rows.append(
            dataclasses.replace(
                row,
                key=HOSTILE,
                name=f"{row.name}{HOSTILE}" if row.name else None,
                architecture={f"{k}{HOSTILE}": f"{v}{HOSTILE}" for k, v in row.architecture.items()},
                values={quality: row.values["accuracy"], "latency_ms": row.values["latency_ms"]}
                if row.values
                else {},
                curve=[{"epoch": point["epoch"], quality: point["accuracy"]} for point in row.curve],
                failure={"kind": HOSTILE, "reason": HOSTILE, "log_tail": HOSTILE} if row.failure else None,
            )
        )
    return run(
        *rows, name=HOSTILE, space=HOSTILE, target=HOSTILE, objectives=[(quality, "maximize"), LATENCY],
        task_description={"name": HOSTILE, HOSTILE: [HOSTILE]}, environment={HOSTILE: {HOSTILE: HOSTILE}},
        started=HOSTILE, recipe={HOSTILE: [HOSTILE]}, baseline=f"softmax_baseline{HOSTILE}", test_metric=HOSTILE,
        finalists=[{"number": 0, "name": HOSTILE, "median_ms": 1.0, "test": {HOSTILE: 1.0}}],
    )  # fmt: skip


def test_no_text_from_outside_becomes_markup() -> None:
    text = render_html(hostile())
    page = check_page(text)
    assert "<script>alert" in page.text
    assert "<script>alert" not in text
    assert "\u2028" not in text.partition('id="figures">')[2].partition("</script>")[0]

    def strings(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [s for item in value.items() for s in strings(list(item))]
        return (
            [s for item in value for s in strings(item)]
            if isinstance(value, list)
            else [value] * isinstance(value, str)
        )

    # plotly reads tags in its labels; ticks of parallel coordinates and hash-named scripts apart, none may get there.
    ticks = {
        tick for d in page.figures()["figure-parallel"]["data"][0]["dimensions"] for tick in d["ticktext"]
    }
    allowed = re.compile(r"<b>|</b>|<br>|<extra></extra>")
    assert not [s for s in strings(page.figures()) if s not in ticks and "<" in allowed.sub("", s)]


def test_hostile_names_break_no_other_output(tmp_path: Path) -> None:
    report = hostile()
    write_pareto_csv(report, tmp_path / "pareto.csv")
    write_pareto_png(report, tmp_path / "pareto.png")
    write_html(report, tmp_path / "report.html")
    for item in (front_table(report), finalists_table(report), failures_table(report)):
        assert "\x1b" not in "".join(printed(item, 80))
    assert "\x1b" not in report.verdict()
    assert len(list(tmp_path.iterdir())) == 3


def test_tables_sort_by_number() -> None:
    page = check_page(render_html(run(BASE, trial(1, 0.99, 0.4))))
    values = [
        attributes["data-v"] for tag, attributes in page.elements if tag == "td" and "data-v" in attributes
    ]
    assert {"0.95", "0.4", "34100", "34101"} <= set(values)
    labels = [column.label for column in trial_columns(run(BASE))]
    assert labels == ["accuracy", "latency (ms)", "params", "MACs"]


def test_logs_are_cut_and_few() -> None:
    rows = [failed(i, log=f"begin{i}" + "x" * 100_000 + f"end{i}") for i in range(50)]
    text = render_html(run(*rows))
    assert text.count("<pre>") == 4  # three logs and the recipe
    assert "begin0" not in text
    assert "end0</pre>" in text
    assert len(text) < 100_000


@pytest.mark.slow
def test_two_thousand_trials_stay_small() -> None:
    text = render_html(many(2000))
    assert len(text.encode()) < 8_000_000
    check_page(text)


def test_importing_the_report_stays_cheap() -> None:
    heavy = ("torch", "matplotlib", "plotly", "sklearn", "optuna", "pandas")
    code = f"import sys, nas.report; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
