"""Pictures of a run: ``pareto.png``, and the figures of the HTML page as plain plotly dictionaries."""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nas.files import atomic_write_bytes
from nas.report.data import (
    RunReport,
    TrialRow,
    as_number,
    format_value,
    objective_label,
    one_line,
)
from nas.report.tables import latency_text, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg

__all__ = [
    "BASELINE",
    "FRONT",
    "OTHER",
    "PUBLISHED",
    "curves_figure",
    "focus",
    "front_figure",
    "page_axis",
    "page_layout",
    "plain",
    "write_pareto_png",
]

# Okabe and Ito's palette, which stays apart for every kind of colour blindness.
FRONT, BASELINE, PUBLISHED, OTHER = "#0072B2", "#D55E00", "#009E73", "#9A9A9A"
_LABELLED = 10
_CURVES = 40


@dataclass(frozen=True)
class _Axis:
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


def _axes(report: RunReport, rows: Sequence[TrialRow]) -> tuple[_Axis, _Axis]:
    """Cost to the right and quality upwards; with one objective, the trial's number to the right."""
    if len(report.objectives) == 1:
        name, direction = report.objectives[0]
        label = report.quality_label if report.quality else objective_label(name)
        return _Axis("trial", "trial", "minimize"), _Axis(name, label, direction)
    cost = report.cost or report.objectives[0]
    other = report.quality or next(objective for objective in report.objectives if objective != cost)
    label = objective_label(cost[0])
    if cost[0].startswith("latency") and report.target:
        label += f" on {report.target}"
    values = [float(row.values[cost[0]]) for row in rows]
    log = bool(values) and min(values) > 0 and max(values) / min(values) > 8
    y_label = report.quality_label if report.quality else objective_label(other[0])
    return _Axis(cost[0], label, cost[1], log), _Axis(other[0], y_label, other[1])


def _title(report: RunReport) -> str:
    task = report.task_description.get("name")
    return one_line(f"{report.space} on {task}" if task else report.space, 70)


@dataclass(frozen=True)
class _Layer:
    """Points of one kind: what they are called and how they look, in matplotlib and in plotly."""

    label: str
    rows: list[TrialRow]
    color: str
    marker: str
    symbol: str
    area: float
    diameter: float
    alpha: float = 1.0


def _layers(report: RunReport, rows: Sequence[TrialRow]) -> list[_Layer]:
    """What is drawn, from the back to the front; empty layers are left out."""
    best = {row.number for row in report.front()}
    count = len(report.objectives)
    front = "best" if count == 1 else "front" if count == 2 else f"front in all {count} objectives"
    found = [row for row in rows if not row.name]
    named = [row for row in rows if row.name]
    base = [row for row in named if row.name == report.baseline]
    layers = [
        _Layer("candidates", [r for r in found if r.number not in best], OTHER, "o", "circle", 28, 7, 0.6),
        _Layer(front, [r for r in found if r.number in best], FRONT, "o", "circle", 70, 11),
        _Layer(
            "published", [r for r in named if r.name != report.baseline], PUBLISHED, "D", "diamond", 70, 11
        ),
        _Layer("baseline", base, BASELINE, "*", "star", 260, 17),
    ]
    return [layer for layer in layers if layer.rows]


def _path(report: RunReport, rows: Sequence[TrialRow], x: _Axis, y: _Axis) -> tuple[list[float], list[float]]:
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


# -- pareto.png --------------------------------------------------------------------------------------------------------


