"""``report.html``: one file that opens anywhere, asks nothing of the network, and trusts none of its texts."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from nas.files import atomic_write_text
from nas.report.conditions import UNTRUSTED, measured_on, short_conditions
from nas.report.data import RunReport, TrialRow
from nas.report.formats import as_number, format_seconds, format_value, objective_label, one_line
from nas.report.importance import Importance, importance_figure, parallel_figure, parameter_importance
from nas.report.page_style import SCRIPT, STYLE
from nas.report.plots import curves_figure, front_figure
from nas.report.tables import Column, interval_text, judgement, trial_columns
from nas.report.words import summarize

__all__ = ["render_html", "write_html"]

_TAIL = 4000
_GROUPS = 100
_TAILS_PER_GROUP = 3


def write_html(report: RunReport, path: Path) -> None:
    """Write the whole report to ``path`` as one self-contained page."""
    atomic_write_text(path, render_html(report))


def render_html(report: RunReport) -> str:
    """The page as text. It needs no network, and its content policy forbids any, and any script but its own."""
    figures: dict[str, dict[str, Any]] = {}
    sections = [
        _verdict(report),
        _front(report, figures),
        _finalists(report),
        *_parameters(report, figures),
        _curves(report, figures),
        _trials(report),
        _failures(report),
        _facts("Hardware and versions", report.environment),
        _facts("Task", report.task_description),
        _recipe(report),
    ]
    scripts = []
    if figures:
        from plotly.offline import get_plotlyjs

        scripts = [_inline(get_plotlyjs()), _inline(SCRIPT)]
    elif report.trials:
        scripts = [_inline(SCRIPT)]
    data = f'<script type="application/json" id="figures">{_json(figures)}</script>'
    # The policy names the scripts by their hashes, so that nothing that slipped into the page could run.
    # 'unsafe-eval' is for the WebGL part of plotly.js, which compiles its drawing routines.
    allowed = [f"'sha256-{_digest(script)}'" for script in scripts]
    allowed = [*allowed, "'unsafe-eval'"] if allowed else ["'none'"]
    policy = (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src 'unsafe-inline'; img-src data: blob:"
    )
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(report.name)}: {_text(report.space)}</title><style>{STYLE}</style></head><body>",
            *sections,
            data,
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


# -- escaping ----------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """Text for the page and for attributes in double quotes; what UTF-8 has no form for becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode().replace("\0", ""))


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _inline(script: str) -> str:
    """A script as the browser will see it inside the page, for its hash."""
    return (
        script.replace("\r\n", "\n")
        .replace("\r", "\n")
        .replace("</script", "<\\/script")
        .replace("<!--", "<\\!--")
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


# -- sections ----------------------------------------------------------------------------------------------------------


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>\n"


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _figure(figures: dict[str, dict[str, Any]], name: str, figure: dict[str, Any]) -> str:
    figures[name] = figure
    height = int(figure["layout"]["height"])
    return (
        f'<div id="{name}" style="height:{height}px"></div><noscript>This figure needs JavaScript.</noscript>'
    )


def _verdict(report: RunReport) -> str:
    when = " to ".join(_text(moment) for moment in (report.started, report.finished) if moment)
    task = report.task_description.get("name")
    subject = f"{_text(report.space)}{f' on {_text(task)}' if task else ''}, target {_text(report.target)}"
    cards = [
        (len(report.in_state(state)), state) for state in ("complete", "pruned", "failed", "interrupted")
    ]
    shown = [(str(count), label) for count, label in cards if count or label == "complete"]
    shown.append((str(len(report.front())), "on the front"))
    if report.wall_seconds is not None:
        shown.append((format_seconds(report.wall_seconds), "wall time"))
    rows = report.comparable()
    for name, direction in report.objectives if rows else ():
        best = (max if direction == "maximize" else min)(row.values[name] for row in rows)
        label = one_line(objective_label(name).removesuffix(" (ms)"), 30)
        shown.append((format_value(name, best), f"best {label}"))
    boxes = "".join(
        f'<div class="card"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in shown
    )
    return (
        f'<h1>{_text(report.name)}</h1><div class="sub">{subject}{f" · {when}" if when else ""}</div>'
        f'<section class="verdict">{_text(report.verdict())}<div class="cards">{boxes}</div></section>\n'
    )


def _front(report: RunReport, figures: dict[str, dict[str, Any]]) -> str:
    title = "Front" if len(report.objectives) > 1 else "Progress"
    front = report.front()
    if not front:
        return _section(title, _note("No candidate has been evaluated to the end."))
    base = report.baseline_row()
    shown = front
    if base is not None and report.beside_front(base) and all(base is not row for row in front):
        shown = [*front, base]
    note = "".join(_note(text) for text in report.notes())
    if len(report.objectives) > 2:
        note += _note(
            f"The points marked as front are non-dominated in all {len(report.objectives)} objectives, of which two "
            "are drawn; the line joins those that are non-dominated in these two alone."
        )
    table = _table(report, shown, trial_columns(report), brief=True)
    drawn = _figure(figures, "figure-front", front_figure(report))
    return _section(title, drawn, note, f'<div class="scroll">{table}</div>')


def _finalists(report: RunReport) -> str:
    if not report.finalists:
        return ""
    rows = []
    for found in report.finalists:
        title = f"#{found.get('number')} {found.get('name') or ''}"
        ratio = interval_text(found, "ratio", "ratio_low", "ratio_high")
        cells = [interval_text(found), ratio, judgement(found, report.latency_budget)]
        test = found.get("test") or {}
        texts = [
            f"{name} {format_value(name, value)}"
            for name, value in test.items()
            if as_number(value) is not None
        ]
        rows.append([title, *cells, ", ".join(texts)])
    note = (
        "The front, the baseline and the published variants measured again, interleaved; the interval of a ratio holds "
        "at 99.5 %, and less than 1 % is not called a difference. Test metrics are of data that the search never saw."
    )
    where = f"Measured on {report.target}, {place}. " if (place := measured_on(report)) else ""
    doubts = dict.fromkeys(str(reason) for found in report.finalists for reason in found.get("reasons") or ())
    warning = f"Not to be trusted: {'; '.join(doubts)}." if doubts else ""
    heads = ["trial", "latency (ms)", "latency / baseline's", "verdict", "test metrics"]
    return _section(
        "Finalists", _note(where + note), *([_note(warning)] if doubts else []), _plain_table(heads, rows)
    )


def _parameters(report: RunReport, figures: dict[str, dict[str, Any]]) -> list[str]:
    """Parallel coordinates and importance; the second decides which parameters the first shows."""
    rows = report.comparable()
    if not rows:
        return []
    architectures = [row.architecture for row in rows]
    estimates = [
        parameter_importance(name, architectures, [row.values[name] for row in rows])
        for name, _ in report.objectives
    ]
    sections = []
    parallel = parallel_figure(report, estimates)
    if parallel is not None:
        note = (
            "Each line is a candidate; drag along an axis to select. – stands for what an architecture lacks."
        )
        count = len({name for architecture in architectures for name in architecture})
        drawn = len(parallel["data"][0]["dimensions"]) - len(report.objectives)
        which = f" The {drawn} most telling of {count} parameters are drawn." if drawn < count else ""
        sections.append(
            _section("Architectures", _note(note + which), _figure(figures, "figure-parallel", parallel))
        )
    return [*sections, _importance(estimates, figures)]


def _importance(estimates: Sequence[Importance], figures: dict[str, dict[str, Any]]) -> str:
    notes = []
    for estimate in estimates:
        label = objective_label(estimate.objective)
        if estimate.reason:
            notes.append(_note(f"{label}: left out, because {estimate.reason}."))
        else:
            quality = f"cross-validated R² {estimate.r2:.2f} on {estimate.trials} trials"
            notes.append(_note(f"{label}: an estimate by a random forest, {quality}."))
    figure = importance_figure(estimates)
    drawn = _figure(figures, "figure-importance", figure) if figure is not None else ""
    return _section("Parameter importance (estimated)", *notes, drawn)


def _curves(report: RunReport, figures: dict[str, dict[str, Any]]) -> str:
    figure = curves_figure(report)
    if figure is None:
        return ""
    drawn = len({trace["name"] for trace in figure["data"]})
    note = f"{drawn} trials: given architectures orange, the front blue, others grey; dotted: stopped early or failed."
    return _section("Learning curves", _note(note), _figure(figures, "figure-curves", figure))


def _trials(report: RunReport) -> str:
    if not report.trials:
        return ""
    note = "Click a heading to sort."
    columns = trial_columns(report)
    if any(row.conditions for row in report.trials):
        columns.append(
            Column(
                "conditions",
                lambda row: None,
                lambda row: short_conditions(row.conditions) if row.latency else "",
            )
        )
    if any(not row.trusted for row in report.trials):
        note = f"{UNTRUSTED} a latency that is untrusted: the machine was out of bounds. {note}"
    table = _table(report, report.trials, columns)
    return _section("All trials", _note(note), f'<div class="scroll">{table}</div>')


def _table(
    report: RunReport, rows: Iterable[TrialRow], columns: Sequence[Column], *, brief: bool = False
) -> str:
    """A sortable table of trials; numbers sort by their value whatever text shows them."""
    front = {row.number for row in report.front()}
    left = ' class="text"'
    heads = [
        ("trial", left),
        *([] if brief else [("state", left)]),
        *((column.label, "") for column in columns),
    ]
    heads += [*([] if brief else [("time", ""), ("seed", "")]), ("architecture", left)]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{_text(name)}</button></th>' for name, kind in heads
    )
    lines = []
    for row in rows:
        kind = (
            "baseline" if row.name and row.name == report.baseline else "front" if row.number in front else ""
        )
        cells = [f'<td class="text" data-v="{row.number}">{_text(one_line(row.title))}</td>']
        if not brief:
            cells.append(f'<td class="text">{_text(row.state)}</td>')
        cells += [_number_cell(column.value(row), column.text(row)) for column in columns]
        if not brief:
            cells += [
                _number_cell(row.seconds, format_seconds(row.seconds)),
                _number_cell(row.seed, str(row.seed)),
            ]
        cells.append(f'<td class="text wide">{_text(summarize(row.architecture))}</td>')
        lines.append(f"<tr{f' class={kind}' if kind else ''}>{''.join(cells)}</tr>")
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _number_cell(value: float | None, text: str) -> str:
    number = as_number(value)
    key = "" if number is None else f' data-v="{number:.10g}"'  # without one, it sorts by its text
    return f"<td{key}>{_text(text)}</td>"


