"""The contract of every controller: ask for an architecture, tell what came of it.

A controller is what it was told. Everything it decides follows from the seed and from the calls of ``tell`` in
their order, so that a controller rebuilt by telling it the recorded trials again goes on as if nothing had
happened (exactly so when one architecture at a time is under evaluation).
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from nas.errors import SpaceExhausted, UserMistake
from nas.pareto import Direction, check_directions

if TYPE_CHECKING:
    from spaces import Architecture, SearchSpace

__all__ = ["Controller", "Losses", "check_count", "check_probability"]

Losses: TypeAlias = tuple[float, ...]
"""Objectives of one evaluation, in the order of the directions, with those to maximise negated."""


class Controller(ABC):
    """Proposes architectures of ``space``, each at most once, and learns from their objectives.

    A new strategy implements :meth:`_propose` and, when it learns, :meth:`_learn`; duplicates, failures, pending
    architectures and exhaustion are handled here.

    Args:
        space: the search space; any :class:`spaces.SearchSpace`.
        directions: "maximize" or "minimize" for each objective.
        seed: one seed gives the same architectures in the same order (with one worker).

    Raises:
        UserMistake: a direction is neither "maximize" nor "minimize", or there is none.

    Example:
        >>> from nas.controllers import make_controller
        >>> from spaces import Choice, Int, SearchSpace
        >>> space = SearchSpace("cell", {"depth": Int(1, 6), "op": Choice(["conv", "attention"])})
        >>> controller = make_controller("evolution", space, ["minimize"], seed=1)
        >>> architecture = controller.ask()
        >>> controller.tell(architecture, [architecture["depth"] * 1.5])
    """

    name: ClassVar[str] = ""
    proposals_per_ask: ClassVar[int] = 20
    """How many proposals may turn out to be known before the last of them is mutated instead."""
    mutations_per_ask: ClassVar[int] = 20
    """How many mutations in a row may turn out to be known before the space is searched for an unseen point."""

    def __init__(self, space: SearchSpace, directions: Sequence[Direction], seed: int = 0) -> None:
        self.space = space
        self.directions = check_directions(directions)
        self.seed = seed
        self._seen: set[str] = set()
        self._told: set[str] = set()
        self._pending: dict[str, Architecture] = {}

    def ask(self) -> Architecture:
        """A canonical architecture that was never asked for, told or reserved before.

        Raises:
            SpaceExhausted: there is none left.
        """
        # String seeds are hashed by SHA-512 within `random`, hence equal in every process and on every machine.
        rng = random.Random(f"{self.seed}:{len(self._seen)}")
        for architecture in self._attempts(rng):
            key = self.space.key(architecture)
            if key not in self._seen:
                self._seen.add(key)
                self._pending[key] = self.space.canonical(architecture)
                return dict(self._pending[key])
        raise SpaceExhausted(
            f"all {len(self._seen)} architectures of space {self.space.name!r} have been proposed; "
            f"ask for fewer trials or widen the space"
        )

    def tell(self, architecture: Mapping[str, object], objectives: Sequence[float] | None) -> None:
        """Records the outcome of an architecture, whether it was asked for or not.

        Args:
            architecture: a point of the space.
            objectives: one number for each direction; None when the candidate failed or was pruned. An outcome
                with NaN or infinity counts as failed. Telling an architecture again adds an observation.

        Raises:
            ArchitectureError: it is not a point of the space.
            UserMistake: the number of objectives is not that of the directions.
        """
        canonical = self.space.canonical(architecture)
        if objectives is not None and len(objectives) != len(self.directions):
            raise UserMistake(
                f"objectives={list(objectives)!r} has {len(objectives)} number(s), "
                f"but the controller was made for {len(self.directions)} direction(s)"
            )
        key = self.space.key(canonical)
        self._learn(canonical, key, self._losses(objectives))
        self._seen.add(key)
        self._told.add(key)
        self._pending.pop(key, None)

    def reserve(self, architecture: Mapping[str, object]) -> None:
        """Marks an architecture as under evaluation although it was not asked for, so that it is not proposed.

        Raises:
            ArchitectureError: it is not a point of the space.
        """
        canonical = self.space.canonical(architecture)
        key = self.space.key(canonical)
        self._seen.add(key)
        if key not in self._told:
            self._pending[key] = canonical

    @abstractmethod
    def _propose(self, rng: random.Random) -> Architecture:
        """An architecture, preferably a new one; must follow from ``rng`` and what was told."""

    def _learn(  # noqa: B027  (a strategy need not learn)
        self, architecture: Architecture, key: str, losses: Losses | None
    ) -> None:
        """Takes in one outcome (None: failed or pruned), before its key joins those told."""

    def _attempts(self, rng: random.Random) -> Iterator[Architecture]:
        architecture = self._propose(rng)
        yield architecture
        for _ in range(self.proposals_per_ask - 1):
            architecture = self._propose(rng)
            yield architecture
        for _ in range(self.mutations_per_ask):
            architecture = self.space.mutate(architecture, rng)
            yield architecture
        unseen = self.space.sample_unseen(self._seen, rng)
        if unseen is not None:
            yield unseen

    def _losses(self, objectives: Sequence[float] | None) -> Losses | None:
        if objectives is None or not all(math.isfinite(value) for value in objectives):
            return None
        signs = (-1.0 if direction == "maximize" else 1.0 for direction in self.directions)
        return tuple(sign * float(value) for sign, value in zip(signs, objectives, strict=True))


def check_count(controller: str, option: str, value: object, low: int) -> None:
    """Holds an option of a controller to whole numbers from ``low`` on.

    Raises:
        UserMistake: ``value`` is anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserMistake(
            f"{option}={value!r} of controller {controller!r} must be a whole number of at least {low}"
        )


def check_probability(controller: str, option: str, value: object, *, positive: bool = False) -> None:
    """Holds an option of a controller to numbers from 0 to 1, without 0 where ``positive``.

    Raises:
        UserMistake: ``value`` is anything else.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= float(value) <= 1 or (positive and value == 0):  # type: ignore[arg-type]
        low = "above 0 and at most 1" if positive else "from 0 to 1"
        raise UserMistake(f"{option}={value!r} of controller {controller!r} must be a number {low}")
