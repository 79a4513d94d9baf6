"""What a run has found, for people: tables in the terminal, ``pareto.csv``, ``pareto.png`` and ``report.html``."""

from __future__ import annotations

from nas.report.data import RunReport, TrialRow
from nas.report.html import write_html
from nas.report.pareto_csv import write_pareto_csv
from nas.report.pareto_png import write_pareto_png
from nas.report.tables import candidate_line, failures_table, finalists_table, front_table

__all__ = [
    "RunReport",
    "TrialRow",
    "candidate_line",
    "failures_table",
    "finalists_table",
    "front_table",
    "write_html",
    "write_pareto_csv",
    "write_pareto_png",
]
