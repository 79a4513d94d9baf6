"""Terminal tables, and the one-line form of a candidate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nas.report.conditions import UNTRUSTED, measured_on
from nas.report.data import RunReport, TrialRow
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
from nas.report.words import abbreviate, summarize

__all__ = [
    "Column",
    "candidate_line",
    "failures_table",
    "finalists_table",
    "front_table",
    "interval_text",
    "judgement",
    "latency_text",
    "trial_columns",
]

_SHOWN = 20


def _short_words(report: RunReport) -> dict[str, str]:
    return abbreviate(v for row in report.trials for v in row.architecture.values() if isinstance(v, str))


# -- the live view -----------------------------------------------------------------------------------------------------


def candidate_line(
    row: TrialRow,
    objectives: Sequence[tuple[str, str]],
    *,
    mark: str = "",
    short: Mapping[str, str] | None = None,
    width: int = 100,
) -> Text:
    """One finished candidate on one line of at most ``width`` columns.

    ``mark`` is a word of up to five letters such as "best" or "front". ``short`` as in ``summarize``.
    """
    line = Text(f"#{row.number:<4}", style="bold" if mark else "", no_wrap=True, overflow="ellipsis")
    if row.state == "complete":
        line.append(f" {mark:<5}", style="green")
        for text in _figures(row, objectives):
            line.append(f"  {text}")
        line.append(f"  {one_line(row.name)}  " if row.name else "  ", style="cyan")
        line.append(summarize(row.architecture, short), style="dim")
    else:
        line.append(f" {row.state}", style="red" if row.state == "failed" else "yellow")
        if row.seconds is not None:
            line.append(f"  {format_seconds(row.seconds)}", style="dim")
        line.append(f"  {_failure_text(row)}")
    line.truncate(width, overflow="ellipsis")
    return line


def _figures(row: TrialRow, objectives: Sequence[tuple[str, str]]) -> list[str]:
    texts = []
    names = [name for name, _ in objectives]
    measured = as_number((row.latency or {}).get("median_ms"))
    if measured is not None and not any(name.startswith("latency") for name in names):
        names.append("latency_ms")
    for name in names:
        value = row.values.get(name, measured if name == "latency_ms" else None)
        if value is None:
            continue
        if name.startswith("latency"):
            texts.append(f"{format_ms(value):>8} {_half_width(row) + _doubt(row):>5}".rstrip())
        else:
            texts.append(f"{one_line(objective_label(name))} {format_value(name, value)}")
    params = as_number(row.metrics.get("params"))
    if params is not None and "params" not in names:
        texts.append(f"{format_count(params):>6}")
    if row.seconds is not None:
        texts.append(f"{format_seconds(row.seconds):>5}")
    return texts


def _half_width(row: TrialRow) -> str:
    """Half of the latency's interval relative to its median, such as ±1.4%."""
    median, low, high = (
        as_number((row.latency or {}).get(key)) for key in ("median_ms", "low_ms", "high_ms")
    )
    if not median or low is None or high is None:
        return ""
    share = (high - low) / 2 / median
    return f"±{share:.1%}" if share < 0.0995 else f"±{share:.0%}"


def _doubt(row: TrialRow) -> str:
    return "" if row.trusted else UNTRUSTED


def _failure_text(row: TrialRow) -> str:
    failure = row.failure or {}
    kind, reason = one_line(failure.get("kind", "")), one_line(failure.get("reason", ""))
    return f"{kind}: {reason}" if kind and kind != row.state else reason


# -- tables ------------------------------------------------------------------------------------------------------------


def _table(title: str = "") -> Table:
    heading = Text(one_line(title, 78), style="bold") if title else None
    return Table(
        title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )


def _columns(table: Table, first: str, others: Iterable[str]) -> None:
    table.add_column(first, no_wrap=True, overflow="ellipsis")
    for name in others:
        # A figure that does not fit goes on in the next line: a cut one would be another figure.
        table.add_column(Text(name), justify="right", overflow="fold")


def _two_lines(label: str) -> str:
    return label.replace("test ", "test\n", 1) if label.startswith("test ") else label


def interval_text(
    source: Mapping[str, Any], value: str = "median_ms", low: str = "low_ms", high: str = "high_ms"
) -> str:
    """``0.42 (0.41-0.43)`` from three keys of ``source``; empty without the value, bare without the bounds."""
    number = as_number(source.get(value))
    return (
        ""
        if number is None
        else format_interval(number, as_number(source.get(low)), as_number(source.get(high)))
    )


def latency_text(row: TrialRow, objective: str | None = None) -> str:
    """Milliseconds with their interval, from the trial's measurement or else from the value of ``objective``.

    A question mark follows what was measured while the machine was out of bounds; ``notes`` explains it.
    """
    fallback = {"median_ms": row.values.get(objective)} if objective else {}
    return interval_text(row.latency or fallback) + _doubt(row)


@dataclass(frozen=True)
class Column:
    """One column about complete trials: its heading, the number to sort by, and the text to show."""

    label: str
    value: Callable[[TrialRow], float | None]
    text: Callable[[TrialRow], str]


def _number_column(label: str, name: str, value: Callable[[TrialRow], float | None]) -> Column:
    def text(row: TrialRow) -> str:
        number = value(row)
        return "" if number is None else format_value(name, number)

    return Column(one_line(label, 30), value, text)


def _latency_column(label: str, objective: str | None) -> Column:
    def value(row: TrialRow) -> float | None:
        return as_number(row.values.get(objective) if objective else (row.latency or {}).get("median_ms"))

    return Column(one_line(label, 30), value, lambda row: latency_text(row, objective))


