"""The one sentence that may be claimed of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nas.report.data import Measured, RunReport, TrialRow
from nas.report.formats import as_number, format_interval, format_value, is_latency, objective_label

__all__ = ["Verdict"]


class Verdict:
    """The cases of the one sentence, from nothing evaluated to a real win."""

    def __init__(self, report: RunReport):
        self.report = report
        self.base = report.baseline_row()
        self.cost_name, cost_direction = report.cost or ("", "minimize")
        self.cost_sign = 1 if cost_direction == "minimize" else -1
        # What was measured again beside the baseline counts, and then nothing else may be claimed.
        self.again = self.base is not None and report.cost_of(self.base, again=True) is not None
        comparable = {row.number for row in report.comparable()}
        # Measured again in one session, they compare whatever they were measured under before.
        self.rows = [row for row in report.usable() if row.number in comparable or self._together(row)]
        self.found = [row for row in self.rows if row.name is None]

    def sentence(self) -> str:
        """The sentence of the case that the report is."""
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
        if any(self.base is row for row in self.report.usable()):
            return (
                f"{text}; nothing is compared with the baseline {baseline}, measured under other conditions."
            )
        reason = (self.base.failure or {}).get("reason") or self.base.state
        return f"{text}; there is nothing to compare with, as the baseline {baseline} failed: {reason}"

    def _values(self, row: TrialRow) -> str:
        doubts = {name: is_latency(name) and not row.trusted for name, _ in self.report.objectives}
        return ", ".join(
            _valued(name, row.values[name]) + (" untrusted" if doubt else "")
            for name, doubt in doubts.items()
        )

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
            best = min(
                [row for row in ahead if not self.report.budget_doubt(row)] or ahead, key=self._cost_key
            )
            figures = f"{self._cost_text(best, base)}, {self._quality_text(best, base)}"
            return f"Found {best.title}: {figures}{self._budget_text(best)}."
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

    def _together(self, row: TrialRow) -> bool:
        return self.again and self.report.cost_of(row, again=True) is not None

    def _measured_like(self, row: TrialRow) -> bool:
        """Whether ``row`` was measured again if the baseline was."""
        return not self.again or self.report.cost_of(row, again=True) is not None

    def _costs(self, row: TrialRow, base: TrialRow) -> tuple[Measured, Measured]:
        """Costs of both from the same round of measurements; unknown where they were made under other conditions."""
        again = self.again and self._measured_like(row)
        unknown = Measured(math.nan, math.nan, math.nan)
        if not again and self._apart(row, base):
            return unknown, unknown
        return self.report.cost_of(row, again=again) or unknown, self.report.cost_of(
            base, again=again
        ) or unknown

    def _apart(self, row: TrialRow, base: TrialRow) -> bool:
        """Whether the latencies of the search do not compare."""
        return is_latency(self.cost_name) and row.conditions != base.conditions

    def _doubtful(self, row: TrialRow, *, again: bool) -> bool:
        """Whether this cost of ``row`` was measured while the machine was out of bounds."""
        if not is_latency(self.cost_name):
            return False
        return self.report.finalist(row).get("trusted") is False if again else not row.trusted

    def _wholly_ahead(self, row: TrialRow, base: TrialRow) -> bool:
        if not self._measured_like(row):
            return False
        again = self.report.finalist(row) if self.again else {}
        if (
            again.get("verdict") is not None
        ):  # decided from pairs of visits, more sharply than by two intervals
            return bool(again["verdict"] == ("faster" if self.cost_sign > 0 else "slower"))
        if any(self._doubtful(one, again=self._together(row)) for one in (row, base)):
            return False
        ours, theirs = self._costs(row, base)
        if not (ours.high < theirs.low if self.cost_sign > 0 else ours.low > theirs.high):
            return False
        bound = as_number(again.get("ratio_high" if self.cost_sign > 0 else "ratio_low"))
        return bound is None or self.cost_sign * bound < self.cost_sign

    def _cost_key(self, row: TrialRow) -> float:
        cost = self.report.cost_of(row, again=self.again and self._measured_like(row))
        return math.inf if cost is None else self.cost_sign * cost.value

    def _why_not(self, row: TrialRow, base: TrialRow) -> str:
        if not self._together(row) and self._apart(row, base):
            return "it was not measured again beside the baseline"
        ours, theirs = self._costs(row, base)
        if math.isnan(ours.low) or math.isnan(theirs.low):
            return "no interval was measured, so no difference can be claimed"
        if self.again and self.report.finalist(row).get("verdict") == "cannot tell":
            return "side by side they cannot be told apart"
        if ours.low <= theirs.high and theirs.low <= ours.high:
            exact = ours.low == ours.high and theirs.low == theirs.high
            return "they cost the same" if exact else "the intervals overlap"
        if self.cost_sign * ours.value > self.cost_sign * theirs.value:
            return "it costs more"
        if any(self._doubtful(one, again=self._together(row)) for one in (row, base)):
            return "of an untrusted latency no difference is claimed"
        if not self._measured_like(row):
            return "it was not measured again beside the baseline"
        return "the interval of their ratio includes 1"

    def _cost_text(self, row: TrialRow, base: TrialRow) -> str:
        again = self._together(row)
        if not again and self._apart(row, base):
            return f"a latency that does not compare with that of {base.name}"
        texts = [
            _cost_value(self.cost_name, cost) + (" untrusted" if self._doubtful(one, again=again) else "")
            for one, cost in zip((row, base), self._costs(row, base), strict=True)
        ]
        label = "" if self.cost_name.endswith("_ms") else f"{objective_label(self.cost_name)} "
        return f"{label}{texts[0]} against {base.name} {texts[1]}"

    def _budget_text(self, row: TrialRow) -> str:
        doubt, budget = self.report.budget_doubt(row), self.report.latency_budget
        if doubt is None:
            return ""
        why = "is not held when measured again" if doubt == "over" else "is not known to hold"
        return f"; the latency budget of {budget:g} ms {why}"

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
