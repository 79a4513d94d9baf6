"""The decisions of a search space: what values each may take, and when it counts at all."""

from __future__ import annotations

import json
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from spaces.errors import SpaceError, nearest

__all__ = [
    "Architecture",
    "Choice",
    "Constraint",
    "Float",
    "Int",
    "Parameter",
    "Scalar",
    "When",
    "draw_index",
    "listed",
]

Scalar = Union[int, float, str, bool, None]  # noqa: UP007  (a runtime alias on Python 3.10)
Architecture = dict[str, Scalar]
When = Callable[[Mapping[str, Any]], bool]

_FLOAT_MOVES = (-0.2, -0.1, 0.1, 0.2)  # fractions of the (logarithmic, if asked) range


class _First:
    """Stands for "the first value", because None is a value of its own."""


_FIRST = _First()


def draw_index(count: int, rng: random.Random) -> int:
    """An integer in [0, count)."""
    # one call of random() is five times faster than randrange, and its bias is below 2**-21 for such counts
    return int(rng.random() * count) if count < 1 << 32 else rng.randrange(count)


def listed(values: Iterable[object], most: int = 16) -> str:
    """``values`` in words for a message, cut short where there are many."""
    words = [repr(value) for value in values]
    return ", ".join(words if len(words) <= most else [*words[:most], f"... ({len(words)} in all)"])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Constraint:
    """A law between parameters that every architecture of a space must meet.

    Args:
        name: short, unique in the space; it appears in error messages.
        predicate: gets the active parameters as a mapping, as a condition does, and is true where the law is
            met. It must be a pure function that can be evaluated for any values of the parameters, also
            where another constraint is broken.
        message: the law in words, shown to whoever breaks it.
    """

    name: str
    predicate: When
    message: str


class Parameter(ABC):
    """One decision. Immutable once made.

    Attributes:
        default: the value it takes where nothing else is known (a neighbour that switches it on).
        when: condition under which it counts, or None for always. It gets a mapping of the active parameters
            declared earlier and must be a pure function.
        size: number of values, or None for a continuum. Values are numbered from 0.
    """

    default: Scalar
    when: When | None
    size: int | None

    @abstractmethod
    def at(self, index: int) -> Scalar:
        """The value with number ``index`` in [0, size)."""

    @abstractmethod
    def normalise(self, value: Any) -> Scalar:
        """The declared scalar that ``value`` stands for; a bare ValueError if there is none."""

    @abstractmethod
    def draw(self, rng: random.Random) -> Scalar:
        """A value, uniformly (a logarithmic Float: uniformly in the logarithm)."""

    @abstractmethod
    def redraw(self, value: Any, rng: random.Random) -> Scalar:
        """A value other than the normalised ``value``; the parameter must have more than one."""

    @abstractmethod
    def near(self, value: Any) -> list[Scalar]:
        """The values one step away from the normalised ``value``, without it and without repetition."""

    @abstractmethod
    def columns(self, name: str) -> list[str]:
        """Names of the numbers that ``encode`` gives for a parameter called ``name``."""

    @abstractmethod
    def encode(self, value: Any) -> Sequence[float]:
        """Numbers in [0, 1] for a normalised value, as many as ``columns`` has names."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What may be chosen, as JSON."""

    @abstractmethod
    def allowed(self) -> str:
        """What may be chosen, in words that follow "must be"."""

    def suggestion(self, value: object) -> str:
        """`` (did you mean 'x'?)`` for a misspelt value, or an empty string."""
        return ""


