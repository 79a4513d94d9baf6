"""Pictures of a run: the front, learning curves, the importance of parameters."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nas.report import write_pareto_png
from nas.report.importance import importance_figure, parallel_figure, parameter_importance
from nas.report.picture import focus
from nas.report.plots import curves_figure, front_figure
from tests.nas._reports import BASE, CASES, architecture, many, run, trial


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
