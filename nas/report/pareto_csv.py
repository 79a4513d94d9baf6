"""``pareto.csv``: every complete trial, for other programs and for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from nas.files import atomic_write_text
from nas.report.data import RunReport

__all__ = ["write_pareto_csv"]


def write_pareto_csv(report: RunReport, path: Path) -> None:
    """Write every complete trial to ``path``, one row each, with its architecture as JSON in the last column.

    Latencies are in milliseconds; those whose ``latency_conditions`` (digest and clock) differ do not compare, and
    ``on_front`` tells of those of one kind alone. Text that a spreadsheet would run as a formula gets a leading
    apostrophe.
    """
    rows = sorted(report.in_state("complete"), key=lambda row: row.number)
    front = {row.number for row in report.front()}
    tests = sorted({name for row in rows for name in (report.finalist(row).get("test") or row.test_metrics)})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    objectives = [name for name, _ in report.objectives]
    header = [
        "trial",
        "name",
        "on_front",
        *objectives,
        "latency_median_ms",
        "latency_low_ms",
        "latency_high_ms",
    ]
    header += [
        "latency_precise",
        "latency_raw_median_ms",
        "latency_clock",
        "latency_trusted",
        "latency_conditions",
        "params",
        "macs",
        *(f"test_{name}" for name in tests),
        "seconds",
        "seed",
        "key",
    ]
    writer.writerow([_cell(name) for name in [*header, "architecture"]])
    for row in rows:
        latency = row.latency or {}
        found = report.finalist(row).get("test") or row.test_metrics
        cells = [
            row.number,
            row.name,
            int(row.number in front),
            *(row.values.get(name) for name in objectives),
        ]
        cells += [latency.get(name) for name in _LATENCY]
        cells += [row.metrics.get("params"), row.metrics.get("macs"), *(found.get(name) for name in tests)]
        cells += [row.seconds, row.seed, row.key, json.dumps(row.architecture)]
        writer.writerow([_cell(cell) for cell in cells])
    atomic_write_text(path, buffer.getvalue())


_LATENCY = ("median_ms", "low_ms", "high_ms", "precise", "raw_median_ms", "clock", "trusted", "conditions")


def _cell(value: object) -> object:
    if isinstance(value, str):
        text = "".join(char if char.isprintable() else " " for char in value)
        return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text
    if value is None or isinstance(value, bool):
        return "" if value is None else int(value)
    return value
