"""What a report is made of: the trials of a run, its front, and the one sentence that may be claimed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from nas.pareto import check_directions, pareto_mask

__all__ = [
    "Measured",
    "RunReport",
    "TrialRow",
    "as_number",
    "format_count",
    "format_interval",
    "format_ms",
    "format_seconds",
    "format_value",
    "objective_label",
    "one_line",
]

# Names that say what a model costs; every other objective says how good it is.
_COST_NAMES = frozenset({"params", "macs", "flops", "memory", "peak_memory", "energy"})


def _is_latency(name: str) -> bool:
    return name.startswith("latency")


def _is_cost(name: str) -> bool:
    return _is_latency(name) or name in _COST_NAMES


def one_line(text: object, length: int | None = None) -> str:
    """``text`` on one line, without control characters so that it cannot steer a terminal, cut at ``length``."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if length is None or len(line) <= length else f"{line[: length - 1]}…"


def as_number(value: object) -> float | None:
    """``value`` as a finite float; None for anything else (text, None, bool, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def format_count(value: float) -> str:
    """Three significant digits with a unit: ``512``, ``34.1 k``, ``3.4 M``, ``1.25 G``, ``2 T``."""
    scaled, unit = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if abs(float(f"{scaled:.3g}")) < 1000:
            break
        scaled, unit = scaled / 1000, larger
    digits = f"{scaled:.3g}" if abs(scaled) < 1000 else f"{scaled:,.0f}"
    return f"{digits} {unit}".rstrip()


def format_ms(milliseconds: float) -> str:
    """A latency with three significant digits: ``0.42 ms``, ``12.3 ms``, ``1,234 ms``."""
    digits = f"{milliseconds:,.0f}" if abs(milliseconds) >= 999.5 else f"{milliseconds:.3g}"
    return f"{digits} ms"


def format_seconds(seconds: float | None) -> str:
    """A duration: ``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 05 min``; an empty text for None."""
    if seconds is None:
        return ""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_interval(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """``0.42 ms (0.41-0.43)``: as many decimals as the interval's width supports, at least two digits."""
    unit = f" {unit}" if unit else ""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return f"{value:.3g}{unit}"
    enough = 1 - math.floor(math.log10(abs(value))) if value else 2
    supported = math.ceil(-math.log10(high - low)) if high > low else enough + 2
    decimals = max(0, enough, min(supported, enough + 2))
    return f"{value:,.{decimals}f}{unit} ({low:,.{decimals}f}-{high:,.{decimals}f})"


def format_value(name: str, value: float) -> str:
    """One objective or metric, by its name: milliseconds, counts, otherwise about four digits."""
    if name.endswith("_ms"):
        return format_ms(value)
    if name in _COST_NAMES:
        return format_count(value)
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.3g}"
    return f"{value:.{4 if size < 1 else 3 if size < 10 else 2}f}"


def objective_label(name: str) -> str:
    """A name for people, with its unit: ``latency_ms`` -> ``latency (ms)``, ``params`` -> ``parameters``."""
    if name.endswith("_ms"):
        return f"{name[:-3].replace('_', ' ')} (ms)"
    return {"params": "parameters", "macs": "MACs", "flops": "FLOPs"}.get(name, name.replace("_", " "))


class Measured(NamedTuple):
    """A cost and the interval it lies in; low and high equal the value where it was counted, not measured."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TrialRow:
    """One trial as the report sees it.

    ``state`` is complete, pruned, failed, interrupted, running or waiting. ``name`` is the baseline's or a
    published variant's, None for what the search found. ``values`` holds the objectives and is empty unless
    ``state`` is complete. ``metrics`` holds params, macs and validation metrics, and under ``final`` the test
    metrics where they were taken. ``latency`` holds median_ms, low_ms, high_ms, samples, precise and target.
    ``curve`` has one dict for each epoch. ``failure`` holds kind, reason and log_tail.
    """

    number: int
    architecture: dict[str, Any]
    key: str
    state: str
    name: str | None = None
    values: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    failure: dict[str, Any] | None = None
    seed: int = 0

    @property
    def title(self) -> str:
        """``#17`` or ``#0 softmax_baseline``."""
        return f"#{self.number} {self.name}" if self.name else f"#{self.number}"

    @property
    def test_metrics(self) -> dict[str, Any]:
        """Metrics on test data that the search never saw; empty where they were not taken."""
        final = self.metrics.get("final")
        return final if isinstance(final, dict) else {}


