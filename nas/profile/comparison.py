"""One model by several counters, and where they disagree."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nas.errors import UserMistake, first_line, nearest
from nas.profile.by_fvcore import count_by_fvcore
from nas.profile.by_thop import count_by_thop
from nas.profile.by_torch import count_by_torch
from nas.profile.default import with_or_without_data
from nas.profile.formulas import NOTHING, Work
from nas.profile.tally import Count, MissingCounter, Tally

__all__ = ["COUNTERS", "Comparison", "Disagreement", "compare", "count"]

logger = logging.getLogger("nas.profile")

COUNTERS: dict[str, Callable[[nn.Module, Sequence[Tensor]], Tally]] = {
    "fvcore": count_by_fvcore,
    "thop": count_by_thop,
    "torch": count_by_torch,
}


@dataclass(frozen=True)
class Disagreement:
    """Figures of one module that differ.

    Attributes:
        module: its name; ``""`` is the model itself.
        figure: ``params``, ``macs`` or ``activations``; of the last two the module's own, without modules in it.
        values: by counter.
    """

    module: str
    figure: str
    values: dict[str, int]

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:,}" for name, value in self.values.items())
        return f"{self.module or 'the model itself'}: {self.figure} {values}"


@dataclass(frozen=True)
class Comparison:
    """One model by several counters.

    Attributes:
        counts: by counter, in the order asked for.
        failures: counters that could not run this model, or whose package is not installed, with the reason.
        disagreements: where the counts differ, module by module; empty when all agree exactly.
    """

    counts: dict[str, Count]
    failures: dict[str, str]
    disagreements: tuple[Disagreement, ...]

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Operators that did work which at least one counter did not count."""
        return tuple(sorted({name for count in self.counts.values() for name in count.uncounted}))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "counters": {name: count.to_dict() for name, count in self.counts.items()},
            "failures": dict(self.failures),
            "agree": not self.disagreements and not self.failures,
            "disagreements": [
                {"module": found.module, "figure": found.figure, "values": found.values}
                for found in self.disagreements
            ],
            "uncounted": list(self.uncounted),
        }


def count(counter: str, model: nn.Module, inputs: Sequence[Tensor]) -> Count:
    """Count one call of ``model`` in evaluation mode by one counter; the model is not changed.

    Args:
        counter: ``fvcore``, ``thop`` or ``torch``.
        model: on any device.
        inputs: what it is called with; only shapes and types matter unless its control flow reads values.

    Raises:
        UserMistake: no counter of that name, or its package is not installed.
        Exception: whatever the model raises when called with ``inputs``, or the counter when it cannot follow it.
    """
    if counter not in COUNTERS:
        raise UserMistake(
            f"counter {counter!r} must be one of {', '.join(COUNTERS)}{nearest(counter, COUNTERS)}"
        )
    tally, method = with_or_without_data(COUNTERS[counter], model, inputs)
    total = tally.total
    own = {name: work for name, work in sorted(tally.own.items()) if work != NOTHING}
    uncounted = tuple(sorted(tally.uncounted))
    return Count(counter, tally.params, total.macs, total.activations, own, uncounted, method)


def compare(
    model: nn.Module, inputs: Sequence[Tensor], counters: Sequence[str] = tuple(COUNTERS)
) -> Comparison:
    """Count one call of ``model`` in evaluation mode by several counters; the model is not changed.

    Raises:
        UserMistake: no counter of that name, or none whose package is installed.
        Exception: what the model raises when called with ``inputs``; that is, if no counter can run it.
    """
    counts: dict[str, Count] = {}
    failures: dict[str, str] = {}
    error: Exception | None = None
    for name in counters:
        try:
            counts[name] = count(name, model, inputs)
        except MissingCounter as missing:
            failures[name] = first_line(missing)
            error = error or missing
        except UserMistake:
            raise
        except Exception as problem:  # a counter that cannot follow a model is told of, the others go on
            logger.info("%s cannot count this model", name, exc_info=True)
            failures[name] = first_line(problem)
            error = problem
    if error is not None and not counts:
        raise error
    return Comparison(counts, failures, tuple(_disagreements(counts)))


def _disagreements(counts: dict[str, Count]) -> list[Disagreement]:
    found = []
    params = {name: count.params for name, count in counts.items()}
    if len(set(params.values())) > 1:
        found.append(Disagreement("", "params", params))
    modules = sorted({module for count in counts.values() for module in count.modules})
    for module in modules:
        works: dict[str, Work] = {name: count.modules.get(module, NOTHING) for name, count in counts.items()}
        for figure in ("macs", "activations"):
            values = {name: int(getattr(work, figure)) for name, work in works.items()}
            if len(set(values.values())) > 1:
                found.append(Disagreement(module, figure, values))
    return found
