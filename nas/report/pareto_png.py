"""``pareto.png``."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nas.files import atomic_write_bytes
from nas.report.data import RunReport, TrialRow
from nas.report.formats import one_line
from nas.report.picture import FRONT, OTHER, Axis, Layer, focus, front_path, plot_axes, plot_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg

__all__ = ["write_pareto_png"]

_LABELLED = 10


def _title(report: RunReport) -> str:
    task = report.task_description.get("name")
    title = one_line(f"{report.space} on {task}" if task else report.space, 70)
    left_out = len(report.usable()) - len(report.comparable())
    if left_out:
        title += f"\nwithout {left_out} candidates whose latencies were measured under other conditions"
    return title


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
    x, y = plot_axes(report, rows)
    if x.log:
        axes.set_xscale("log")
        _plain_log_ticks(axes)
    layers = plot_layers(report, rows)
    for layer in layers:
        _points(axes, layer, x, y)
    where: Literal["post", "pre"] = "post" if x.direction == "minimize" else "pre"
    label = "best so far" if x.name == "trial" else None
    axes.step(*front_path(report, rows, x, y), where=where, color=FRONT, lw=1.8, zorder=3, label=label)
    kept = [row for layer in layers if layer.color != OTHER for row in layer.rows]
    _decorate(axes, rows, kept, x, y)
    _label(axes, canvas, _to_label(kept, x), x, y)


def _points(axes: Axes, layer: Layer, x: Axis, y: Axis) -> None:
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


def _decorate(axes: Axes, rows: Sequence[TrialRow], kept: Sequence[TrialRow], x: Axis, y: Axis) -> None:
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


def _to_label(kept: Sequence[TrialRow], x: Axis) -> list[TrialRow]:
    """Names first; numbers of the front as long as they are few, otherwise of its two ends."""
    named = [row for row in kept if row.name][:_LABELLED]
    numbered = [row for row in kept if not row.name]
    if x.name == "trial":
        numbered = numbered[:1]
    elif len(numbered) > _LABELLED:
        numbered = [numbered[0], numbered[-1]]
    return list({row.number: row for row in [*named, *numbered]}.values())


def _label(axes: Axes, canvas: Any, rows: Sequence[TrialRow], x: Axis, y: Axis) -> None:
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
