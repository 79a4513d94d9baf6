"""NSGA-II: survivors by non-dominated rank and crowding distance, in its steady-state form.

Deb, Pratap, Agarwal, Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE
Transactions on Evolutionary Computation 6 (2), 2002; steady state: Durillo, Nebro, Luna, Alba, "On the Effect of
the Steady-State Selection Scheme in Multi-Objective Genetic Algorithms", EMO 2009. Every architecture competes
with its parents as soon as it is told, so that nobody waits for a generation to be complete.

Not Optuna's NSGAIISampler: that one crosses over and inherits only parameters that all architectures share, and
redraws conditional ones at random; and its generations live in attributes of its own study, so that it would not
go on exactly where it was after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from nas.controllers import register_controller
from nas.controllers.base import Controller, Losses, check_count, check_probability
from nas.pareto import Direction, crowding_distance, non_dominated_sort

if TYPE_CHECKING:
    from spaces import Architecture, SearchSpace

__all__ = ["NSGA2"]


@register_controller("nsga2")
class NSGA2(Controller):
    """Steady-state NSGA-II; with one objective, a genetic algorithm that keeps the best.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
        population: architectures that survive, at least 2; as many successful ones are random at first. 20 suits
            budgets below 500 trials.
        crossover_probability: share of children with two parents, from 0 to 1.
        mutation_rate: probability that a parameter is redrawn, above 0 and at most 1; None: one over the number
            of active parameters. At least one is always redrawn.

    Raises:
        UserMistake: an option is out of its range.
    """

    def __init__(
        self,
        space: SearchSpace,
        directions: Sequence[Direction],
        seed: int = 0,
        *,
        population: int = 20,
        crossover_probability: float = 0.9,
        mutation_rate: float | None = None,
    ) -> None:
        super().__init__(space, directions, seed)
        check_count(self.name, "population", population, 2)
        check_probability(self.name, "crossover_probability", crossover_probability)
        if mutation_rate is not None:
            check_probability(self.name, "mutation_rate", mutation_rate, positive=True)
        self._size = population
        self._crossover_probability = crossover_probability
        self._mutation_rate = mutation_rate
        self._population: list[tuple[Architecture, Losses]] = []

    def _learn(self, architecture: Architecture, key: str, losses: Losses | None) -> None:
        if losses is not None:
            self._population.append((architecture, losses))
            if len(self._population) >= self._size:
                self._population = self._survivors(self._population)

    def _propose(self, rng: Random) -> Architecture:
        if len(self._population) < self._size:
            return self.space.sample(rng)
        child = self._parent(rng)
        if rng.random() < self._crossover_probability:
            child = self.space.crossover(child, self._parent(rng), rng)
        rate = self._mutation_rate
        if rate is None:
            rate = 1.0 / max(1, len(child))
        return self.space.mutate(child, rng, rate=rate)

    def _parent(self, rng: Random) -> Architecture:
        # Survivors stand in the order of rank and crowding, so the lower index wins a binary tournament.
        places = range(len(self._population))
        return self._population[min(rng.choice(places), rng.choice(places))][0]

    def _survivors(self, pool: list[tuple[Architecture, Losses]]) -> list[tuple[Architecture, Losses]]:
        """The best ``population`` of ``pool``, best first."""
        losses = [losses for _, losses in pool]
        minimize: list[Direction] = ["minimize"] * len(self.directions)
        ranks = non_dominated_sort(losses, minimize)
        order = np.lexsort((-crowding_distance(losses, minimize, ranks), ranks))
        return [pool[index] for index in order[: self._size].tolist()]