class Choice(Parameter):
    """One of a list of JSON scalars.

    Values are compared by type and value: True, 1 and 1.0 are three values, and an architecture must hold
    the declared one. A choice among numbers (no bool) is encoded by rank, any other one-hot.

    Args:
        values: at least one, without repetition; int, finite float, str, bool or None.
        default: one of ``values``; the first if not given.
        when: condition under which the parameter counts.

    Raises:
        SpaceError: no value, a repeated one, one that is not a JSON scalar, or a default outside the values.
    """

    def __init__(
        self, values: Sequence[Scalar], *, default: Scalar | _First = _FIRST, when: When | None = None
    ) -> None:
        if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not isinstance(values, Iterable):
            raise SpaceError(f"Choice(values={values!r}): values must be a list, in an order that is kept")
        self.values: tuple[Scalar, ...] = tuple(_plain(value) for value in values)
        if not self.values:
            raise SpaceError("Choice(values=[]): values must hold at least one value")
        for value in self.values:
            scalar = value is None or type(value) in (bool, int, float, str)
            if not scalar or (isinstance(value, float) and not math.isfinite(value)):
                raise SpaceError(f"Choice: value {value!r} must be a finite number, a string, a bool or None")
        self._index = {(type(value), value): index for index, value in enumerate(self.values)}
        if len(self._index) < len(self.values):
            raise SpaceError(f"Choice: values {list(self.values)!r} must not repeat a value")
        self.size: int = len(self.values)
        self.when = when
        if isinstance(default, _First):
            self.default = self.values[0]
        else:
            try:
                self.default = self.normalise(default)
            except ValueError:
                raise SpaceError(f"Choice: default={default!r} must be {self.allowed()}") from None
        self._ranked = all(_is_number(value) for value in self.values)
        self._codes = self._rank_codes() if self._ranked else np.eye(self.size).tolist()

    def _rank_codes(self) -> list[list[float]]:
        order = sorted(range(self.size), key=lambda index: float(self.values[index] or 0))
        codes = [[0.0]] * self.size
        for rank, index in enumerate(order):
            codes[index] = [rank / max(self.size - 1, 1)]
        return codes

    def at(self, index: int) -> Scalar:
        return self.values[index]

    def normalise(self, value: Any) -> Scalar:
        try:
            return self.values[self._index[type(value), value]]
        except (KeyError, TypeError):
            if isinstance(value, np.generic):
                return self.normalise(value.item())
            raise ValueError from None

    def draw(self, rng: random.Random) -> Scalar:
        return self.values[draw_index(self.size, rng)]

    def redraw(self, value: Any, rng: random.Random) -> Scalar:
        other = draw_index(self.size - 1, rng)
        return self.values[other + (other >= self._index[type(value), value])]

    def near(self, value: Any) -> list[Scalar]:
        own = self._index[type(value), value]
        return [other for index, other in enumerate(self.values) if index != own]

    def columns(self, name: str) -> list[str]:
        return [name] if self._ranked else [f"{name}={json.dumps(value)}" for value in self.values]

    def encode(self, value: Any) -> Sequence[float]:
        return self._codes[self._index[type(value), value]]

    def describe(self) -> dict[str, Any]:
        return {"type": "choice", "values": list(self.values)}

    def allowed(self) -> str:
        return repr(self.values[0]) if self.size == 1 else f"one of {listed(self.values)}"

    def suggestion(self, value: object) -> str:
        return nearest(str(value), [other for other in self.values if isinstance(other, str)])

    def __repr__(self) -> str:
        return f"Choice({list(self.values)!r})"


