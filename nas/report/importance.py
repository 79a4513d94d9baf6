"""Which parameters of the architecture decide an objective: an estimate from the trials of one run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.report.data import RunReport, TrialRow
from nas.report.formats import as_number, format_value, objective_label, one_line
from nas.report.picture import BASELINE, FRONT, PUBLISHED, focus
from nas.report.plots import page_axis, page_layout, plain

__all__ = ["MIN_TRIALS", "Importance", "importance_figure", "parallel_figure", "parameter_importance"]

MIN_TRIALS = 15
_MAX_TRIALS = 1000
_FOLDS = 3
_REPEATS = 2
_DIMENSIONS = 12

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """An estimate, or the reason why there is none.

    ``scores``: parameter -> how much of the explained variance (R2 on trials left out of the fit, at most 1) is
    lost when that parameter is shuffled, largest first; empty where ``reason`` is not. ``r2`` is the
    cross-validated R2 itself, NaN where nothing was fitted; ``trials`` is the number of trials used.
    """

    objective: str
    trials: int
    scores: dict[str, float]
    r2: float
    reason: str = ""


def parameter_importance(
    objective: str, architectures: Sequence[Mapping[str, Any]], values: Sequence[float], *, seed: int = 0
) -> Importance:
    """Permutation importance in a random forest, judged on trials that the forest has not seen.

    ``architectures`` and finite ``values`` are parallel. Of more than 1,000 trials a seeded sample is used. Numeric
    parameters are one column, others one column for each value; the columns of one parameter are shuffled
    together. Fewer than ``MIN_TRIALS`` trials, or a forest that predicts no better than the mean, give a reason
    instead of scores.

    Source of the method: Breiman, "Random Forests", Machine Learning 45, 2001, section 10.
    """
    count = len(values)
    if count < MIN_TRIALS:
        return _none(
            objective, count, f"{count} complete trials are too few; at least {MIN_TRIALS} are needed"
        )
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(count)[:_MAX_TRIALS])
    target = np.array([values[i] for i in chosen], dtype=np.float64)
    columns = _encode([architectures[i] for i in chosen])
    if not columns:
        return _none(objective, len(chosen), "all architectures are the same")
    if float(np.ptp(target)) == 0:
        return _none(objective, len(chosen), "all trials have the same value")
    r2, drops = _cross_validate(list(columns.values()), target, rng, seed)
    if r2 <= 0:
        reason = f"it cannot be told from these trials (cross-validated R² {r2:.2f})"
        return Importance(objective, len(chosen), {}, r2, reason)
    scores = {name: max(0.0, float(drop)) for name, drop in zip(columns, drops, strict=True)}
    ordered = dict(sorted(scores.items(), key=lambda item: -item[1]))
    return Importance(objective, len(chosen), ordered, r2)


def _none(objective: str, trials: int, reason: str) -> Importance:
    return Importance(objective, trials, {}, float("nan"), reason)


def _is_number(value: object) -> bool:
    return as_number(value) is not None


def _encode(architectures: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    """Parameter -> (trials, columns) float64; parameters that never vary are left out."""
    names = dict.fromkeys(name for architecture in architectures for name in architecture)
    encoded = {}
    for name in names:
        column = [architecture.get(name) for architecture in architectures]
        present = [architecture[name] for architecture in architectures if name in architecture]
        if all(_is_number(value) for value in present):
            # A value below all others marks an inactive parameter: a tree can split it off.
            absent = min(present) - 1.0
            numbers = [absent if name not in a else float(a[name]) for a in architectures]
            matrix = np.array(numbers, dtype=np.float64)[:, None]
        else:
            kinds = list(dict.fromkeys(map(repr, column)))
            matrix = np.array([[float(repr(value) == kind) for kind in kinds] for value in column])
        if (matrix != matrix[0]).any():
            encoded[name] = matrix
    return encoded


def _cross_validate(
    blocks: Sequence[Floats], target: Floats, rng: np.random.Generator, seed: int
) -> tuple[float, Floats]:
    """Cross-validated R2 and, for each block of columns, the R2 lost by shuffling it; both over all folds."""
    from sklearn.ensemble import RandomForestRegressor

    matrix = np.concatenate(blocks, axis=1)
    edges = np.cumsum([0, *(block.shape[1] for block in blocks)])
    fold = rng.permutation(len(target)) % _FOLDS
    squared, shuffled = 0.0, np.zeros(len(blocks))
    for index in range(_FOLDS):
        held = fold == index
        forest = RandomForestRegressor(n_estimators=60, min_samples_leaf=2, n_jobs=1, random_state=seed)
        forest.fit(matrix[~held], target[~held])
        left, truth = matrix[held], target[held]
        squared += float(np.sum((forest.predict(left) - truth) ** 2))
        for _ in range(_REPEATS):
            changed = _shuffle_each(
                left, edges, rng
            )  # all at once: a forest's fixed cost for each call is high
            predicted = forest.predict(changed).reshape(len(blocks), len(left))
            shuffled += np.sum((predicted - truth) ** 2, axis=1) / _REPEATS
    total = float(np.sum((target - target.mean()) ** 2))
    return 1 - squared / total, (shuffled - squared) / total


def _shuffle_each(
    matrix: Floats, edges: npt.NDArray[np.intp], rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """(n, columns) -> (blocks * n, columns): one copy for each block of columns, with that block shuffled."""
    copies = np.tile(matrix.astype(np.float32), (len(edges) - 1, 1, 1))
    for block, (start, stop) in enumerate(itertools.pairwise(edges)):
        copies[block, :, start:stop] = matrix[rng.permutation(len(matrix)), start:stop]
    return copies.reshape(-1, matrix.shape[1])


# -- figures of the page -----------------------------------------------------------------------------------------------


def parallel_figure(report: RunReport, importance: Sequence[Importance]) -> dict[str, Any] | None:
    """Parallel coordinates of the most important parameters and the objectives, the best in the darkest colour.

    Without importances the parameters that vary most come first. None when no parameter varies.
    """
    rows = report.comparable()
    names = _parallel_names(rows, importance)
    if not names:
        return None
    name, direction = report.quality or report.objectives[0]
    colors = [float(row.values[name]) for row in rows]
    # A few bad trials would take all the colours and most of the axis.
    low, high = focus(colors, [row.values[name] for row in report.front()], direction) or (
        -math.inf,
        math.inf,
    )
    colors = [min(max(value, low), high) for value in colors]
    dimensions = [_dimension(name, [row.architecture.get(name) for row in rows]) for name in names]
    for objective, _ in report.objectives:
        column = colors if objective == name else [float(row.values[objective]) for row in rows]
        beyond = objective == name and (low > -math.inf)
        dimensions.append(
            _scale(objective, column, beyond=("≤ " if direction == "maximize" else "≥ ") if beyond else "")
        )
    line = {
        "color": colors,
        "colorscale": "Viridis",
        "reversescale": direction == "maximize",
        "showscale": True,
        "colorbar": {"title": {"text": plain(report.quality_label, 40), "side": "right"}, "thickness": 14},
    }
    trace = {
        "type": "parcoords",
        "dimensions": dimensions,
        "line": line,
        "labelangle": -20,
        "labelfont": {"size": 12},
        "tickfont": {"size": 11},
        "rangefont": {"size": 1, "color": "rgba(0,0,0,0)"},
    }
    return {"data": [trace], "layout": page_layout(height=470, margin={"l": 90, "r": 60, "t": 90, "b": 30})}


def _parallel_names(rows: Sequence[TrialRow], importance: Sequence[Importance]) -> list[str]:
    """At most a dozen parameters that vary, the most important ones, in the order of declaration."""
    names = list(dict.fromkeys(name for row in rows for name in row.architecture))
    different = {name: len({repr(row.architecture.get(name)) for row in rows}) for name in names}
    varying = [name for name in names if different[name] > 1]
    scores: dict[str, float] = {}
    for estimate in importance:
        for name, score in estimate.scores.items():
            scores[name] = max(scores.get(name, 0.0), score)
    ranked = sorted(varying, key=lambda name: (-scores.get(name, 0.0), names.index(name)))
    return sorted(ranked[:_DIMENSIONS], key=names.index)


def _dimension(name: str, column: Sequence[Any]) -> dict[str, Any]:
    """One parameter: many numbers on their scale, everything else (and what is absent) on ticks of its own."""
    present = [value for value in column if value is not None]
    numeric = all(_is_number(value) for value in present)
    ordered = sorted(set(present)) if numeric else sorted(set(present), key=str)
    if numeric and len(ordered) > 12:
        return _scale(name, [None if value is None else float(value) for value in column])
    place = {repr(value): float(i) for i, value in enumerate(ordered)}
    ticks, texts = list(place.values()), [one_line(value, 24) for value in ordered]
    values = [-1.0 if value is None else place[repr(value)] for value in column]
    return _ticked(name, values, ticks, texts, absent=-1.0 if len(present) < len(column) else None)


def _scale(name: str, column: Sequence[float | None], *, beyond: str = "") -> dict[str, Any]:
    """Numbers with five ticks; ``beyond`` goes before the tick of the worst value, where worse ones are drawn too."""
    numbers = [value for value in column if value is not None]
    low, high = min(numbers), max(numbers)
    ticks = [low + i * (high - low) / 4 for i in range(5)] if high > low else [low]
    texts = [format_value(name, tick) for tick in ticks]
    if beyond:
        worst = 0 if beyond.startswith("≤") else -1
        texts[worst] = f"{beyond}{texts[worst]}"
    absent = low - 0.15 * ((high - low) or 1.0)
    values = [absent if value is None else value for value in column]
    return _ticked(name, values, ticks, texts, absent=absent if len(numbers) < len(column) else None)


def _ticked(
    name: str, values: list[float], ticks: list[float], texts: list[str], absent: float | None
) -> dict[str, Any]:
    if absent is not None:
        ticks, texts = [absent, *ticks], ["–", *texts]
    margin = 0.02 * (max(ticks) - min(ticks) or 1.0)
    extent = [min(ticks) - margin, max(ticks) + margin]
    return {
        "label": plain(objective_label(name), 24),
        "values": values,
        "tickvals": ticks,
        "ticktext": texts,
        "range": extent,
    }


def importance_figure(importance: Sequence[Importance]) -> dict[str, Any] | None:
    """Horizontal bars of the leading parameters, one colour for each objective; None without any score."""
    shown = [estimate for estimate in importance if estimate.scores]
    if not shown:
        return None
    totals: dict[str, float] = {}
    for estimate in shown:
        for name, score in estimate.scores.items():
            totals[name] = totals.get(name, 0.0) + score
    names = sorted(totals, key=lambda name: totals[name])[-15:]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": f"{plain(objective_label(estimate.objective), 40)} (R² {estimate.r2:.2f})",
            "y": [plain(name, 40) for name in names],
            "x": [estimate.scores.get(name, 0.0) for name in names],
            "marker": {"color": color},
            "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
        }
        for estimate, color in zip(shown, (FRONT, BASELINE, PUBLISHED, "#CC79A7"), strict=False)
    ]
    x_axis = page_axis("estimated importance: R² lost when the parameter is shuffled")
    height = 140 + 26 * len(names)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}
    layout = page_layout(
        xaxis=x_axis,
        yaxis=page_axis("", type="category"),
        height=height,
        legend=legend,
        barmode="group",
        showlegend=True,
    )
    return {"data": data, "layout": layout}
