"""What a report is made of: a run, its trials and its front."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from nas.pareto import check_directions, pareto_mask
from nas.report.formats import as_number, is_cost, is_latency, objective_label, one_line

__all__ = ["Measured", "RunReport", "TrialRow"]


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
    metrics where they were taken. ``latency`` holds median_ms, low_ms, high_ms, samples, precise and target,
    and where the toolkit measured it trusted, reasons, identity and conditions.
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
    def conditions(self) -> str | None:
        """Under which conditions the latency was measured; None where there is none, or no record of it."""
        return (self.latency or {}).get("conditions")

    @property
    def trusted(self) -> bool:
        """Whether nothing was out of bounds while the latency was measured, as far as the record says."""
        return (self.latency or {}).get("trusted") is not False

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
        return next((objective for objective in self.objectives if not is_cost(objective[0])), None)

    @property
    def cost(self) -> tuple[str, str] | None:
        """The objective weighed against the quality: latency if there is one, else the first of the others."""
        others = [objective for objective in self.objectives if objective != self.quality]
        return next((o for o in others if is_latency(o[0])), others[0] if others else None)

    @property
    def quality_label(self) -> str:
        """``validation accuracy``; the bare name where there is no task with data, or no quality at all."""
        name = objective_label(self.quality[0]) if self.quality else "quality"
        return f"validation {name}" if self.task_description else name

    def in_state(self, *states: str) -> list[TrialRow]:
        """Trials in one of ``states``, in order of their numbers as given."""
        return [row for row in self.trials if row.state in states]

    def usable(self) -> list[TrialRow]:
        """Complete trials whose objectives are all present and finite, whatever their latencies were measured under."""
        names = [name for name, _ in self.objectives]
        return [
            row
            for row in self.in_state("complete")
            if all(as_number(row.values.get(n)) is not None for n in names)
        ]

    def groups(self) -> list[tuple[str | None, list[TrialRow]]]:
        """The usable trials by the conditions of their latencies, the largest group first, of equal ones the latest.

        Latencies of different conditions are never compared. Without a latency among the objectives there is one group.
        """
        found: dict[str | None, list[TrialRow]] = defaultdict(list)
        split = any(is_latency(name) for name, _ in self.objectives)
        for row in self.usable():
            found[row.conditions if split else None].append(row)
        return sorted(found.items(), key=lambda group: (-len(group[1]), -max(row.number for row in group[1])))

    def comparable(self) -> list[TrialRow]:
        """The usable trials of one kind of conditions: of the largest group."""
        return next((rows for _, rows in self.groups()), [])

    def fronts(self) -> list[list[TrialRow]]:
        """The front of every group, as ``groups`` sorts them."""
        return [self._front_of(rows) for _, rows in self.groups()]

    def front(self) -> list[TrialRow]:
        """The comparable trials that no other dominates, best cost first (one objective: the best ones)."""
        return self._front_of(self.comparable())

    def _front_of(self, rows: list[TrialRow]) -> list[TrialRow]:
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

    def beside_front(self, row: TrialRow) -> bool:
        """Whether ``row`` may stand beside the front: it is complete, and its latency compares."""
        others = self.front()
        split = any(is_latency(name) for name, _ in self.objectives)
        return row.state == "complete" and not (split and others and others[0].conditions != row.conditions)

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
        if not is_latency(self.cost[0]):
            return None if again else Measured(value, value, value)
        source = self.finalist(row) if again else row.latency or {}
        median, low, high = (as_number(source.get(key)) for key in ("median_ms", "low_ms", "high_ms"))
        if again and median is None:
            return None
        if median is None or low is None or high is None:
            return Measured(value if median is None else median, math.nan, math.nan)
        return Measured(median, low, high)

    @property
    def latency_budget(self) -> float | None:
        """Milliseconds, as the recipe has it."""
        return as_number(self.recipe.get("latency_budget"))

    def budget_doubt(self, row: TrialRow) -> Literal["untrusted", "over"] | None:
        """Why ``row`` is not known to hold the latency budget; None when it does, or where there is nothing to hold.

        Only a trusted latency holds a budget, and the second measurement comes before the search's. That counts
        where there is no second one, or where it was made under the same conditions and is not to be trusted.
        """
        again, first = self.finalist(row), row.latency or {}
        measured = [source for source in (again, first) if as_number(source.get("high_ms")) is not None]
        if len(measured) > 1 and again.get("conditions") not in (None, row.conditions):
            measured = [again]
        if self.latency_budget is None or not measured:
            return None
        trusted = [source for source in measured if source.get("trusted") is not False]
        if not trusted:
            return "untrusted"
        return "over" if float(trusted[0]["high_ms"]) > self.latency_budget else None

    def commonest_failure(self) -> tuple[str, str, int] | None:
        """Kind, reason and number of what ended most of the failed and pruned trials; None if no reason is known."""
        failures = [row.failure for row in self.in_state("failed", "pruned") if row.failure]
        counts = Counter((one_line(f.get("kind", "error")), one_line(f.get("reason", ""))) for f in failures)
        return next(((kind, reason, count) for (kind, reason), count in counts.most_common(1)), None)

    def notes(self) -> list[str]:
        """Sentences that belong beside the front: of other conditions, untrusted latencies, budgets left open."""
        from nas.report.conditions import notes  # reads reports itself

        return notes(self)

    def verdict(self) -> str:
        """One honest sentence: what was found against the baseline, and nothing that lies within the noise."""
        from nas.report.verdict import Verdict  # made of reports itself

        return one_line(Verdict(self).sentence())
