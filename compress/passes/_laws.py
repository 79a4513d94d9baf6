"""What the options of a pass may be: looked at when the pass is made, since texts hold whatever YAML reads in them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nas.errors import UserMistake

__all__ = ["FLAG", "Law", "check_options", "number", "optional", "whole", "wholes", "word"]


class Law(NamedTuple):
    """``holds`` for values that are allowed; ``text`` follows "must be"."""

    holds: Callable[[Any], bool]
    text: str


def check_options(owner: str, options: Mapping[str, Any], laws: Mapping[str, Law]) -> None:
    """Raises UserMistake that names the first option that breaks its law, its value and what is allowed."""
    for name, law in laws.items():
        if not law.holds(options[name]):
            raise UserMistake(f"{owner}: {name}={options[name]!r} must be {law.text}")


FLAG = Law(lambda value: isinstance(value, bool), "true or false")


def number(interval: str) -> Law:
    """A finite number in ``interval``: ``(0, 1]``, ``[0, 1)``, or ``above 0``, ``at least 0``."""
    low, high, above, below = _bounds(interval)

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            return False
        size = float(value)
        return (size > low if above else size >= low) and (size < high if below else size <= high)

    return Law(holds, interval if interval[0] not in "([" else f"in {interval}")


def whole(least: int) -> Law:
    """A whole number of at least ``least``."""
    return Law(lambda value: _is_whole(value, least), f"at least {least}, a whole number")


def wholes(what: str, example: str) -> Law:
    """A list of whole numbers of ``what``, each at least 1; with an example for the message."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(_is_whole(one, 1) for one in value)
        )

    return Law(holds, f"a list of numbers of {what}, whole and at least 1, as in {example}")


def word(*allowed: str) -> Law:
    """One of ``allowed``."""
    head, last = allowed[:-1], allowed[-1]
    return Law(lambda value: isinstance(value, str) and value in allowed, f"{', '.join(head)} or {last}")


def optional(law: Law) -> Law:
    """``law``, or None."""
    return Law(lambda value: value is None or law.holds(value), law.text)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _bounds(interval: str) -> tuple[float, float, bool, bool]:
    """Lower and upper end, and whether each is left out itself."""
    if interval[0] in "([":
        low, high = (float(part) for part in interval[1:-1].split(","))
        return low, high, interval[0] == "(", interval[-1] == ")"
    words, _, least = interval.rpartition(" ")
    return float(least), math.inf, words == "above", False
