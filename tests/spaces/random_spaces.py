"""Random small conditional spaces for hypothesis, and their architectures counted the slow way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from hypothesis import strategies as st

from spaces import Choice, Constraint, Int, Parameter, SearchSpace

__all__ = ["RandomSpace", "random_spaces"]

_SCALARS = [1, True, 1.0, 0, False, None, "a", "b", -2.5]

Predicate = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class RandomSpace:
    """A space, and what an implementation that knows nothing of ``SearchSpace`` says is in it (as JSON)."""

    space: SearchSpace
    expected: frozenset[str]


@st.composite
def random_spaces(draw: st.DrawFn, *, constrained: bool = True) -> RandomSpace:
    count = draw(st.integers(1, 5))
    names = [f"p{i}" for i in range(count)]
    parameters: dict[str, Parameter] = {}
    values: dict[str, list[Any]] = {}
    conditions: dict[str, Predicate | None] = {}
    for position, name in enumerate(names):
        when = draw(st.none() | _predicates(names[:position])) if position else None
        parameters[name], values[name] = draw(_parameters(when))
        conditions[name] = when
    laws = draw(st.lists(_predicates(names), max_size=2)) if constrained else []
    constraints = [Constraint(f"law{i}", law, "a random law") for i, law in enumerate(laws)]
    expected = _brute_force(values, conditions, laws)
    return RandomSpace(SearchSpace("random", parameters, constraints=constraints), frozenset(expected))


@st.composite
def _parameters(draw: st.DrawFn, when: Predicate | None) -> tuple[Parameter, list[Any]]:
    if draw(st.booleans()):
        indexes = draw(st.lists(st.sampled_from(range(len(_SCALARS))), min_size=1, max_size=3, unique=True))
        values = [_SCALARS[index] for index in indexes]
        return Choice(values, default=draw(st.sampled_from(values)), when=when), values
    low, step, size = draw(st.integers(-2, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    ints = [low + step * i for i in range(size)]
    return Int(ints[0], ints[-1], step=step, default=draw(st.sampled_from(ints)), when=when), ints


@st.composite
def _predicates(draw: st.DrawFn, names: list[str]) -> Predicate:
    """Reads one parameter, several, several only where the first says so, or all of them."""
    one, two, three = (draw(st.sampled_from(names)) for _ in range(3))
    code = draw(st.integers(0, 3))
    simple: list[Predicate] = [
        lambda a: _code(a.get(one)) != code,
        lambda a: one in a and _code(a[one]) > 0,
        lambda a: (_code(a.get(one)) + 2 * _code(a.get(two))) % 4 != code,
        lambda a: a[two] != 1 if one in a and two in a else _code(a.get(three)) != code,
        lambda a: not (one in a and two in a) or (_code(a[one]) == code or three in a),
        lambda a: len(a) % 3 != code,
        lambda a: sum(_code(value) for value in a.values()) % 4 != code,
    ]
    return draw(st.sampled_from(simple))


def _code(value: Any) -> int:
    return sum(json.dumps(value).encode()) % 4


def _brute_force(
    values: dict[str, list[Any]], conditions: dict[str, Predicate | None], laws: list[Predicate]
) -> set[str]:
    found = set()
    for combination in product(*values.values()):
        architecture: dict[str, Any] = {}
        for (name, condition), value in zip(conditions.items(), combination, strict=True):
            if condition is None or condition(architecture):
                architecture[name] = value
        if all(law(architecture) for law in laws):
            found.add(json.dumps(architecture))
    return found
