"""Architectures as the flat numbers that NNI's tuners know: one code for each parameter, conditional or not.

NNI can nest parameters in the values of a choice, but a condition of a :class:`spaces.SearchSpace` is any function of
the parameters before it. So every parameter gets a code, and what is inactive is dropped when codes are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from nas.errors import ArchitectureError
from spaces.parameters import Choice, Float, Int, Parameter

if TYPE_CHECKING:
    from spaces import Architecture, Scalar, SearchSpace

__all__ = ["Code", "Codes", "SpaceCodes"]

Codes = dict[str, float]
"""Parameter name -> number: an index, or a value (the logarithm where the parameter is logarithmic)."""

_HALF = 0.5 - 1e-9


@dataclass(frozen=True)
class Code:
    """Numbers that stand for the values of one parameter with more than one value.

    Attributes:
        kind: "categorical" (indices without order), "ordered" (indices in order), "interval" (any number).
        low, high: smallest and largest number; the index of the first and the last value.
    """

    parameter: Parameter
    kind: Literal["categorical", "ordered", "interval"]
    low: float
    high: float
    values: tuple[Scalar, ...] = ()

    @classmethod
    def of(cls, parameter: Parameter) -> Code:
        """The code of a parameter; choices among numbers are numbered by rank."""
        if isinstance(parameter, Float):
            ends = (parameter.low, parameter.high)
            low, high = (math.log(end) for end in ends) if parameter.log else ends
            return cls(parameter, "interval", low, high)
        assert parameter.size is not None  # only a Float is a continuum
        if isinstance(parameter, Choice):
            values = parameter.values
            if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
                values = tuple(sorted(values, key=lambda value: float(value or 0)))
            return cls(parameter, "categorical", 0, parameter.size - 1, values)
        return cls(parameter, "ordered", 0, parameter.size - 1)

    @property
    def size(self) -> int:
        """Number of indices."""
        return int(self.high) + 1

    @property
    def stretched(self) -> tuple[float, float]:
        """Ends of an interval that, rounded, gives every index the same share."""
        return self.low - _HALF, self.high + _HALF

    def encode(self, value: Any) -> float:
        """The number of a canonical value."""
        parameter = self.parameter
        if isinstance(parameter, Float):
            number = math.log(value) if parameter.log else float(value)
            return min(max(number, self.low), self.high)
        if isinstance(parameter, Int):
            return float((value - parameter.low) // parameter.step)
        # True, 1 and 1.0 are three values of a choice, but equal to Python
        return float([(type(other), other) for other in self.values].index((type(value), value)))

    def decode(self, number: float) -> Scalar:
        """The value of a number; an index may lie up to one half aside."""
        parameter = self.parameter
        if isinstance(parameter, Float):
            value = math.exp(number) if parameter.log else float(number)
            return min(max(value, parameter.low), parameter.high)
        index = min(max(round(float(number)), 0), self.size - 1)
        return self.values[index] if self.values else parameter.at(index)


class SpaceCodes:
    """Codes of all parameters of a space that have more than one value."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self.each = {
            name: Code.of(parameter) for name, parameter in space.parameters.items() if parameter.size != 1
        }

    def encode(self, architecture: Mapping[str, Any]) -> Codes:
        """Codes of the active parameters of a canonical architecture."""
        return {
            name: self.each[name].encode(value) for name, value in architecture.items() if name in self.each
        }

    def decode(self, codes: Mapping[str, float]) -> Architecture | None:
        """The canonical architecture of codes for all parameters, or None where they break a constraint."""
        values = {
            name: self.each[name].decode(codes[name]) if name in self.each else parameter.at(0)
            for name, parameter in self._space.parameters.items()
        }
        try:
            return self._space.canonical(values)
        except ArchitectureError:
            return None

    def with_defaults(self, codes: Mapping[str, float]) -> Codes:
        """Codes for all parameters, the inactive ones at their defaults: one point for one architecture."""
        return {
            name: codes[name] if name in codes else code.encode(code.parameter.default)
            for name, code in self.each.items()
        }

    def with_draws(self, codes: Mapping[str, float], rng: Random) -> Codes:
        """Codes for all parameters, the inactive ones drawn at random: what would count once they are active."""
        return {
            name: codes[name] if name in codes else code.encode(code.parameter.draw(rng))
            for name, code in self.each.items()
        }