def trial_columns(report: RunReport) -> list[Column]:
    """Objectives, latency with its interval, params, MACs and test metric, each where any trial has it."""
    names = [name for name, _ in report.objectives]
    columns = [
        _latency_column(objective_label(name), name)
        if name.startswith("latency")
        else _number_column(objective_label(name), name, partial(_objective, name))
        for name in names
    ]
    if not any(name.startswith("latency") for name in names) and any(row.latency for row in report.trials):
        columns.append(_latency_column("latency (ms)", None))
    for label, name in (("params", "params"), ("MACs", "macs")):
        if name not in names and any(name in row.metrics for row in report.trials):
            columns.append(_number_column(label, name, partial(_metric, name)))
    test = report.test_metric
    if test is not None and any(report.test_value(row) is not None for row in report.trials):
        columns.append(_number_column(f"test {objective_label(test)}", test, report.test_value))
    return columns


def _objective(name: str, row: TrialRow) -> float | None:
    return as_number(row.values.get(name))


def _metric(name: str, row: TrialRow) -> float | None:
    return as_number(row.metrics.get(name))


def front_table(report: RunReport) -> Group:
    """The front and the baseline: their figures as a table, their architectures below it, then ``report.notes``.

    A baseline that was measured under other conditions is not in the table. A front of more than 20 is shown by 20 of
    its members, spread evenly; the title says so.
    """
    front = report.front()
    if not front:
        return Group(Text("No candidate has been evaluated to the end, so there is no front."))
    shown = front
    if len(front) > _SHOWN:
        shown = [front[round(i * (len(front) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]
    title = f"{'Pareto front' if len(report.objectives) > 1 else 'Best'} of {one_line(report.space, 40)}"
    if report.target:
        title += f", latency on {one_line(report.target, 24)}"
    if len(shown) < len(front):
        title += f"\n{len(shown)} of {len(front)} are shown; all are in pareto.csv"
    base = report.baseline_row()
    columns = trial_columns(report)
    table = _table()
    _columns(table, "trial", (_two_lines(column.label) for column in columns))
    for row in shown:
        table.add_row(Text(one_line(row.title, 40)), *(Text(column.text(row)) for column in columns))
    extra = []
    if base is not None and report.beside_front(base) and all(base is not row for row in shown):
        extra = [base]
        table.add_section()
        table.add_row(
            Text(one_line(base.title, 40)), *(Text(column.text(base)) for column in columns), style="dim"
        )
    listing = Table.grid(padding=(0, 2))
    listing.add_column(no_wrap=True)
    listing.add_column(overflow="fold")
    short = _short_words(report)
    for row in [*shown, *extra]:
        listing.add_row(Text(f"#{row.number}"), Text(summarize(row.architecture, short), style="dim"))
    notes = [Text(note, style="yellow") for note in report.notes()]
    return Group(Text(title, style="bold"), table, listing, *notes)


def finalists_table(report: RunReport) -> Table:
    """The second measurement of the front beside the baseline: latency, ratio to the baseline, test metric."""
    table = _table()
    heading = [one_line(f"Measured again side by side on {report.target}", 78), measured_on(report)]
    table.title = Text("\n".join(line for line in heading if line), style="bold")
    columns = ["latency (ms)", "to baseline", ""]
    if report.test_metric is not None:
        columns.append(_two_lines(f"test {one_line(objective_label(report.test_metric), 25)}"))
    _columns(table, "trial", columns)
    rows = {row.number: row for row in report.trials}
    for found in report.finalists or ():
        row = rows.get(int(found["number"]))
        latency, ratio = interval_text(found), interval_text(found, "ratio", "ratio_low", "ratio_high")
        is_base = row is not None and row.name is not None and row.name == report.baseline
        cells = [latency, "baseline" if is_base else ratio, judgement(found, report.latency_budget)]
        if report.test_metric is not None:
            value = report.test_value(row) if row is not None else None
            cells.append("" if value is None else format_value(report.test_metric, value))
        title = row.title if row is not None else f"#{found['number']}"
        table.add_row(Text(one_line(title, 40)), *(Text(cell) for cell in cells))
    return table


def judgement(found: Mapping[str, Any], budget: float | None = None) -> str:
    """What may be said of a finalist: ``faster``, ``slower`` or ``cannot tell``, and whether it may be trusted.

    ``over budget`` where its latency is not surely at most ``budget`` (milliseconds).
    """
    high, parts = as_number(found.get("high_ms")), [str(found.get("verdict") or "")]
    if budget is not None and high is not None and high > budget:
        parts.append("over budget")
    text = ", ".join(part for part in parts if part)
    return f"{text} (untrusted)".strip() if found.get("trusted") is False else text


def failures_table(report: RunReport) -> Table:
    """Failed trials by kind and reason, the commonest first."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in report.in_state("failed"):
        failure = row.failure or {}
        groups[one_line(failure.get("kind", "error"), 12), one_line(failure.get("reason", ""))].append(
            row.number
        )
    table = _table("Failed candidates")
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("trials", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for (kind, reason), numbers in sorted(groups.items(), key=lambda item: (-len(item[1]), item[1][0])):
        trials = ", ".join(f"#{number}" for number in numbers[:3]) + (" …" if len(numbers) > 3 else "")
        table.add_row(str(len(numbers)), Text(kind), trials, Text(one_line(reason, 300)))
    return table
