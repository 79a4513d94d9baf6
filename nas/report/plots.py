"""The figures of the HTML page, as plain plotly dictionaries."""

from __future__ import annotations

import html
from typing import Any

from nas.report.data import RunReport, TrialRow
from nas.report.formats import as_number, format_value, objective_label, one_line
from nas.report.picture import BASELINE, FRONT, OTHER, Axis, Layer, focus, front_path, plot_axes, plot_layers
from nas.report.tables import latency_text
from nas.report.words import summarize

__all__ = ["curves_figure", "front_figure", "page_axis", "page_layout", "plain"]

_CURVES = 40


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
    x, y = plot_axes(report, rows)
    layers = plot_layers(report, rows)
    xs, ys = front_path(report, rows, x, y)
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


def _markers(report: RunReport, layer: Layer, x: Axis, y: Axis) -> dict[str, Any]:
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
