"""Local search: neighbours of the best architectures, and a fresh start where there is nothing left to climb.

With one objective this is hill climbing by first improvement (White, Nolen, Savani, "Exploring the Loss Landscape
in Neural Architecture Search", UAI 2021, arXiv:2005.02960, who climb by best improvement); with several it is
Pareto local search (Paquete, Chiarandini, Stuetzle 2004) over the front of the current climb.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from nas.controllers import register_controller
from nas.controllers.base import Controller, Losses, check_count
from nas.pareto import Direction

if TYPE_CHECKING:
    from spaces import Architecture, SearchSpace

__all__ = ["LocalSearch"]


class _Member:
    """One architecture on the front of the climb; neighbours are found, and their keys computed, when needed."""

    def __init__(self, architecture: Architecture, key: str, losses: Losses) -> None:
        self.architecture = architecture
        self.key = key
        self.losses = losses
        self.expanded = False
        self._neighbours: list[Architecture] | None = None
        self._keys: dict[int, str] = {}

    def neighbours(self, space: SearchSpace) -> list[Architecture]:
        if self._neighbours is None:
            self._neighbours = space.neighbors(self.architecture)
        return self._neighbours

    def neighbour_key(self, space: SearchSpace, index: int) -> str:
        if index not in self._keys:
            self._keys[index] = space.key(self.neighbours(space)[index])
        return self._keys[index]


@register_controller("local_search")
class LocalSearch(Controller):
    """Evaluates unseen neighbours of the front; when all are told, a random architecture begins a new climb.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
        starts: how many successful random architectures precede the first climb, at least 1.

    Raises:
        UserMistake: an option is out of its range.
    """

    def __init__(
        self, space: SearchSpace, directions: Sequence[Direction], seed: int = 0, *, starts: int = 10
    ) -> None:
        super().__init__(space, directions, seed)
        check_count(self.name, "starts", starts, 1)
        self._starts_left = starts
        self._front: list[_Member] = []

    def _learn(self, architecture: Architecture, key: str, losses: Losses | None) -> None:
        if losses is None:
            return
        if self._starts_left:
            self._starts_left -= 1
        elif all(self._is_expanded(member, key) for member in self._front):
            self._front = []
        if any(_dominates(member.losses, losses) for member in self._front):
            return
        kept = [
            member for member in self._front if member.key != key and not _dominates(losses, member.losses)
        ]
        self._front = [*kept, _Member(architecture, key, losses)]

    def _propose(self, rng: Random) -> Architecture:
        if not self._starts_left:
            # Every member is drawn, expanded or not: which ones are known to be expanded depends on what was
            # asked in this process, and a controller rebuilt from the trials must draw the same.
            for member in rng.sample(self._front, len(self._front)):
                unseen = self._unseen(member, rng)
                if unseen is not None:
                    return unseen
        return self.space.sample(rng)

    def _unseen(self, member: _Member, rng: Random) -> Architecture | None:
        neighbours = member.neighbours(self.space)
        for index in rng.sample(range(len(neighbours)), len(neighbours)):
            if member.neighbour_key(self.space, index) not in self._seen:
                return neighbours[index]
        return None

    def _is_expanded(self, member: _Member, arriving: str) -> bool:
        """Whether all neighbours were told before ``arriving``; once true, it stays so."""
        if not member.expanded:
            keys = (
                member.neighbour_key(self.space, index) for index in range(len(member.neighbours(self.space)))
            )
            member.expanded = all(key in self._told and key != arriving for key in keys)
        return member.expanded


def _dominates(first: Losses, second: Losses) -> bool:
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))
