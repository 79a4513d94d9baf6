"""Meeting a budget by measuring: the weakest strength of the adjustable passes that does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from compress.measuring import count, measure_against
from compress.passes.base import Adjustable, Context, Pass
from compress.result import Step
from nas.errors import UserMistake

__all__ = ["Costs", "fitting_passes"]

_PROBES = 7
_NARROW = 0.02
_LONGER = 3
_AIM = 0.98
"""Latency is aimed at a little below the limit, so that the last measurement does not miss it by its noise."""


class Costs:
    """What the original costs, and whether another model costs little enough.

    Args:
        original, counted: the model, and its ``compress.measuring.count``.
        context: with budget, target and example.
        seconds: of the last measurement; a probe takes a quarter of it or more. 0: no latency is measured.
    """

    def __init__(self, original: nn.Module, counted: Mapping[str, Any], context: Context, seconds: float):
        self._original, self._counted, self._context, self._seconds = original, counted, context, seconds
        self.budget = context.budget
        self._latency: float | None = None
        if seconds > 0:
            session = measure_against(
                {"original": original},
                "original",
                context.example,
                context.target,
                seconds=max(1.0, seconds / 4),
            )
            self._latency = session.results["original"].median_ms

    def original(self) -> dict[str, float]:
        """``params``, ``macs`` and, where measured, ``latency`` in ms."""
        found = {"params": float(self._counted["params"]), "macs": float(self._counted["macs"])}
        return found if self._latency is None else {**found, "latency": self._latency}

    def fits(self, model: nn.Module) -> tuple[bool, float]:
        """Whether ``model`` meets the budget, and its cost, in the budget's own unit (share, ms or count).

        Latency is measured again, twice as long each time, while the interval holds the limit; if it still does in
        the end, the median decides.
        """
        budget = self._need()
        if budget.kind != "latency":
            found = float(count(model, self._context.example)[budget.kind])
            value = found / self._counted[budget.kind] if budget.relative else found
            return value <= budget.value, value
        limit, seconds = budget.value * _AIM, max(1.0, self._seconds / 4)
        for attempt in range(_LONGER):
            session = measure_against(
                {"original": self._original, "candidate": model},
                "original",
                self._context.example,
                self._context.target,
                seconds=seconds * 2**attempt,
                seed=self._context.seed + attempt,
            )
            pair, result = session.pair("candidate", "original"), session.results["candidate"]
            low, value, high = (
                (pair.low, pair.ratio, pair.high)
                if budget.relative
                else (result.low_ms, result.median_ms, result.high_ms)
            )
            if high <= limit or low > limit:
                break
        return value <= limit, value

    def holds(self, step: Step) -> bool:
        """Whether the finished step meets the budget: latency by its median; ``sure`` says whether beyond doubt."""
        return bool(self._figures(step)[0] <= self._need().value)

    def sure(self, step: Step) -> bool:
        """Whether the upper end of the interval meets it too."""
        return bool(self._figures(step)[1] <= self._need().value)

    def describe(self, step: Step) -> str:
        """The figure of a finished step, in words."""
        value, high = self._figures(step)
        budget = self._need()
        unit = " of the original" if budget.relative else " ms" if budget.kind == "latency" else ""
        upper = f" (surely at most {high:.4g})" if budget.kind == "latency" else ""
        return f"{budget.kind} is {value:.4g}{unit}{upper}"

    def _figures(self, step: Step) -> tuple[float, float]:
        budget = self._need()
        if budget.kind == "latency":
            if budget.relative:
                found = step.ratio or {"ratio": 1.0, "high": 1.0}
                return found["ratio"], found["high"]
            measured = step.latency or {}
            return measured["median_ms"], measured["high_ms"]
        value = float(getattr(step, budget.kind))
        value = value / self._counted[budget.kind] if budget.relative else value
        return value, value

    def _need(self) -> Any:
        if self.budget is None:
            raise ValueError("there is no budget")
        return self.budget


def fitting_passes(
    passes: Sequence[Pass],
    costs: Costs,
    apply_all: Callable[[Sequence[Pass]], nn.Module],
    *,
    at_least: float | None = None,
) -> tuple[list[Pass], float | None]:
    """The passes at the weakest common strength that meets the budget, found by bisection, and that strength.

    Args:
        passes: those that are not adjustable stay as they are.
        apply_all: gives the shapes that passes lead to, untrained.
        at_least: strength below which it is known to be missed; taken as it is (the measurement of the finished
            model judges).

    Raises:
        UserMistake: not even full strength meets it, or nothing is adjustable and it is missed.
    """
    budget, report = costs.budget, costs._context.report
    assert budget is not None
    if at_least is not None:
        return _at(passes, at_least), at_least
    adjustable = [one.name for one in passes if isinstance(one, Adjustable)]
    if not adjustable:
        return list(passes), None  # the result is measured, and refused if it misses
    met, value = costs.fits(apply_all(_at(passes, 1.0)))
    if not met:
        raise UserMistake(
            f"budget {budget}: cannot be met: at full strength of {', '.join(adjustable)} "
            f"{budget.kind} is still {value:.3g}, and {budget.value:.3g} is asked for; allow more, or add a pass"
        )
    weak, strong = 0.0, 1.0
    for _ in range(_PROBES if budget.kind == "latency" else 2 * _PROBES):
        if strong - weak <= (_NARROW if budget.kind == "latency" else 1e-3):
            break
        middle = (weak + strong) / 2
        met, value = costs.fits(apply_all(_at(passes, middle)))
        report(f"strength {middle:.3f}: {budget.kind} {value:.4g}, wanted {budget.value:.4g}")
        weak, strong = (weak, middle) if met else (middle, strong)
    return _at(passes, strong), strong


def _at(passes: Sequence[Pass], strength: float) -> list[Pass]:
    return [one.with_strength(strength) if isinstance(one, Adjustable) else one for one in passes]