@dataclass(frozen=True)
class RunReport:
    """Everything known about a run, at any moment of it.

    ``objectives`` holds (name, "maximize" or "minimize"). ``baseline`` is the name of the trial to compare with.
    ``finalists`` are the front and the baseline measured again side by side: number, name, median_ms, low_ms,
    high_ms, ratio, ratio_low, ratio_high (latency divided by the baseline's, with its interval) and test
    (metrics). ``started`` and ``finished`` are ISO texts.
    """

    name: str
    space: str
    task_description: dict[str, Any]
    target: str
    objectives: Sequence[tuple[str, str]]
    trials: Sequence[TrialRow]
    environment: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    wall_seconds: float | None = None
    baseline: str | None = None
    finalists: Sequence[dict[str, Any]] | None = None
    test_metric: str | None = None

    @property
    def quality(self) -> tuple[str, str] | None:
        """The first objective that says how good a model is; None if every objective is a cost."""
        return next((objective for objective in self.objectives if not _is_cost(objective[0])), None)

    @property
    def cost(self) -> tuple[str, str] | None:
        """The objective weighed against the quality: latency if there is one, else the first of the others."""
        others = [objective for objective in self.objectives if objective != self.quality]
        return next((o for o in others if _is_latency(o[0])), others[0] if others else None)

    @property
    def quality_label(self) -> str:
        """``validation accuracy``; the bare name where there is no task with data, or no quality at all."""
        name = objective_label(self.quality[0]) if self.quality else "quality"
        return f"validation {name}" if self.task_description else name

    def in_state(self, *states: str) -> list[TrialRow]:
        """Trials in one of ``states``, in order of their numbers as given."""
        return [row for row in self.trials if row.state in states]

    def comparable(self) -> list[TrialRow]:
        """Complete trials whose objectives are all present and finite."""
        names = [name for name, _ in self.objectives]
        return [
            row
            for row in self.in_state("complete")
            if all(as_number(row.values.get(n)) is not None for n in names)
        ]

    def front(self) -> list[TrialRow]:
        """The comparable trials that no other dominates, best cost first (one objective: the best ones)."""
        rows = self.comparable()
        if not rows:
            return []
        values = np.array([[float(row.values[name]) for name, _ in self.objectives] for row in rows])
        mask = pareto_mask(values, check_directions([direction for _, direction in self.objectives]))
        name, direction = self.cost or self.objectives[0]
        sign = 1 if direction == "minimize" else -1
        kept = [row for row, keep in zip(rows, mask, strict=True) if keep]
        return sorted(kept, key=lambda row: (sign * row.values[name], row.number))

    def baseline_row(self) -> TrialRow | None:
        """The baseline's trial, a complete one first; None if there is no baseline or it has no trial."""
        rows = [row for row in self.trials if self.baseline is not None and row.name == self.baseline]
        return next((row for row in rows if row.state == "complete"), rows[0] if rows else None)

    def finalist(self, row: TrialRow) -> dict[str, Any]:
        """The second measurement of ``row``, or an empty dict."""
        return next((f for f in self.finalists or () if f.get("number") == row.number), {})

    def test_value(self, row: TrialRow) -> float | None:
        """``test_metric`` of ``row`` on test data, where it was taken."""
        if self.test_metric is None:
            return None
        again = self.finalist(row).get("test")
        metrics = again if isinstance(again, dict) else row.test_metrics
        return as_number(metrics.get(self.test_metric))

    def cost_of(self, row: TrialRow, *, again: bool = False) -> Measured | None:
        """The cost of ``row`` with its interval; ``again``: of the second measurement, None where there is none.

        A latency without an interval gets NaN bounds, so that no comparison with it succeeds.
        """
        if self.cost is None or as_number(row.values.get(self.cost[0])) is None:
            return None
        value = float(row.values[self.cost[0]])
        if not _is_latency(self.cost[0]):
            return None if again else Measured(value, value, value)
        source = self.finalist(row) if again else row.latency or {}
        median, low, high = (as_number(source.get(key)) for key in ("median_ms", "low_ms", "high_ms"))
        if again and median is None:
            return None
        if median is None or low is None or high is None:
            return Measured(value if median is None else median, math.nan, math.nan)
        return Measured(median, low, high)

    def commonest_failure(self) -> tuple[str, str, int] | None:
        """Kind, reason and number of what ended most of the failed and pruned trials; None if no reason is known."""
        failures = [row.failure for row in self.in_state("failed", "pruned") if row.failure]
        counts = Counter((one_line(f.get("kind", "error")), one_line(f.get("reason", ""))) for f in failures)
        return next(((kind, reason, count) for (kind, reason), count in counts.most_common(1)), None)

    def verdict(self) -> str:
        """One honest sentence: what was found against the baseline, and nothing that lies within the noise."""
        return one_line(_Verdict(self).sentence())


