"""Reports in a terminal and in pareto.csv."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest

from nas.report import candidate_line, failures_table, finalists_table, front_table, write_pareto_csv
from tests.nas._reports import ACCURACY, BASE, LATENCY, failed, finalists, many, printed, run, trial


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(width: int) -> None:
    report = finalists(many(60))
    for table in (front_table(report), finalists_table(report), failures_table(report)):
        lines = printed(table, width)
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines).replace(" …", "")


@pytest.mark.parametrize("width", [66, 80])
def test_no_figure_of_the_finalists_is_cut(width: int) -> None:
    report = dataclasses.replace(finalists(many(60)), test_metric="accuracy")
    figures = re.findall(r"\d+\.\d+", " ".join(printed(finalists_table(report), 160)))
    lines = printed(finalists_table(report), width)
    assert figures
    assert sorted(re.findall(r"\d+\.\d+", " ".join(lines))) == sorted(figures)
    assert "…" not in "".join(lines)


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
