"""What a picture of the front shows, however it is drawn: axes, kinds of points, the line through them, colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.report.data import RunReport, TrialRow
from nas.report.formats import as_number, objective_label

__all__ = [
    "BASELINE",
    "FRONT",
    "OTHER",
    "PUBLISHED",
    "Axis",
    "Layer",
    "focus",
    "front_path",
    "plot_axes",
    "plot_layers",
]

# Okabe and Ito's palette, which stays apart for every kind of colour blindness.
FRONT, BASELINE, PUBLISHED, OTHER = "#0072B2", "#D55E00", "#009E73", "#9A9A9A"


@dataclass(frozen=True)
class Axis:
    """One axis of the picture; ``name`` is an objective, or ``trial`` for the trial's number."""

    name: str
    label: str
    direction: str
    log: bool = False

    def value(self, row: TrialRow) -> float:
        return float(row.number) if self.name == "trial" else float(row.values[self.name])

    def interval(self, row: TrialRow) -> tuple[float, float]:
        """Distances (below, above) of the latency's interval; zeros for everything else."""
        latency = row.latency or {}
        low, high = as_number(latency.get("low_ms")), as_number(latency.get("high_ms"))
        if not self.name.startswith("latency") or low is None or high is None:
            return 0.0, 0.0
        return max(0.0, self.value(row) - low), max(0.0, high - self.value(row))


def plot_axes(report: RunReport, rows: Sequence[TrialRow]) -> tuple[Axis, Axis]:
    """Cost to the right and quality upwards; with one objective, the trial's number to the right."""
    if len(report.objectives) == 1:
        name, direction = report.objectives[0]
        label = report.quality_label if report.quality else objective_label(name)
        return Axis("trial", "trial", "minimize"), Axis(name, label, direction)
    cost = report.cost or report.objectives[0]
    other = report.quality or next(objective for objective in report.objectives if objective != cost)
    label = objective_label(cost[0])
    if cost[0].startswith("latency") and report.target:
        label += f" on {report.target}"
    values = [float(row.values[cost[0]]) for row in rows]
    log = bool(values) and min(values) > 0 and max(values) / min(values) > 8
    y_label = report.quality_label if report.quality else objective_label(other[0])
    return Axis(cost[0], label, cost[1], log), Axis(other[0], y_label, other[1])


@dataclass(frozen=True)
class Layer:
    """Points of one kind: what they are called and how they look, in matplotlib and in plotly."""

    label: str
    rows: list[TrialRow]
    color: str
    marker: str
    symbol: str
    area: float
    diameter: float
    alpha: float = 1.0


def plot_layers(report: RunReport, rows: Sequence[TrialRow]) -> list[Layer]:
    """What is drawn, from the back to the front; empty layers are left out."""
    best = {row.number for row in report.front()}
    count = len(report.objectives)
    front = "best" if count == 1 else "front" if count == 2 else f"front in all {count} objectives"
    found = [row for row in rows if not row.name]
    named = [row for row in rows if row.name]
    base = [row for row in named if row.name == report.baseline]
    layers = [
        Layer("candidates", [r for r in found if r.number not in best], OTHER, "o", "circle", 28, 7, 0.6),
        Layer(front, [r for r in found if r.number in best], FRONT, "o", "circle", 70, 11),
        Layer(
            "published", [r for r in named if r.name != report.baseline], PUBLISHED, "D", "diamond", 70, 11
        ),
        Layer("baseline", base, BASELINE, "*", "star", 260, 17),
    ]
    return [layer for layer in layers if layer.rows]


def front_path(
    report: RunReport, rows: Sequence[TrialRow], x: Axis, y: Axis
) -> tuple[list[float], list[float]]:
    """The line through the picture: the best so far, or the part of the front that is one in these two alone."""
    better = 1 if y.direction == "maximize" else -1
    if x.name == "trial":
        running = better * np.maximum.accumulate([better * y.value(row) for row in rows])
        return [x.value(row) for row in rows], [float(value) for value in running]
    sign = 1 if x.direction == "minimize" else -1
    steps: list[tuple[float, float]] = []
    points = [(x.value(row), y.value(row)) for row in report.front()]
    for point in sorted(points, key=lambda point: (sign * point[0], -better * point[1])):
        if not steps or better * point[1] > better * steps[-1][1]:
            steps.append(point)
    steps.sort()
    return [point[0] for point in steps], [point[1] for point in steps]


def focus(values: Sequence[float], kept: Sequence[float], direction: str) -> tuple[float, float] | None:
    """Range that shows ``kept`` and most ``values`` when a few bad ones would squeeze the rest; None: show all."""
    low, high = np.quantile(values, (0.15, 1.0) if direction == "maximize" else (0.0, 0.85))
    low, high = float(min(low, *kept)), float(max(high, *kept))
    if high <= low or float(np.ptp(values)) < 3 * (high - low):
        return None
    margin = 0.08 * (high - low)
    return low - margin, high + margin