class _Verdict:
    """The cases of the one sentence, from nothing evaluated to a real win."""

    def __init__(self, report: RunReport):
        self.report = report
        self.rows = report.comparable()
        self.found = [row for row in self.rows if row.name is None]
        self.base = report.baseline_row()
        self.cost_name, cost_direction = report.cost or ("", "minimize")
        self.cost_sign = 1 if cost_direction == "minimize" else -1
        # What was measured again beside the baseline counts, and then nothing else may be claimed.
        self.again = self.base is not None and report.cost_of(self.base, again=True) is not None

    def sentence(self) -> str:
        if not self.rows:
            return self._no_success()
        if self.base is None or all(self.base is not row for row in self.rows):
            return self._without_baseline()
        if not self.found:
            return f"Nothing was found yet: only {_counted(self.rows, 'given architecture')} finished."
        if self.report.cost is None:
            return self._quality_alone(self.base)
        return self._against(self.base)

    def _no_success(self) -> str:
        failed, pruned = self.report.in_state("failed"), self.report.in_state("pruned")
        worst = self.report.commonest_failure()
        if worst is None:
            ended = [*failed, *pruned, *self.report.in_state("complete")]
            if not ended:
                return "No candidate has been evaluated yet."
            return f"No candidate succeeded: {_counted(ended, 'candidate')} ended without a usable value."
        kind, reason, count = worst
        often = f"most often ({count} times) with {kind}: {reason}"
        return f"No candidate succeeded: {len(failed)} failed and {len(pruned)} were stopped early, {often}"

    def _without_baseline(self) -> str:
        front, baseline = self.report.front(), self.report.baseline
        if self.report.cost is None:
            text = f"The best of {_counted(self.rows, 'candidate')} is {front[0].title} with {self._values(front[0])}"
        else:
            ends = " to ".join(
                f"{row.title} ({self._values(row)})" for row in front[:: max(1, len(front) - 1)]
            )
            text = f"The front holds {_counted(front, 'candidate')} of {len(self.rows)} evaluated: {ends}"
        if baseline is None:
            return f"{text}; no baseline was given to compare with."
        if self.base is None or self.base.state in ("waiting", "running", "interrupted"):
            return f"{text}; the baseline {baseline} has not been evaluated yet."
        reason = (self.base.failure or {}).get("reason") or self.base.state
        return f"{text}; there is nothing to compare with, as the baseline {baseline} failed: {reason}"

    def _values(self, row: TrialRow) -> str:
        return ", ".join(_valued(name, row.values[name]) for name, _ in self.report.objectives)

    def _best_quality(self) -> tuple[str, str, TrialRow]:
        name, direction = self.report.quality or self.report.objectives[0]
        return (
            name,
            direction,
            (max if direction == "maximize" else min)(self.found, key=lambda row: row.values[name]),
        )

    def _quality_alone(self, base: TrialRow) -> str:
        name, direction, best = self._best_quality()
        ours, theirs = best.values[name], base.values[name]
        label = self.report.quality_label if self.report.quality else objective_label(name)
        figures = (
            f"{best.title}: {label} {format_value(name, ours)} "
            f"against {base.name} {format_value(name, theirs)}{self._test_text(best, base)}"
        )
        if ours == theirs or (ours > theirs) != (direction == "maximize"):
            return f"No found architecture beats {base.name}: the best is {figures}."
        return f"Best found {figures} (one training run each, so a small difference may be chance)."

    def _against(self, base: TrialRow) -> str:
        good = [row for row in self.found if self._no_worse(row, base)]
        if not good:
            name, _, best = self._best_quality()
            return (
                f"No found architecture beats {base.name}: none reaches its {self.report.quality_label} "
                f"{format_value(name, base.values[name])}; the closest is {best.title} with "
                f"{format_value(name, best.values[name])} and {self._cost_text(best, base)}."
            )
        ahead = [row for row in good if self._wholly_ahead(row, base)]
        if ahead:
            best = min(ahead, key=self._cost_key)
            return f"Found {best.title}: {self._cost_text(best, base)}, {self._quality_text(best, base)}."
        best = min([row for row in good if self._measured_like(row)] or good, key=self._cost_key)
        condition = f" at no worse {self.report.quality_label}" if self.report.quality else ""
        return (
            f"No found architecture beats {base.name}: the best{condition} is {best.title} with "
            f"{self._cost_text(best, base)}; {self._why_not(best, base)}."
        )

    def _no_worse(self, row: TrialRow, base: TrialRow) -> bool:
        if self.report.quality is None:
            return True
        name, direction = self.report.quality
        difference = row.values[name] - base.values[name]
        return difference >= 0 if direction == "maximize" else difference <= 0

    def _measured_like(self, row: TrialRow) -> bool:
        """Whether ``row`` was measured again if the baseline was."""
        return not self.again or self.report.cost_of(row, again=True) is not None

    def _costs(self, row: TrialRow, base: TrialRow) -> tuple[Measured, Measured]:
        """Costs of both from the same round of measurements."""
        again = self.again and self._measured_like(row)
        unknown = Measured(math.nan, math.nan, math.nan)
        return self.report.cost_of(row, again=again) or unknown, self.report.cost_of(
            base, again=again
        ) or unknown

    def _wholly_ahead(self, row: TrialRow, base: TrialRow) -> bool:
        ours, theirs = self._costs(row, base)
        apart = ours.high < theirs.low if self.cost_sign > 0 else ours.low > theirs.high
        if not apart or not self._measured_like(row):
            return False
        again = self.report.finalist(row) if self.again else {}
        bound = as_number(again.get("ratio_high" if self.cost_sign > 0 else "ratio_low"))
        return bound is None or self.cost_sign * bound < self.cost_sign

    def _cost_key(self, row: TrialRow) -> float:
        cost = self.report.cost_of(row, again=self.again and self._measured_like(row))
        return math.inf if cost is None else self.cost_sign * cost.value

    def _why_not(self, row: TrialRow, base: TrialRow) -> str:
        ours, theirs = self._costs(row, base)
        if math.isnan(ours.low) or math.isnan(theirs.low):
            return "no interval was measured, so no difference can be claimed"
        if ours.low <= theirs.high and theirs.low <= ours.high:
            exact = ours.low == ours.high and theirs.low == theirs.high
            return "they cost the same" if exact else "the intervals overlap"
        if self.cost_sign * ours.value > self.cost_sign * theirs.value:
            return "it costs more"
        if not self._measured_like(row):
            return "it was not measured again beside the baseline"
        return "the interval of their ratio includes 1"

    def _cost_text(self, row: TrialRow, base: TrialRow) -> str:
        texts = [_cost_value(self.cost_name, cost) for cost in self._costs(row, base)]
        label = "" if self.cost_name.endswith("_ms") else f"{objective_label(self.cost_name)} "
        return f"{label}{texts[0]} against {base.name} {texts[1]}"

    def _quality_text(self, row: TrialRow, base: TrialRow) -> str:
        if self.report.quality is None:
            return "no quality was among the objectives"
        name = self.report.quality[0]
        ours, theirs = (format_value(name, r.values[name]) for r in (row, base))
        return f"{self.report.quality_label} {ours} against {theirs}{self._test_text(row, base)}"

    def _test_text(self, row: TrialRow, base: TrialRow) -> str:
        name = self.report.test_metric
        ours, theirs = self.report.test_value(row), self.report.test_value(base)
        if name is None or ours is None or theirs is None:
            return ""
        return (
            f", test {objective_label(name)} {format_value(name, ours)} against {format_value(name, theirs)}"
        )


def _counted(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _valued(name: str, value: float) -> str:
    text = format_value(name, value)
    return text if name.endswith("_ms") else f"{objective_label(name)} {text}"


def _cost_value(name: str, cost: Measured) -> str:
    if math.isnan(cost.value):
        return "unknown"
    return format_interval(*cost, "ms") if name.endswith("_ms") else format_value(name, cost.value)
