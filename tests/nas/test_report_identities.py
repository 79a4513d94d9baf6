"""Latencies of several machines or conditions in one run, and those that are not to be trusted: never pooled, never
silent."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import nas.latency.identity
from nas.api import _Silent
from nas.cli._view import RunView
from nas.conclude import _already_judged, _finalists, measured_elsewhere
from nas.config import SearchConfig
from nas.executors import InlineExecutor, Outcome
from nas.files import write_record
from nas.records import StoredTrial, TrialResult
from nas.report import RunReport, TrialRow, candidate_line, finalists_table, front_table, write_pareto_csv
from nas.report.conditions import differing, short_conditions
from nas.report.html import render_html
from nas.report.pareto_png import _title
from nas.report.tables import judgement
from nas.run_directory import RunDirectory
from nas.session import Session
from nas.trial_latency import over_budget
from tests.nas._reports import ACCURACY, BASE, LATENCY, printed, run, trial

HERE, THERE = "1111111122222222-wall", "aaaaaaaabbbbbbbb-wall"
IDENTITY = {
    "device": "cpu",
    "device_name": "Some CPU",
    "device_uuid": "u1",
    "driver": "Linux 6.1",
    "versions": {"torch": "2.9", "exporter": "dynamo"},
    "affinity": [0],
    "batch": 1,
    "inputs": [],
    "key": "k",
}


def on(conditions: str, row: TrialRow, *, trusted: bool = True) -> TrialRow:
    """``row`` with its latency measured under these conditions."""
    doubts = {"trusted": trusted, "reasons": [] if trusted else ["load 40 on 2 cores"]}
    return dataclasses.replace(row, latency={**(row.latency or {}), "conditions": conditions, **doubts})


def again(row: TrialRow, ms: float, **more: Any) -> dict[str, Any]:
    """``row`` measured again as a finalist, here."""
    figures = {
        "median_ms": ms,
        "low_ms": ms * 0.99,
        "high_ms": ms * 1.01,
        "trusted": True,
        "conditions": HERE,
    }
    return {"number": row.number, "name": row.name, "identity": IDENTITY, **figures, **more}


SLOW = on(THERE, dataclasses.replace(trial(0, 0.90, 10.0, name="softmax_baseline")))
OLD = [on(THERE, trial(number, 0.90 + number / 1000, 9.0 + number / 10)) for number in (1, 2)]
NEW = [on(HERE, trial(number, 0.93 + number / 1000, 5.0 + number / 10)) for number in (3, 4)]


def mixed(**more: Any) -> RunReport:
    return run(SLOW, *OLD, *NEW, **more)


# -- conditions --------------------------------------------------------------------------------------------------------


def test_a_front_is_made_of_latencies_of_one_kind_of_conditions() -> None:
    assert {row.conditions for row in mixed().front()} == {THERE}  # three of five
    assert [row.number for row in mixed().front()] == [1, 2]
    more = run(SLOW, *OLD, *NEW, on(HERE, trial(5, 0.95, 6.0)))
    assert [row.number for row in more.front()] == [3, 4, 5]  # as many, and later
    assert [[row.number for row in front] for front in more.fronts()] == [[3, 4, 5], [1, 2]]
    assert len(more.usable()) == 6


def test_where_no_latency_is_an_objective_all_trials_compare() -> None:
    report = mixed(objectives=[ACCURACY])
    assert len(report.comparable()) == 5
    assert report.notes() == []
    assert report.verdict().startswith("Best found #4")


def test_the_verdict_compares_no_figures_of_two_machines() -> None:
    verdict = run(SLOW, NEW[0]).verdict()
    assert "against softmax_baseline" not in verdict
    assert "5.3" in verdict
    assert (
        "nothing is compared with the baseline softmax_baseline, measured under other conditions" in verdict
    )
    assert mixed().verdict().startswith("Found #1: 9.1 ms")  # and not #3, which another machine measured


def test_measured_again_together_they_compare() -> None:
    found = [
        again(SLOW, 6.0, verdict=None),
        again(OLD[0], 5.9, verdict="cannot tell"),
        again(NEW[1], 5.0, verdict="faster"),
    ]
    verdict = mixed(finalists=found).verdict()
    assert verdict.startswith("Found #4: 5.00 ms (4.95-5.05) against softmax_baseline 6.0 ms")
    alone = run(SLOW, *NEW, finalists=[again(SLOW, 6.0, verdict=None)]).verdict()
    assert alone == (
        "No found architecture beats softmax_baseline: the best at no worse validation accuracy is #3 with a latency "
        "that does not compare with that of softmax_baseline; it was not measured again beside the baseline."
    )


def test_every_output_says_whose_latencies_are_left_out(tmp_path: Path) -> None:
    report = mixed()
    said = "not in it: 2 measured under 11111111-wall (#3, #4)"
    (note,) = report.notes()
    assert said in note
    assert "the 3 candidates measured under aaaaaaaa-wall" in note
    assert said in " ".join(" ".join(printed(front_table(report), 100)).split())
    assert said in render_html(report)
    assert "without 2 candidates whose latencies were measured under other conditions" in _title(report)
    write_pareto_csv(report, tmp_path / "pareto.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "pareto.csv").read_text())))
    assert [row["latency_conditions"] for row in rows] == [THERE] * 3 + [HERE] * 2
    assert [row["on_front"] for row in rows] == ["0", "1", "1", "0", "0"]
    assert re.search(r"<td>11111111-wall</td>", render_html(report))


def test_a_baseline_of_other_conditions_does_not_stand_beside_the_front() -> None:
    report = run(SLOW, *NEW)
    assert [row.number for row in report.front()] == [3, 4]
    assert not any("softmax_baseline" in line for line in printed(front_table(report), 100)[:8])
    assert "softmax_baseline" in "".join(printed(front_table(run(BASE, trial(1, 0.99, 0.1))), 100)[:8])


def test_the_finalists_table_names_the_machine() -> None:
    report = mixed(finalists=[again(SLOW, 6.0), again(NEW[0], 5.0)])
    heading = " ".join(" ".join(printed(finalists_table(report), 100)).split())
    assert "Some CPU, conditions 11111111-wall" in heading
    assert "Measured on cpu:1, Some CPU, conditions 11111111-wall." in render_html(report)
    assert short_conditions(None) == "unknown"


def test_the_live_view_marks_the_front_of_the_same_conditions() -> None:
    console = Console(width=100, color_system=None, force_terminal=False)
    view = RunView(console)
    config = SearchConfig.parse({"space": "s", "objectives": ["accuracy:maximize", "latency_ms:minimize"]})
    view.searching(config, [stored(NEW[1])])
    with console.capture() as capture:
        view.finished(stored(OLD[0]))  # slower and less accurate, but on another machine
    assert "front" in capture.get()
    with console.capture() as capture:
        view.finished(stored(on(THERE, trial(7, 0.5, 20.0))))
    assert "front" not in capture.get()


def stored(row: TrialRow) -> StoredTrial:
    result = TrialResult(state="complete", values=row.values, metrics=row.metrics, latency=row.latency)
    return StoredTrial(row.number, -1, row.architecture, row.key, row.name, 0, "complete", result=result)


# -- another machine ---------------------------------------------------------------------------------------------------


def test_identities_differ_in_what_a_latency_depends_on() -> None:
    now = {**IDENTITY, "versions": {"torch": "2.9"}, "affinity": [3], "batch": 8, "key": None}
    assert differing(IDENTITY, now) == []
    other = {**now, "device_uuid": "u2", "versions": {"torch": "3.0"}, "affinity": None}
    assert differing(IDENTITY, other) == [
        "device_uuid: u1, now u2",
        "affinity: 1, now None",
        "version of torch: 2.9, now 3.0",
    ]


def test_a_run_that_goes_on_elsewhere_says_so() -> None:
    latencies = [{"identity": IDENTITY}, {"identity": {**IDENTITY, "device_uuid": "u2"}}, {}]
    assert measured_elsewhere(latencies[:1], IDENTITY) == ""
    line = measured_elsewhere(latencies, IDENTITY)
    assert line.startswith("1 of 2 latencies of this run were measured under other conditions")
    assert "device_uuid: u2, now u1" in line


class Answers:
    """An executor whose target tells these conditions."""

    capacity = 1

    def __init__(self, identity: dict[str, Any]):
        self.identity = identity
        self.asked: list[str] = []

    def submit(self, function: str, payload: dict[str, Any], **more: Any) -> Future[Outcome]:
        self.asked.append(function)
        future: Future[Outcome] = Future()
        future.set_result(Outcome({"identity": self.identity}, None, 0.1, 1))
        return future

    def close(self, *, kill: bool = False) -> None:
        raise AssertionError("nobody closes it")


@pytest.mark.parametrize(("uuid", "kept"), [("u1", True), ("u2", False)])
def test_finalists_are_judged_again_on_another_machine(tmp_path: Path, uuid: str, kept: bool) -> None:
    directory = RunDirectory(tmp_path)
    chosen = [SLOW, NEW[0]]
    write_record(
        directory.finalists, {"finalists": [again(row, 5.0, test={"accuracy": 1}) for row in chosen]}
    )
    config, executor = SearchConfig.parse({"space": "s"}), Answers({**IDENTITY, "device_uuid": uuid})
    assert _already_judged(directory, chosen, config, executor, threading.Event()) is kept
    assert executor.asked == ["nas.search_jobs:conditions_here"]
    assert not _already_judged(directory, chosen[:1], config, executor, threading.Event())


def test_finalists_are_the_best_of_each_kind_of_conditions() -> None:
    assert [row.number for row in _finalists(mixed())] == [1, 2, 3, 4, 0]
    alone = run(*(on(THERE, trial(number, 0.5 + number / 100, 1.0 + number)) for number in range(30)))
    assert len(_finalists(alone)) == 12
    both = run(*alone.trials, *(on(HERE, trial(number, number / 100, number)) for number in range(30, 40)))
    assert [row.number for row in _finalists(both)] == [0, 6, 12, 17, 23, 29, 30, 32, 34, 35, 37, 39]


# -- trust -------------------------------------------------------------------------------------------------------------

DOUBTFUL = on(HERE, trial(2, 0.99, 0.5), trusted=False)
SURE = on(HERE, BASE)


def test_untrusted_latencies_are_marked_wherever_they_are_shown() -> None:
    report = run(SURE, DOUBTFUL)
    legend = "? untrusted: measured while the machine was out of bounds, 1 of 2 latencies (#2); most often: load 40"
    text = " ".join(" ".join(printed(front_table(report), 100)).split())
    assert "0.50 (0.49-0.51)?" in text
    assert "0.95 (0.94-0.96) " in text
    assert legend in text
    page = render_html(report)
    assert "0.50 (0.49-0.51)?" in page
    assert legend in page
    assert "±2.0%?" in candidate_line(DOUBTFUL, [ACCURACY, LATENCY], width=100).plain
    assert "?" not in candidate_line(SURE, [ACCURACY, LATENCY], width=100).plain
    assert run(SURE).notes() == []


def test_nothing_is_claimed_of_an_untrusted_latency() -> None:
    verdict = run(SURE, DOUBTFUL).verdict()
    assert "0.50 ms (0.49-0.51) untrusted against softmax_baseline 0.95 ms (0.94-0.96);" in verdict
    assert verdict.endswith("of an untrusted latency no difference is claimed.")
    assert run(on(HERE, BASE, trusted=False), on(HERE, trial(1, 0.99, 0.1))).verdict().startswith("No found")
    assert "0.5 ms untrusted" in run(DOUBTFUL, baseline=None).verdict()


def test_side_by_side_a_disturbed_comparison_is_told_as_such() -> None:
    found = [
        again(SURE, 1.0, verdict=None, trusted=False),
        again(DOUBTFUL, 0.5, verdict="faster", trusted=False),
    ]
    verdict = run(SURE, DOUBTFUL, finalists=found).verdict()
    assert verdict.startswith("Found #2: 0.50 ms (0.49-0.51) untrusted against softmax_baseline 1.00 ms")


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_an_untrusted_latency_neither_discards_nor_holds() -> None:
    assert over_budget(5.5, {"median_ms": 5, "low_ms": 4.9, "high_ms": 5.1, "trusted": False}) is None
    report = run(SURE, DOUBTFUL, recipe={"latency_budget": 0.55})
    assert report.budget_doubt(DOUBTFUL) == "untrusted"
    assert report.notes()[-1] == (
        "The latency budget of 0.55 ms is not known to hold for #2, whose latency is untrusted."
    )
    assert report.notes()[-1] in render_html(report)
    assert run(SURE, DOUBTFUL).budget_doubt(DOUBTFUL) is None


def test_measured_again_a_budget_is_held_or_not() -> None:
    budget = {"recipe": {"latency_budget": 0.55}}
    held = run(SURE, DOUBTFUL, finalists=[again(DOUBTFUL, 0.5)], **budget)
    assert held.budget_doubt(DOUBTFUL) is None
    over = run(SURE, DOUBTFUL, finalists=[again(SURE, 1.0), again(DOUBTFUL, 0.6, verdict="faster")], **budget)
    assert over.budget_doubt(DOUBTFUL) == "over"
    assert over.notes()[-1].endswith("0.55 ms is not held by #2 when measured again.")
    assert over.verdict().endswith("; the latency budget of 0.55 ms is not held when measured again.")
    assert "over budget" in " ".join(printed(finalists_table(over), 100))
    assert judgement(again(DOUBTFUL, 0.6, verdict="faster"), 0.55) == "faster, over budget"
    assert judgement(again(DOUBTFUL, 0.6, trusted=False), 0.55) == "over budget (untrusted)"


def test_a_trusted_latency_of_the_same_conditions_holds_a_budget_though_a_second_one_was_disturbed() -> None:
    sure = on(HERE, trial(2, 0.99, 0.5))
    disturbed = [again(sure, 0.5, trusted=False)]
    budget = {"recipe": {"latency_budget": 0.55}, "finalists": disturbed}
    assert run(SURE, sure, **budget).budget_doubt(sure) is None
    moved = on(THERE, trial(2, 0.99, 0.5))
    assert run(SURE, moved, **budget).budget_doubt(moved) == "untrusted"


# -- a real run --------------------------------------------------------------------------------------------------------


class Listens(_Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def concluding(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a measurement of somebody else's may hold the device for a while
def test_a_run_goes_on_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beside other work on its core a candidate may be read by CPU time, which makes it another kind of conditions.
    monkeypatch.setattr(sys.modules["nas.latency.measure"], "clock_of", lambda target, calls: "wall")

    def session(trials: int) -> tuple[RunReport, str]:
        listener = Listens()
        settings = {
            "space": "efficient_transformer",
            "epochs": 1,
            "workers": 1,
            "training": {"train_fraction": 0.2},
        }
        out = Session(tmp_path / "run", listener, InlineExecutor())
        return out.run({**settings, "trials": trials}), "\n".join(listener.told)

    before, _ = session(2)
    assert len({row.conditions for row in before.usable()}) == 1
    same, told = session(2)
    assert "measured under other conditions" not in told
    assert "measuring" not in told  # the finalists are those of this machine
    assert same.finalists == before.finalists
    monkeypatch.setattr(nas.latency.identity, "_machine_id", lambda: "another machine")
    moved, told = session(3)
    assert "2 of 2 latencies of this run were measured under other conditions" in told
    assert "now another machine" in told
    assert [len(rows) for _, rows in moved.groups()] == [2, 1]
    assert "1 measured under" in moved.notes()[0]
    judged = moved.finalists or []
    assert {entry["number"] for entry in judged} >= {2, *(row.number for row in moved.front())}
    assert {entry["identity"]["device_uuid"] for entry in judged} == {"another machine"}
    monkeypatch.setattr(nas.latency.identity, "_machine_id", lambda: "a third machine")
    _, told = session(3)
    assert "measuring" in told
