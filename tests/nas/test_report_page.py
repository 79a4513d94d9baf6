"""report.html: it holds everything, fetches nothing, and no text from outside can act on a reader."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from nas.report import (
    RunReport,
    failures_table,
    finalists_table,
    front_table,
    write_html,
    write_pareto_csv,
    write_pareto_png,
)
from nas.report.html import render_html
from nas.report.tables import trial_columns
from tests.nas._reports import BASE, CASES, HOSTILE, LATENCY, failed, finalists, many, printed, run, trial


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