def write_pareto_png(report: RunReport, path: Path) -> None:
    """Draw the front (or, for one objective, the best so far) to ``path``, 900 by 600 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = report.comparable()
    if rows:
        _draw(axes, canvas, report, rows)
    else:
        axes.set_axis_off()
        text = one_line(report.verdict(), 300)
        axes.text(0.5, 0.5, text, ha="center", va="center", wrap=True, fontsize=13, parse_math=False)
    axes.set_title(_title(report), fontsize=15, parse_math=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
        figure.savefig(buffer, format="png", metadata={"Software": None})
    atomic_write_bytes(path, buffer.getvalue())


def _draw(axes: Axes, canvas: FigureCanvasAgg, report: RunReport, rows: Sequence[TrialRow]) -> None:
    x, y = _axes(report, rows)
    if x.log:
        axes.set_xscale("log")
        _plain_log_ticks(axes)
    layers = _layers(report, rows)
    for layer in layers:
        _points(axes, layer, x, y)
    where: Literal["post", "pre"] = "post" if x.direction == "minimize" else "pre"
    label = "best so far" if x.name == "trial" else None
    axes.step(*_path(report, rows, x, y), where=where, color=FRONT, lw=1.8, zorder=3, label=label)
    kept = [row for layer in layers if layer.color != OTHER for row in layer.rows]
    _decorate(axes, rows, kept, x, y)
    _label(axes, canvas, _to_label(kept, x), x, y)


def _points(axes: Axes, layer: _Layer, x: _Axis, y: _Axis) -> None:
    xs, ys = [x.value(row) for row in layer.rows], [y.value(row) for row in layer.rows]
    spread = np.array([x.interval(row) for row in layer.rows]).T
    look: dict[str, Any] = {"alpha": layer.alpha, "zorder": 2 if layer.color == OTHER else 4}
    if spread.any() and (layer.color != OTHER or len(xs) <= 100):
        axes.errorbar(xs, ys, xerr=spread, fmt="none", ecolor=layer.color, elinewidth=1.4, capsize=3, **look)
    axes.scatter(
        xs,
        ys,
        s=layer.area,
        c=layer.color,
        marker=layer.marker,
        edgecolors="white",
        lw=0.7,
        label=layer.label,
        **look,
    )


def _decorate(axes: Axes, rows: Sequence[TrialRow], kept: Sequence[TrialRow], x: _Axis, y: _Axis) -> None:
    axes.set_xlabel(one_line(x.label, 60), fontsize=13, parse_math=False)
    axes.set_ylabel(one_line(y.label, 45), fontsize=13, parse_math=False)
    axes.tick_params(labelsize=11)
    axes.grid(True, color="#DDDDDD", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.09)
    shown = focus([y.value(row) for row in rows], [y.value(row) for row in kept], y.direction)
    if shown is not None:
        axes.set_ylim(*shown)
        hidden = sum(not shown[0] <= y.value(row) <= shown[1] for row in rows)
        where = "below" if y.direction == "maximize" else "above"
        text = f"{hidden} candidate{'s' if hidden > 1 else ''} {where} the range shown"
        axes.text(
            0.99, 0.01, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=10, color="#666"
        )
    anchor: dict[str, Any] = {"loc": "best"}
    if x.name != "trial":  # the corner that the front leaves empty, above the note
        lower, right = y.direction == "maximize", x.direction == "minimize"
        corner = f"{'lower' if lower else 'upper'} {'right' if right else 'left'}"
        anchor = {"loc": corner, "bbox_to_anchor": (1.0 if right else 0.0, 0.05 if lower else 1.0)}
    axes.legend(fontsize=11, framealpha=0.9, **anchor)


def _to_label(kept: Sequence[TrialRow], x: _Axis) -> list[TrialRow]:
    """Names first; numbers of the front as long as they are few, otherwise of its two ends."""
    named = [row for row in kept if row.name][:_LABELLED]
    numbered = [row for row in kept if not row.name]
    if x.name == "trial":
        numbered = numbered[:1]
    elif len(numbered) > _LABELLED:
        numbered = [numbered[0], numbered[-1]]
    return list({row.number: row for row in [*named, *numbered]}.values())


def _label(axes: Axes, canvas: Any, rows: Sequence[TrialRow], x: _Axis, y: _Axis) -> None:
    """Write names and numbers beside the points, each where it covers no other label and no labelled point."""
    canvas.figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    points = [axes.transData.transform((x.value(row), y.value(row))) for row in rows]
    frame = axes.get_window_extent(renderer)
    legend = axes.get_legend()
    taken: list[Any] = [] if legend is None else [legend.get_window_extent(renderer)]

    def penalty(box: Any) -> int:
        inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
        over = sum(box.overlaps(other) for other in taken) + sum(box.contains(*point) for point in points)
        return int(over) + (0 if inside else 2)

    for row in rows:
        text = one_line(row.name or f"#{row.number}", 32)
        notes = []
        for dx, dy in ((9, 7), (9, -14), (-9, 7), (-9, -14), (9, 20), (-9, 20), (9, -28), (-9, -28)):
            look: dict[str, Any] = {"ha": "left" if dx > 0 else "right", "fontsize": 11 if row.name else 10}
            place = (x.value(row), y.value(row))
            note = axes.annotate(text, place, (dx, dy), textcoords="offset points", parse_math=False, **look)
            notes.append((penalty(note.get_window_extent(renderer)), note))
            if notes[-1][0] == 0:
                break
        best = min(notes, key=lambda pair: pair[0])[1]
        taken.append(best.get_window_extent(renderer))
        for _, note in notes:
            if note is not best:
                note.remove()


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


# -- figures of the page -----------------------------------------------------------------------------------------------


def plain(text: object, length: int = 200) -> str:
    """``text``, cut at ``length``, for plotly, which reads a few HTML tags (links among them) in what it writes."""
    return html.escape(one_line(text, length), quote=False)


def page_layout(**more: Any) -> dict[str, Any]:
    """The look that all figures of the page share, and ``more``."""
    base = {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "#fff",
        "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
        "hoverlabel": {"align": "left"},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(255,255,255,0)", "color": "#9aa3ad", "activecolor": "#222"},
    }
    return {**base, **more}


def page_axis(label: str, **more: Any) -> dict[str, Any]:
    """A titled axis of a figure of the page."""
    look = {"gridcolor": "#e6e6e6", "zeroline": False, "linecolor": "#999", "automargin": True}
    return {"title": {"text": plain(label, 60)}, **look, **more}


def _hover(report: RunReport, row: TrialRow) -> str:
    lines = [f"<b>{plain(row.title, 60)}</b>"]
    for name, _ in report.objectives:
        text = format_value(name, row.values[name])
        if name.startswith("latency") and row.latency:
            text = f"{latency_text(row)} ms"
        lines.append(f"{plain(objective_label(name).removesuffix(' (ms)'), 40)}: {text}")
    words = summarize(row.architecture).split(" ")
    return "<br>".join([*lines, *(plain(word, 90) for word in words[:16])])


def front_figure(report: RunReport) -> dict[str, Any]:
    """Interactive picture of the front, or of the best so far; hovering shows the architecture."""
    rows = report.comparable()
    x, y = _axes(report, rows)
    layers = _layers(report, rows)
    xs, ys = _path(report, rows, x, y)
    look = {"color": FRONT, "width": 2, "shape": "hv" if x.direction == "minimize" else "vh"}
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": xs,
        "y": ys,
        "line": look,
        "hoverinfo": "skip",
        "showlegend": False,
    }
    kept = [y.value(row) for layer in layers if layer.color != OTHER for row in layer.rows]
    shown = focus([y.value(row) for row in rows], kept, y.direction)
    layout = page_layout(
        xaxis=page_axis(x.label, **({"type": "log", "dtick": "D2"} if x.log else {})),
        yaxis=page_axis(y.label, **({"range": list(shown)} if shown else {})),
        height=520,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    return {"data": [line, *(_markers(report, layer, x, y) for layer in layers)], "layout": layout}


def _markers(report: RunReport, layer: _Layer, x: _Axis, y: _Axis) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": plain(report.baseline, 40) if layer.color == BASELINE else layer.label,
        "x": [x.value(row) for row in layer.rows],
        "y": [y.value(row) for row in layer.rows],
        "text": [_hover(report, row) for row in layer.rows],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "color": layer.color,
            "symbol": layer.symbol,
            "size": layer.diameter,
            "opacity": layer.alpha,
        },
    }
    spread = [x.interval(row) for row in layer.rows]
    if layer.color != OTHER and any(below or above for below, above in spread):
        below, above = ([pair[side] for pair in spread] for side in (0, 1))
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        trace["error_x"] = {**bars, "thickness": 1.2, "width": 3}
    return trace


def curves_figure(report: RunReport) -> dict[str, Any] | None:
    """Learning curves of the front, the baseline and further trials, 40 in all; None if none was recorded."""
    front = {row.number for row in report.front()}
    rows = [row for row in report.trials if len(row.curve) > 1]
    rows = sorted(rows, key=lambda row: (not row.name, row.number not in front, row.number))[:_CURVES]
    panels = [("train_loss", "training loss")]
    # A cheap evaluation between epochs may leave the objective out; the validation loss then stands for it.
    if report.quality and any(len(_series(row, report.quality[0])[0]) > 1 for row in rows):
        panels.insert(0, (report.quality[0], report.quality_label))
    else:
        panels.insert(0, ("loss", "validation loss"))
    panels = [panel for panel in panels if any(_series(row, panel[0])[0] for row in rows)]
    if not panels:
        return None
    layout = page_layout(height=400, grid={"rows": 1, "columns": len(panels), "pattern": "independent"})
    data = []
    for index, (name, label) in enumerate(panels, start=1):
        layout[f"xaxis{index}"], layout[f"yaxis{index}"] = page_axis("epoch"), page_axis(label)
        for row in reversed(rows):
            color = BASELINE if row.name else FRONT if row.number in front else OTHER
            data.append({**_curve(row, name, color), "xaxis": f"x{index}", "yaxis": f"y{index}"})
    return {"data": [trace for trace in data if trace["x"]], "layout": layout}


def _curve(row: TrialRow, name: str, color: str) -> dict[str, Any]:
    epochs, values = _series(row, name)
    whole = row.state == "complete"
    text = plain(row.title, 60) if whole else f"{plain(row.title, 60)} ({plain(row.state)})"
    return {
        "type": "scatter",
        "mode": "lines" if len(epochs) > 1 else "markers",
        "x": epochs,
        "y": values,
        "name": text,
        "showlegend": False,
        "line": {"color": color, "width": 1 if color == OTHER else 2, "dash": "solid" if whole else "dot"},
        "marker": {"color": color},
        "opacity": 0.6 if color == OTHER else 1,
        "hovertemplate": f"{text}<br>epoch %{{x}}: %{{y:.4g}}<extra></extra>",
    }


def _series(row: TrialRow, name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one quantity of a learning curve; entries may hold their metrics one level down."""
    epochs, values = [], []
    for index, entry in enumerate(row.curve, start=1):
        inner = entry.get("metrics")
        value = as_number(entry.get(name, inner.get(name) if isinstance(inner, dict) else None))
        epoch = as_number(entry.get("epoch"))
        if value is not None:
            epochs.append(float(index) if epoch is None else epoch)
            values.append(value)
    return epochs, values