class Int(Parameter):
    """An integer from ``low`` to ``high``, both included, in steps of ``step``.

    Args:
        low: smallest value.
        high: largest value, ``low`` plus a multiple of ``step``.
        step: distance of two values, at least 1.
        default: one of the values; ``low`` if not given.
        when: condition under which the parameter counts.

    Raises:
        SpaceError: bounds or step that are not integers or do not fit together, or a default outside.
    """

    def __init__(
        self, low: int, high: int, *, step: int = 1, default: int | None = None, when: When | None = None
    ) -> None:
        for label, bound in (("low", low), ("high", high), ("step", step)):
            if type(_plain(bound)) is not int:
                raise SpaceError(f"Int: {label}={bound!r} must be an integer")
        self.low, self.high, self.step = _plain(low), _plain(high), _plain(step)
        if self.step < 1 or self.high < self.low:
            raise SpaceError(f"Int({low}, {high}, step={step}): high must not be below low, nor step below 1")
        excess = (self.high - self.low) % self.step
        if excess:
            raise SpaceError(
                f"Int({low}, {high}, step={step}): high must be low plus a multiple of step; "
                f"use high={self.high - excess} or high={self.high - excess + self.step}"
            )
        self.size: int = (self.high - self.low) // self.step + 1
        self.when = when
        try:
            self.default = self.low if default is None else self.normalise(default)
        except ValueError:
            raise SpaceError(f"Int: default={default!r} must be {self.allowed()}") from None

    def at(self, index: int) -> int:
        return int(self.low + index * self.step)

    def normalise(self, value: Any) -> int:
        if type(value) is not int:
            value = _plain(value)
            if not _is_number(value) or value != value // 1:
                raise ValueError
            value = int(value)
        if not self.low <= value <= self.high or (value - self.low) % self.step:
            raise ValueError
        return int(value)

    def draw(self, rng: random.Random) -> int:
        return self.at(draw_index(self.size, rng))

    def redraw(self, value: Any, rng: random.Random) -> int:
        other = draw_index(self.size - 1, rng)
        return self.at(other + (other >= (value - self.low) // self.step))

    def near(self, value: Any) -> list[Scalar]:
        return [other for other in (value - self.step, value + self.step) if self.low <= other <= self.high]

    def columns(self, name: str) -> list[str]:
        return [name]

    def encode(self, value: Any) -> Sequence[float]:
        return ((value - self.low) / ((self.high - self.low) or 1),)

    def describe(self) -> dict[str, Any]:
        return {"type": "int", "low": self.low, "high": self.high, "step": self.step}

    def allowed(self) -> str:
        steps = f" in steps of {self.step}" if self.step > 1 else ""
        return f"an integer from {self.low} to {self.high}{steps}"

    def __repr__(self) -> str:
        return f"Int({self.low}, {self.high}" + (f", step={self.step})" if self.step > 1 else ")")


class Float(Parameter):
    """A number from ``low`` to ``high``, both included.

    Args:
        low: smallest value; above 0 where ``log`` is set.
        high: largest value, above ``low``.
        log: draw, step and encode in the logarithm.
        default: a number in the range; the middle (of the logarithms where ``log`` is set) if not given.
        when: condition under which the parameter counts.

    Raises:
        SpaceError: bounds that are not finite numbers or do not fit together, or a default outside them.
    """

    size = None

    def __init__(
        self,
        low: float,
        high: float,
        *,
        log: bool = False,
        default: float | None = None,
        when: When | None = None,
    ) -> None:
        for label, bound in (("low", low), ("high", high)):
            if not _is_number(_plain(bound)) or not math.isfinite(bound):
                raise SpaceError(f"Float: {label}={bound!r} must be a finite number")
        self.low, self.high, self.log = float(low), float(high), bool(log)
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise SpaceError(f"Float({low}, {high}): low must be below high, at a finite distance")
        if self.log and self.low <= 0:
            raise SpaceError(f"Float({low}, {high}, log=True): low must be above 0")
        self.when = when
        try:
            self.default = self._from_unit(0.5) if default is None else self.normalise(default)
        except ValueError:
            raise SpaceError(f"Float: default={default!r} must be {self.allowed()}") from None

    def _unit(self, value: float) -> float:
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def _from_unit(self, unit: float) -> float:
        if self.log:
            value = math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + unit * (self.high - self.low)
        return min(max(value, self.low), self.high) + 0.0

    def at(self, index: int) -> float:
        raise SpaceError("a Float has no numbered values; use draw() or a Choice of numbers")

    def normalise(self, value: Any) -> float:
        if type(value) is not float:
            value = _plain(value)
            if not _is_number(value):
                raise ValueError
        if not self.low <= value <= self.high:
            raise ValueError
        return float(value) + 0.0  # -0.0 equals 0.0 but is written differently in JSON

    def draw(self, rng: random.Random) -> float:
        return self._from_unit(rng.random())

    def redraw(self, value: Any, rng: random.Random) -> float:
        for _ in range(8):
            other = self.draw(rng)
            if other != value:
                return other
        return self.low if value != self.low else self.high

    def near(self, value: Any) -> list[Scalar]:
        unit = self._unit(value)
        moved = [self._from_unit(min(max(unit + move, 0.0), 1.0)) for move in _FLOAT_MOVES]
        return [other for other in dict.fromkeys(moved) if other != value]

    def columns(self, name: str) -> list[str]:
        return [name]

    def encode(self, value: Any) -> Sequence[float]:
        return (min(max(self._unit(value), 0.0), 1.0),)

    def describe(self) -> dict[str, Any]:
        return {"type": "float", "low": self.low, "high": self.high, "log": self.log}

    def allowed(self) -> str:
        return f"a number from {self.low!r} to {self.high!r}"

    def __repr__(self) -> str:
        return f"Float({self.low!r}, {self.high!r}" + (", log=True)" if self.log else ")")
