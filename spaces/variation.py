"""New architectures from chance, from others, and from what has been seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from spaces.errors import SpaceError
from spaces.parameters import Architecture, Parameter, Scalar, draw_index
from spaces.rules import Rules, View

__all__ = ["crossover", "enumerate_all", "mutate", "neighbors", "sample", "unseen"]

_TRIES = 100  # blind draws before the systematic walk
_SAMPLE_DEAD_ENDS = 10_000
_UNSEEN_DEAD_ENDS = 200_000
_RESTART = 64  # dead ends after which the systematic walk tries elsewhere
_CONTINUOUS_REPEATS = 1_000  # draws of a Float may repeat only if ``seen`` claims to hold everything


def sample(rules: Rules, rng: random.Random) -> Architecture:
    """Each active parameter drawn independently; drawn anew until the constraints are met."""
    for _ in range(_TRIES):
        values = rules.assemble(lambda _, parameter: parameter.draw(rng))
        if rules.violated(values) is None:
            return dict(values)
    found = _Walk(rules, rng, _SAMPLE_DEAD_ENDS).find(lambda _: True)
    if found is None:
        raise _hopeless(rules, "no architecture meets all constraints")
    return found


def mutate(rules: Rules, parent: Architecture, rng: random.Random, rate: float | None) -> Architecture | None:
    """Redraws one active parameter, or each with probability ``rate`` but at least one; None if none can."""
    movable = [name for name in parent if rules.parameters[name].size != 1]
    if not movable:
        return None
    for _ in range(_TRIES if rules.constraints else 1):
        chosen = {name for name in movable if rng.random() < rate} if rate is not None else set()
        chosen = chosen or {movable[draw_index(len(movable), rng)]}

        def pick(name: str, parameter: Parameter, chosen: set[str] = chosen) -> Scalar:
            if name in chosen:
                return parameter.redraw(parent[name], rng)
            return parent[name] if name in parent else parameter.draw(rng)

        values = rules.assemble(pick)
        if rules.violated(values) is None:
            return dict(values)
    near = neighbors(rules, parent)
    return near[draw_index(len(near), rng)] if near else None


def crossover(rules: Rules, first: Architecture, second: Architecture, rng: random.Random) -> Architecture:
    """Each active parameter from either parent, at random; drawn where neither has it."""

    def pick(name: str, parameter: Parameter) -> Scalar:
        if name in first and name in second:
            return (first if rng.random() < 0.5 else second)[name]
        if name in first or name in second:
            return first[name] if name in first else second[name]
        return parameter.draw(rng)

    for _ in range(_TRIES):
        values = rules.assemble(pick)
        if rules.violated(values) is None:
            return dict(values)
    return dict(first if rng.random() < 0.5 else second)


def neighbors(rules: Rules, center: Architecture) -> list[Architecture]:
    """All valid architectures that differ in one decision, in order of declaration."""
    found = []
    for name, own in center.items():
        for other in rules.parameters[name].near(own):
            values = _completed(rules, {**center, name: other})
            if rules.violated(values) is None:
                found.append(dict(values))
    return found


def _completed(rules: Rules, given: Architecture) -> View:
    return rules.assemble(lambda name, parameter: given.get(name, parameter.default))


def unseen(
    rules: Rules, key: Callable[[Architecture], str], seen: Container[str], rng: random.Random
) -> Architecture | None:
    """An architecture whose key is not in ``seen``, or None if there is none."""
    return _Walk(rules, rng, _UNSEEN_DEAD_ENDS).find(lambda values: key(values) not in seen)


def enumerate_all(rules: Rules) -> Iterator[Architecture]:
    """Every architecture once, the last declared parameter changing fastest."""
    values = View(rules)
    path: list[tuple[int, int]] = []
    start, following = 0, 0

    def choose(position: int) -> Scalar:
        nonlocal following
        path.append((position, following))
        index, following = following, 0
        return rules.parameters[rules.names[position]].at(index)

    while True:
        if rules.extend(values, start, choose) is None:
            yield dict(values)
        while path:
            start, index = path.pop()
            del values[rules.names[start]]
            if index + 1 < (rules.parameters[rules.names[start]].size or 0):
                following = index + 1
                break
        else:
            return


class _Node:
    """A decision of the walk: which of its values lead to nothing new."""

    __slots__ = ("children", "exhausted")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.exhausted: set[int] = set()


class _Step(NamedTuple):
    """A decision taken: value number ``taken`` of the ``size`` values of the parameter at ``position``.

    ``size`` 0 is a Float, which is drawn anew each time and never exhausted.
    """

    position: int
    node: _Node
    taken: int
    size: int
    child: _Node


class _Walk:
    """A random walk through the tree of decisions, never twice to the same leaf of a discrete space.

    It chooses uniformly among the values that are not exhausted. A leaf that was refused, a prefix that breaks a
    constraint, and a decision without any value left are exhausted for good, so that at most one leaf more is
    visited than are refused. After a refused leaf it starts again at the root, lest it stay among the leaves next
    to it; at a broken constraint it goes back one decision only, and now and then to the root.
    """

    def __init__(self, rules: Rules, rng: random.Random, dead_ends: int) -> None:
        self.rules = rules
        self.rng = rng
        self.dead_ends = dead_ends
        self.root = _Node()
        self.path: list[_Step] = []
        self.values = View(rules)
        self.done = False

    def find(self, accept: Callable[[Architecture], bool]) -> Architecture | None:
        """The first leaf that ``accept`` takes, or None when there is no other.

        Raises:
            SpaceError: too many prefixes broke a constraint.
        """
        start = dead_ends = repeats = 0
        while not self.done and repeats < _CONTINUOUS_REPEATS:
            restart = True
            if self.rules.extend(self.values, start, self._choose) is None:
                found = dict(self.values)
                if accept(found):
                    return found
                repeats += any(step.size == 0 for step in self.path)
            else:
                dead_ends += 1
                restart = dead_ends % _RESTART == 0
                if dead_ends > self.dead_ends:
                    raise _hopeless(self.rules, f"no architecture found in {dead_ends:,} attempts")
            start = self._back(restart)
        return None

    def _choose(self, position: int) -> Scalar:
        parameter = self.rules.parameters[self.rules.names[position]]
        node = self.path[-1].child if self.path else self.root
        if parameter.size is None:
            self.path.append(_Step(position, node, 0, 0, _Node()))
            return parameter.draw(self.rng)
        index = self._open_index(node, parameter.size)
        child = node.children.setdefault(index, _Node())
        self.path.append(_Step(position, node, index, parameter.size, child))
        return parameter.at(index)

    def _open_index(self, node: _Node, size: int) -> int:
        if 2 * len(node.exhausted) < size:
            while True:
                index = draw_index(size, self.rng)
                if index not in node.exhausted:
                    return index
        left = [index for index in range(size) if index not in node.exhausted]
        return left[draw_index(len(left), self.rng)]

    def _back(self, restart: bool) -> int:
        """Marks what is exhausted now, and returns the position at which to go on."""
        while self.path:
            step = self.path.pop()
            del self.values[self.rules.names[step.position]]
            if step.size == 0:
                restart = True
                break
            step.node.exhausted.add(step.taken)
            step.node.children.pop(step.taken, None)
            if len(step.node.exhausted) < step.size:
                break
        else:
            self.done = restart = True
        if not restart:
            return step.position
        self.path.clear()
        self.values.clear()
        return 0


def _hopeless(rules: Rules, finding: str) -> SpaceError:
    probes = list(rules.probes())
    met = [
        sum(rules.meets(reader, values) for values in probes)
        for reader in rules.readers
        if reader >= len(rules.names)
    ]
    hardest = min(range(len(met)), key=met.__getitem__)
    constraint = rules.constraints[hardest]
    return SpaceError(
        f"search space {rules.space!r}: {finding}; constraint {constraint.name!r} ({constraint.message}) was "
        f"met by {met[hardest]} of {len(probes)} probes; relax it, or turn it into conditions of parameters"
    )