def _plain_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{_text(label)}</th>" for label in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _failures(report: RunReport) -> str:
    """Failed and stopped trials by kind and reason, the commonest first, with the ends of a few logs."""
    groups: dict[tuple[str, str, str], list[TrialRow]] = defaultdict(list)
    for row in report.in_state("failed", "pruned"):
        failure = row.failure or {}
        groups[row.state, str(failure.get("kind", "")), one_line(failure.get("reason", ""))].append(row)
    if not groups:
        return ""
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1])))
    parts = [_failure_group(*key, rows) for key, rows in ordered[:_GROUPS]]
    if len(ordered) > _GROUPS:
        parts.append(_note(f"{len(ordered) - _GROUPS} further reasons are in the records of the trials."))
    return _section("Failed and stopped trials", *parts)


def _failure_group(state: str, kind: str, reason: str, rows: Sequence[TrialRow]) -> str:
    numbers = ", ".join(f"#{row.number}" for row in rows[:12]) + (" …" if len(rows) > 12 else "")
    label = kind if kind and kind != state else state
    summary = f"<b>{len(rows)} × {_text(label)}</b> ({numbers}): {_text(reason[:1000])}"
    tails = [(row, str((row.failure or {}).get("log_tail") or "")) for row in rows]
    logs = [f"<p>#{row.number}</p><pre>{_text(tail[-_TAIL:])}</pre>" for row, tail in tails if tail][
        :_TAILS_PER_GROUP
    ]
    return f"<details><summary>{summary}</summary>{''.join(logs) or _note('no output was kept')}</details>"


def _facts(title: str, facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    lines = "".join(
        f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in _flatten(facts)
    )
    return _section(title, f'<table class="facts"><tbody>{lines}</tbody></table>')


def _flatten(facts: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key} · ")
        else:
            yield (
                f"{prefix}{key}",
                ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value),
            )


def _recipe(report: RunReport) -> str:
    if not report.recipe:
        return ""
    plain = json.loads(json.dumps(report.recipe, default=str))
    return _section(
        "Recipe", f"<pre>{_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))}</pre>"
    )
