"""SearchSpace: what can be built, as a set of decisions, and every operation on its architectures."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spaces import counting, variation
from spaces.errors import ArchitectureError, SpaceError, nearest
from spaces.parameters import Architecture, Constraint, Parameter, Scalar, listed
from spaces.rules import Rules, View
from spaces.signature import Signature

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SearchSpace"]


class SearchSpace:
    """A set of architectures: flat dicts of parameter -> value.

    >>> from spaces import Choice, Int, SearchSpace
    >>> op = Choice(["conv", "pool"], when=lambda a: a["depth"] > 1)
    >>> space = SearchSpace("cell", {"depth": Int(1, 2), "op": op})
    >>> list(space.enumerate())
    [{'depth': 1}, {'depth': 2, 'op': 'conv'}, {'depth': 2, 'op': 'pool'}]

    A condition (``when``) may read the parameters declared before its own; looking up an inactive one is an
    error, ``.get`` gives its default and ``in`` tells. Two architectures that differ in inactive parameters
    only are the same one: ``canonical`` drops those, and ``key`` is equal. All operations give canonical
    architectures, draw from the given generator alone, and give the same result in every process.

    Args:
        name: what the space is called in messages.
        parameters: name -> Choice, Int or Float, in an order in which conditions look backwards only.
        build: makes the model from a canonical architecture and what a task asks of it.
        task: name of the task that the space is for, or None for any.
        published: points of the space that a paper names.
        baseline: the one of ``published`` that is the plain hand-made architecture.
        constraints: laws that every architecture meets.
        description: one or two sentences for the user.

    Attributes:
        parameters, published, baseline, task, description: as given; ``published`` in canonical form.

    Raises:
        SpaceError: no parameters, a parameter of another type, two constraints of one name, a condition or
            constraint that reads what it may not, a published architecture outside the space, an unknown
            baseline.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, Parameter],
        *,
        build: Callable[[Architecture, Signature], nn.Module] | None = None,
        task: str | None = None,
        published: Mapping[str, Architecture] | None = None,
        baseline: str | None = None,
        constraints: Sequence[Constraint] = (),
        description: str = "",
    ) -> None:
        _check_declaration(name, parameters, constraints)
        self.name = name
        self.task = task
        self.baseline = baseline
        self.description = description
        self._build = build
        self._rules = Rules(name, parameters, constraints)
        self.parameters: dict[str, Parameter] = self._rules.parameters
        self.constraints: tuple[Constraint, ...] = self._rules.constraints
        self.published: dict[str, Architecture] = {}
        for variant, architecture in (published or {}).items():
            try:
                self.published[variant] = self.canonical(architecture)
            except ArchitectureError as error:
                raise SpaceError(
                    f"published architecture {variant!r} is not in its space: {error}"
                ) from error
        if baseline is not None and baseline not in self.published:
            raise SpaceError(
                f"search space {name!r}: baseline={baseline!r} must be one of the published architectures"
                f"{nearest(baseline, self.published)}: {listed(self.published) or 'there is none'}"
            )

    def __repr__(self) -> str:
        return f"SearchSpace({self.name!r}, {len(self.parameters)} parameters)"

    def active(self, arch: Mapping[str, Any]) -> list[str]:
        """Names of the parameters that count in ``arch``, in order of declaration.

        Raises:
            ArchitectureError: as ``validate``, save that constraints need not be met.
        """
        return list(self._decide(arch))

    def sample(self, rng: random.Random) -> Architecture:
        """A random architecture: each active parameter is drawn uniformly and independently of the others.

        Where constraints reject 100 draws in a row, a systematic random walk goes on; it reaches every
        architecture, but not with the same probabilities.

        Raises:
            SpaceError: nothing was found that meets the constraints; names the hardest of them.
        """
        return variation.sample(self._rules, rng)

    def mutate(
        self, arch: Mapping[str, Any], rng: random.Random, *, rate: float | None = None
    ) -> Architecture:
        """A copy of ``arch`` with a part of it redrawn; its key differs, unless the space has no other point.

        Args:
            rate: None redraws exactly one active parameter to another value; a probability in (0, 1] redraws
                each active parameter with that probability, and at least one. Parameters that become active
                are drawn. Where constraints forbid every such change, another architecture is drawn.
        """
        if rate is not None and not 0 < rate <= 1:
            raise SpaceError(f"mutate: rate={rate!r} must be a probability above 0 and at most 1, or None")
        parent = self.canonical(arch)
        child = variation.mutate(self._rules, parent, rng, rate)
        if child is None:
            child = self.sample_unseen({self.key(parent)}, rng)
        return parent if child is None else child

    def crossover(self, a: Mapping[str, Any], b: Mapping[str, Any], rng: random.Random) -> Architecture:
        """Each parameter from ``a`` or ``b`` at random; one that is active in the child alone is drawn.

        Where constraints leave no mixture, the child is a copy of one of them.
        """
        return variation.crossover(self._rules, self.canonical(a), self.canonical(b), rng)

    def neighbors(self, arch: Mapping[str, Any]) -> list[Architecture]:
        """All architectures that differ from ``arch`` in one decision.

        A Choice takes every other value, an Int moves by one step, a Float by 10 and 20 % of its range.
        Parameters that become active take their defaults.
        """
        return variation.neighbors(self._rules, self.canonical(arch))

    def validate(self, arch: Mapping[str, Any]) -> None:
        """Checks that ``arch`` is a point of the space; values of inactive parameters are let pass.

        Raises:
            ArchitectureError: a missing or unknown parameter, a value not allowed, or a broken constraint.
        """
        self.canonical(arch)

    def canonical(self, arch: Mapping[str, Any]) -> Architecture:
        """The one form of ``arch``: active parameters in order of declaration, values as declared (1.0 -> 1).

        Raises:
            ArchitectureError: as ``validate``.
        """
        values = self._decide(arch)
        constraint = self._rules.violated(values)
        if constraint is not None:
            reader = len(self.parameters) + self.constraints.index(constraint)
            read = ", ".join(
                f"{name}={values[name]!r}" for name in self._rules.read_by(reader, values) if name in values
            )
            raise ArchitectureError(
                f"search space {self.name!r}: constraint {constraint.name!r} is not met ({read}): "
                f"{constraint.message}"
            )
        return dict(values)

    def key(self, arch: Mapping[str, Any]) -> str:
        """16 hexadecimal digits, equal for two architectures exactly if their canonical forms are."""
        return _key(self.canonical(arch))

    @cached_property
    def encoding_names(self) -> list[str]:
        """Names of the numbers that ``encode`` gives."""
        return [column for _, columns in self._columns for column in columns]

    @cached_property
    def _columns(self) -> list[tuple[str, list[str]]]:
        return [
            (name, parameter.columns(name) + ([f"{name}.active"] if parameter.when is not None else []))
            for name, parameter in self.parameters.items()
        ]

    def encode(self, arch: Mapping[str, Any]) -> npt.NDArray[np.float32]:
        """``arch`` as a vector of ``len(encoding_names)`` numbers in [0, 1].

        Int and Float are scaled by their range (in the logarithm if so declared), a Choice among numbers by
        rank, any other Choice is one-hot. A conditional parameter is followed by ``<name>.active``; where it
        is inactive, all its numbers are 0.
        """
        decided = self.canonical(arch)
        numbers: list[float] = []
        for name, columns in self._columns:
            if name not in decided:
                numbers.extend([0.0] * len(columns))
                continue
            parameter = self.parameters[name]
            numbers.extend(parameter.encode(decided[name]))
            if parameter.when is not None:
                numbers.append(1.0)
        return np.array(numbers, dtype=np.float32)

    def cardinality(self) -> int | float:
        """Exact number of architectures (canonical ones), or ``math.inf`` where there is a Float.

        Raises:
            SpaceError: conditions and constraints tie so many parameters together that a million states of a
                dynamic programme do not suffice.
        """
        return self._cardinality

    @cached_property
    def _cardinality(self) -> int | float:
        return counting.cardinality(self._rules)

    def enumerate(self) -> Iterator[Architecture]:
        """Every architecture once, the last declared parameter changing fastest.

        Raises:
            SpaceError: the space has a Float.
        """
        for name, parameter in self.parameters.items():
            if parameter.size is None:
                raise SpaceError(
                    f"search space {self.name!r} cannot be enumerated: {name!r} is a Float; use a Choice"
                )
        return variation.enumerate_all(self._rules)

    def sample_unseen(self, seen: Container[str], rng: random.Random) -> Architecture | None:
        """A random architecture whose key is not in ``seen``, or None if there is none.

        In a discrete space at most ``len(seen) + 1`` architectures are looked at, each once. In a space with
        a Float None means that a thousand of them were all in ``seen``.

        Raises:
            SpaceError: the constraints leave so little that nothing was found in 200,000 attempts.
        """
        return variation.unseen(self._rules, _key, seen, rng)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the set of architectures does.

        Covers names, order, types and values of the parameters, the names of the constraints, and what
        conditions and constraints say of several hundred fixed probes; a change that no probe meets goes
        unnoticed.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        declared = [[name, parameter.describe()] for name, parameter in self.parameters.items()]
        laws = [constraint.name for constraint in self.constraints]
        answers = []
        if self._rules.readers:
            first = len(self.parameters)
            answers = [
                [
                    list(values),
                    [self._rules.meets(reader, values) for reader in range(first, first + len(laws))],
                ]
                for values in self._rules.probes()
            ]
        return _digest(json.dumps([declared, laws, answers]))

    def to_json(self, arch: Mapping[str, Any]) -> str:
        """The canonical form of ``arch`` as one line of JSON."""
        return json.dumps(self.canonical(arch), allow_nan=False)

    def from_json(self, text: str) -> Architecture:
        """The canonical architecture written in ``text``.

        Raises:
            ArchitectureError: not a JSON object, or not a point of the space.
        """
        try:
            arch = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArchitectureError(
                f"search space {self.name!r}: an architecture must be JSON: {error}"
            ) from error
        return self.canonical(arch)

    def build(self, arch: Mapping[str, Any], signature: Signature) -> nn.Module:
        """The model of ``arch`` for the shapes of a task.

        Raises:
            ArchitectureError: as ``validate``.
            SpaceError: the space was made without a builder.
        """
        decided = self.canonical(arch)
        if self._build is None:
            raise SpaceError(
                f"search space {self.name!r} has no builder; give SearchSpace(..., build=function)"
            )
        return self._build(decided, signature)

    def _decide(self, arch: Mapping[str, Any]) -> View:
        if not isinstance(arch, Mapping):
            raise ArchitectureError(
                f"search space {self.name!r}: an architecture must be a dict of parameter -> value, "
                f"not {type(arch).__name__}"
            )
        values = self._rules.assemble(partial(self._given, arch))
        if len(values) != len(arch):
            self._check_names(arch)
        return values

    def _given(self, arch: Mapping[str, Any], name: str, parameter: Parameter) -> Scalar:
        try:
            value = arch[name]
        except KeyError:
            self._check_names(arch)
            raise ArchitectureError(
                f"search space {self.name!r}: parameter {name!r} is missing; it must be {parameter.allowed()}"
            ) from None
        try:
            return parameter.normalise(value)
        except ValueError:
            raise ArchitectureError(
                f"search space {self.name!r}: parameter {name!r} is {value!r}; "
                f"it must be {parameter.allowed()}{parameter.suggestion(value)}"
            ) from None

    def _check_names(self, arch: Mapping[str, Any]) -> None:
        for name in arch:
            if name not in self.parameters:
                raise ArchitectureError(
                    f"search space {self.name!r} has no parameter {name!r}"
                    f"{nearest(str(name), self.parameters)}; it has {listed(self.parameters)}"
                )


def _check_declaration(
    name: str, parameters: Mapping[str, Parameter], constraints: Sequence[Constraint]
) -> None:
    if not isinstance(name, str) or not name:
        raise SpaceError(f"SearchSpace: name={name!r} must be a string with at least one character")
    if not isinstance(parameters, Mapping) or not parameters:
        raise SpaceError(
            f"search space {name!r}: parameters must be a non-empty dict of name -> Choice, Int or Float"
        )
    for key, parameter in parameters.items():
        if not isinstance(key, str) or not key:
            raise SpaceError(
                f"search space {name!r}: a parameter is called {key!r}; its name must be a string"
            )
        if not isinstance(parameter, Parameter):
            raise SpaceError(
                f"search space {name!r}: parameter {key!r} is {parameter!r}; it must be a Choice, Int or Float"
            )
    laws = [constraint.name for constraint in constraints]
    for law in laws:
        if laws.count(law) > 1:
            raise SpaceError(
                f"search space {name!r}: two constraints are called {law!r}; give each its own name"
            )


def _key(canonical: Architecture) -> str:
    return _digest(json.dumps(canonical, sort_keys=True, separators=(",", ":"), allow_nan=False))


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()
