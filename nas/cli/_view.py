"""What a person sees of a run: what the space is, one line per candidate, a bar with the best so far."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from nas.errors import SpaceError
from nas.pareto import pareto_mask
from nas.report.data import TrialRow
from nas.report.formats import format_count, format_interval, format_ms, format_value, is_latency, one_line
from nas.report.tables import candidate_line
from nas.report.words import abbreviate
from nas.resolve import objectives_of

if TYPE_CHECKING:
    from nas.config import SearchConfig
    from nas.pareto import Direction
    from nas.study import StoredTrial
    from spaces import SearchSpace

__all__ = ["RunView", "count_text", "size_text"]

logger = logging.getLogger("nas.run")


def size_text(space: SearchSpace) -> str:
    """How many architectures a space has, in words; some spaces are too entangled to count."""
    try:
        return count_text(space.cardinality())
    except SpaceError:
        return "too many to count exactly"


def count_text(count: float) -> str:
    """An exact number of architectures: in full up to a million, then in scientific form."""
    if count == float("inf"):
        return "infinitely many (it has continuous parameters)"
    return f"{count:,}" if count < 1_000_000 else f"{_scientific(int(count))} (exactly {count:,})"


def _scientific(count: int) -> str:
    digits = str(count)  # float(count) would overflow for the largest spaces
    return f"{digits[0]}.{digits[1:3]}e{len(digits) - 1}"


class RunView:
    """Watches a run for a terminal, or line by line where there is none. Everything is also logged."""

    def __init__(self, console: Console):
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._lock = threading.Lock()
        self._objectives: list[tuple[str, Direction]] = []
        self._values: defaultdict[str | None, list[list[float]]] = defaultdict(list)  # by conditions
        self._short: dict[str, str] = {}
        self._now: dict[int, str] = {}
        self._deadline: float | None = None
        self._began = time.monotonic()
        self._done_here = 0
        self._total = 0
        self._first_latency_told = False

    # -- before ----------------------------------------------------------------------------------------------------

    def space(self, space: SearchSpace, config: SearchConfig, found: Mapping[str, Any]) -> None:
        task = found.get("task") or {}
        self._line(f"space    {space.name}: {size_text(space)} architectures")
        if task:
            splits = ", ".join(
                f"{one_line(name)} {count:,}" for name, count in task.get("splits", {}).items()
            )
            self._line(f"task     {one_line(task['name'])} on {one_line(task.get('source', '?'))}: {splits}")
            for note in task.get("notes", []):
                self._line(f"note     {one_line(note)}", style="yellow")
        self._line(
            f"target   {config.target}; training on {config.device}, {config.workers} at a time; "
            f"controller {config.controller}, {config.trials} trials, seed {config.seed}"
        )
        if not found.get("candidates"):
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("candidate", "parameters", "MACs", f"latency on {config.target} (ms)"):
            table.add_column(name, justify="left" if name == "candidate" else "right")
        for label, entry in found["candidates"].items():
            latency = entry["latency"]
            interval = format_interval(latency["median_ms"], latency["low_ms"], latency["high_ms"])
            table.add_row(label, format_count(entry["params"]), format_count(entry["macs"]), interval)
        self._console.print(table)
        self._tell_budgets(config, found["candidates"])

    def _tell_budgets(self, config: SearchConfig, candidates: Mapping[str, Any]) -> None:
        largest = candidates["largest"]
        costs = {
            "latency_budget": (largest["latency"]["median_ms"], "ms"),
            "params_budget": (largest["params"], "parameters"),
            "macs_budget": (largest["macs"], "MACs"),
        }
        for key, (most, unit) in costs.items():
            budget = getattr(config, key)
            if budget is not None:
                effect = (
                    "excludes part of the space"
                    if most > budget
                    else "even the largest candidate shown meets it"
                )
                self._line(f"budget   {format_count(budget)} {unit}: {effect}")

    # -- during ----------------------------------------------------------------------------------------------------

    def searching(self, config: SearchConfig, finished: Sequence[StoredTrial]) -> None:
        self._objectives = objectives_of(config, None)
        for trial in finished:
            if trial.result is not None and trial.result.state == "complete":
                values = [trial.result.values[name] for name, _ in self._objectives]
                self._values[self._kind(trial.result.latency)].append(values)
        done = len(finished)
        if done:
            self._line(f"resuming: {done} of {config.trials} trials are finished")
        self._total = config.trials
        self._began = time.monotonic()
        self._deadline = None if config.time_budget is None else self._began + config.time_budget
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn(
                "{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            console=self._console,
            transient=True,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task("", total=config.trials, completed=done, text="")
        self._progress.start()

    def started(self, trial: StoredTrial) -> None:
        self._doing(trial.number, "starting")

    def stage(self, trial: StoredTrial, event: dict[str, Any]) -> None:
        stage = event["stage"]
        if stage == "measured":
            text = format_ms(event["latency"]["median_ms"])
            self._doing(trial.number, f"{text}, training")
            if not self._first_latency_told:
                self._first_latency_told = True
                self._line(
                    f"#{trial.number:<4} {trial.name or 'first candidate'}: {text} measured, now training"
                )
        elif stage == "report":
            self._doing(trial.number, f"epoch {event['epoch']}/{event['epochs']}")

    def finished(self, trial: StoredTrial) -> None:
        result = trial.result
        assert result is not None  # only finished trials are shown
        row = TrialRow(
            number=trial.number,
            architecture=trial.architecture,
            key=trial.key,
            state=trial.state,
            name=trial.name,
            values=result.values,
            metrics=result.metrics,
            latency=result.latency,
            seconds=result.seconds,
            failure=result.failure,
        )
        with self._lock:
            self._now.pop(trial.number, None)
            self._done_here += 1
            mark = self._mark(row)
            words = {value for value in row.architecture.values() if isinstance(value, str)} | set(
                self._short
            )
            self._short = abbreviate(words)
            short = self._short
        line = candidate_line(
            row, self._objectives, mark=mark, short=short, width=max(self._console.width, 80)
        )
        self._console.print(line)
        logger.info("%s", line.plain)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1)
        self._refresh()

    def note(self, text: str) -> None:
        self._line(text, style="yellow")

    def _mark(self, row: TrialRow) -> str:
        if row.state != "complete":
            return ""
        alike = self._values[self._kind(row.latency)]
        alike.append([row.values[name] for name, _ in self._objectives])
        directions = [direction for _, direction in self._objectives]
        on_front = bool(pareto_mask(alike, directions)[-1])
        return "front" if on_front and len(directions) > 1 else "best" if on_front else ""

    def _kind(self, latency: Mapping[str, Any] | None) -> str | None:
        """What a candidate may be compared within: latencies of other conditions do not compare."""
        split = any(is_latency(name) for name, _ in self._objectives)
        return (latency or {}).get("conditions") if split else None

    def _refresh(self) -> None:
        """Best so far, size of the front, time left, and last, since it may be cut off, what runs now."""
        if self._progress is not None and self._task is not None:
            parts = [*self._best(), self._left(), *self._running_now()]
            self._progress.update(self._task, text="; ".join(part for part in parts if part))

    def _best(self) -> list[str]:
        most = max(self._values.values(), key=len, default=[])
        if not most:
            return []
        texts = []
        for index, (name, direction) in enumerate(self._objectives):
            best = (max if direction == "maximize" else min)(values[index] for values in most)
            texts.append(f"{name.removesuffix('_ms')} {format_value(name, best)}")
        parts = [f"best {', '.join(texts)}"]
        if len(self._objectives) > 1:
            directions = [direction for _, direction in self._objectives]
            parts.append(f"front {int(pareto_mask(most, directions).sum())}")
        return parts

    def _left(self) -> str:
        if not self._done_here or self._progress is None:
            return ""
        task = self._progress.tasks[0]
        elapsed = time.monotonic() - self._began
        seconds = elapsed / self._done_here * (self._total - task.completed)
        if self._deadline is not None:
            seconds = min(seconds, max(0.0, self._deadline - time.monotonic()))
        return f"about {int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _doing(self, number: int, text: str) -> None:
        with self._lock:
            self._now[number] = text
        self._refresh()

    def _running_now(self) -> list[str]:
        with self._lock:
            return [f"#{number} {text}" for number, text in sorted(self._now.items())[:3]]

    # -- after -----------------------------------------------------------------------------------------------------

    def concluding(self, text: str) -> None:
        self.close()
        self._line(text)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)
        logger.info("%s", text)
