"""Meeting a budget by measuring: the weakest strength of the adjustable passes that does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.measuring import compare_on_target, count, measure_against
from compress.passes.base import Adjustable, Budget, Context, Pass
from compress.result import Step
from nas.errors import UserMistake

__all__ = ["Costs", "Fit", "fitting_passes"]

_PROBES = 7
_NARROW = 0.02
_LONGER = 3
_STEP = 0.03
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
        self.budget, self.report = context.budget, context.report
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
        budget = self.need()
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

    def lowered_by(self, model: nn.Module) -> bool:
        """Whether ``model`` costs less than the original in what the budget is of.

        A latency counts as lowered where the MACs are; else it is measured.
        """
        counted, kind = count(model, self._context.example), self.need().kind
        if kind != "latency":
            return bool(counted[kind] < self._counted[kind])
        if counted["macs"] < self._counted["macs"]:
            return True
        seconds = max(1.0, self._seconds / 4)
        return compare_on_target(model, self._original, self._context, seconds=seconds).verdict == "faster"

    def need(self) -> Budget:
        """The budget. Raises ValueError where there is none."""
        if self.budget is None:
            raise ValueError("there is no budget")
        return self.budget

    def holds(self, step: Step) -> bool:
        """Whether the finished step meets the budget: latency by its median; ``sure`` says whether beyond doubt."""
        return bool(self._figures(step)[0] <= self.need().value)

    def sure(self, step: Step) -> bool:
        """Whether the upper end of the interval meets it too."""
        return bool(self._figures(step)[1] <= self.need().value)

    def describe(self, step: Step) -> str:
        """The figure of a finished step, in words."""
        value, high = self._figures(step)
        budget = self.need()
        unit = " of the original" if budget.relative else " ms" if budget.kind == "latency" else ""
        upper = f" (surely at most {high:.4g})" if budget.kind == "latency" else ""
        return f"{budget.kind} is {value:.4g}{unit}{upper}"

    def _figures(self, step: Step) -> tuple[float, float]:
        budget = self.need()
        if budget.kind == "latency":
            if budget.relative:
                found = step.ratio or {"ratio": 1.0, "high": 1.0}
                return found["ratio"], found["high"]
            measured = step.latency or {}
            return measured["median_ms"], measured["high_ms"]
        value = float(getattr(step, budget.kind))
        value = value / self._counted[budget.kind] if budget.relative else value
        return value, value


@dataclass(frozen=True)
class Fit:
    """Passes at strengths that meet a budget.

    Attributes:
        passes: at their strengths.
        strengths: position among ``passes`` -> strength in [0, 1]. The others are as the caller made them: they cannot
            be adjusted, or do not lower what the budget is of.
    """

    passes: tuple[Pass, ...]
    strengths: Mapping[int, float]

    @property
    def strength(self) -> float | None:
        """The common one; None where nothing is adjusted."""
        return max(self.strengths.values(), default=None)

    def stronger(self) -> Fit | None:
        """A little stronger, for when the finished model misses the budget; None when that is not possible."""
        if self.strength is None or self.strength >= 1:
            return None
        return _fit(self.passes, {at: min(1.0, one + _STEP) for at, one in self.strengths.items()})


def fitting_passes(
    passes: Sequence[Pass], costs: Costs, apply_all: Callable[[Sequence[Pass]], nn.Module]
) -> Fit:
    """The passes at the weakest common strength that meets the budget, found by bisection.

    A pass that alone, at full strength, does not lower what the budget is of stays as the caller made it. One without
    which a counted budget is met too, because the others meet it by more than enough, stays at strength 0.

    Args:
        passes: those that are not adjustable stay as they are.
        apply_all: gives the shapes that passes lead to, untrained.

    Raises:
        UserMistake: not even full strength meets it, or, of a count, no adjustable pass lowers it and it is missed.
    """
    adjustable = {at: one for at, one in enumerate(passes) if isinstance(one, Adjustable)}
    if not adjustable:
        return Fit(tuple(passes), {})  # the result is measured, and refused if it misses
    helping = [at for at, one in adjustable.items() if _helps(one, costs, apply_all)]
    for at in sorted(adjustable.keys() - set(helping)):
        costs.report(
            f"{passes[at].name}: even at full strength it does not lower the {costs.need().kind}; it stays as it is"
        )

    def met_at(strength: float) -> bool:
        met, value = costs.fits(apply_all(_fit(passes, dict.fromkeys(helping, strength)).passes))
        costs.report(
            f"strength {strength:.3f}: {costs.need().kind} {value:.4g}, wanted {costs.need().value:.4g}"
        )
        return met

    if not helping and costs.need().kind == "latency":
        return Fit(tuple(passes), {})  # it is measured in the end, more exactly
    if met_at(0.0):
        return _fit(passes, dict.fromkeys(helping, 0.0))
    _require_reachable(passes, helping, costs, apply_all)
    weak, strong = 0.0, 1.0
    latency = costs.need().kind == "latency"
    for _ in range(_PROBES if latency else 2 * _PROBES):
        if strong - weak <= (_NARROW if latency else 1e-3):
            break
        middle = (weak + strong) / 2
        weak, strong = (weak, middle) if met_at(middle) else (middle, strong)
    strengths = dict.fromkeys(helping, strong)
    return _fit(passes, strengths if latency else _without_needless(passes, strengths, costs, apply_all))


def _helps(one: Any, costs: Costs, apply_all: Callable[[Sequence[Pass]], nn.Module]) -> bool:
    try:
        return costs.lowered_by(apply_all([one.with_strength(1.0)]))
    except UserMistake:
        return True  # alone it cannot work: what it does behind the others is seen when all are applied


def _require_reachable(
    passes: Sequence[Pass],
    helping: Sequence[int],
    costs: Costs,
    apply_all: Callable[[Sequence[Pass]], nn.Module],
) -> None:
    budget = costs.need()
    met, value = costs.fits(apply_all(_fit(passes, dict.fromkeys(helping, 1.0)).passes))
    if met:
        return
    names = ", ".join(passes[at].name for at in helping)
    how = f"at full strength of {names}" if names else "by these passes, of which none lowers it further:"
    raise UserMistake(
        f"budget {budget}: cannot be met: {how} {budget.kind} is still {value:.3g}, and {budget.value:.3g} is asked "
        "for; allow more, or add a pass"
    )


def _without_needless(
    passes: Sequence[Pass],
    strengths: Mapping[int, float],
    costs: Costs,
    apply_all: Callable[[Sequence[Pass]], nn.Module],
) -> Mapping[int, float]:
    """``strengths`` with 0 for those without which the budget is met too, the last ones first.

    Some passes cannot do as little as the weakest strength asks for: a first token slimming takes a tenth at least.
    """
    for at in sorted(strengths, reverse=True):
        fewer = {**strengths, at: 0.0}
        if any(fewer.values()) and costs.fits(apply_all(_fit(passes, fewer).passes))[0]:
            costs.report(f"{passes[at].name}: is not needed for the budget; strength 0")
            strengths = fewer
    return strengths


def _fit(passes: Sequence[Pass], strengths: Mapping[int, float]) -> Fit:
    made = [
        one.with_strength(strengths[at]) if at in strengths and isinstance(one, Adjustable) else one
        for at, one in enumerate(passes)
    ]
    return Fit(tuple(made), strengths)
