"""Regularised evolution: parents win a tournament, children replace the oldest.

Real, Aggarwal, Huang, Le, "Regularized Evolution for Image Classifier Architecture Search", AAAI 2019
(arXiv:1802.01548). Deviations: crossover and several objectives, for which a tournament is won by the lower
non-dominated rank and then the larger crowding distance within the population, as in NSGA-II.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from nas.controllers import register_controller
from nas.controllers.base import Controller, Losses, check_count, check_probability
from nas.errors import UserMistake
from nas.pareto import Direction, crowding_distance, non_dominated_sort

if TYPE_CHECKING:
    from spaces import Architecture, SearchSpace

__all__ = ["RegularizedEvolution"]


@register_controller("evolution")
class RegularizedEvolution(Controller):
    """Ageing evolution over the latest ``population`` successful architectures; the first are random.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
        population: how many architectures live, at least 2. 50 was better than 100 up to 500 trials.
        initial: how many of the first are random, from 1 to ``population``. With 20, a budget of a few
            dozen trials sees evolution at all (recipes/benchmarks/controllers_quality.py compares with 50).
        tournament: how many are drawn for one tournament, from 1 to ``population``, but at most half of those
            that live.
        crossover_probability: share of children with two parents, from 0 to 1.
        mutation_rate: probability that a parameter is redrawn, above 0 and at most 1; None redraws one or two.

    Raises:
        UserMistake: an option is out of its range.
    """

    def __init__(
        self,
        space: SearchSpace,
        directions: Sequence[Direction],
        seed: int = 0,
        *,
        population: int = 50,
        initial: int = 20,
        tournament: int = 10,
        crossover_probability: float = 0.25,
        mutation_rate: float | None = None,
    ) -> None:
        super().__init__(space, directions, seed)
        check_count(self.name, "population", population, 2)
        check_count(self.name, "initial", initial, 1)
        check_count(self.name, "tournament", tournament, 1)
        for option, value in (("initial", initial), ("tournament", tournament)):
            if value > population:
                raise UserMistake(
                    f"{option}={value} of controller {self.name!r} must not exceed population={population}"
                )
        check_probability(self.name, "crossover_probability", crossover_probability)
        if mutation_rate is not None:
            check_probability(self.name, "mutation_rate", mutation_rate, positive=True)
        self._initial = initial
        self._tournament = tournament
        self._crossover_probability = crossover_probability
        self._mutation_rate = mutation_rate
        self._population: deque[tuple[Architecture, Losses]] = deque(maxlen=population)
        self._standing: list[int] | None = None

    def _learn(self, architecture: Architecture, key: str, losses: Losses | None) -> None:
        if losses is not None:
            self._population.append((architecture, losses))
            self._standing = None

    def _propose(self, rng: Random) -> Architecture:
        if len(self._population) < self._initial:
            return self.space.sample(rng)
        child = self._parent(rng)
        if rng.random() < self._crossover_probability:
            child = self.space.crossover(child, self._parent(rng), rng)
        return self._mutant(child, rng)

    def _parent(self, rng: Random) -> Architecture:
        standing = self._standings()
        living = len(self._population)
        # A tournament among all that live would always be won by the same one.
        drawn = rng.sample(range(living), min(self._tournament, (living + 1) // 2))
        return self._population[min(drawn, key=standing.__getitem__)][0]

    def _mutant(self, child: Architecture, rng: Random) -> Architecture:
        if self._mutation_rate is not None:
            return self.space.mutate(child, rng, rate=self._mutation_rate)
        mutant = self.space.mutate(child, rng)
        return self.space.mutate(mutant, rng) if rng.random() < 0.5 else mutant

    def _standings(self) -> list[int]:
        """Place of each living architecture, 0 for the best; computed once for each thing told."""
        if self._standing is None:
            losses = [losses for _, losses in self._population]
            minimize: list[Direction] = ["minimize"] * len(self.directions)
            ranks = non_dominated_sort(losses, minimize)
            order = np.lexsort((-crowding_distance(losses, minimize, ranks), ranks))
            places = np.empty(len(losses), dtype=np.intp)
            places[order] = np.arange(len(losses))
            self._standing = places.tolist()
        return self._standing
