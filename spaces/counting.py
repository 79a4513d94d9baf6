"""Exact number of architectures of a search space, without enumerating them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from spaces.errors import SpaceError
from spaces.parameters import listed
from spaces.rules import PartialView, Rules, Undecided

__all__ = ["cardinality"]

_INACTIVE = -1  # beside the numbers of the values, which start at 0

_State = tuple[int, ...]


def cardinality(rules: Rules, *, limit: int = 1_000_000) -> int | float:
    """Number of distinct canonical architectures; ``math.inf`` where the space has a Float.

    Dynamic programming over the parameters in order of declaration. A state holds the values of just those
    parameters that a later condition or constraint reads. What they read is learnt: it starts with what
    probes showed, and a predicate that asks for a parameter that the states do not hold adds it and starts
    the count anew. A count that comes to its end is exact, because no predicate missed anything.

    Raises:
        SpaceError: more than ``limit`` states are needed.
    """
    if any(parameter.size is None for parameter in rules.parameters.values()):
        return math.inf
    reads = {reader: set(names) for reader, names in rules.probed_reads.items()}
    while True:
        try:
            return _Counter(rules, reads, limit).count()
        except Undecided as missed:
            reads[missed.reader].add(missed.name)


class _Counter:
    """One attempt, believing that each predicate reads nothing but ``reads[reader]``."""

    def __init__(self, rules: Rules, reads: dict[int, set[str]], limit: int) -> None:
        self.rules = rules
        self.limit = limit
        self.due: dict[int, list[int]] = {}
        self.last_read: dict[str, int] = {}
        for reader, names in reads.items():
            at = reader
            if reader >= len(rules.names):
                at = max((rules.positions[name] for name in names), default=0)
                self.due.setdefault(at, []).append(reader)
            for name in names:
                self.last_read[name] = max(self.last_read.get(name, -1), at)

    def count(self) -> int:
        kept: tuple[str, ...] = ()
        ways: dict[_State, int] = {(): 1}
        visited = 0
        for position, (name, parameter) in enumerate(self.rules.parameters.items()):
            size = parameter.size or 0
            read = self.last_read.get(name, -1) >= position
            before = kept
            known = (*kept, name) if read else kept
            kept = tuple(other for other in known if self.last_read[other] > position)
            places = [known.index(other) for other in kept]
            following: dict[_State, int] = {}
            if read and parameter.when is None and visited + len(ways) * size > self.limit:
                raise self._too_many(known)  # known beforehand: the last round would take most of the time
            for state, count in ways.items():
                active = parameter.when is None or self._holds(position, before, state)
                numbers, weight = self._options(size, active, read)
                visited += size if active and read else 1
                if visited > self.limit:
                    raise self._too_many(known)
                for number in numbers:
                    decided = (*state, number) if read else state
                    if all(self._holds(reader, known, decided) for reader in self.due.get(position, ())):
                        left = tuple([decided[place] for place in places])
                        following[left] = following.get(left, 0) + count * weight
            ways = following
        return sum(ways.values())

    @staticmethod
    def _options(size: int, active: bool, read: bool) -> tuple[Sequence[int], int]:
        """The numbers that a state goes on with, and how many values each of them stands for."""
        if not active:
            return (_INACTIVE,), 1
        return (range(size), 1) if read else ((0,), size)

    def _holds(self, reader: int, known: tuple[str, ...], state: _State) -> bool:
        values: dict[str, Any] = {
            name: self.rules.parameters[name].at(number)
            for name, number in zip(known, state, strict=True)
            if number != _INACTIVE
        }
        return self.rules.holds(reader, PartialView(self.rules, reader, values, known.__contains__))

    def _too_many(self, known: Sequence[str]) -> SpaceError:
        return SpaceError(
            f"search space {self.rules.space!r}: counting needs more than {self.limit:,} states, because "
            f"conditions and constraints read too many parameters together ({listed(known, 6)}); "
            "split them into ones that read fewer"
        )
