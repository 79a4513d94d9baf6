"""NNI's tuners, as ``nni:NAME``: the same ask and tell, for any search space and any number of objectives.

    make_controller("nni:tpe", space, ["maximize", "minimize"], seed=0)

They need ``pip install 'nas-toolkit[nni]'`` (NNI 3.0; nni:anneal hyperopt as well).

Search spaces: every parameter gets a code; what is inactive in an architecture is dropped when codes are read, and
does not count among what a tuner learns of (it has a default for GP, which needs a number for everything, and random
genes in a population). Proposals that break a constraint are told to the tuner as the worst, and it is asked again.

Several objectives: NNI minimises one number, so here it gets the place of each architecture among all that were told,
by non-dominated rank and then by crowding distance, as in NSGA-II; places are reckoned again after each thing told.
One objective is passed on as it is. A failed candidate counts as much as the worst.

Repeats: NNI's TPE replaces them by the next point of a fixed grid, and its evolutions evaluate them again. Here a
repeat is told to the tuner with its known value and it is asked again, ``proposals_per_ask`` times at most; after
that, as with every controller, the last proposal is mutated, and at last the space is searched for an unseen
architecture.

Not offered: PBT, which changes hyper-parameters of one network while its weights are kept, where another architecture
has other weights; GridSearch and Batch, whose order is fixed whatever the seed; Metis, SMAC, DNGO, BOHB and PPO, which
were not tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from nas.controllers import register_controller
from nas.controllers.base import Controller, Losses, check_count
from nas.pareto import Direction, crowding_distance, non_dominated_sort

if TYPE_CHECKING:
    import numpy.typing as npt

    from nas.controllers._nni_codes import SpaceCodes
    from nas.controllers._nni_tuners import Observation, Tuner
    from spaces import Architecture, SearchSpace

__all__ = ["NniAnneal", "NniEvolution", "NniGP", "NniRandom", "NniRegularizedEvolution", "NniTPE"]

_DRAWS = 20
"""Proposals in a row that may break constraints."""


class _NniController(Controller):
    """Runs a tuner of NNI; a subclass makes it.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
    """

    def __init__(self, space: SearchSpace, directions: Sequence[Direction], seed: int = 0) -> None:
        from nas.controllers._nni_codes import SpaceCodes

        super().__init__(space, directions, seed)
        self._codes: SpaceCodes = SpaceCodes(space)
        self._tuner: Tuner
        self._observations: list[Observation] = []
        self._losses_told: list[Losses | None] = []
        self._index_of: dict[str, int] = {}
        self._scalars: list[float] | None = None
        self._last: str | None = None

    def _learn(self, architecture: Architecture, key: str, losses: Losses | None) -> None:
        from nas.controllers._nni_tuners import Observation

        # The draws of the ask that proposed it, where one worker asks and tells in turn.
        rng = Random(f"{self.seed}:{len(self._seen) - (key in self._seen)}")
        self._observations.append(Observation(self._codes.encode(architecture), losses is not None))
        self._losses_told.append(losses)
        self._index_of[key] = len(self._observations) - 1
        self._scalars = None
        if self._codes.each and self._tuner.carries_on:
            self._tuner.record(self._observations, self._scalarised(), rng)

    def _attempts(self, rng: Random) -> Iterator[Architecture]:
        self._last = None
        if self._codes.each:
            pending = [self._codes.encode(architecture) for architecture in self._pending.values()]
            self._tuner.start(self._observations, self._scalarised(), pending, rng)
        return super()._attempts(rng)

    def _propose(self, rng: Random) -> Architecture:
        if not self._codes.each:
            return self.space.sample(rng)
        if self._last is not None:  # asked again: the last was known
            self._tuner.receive(self._known(self._last))
        for _ in range(_DRAWS):
            architecture = self._codes.decode(self._tuner.propose())
            if architecture is not None:
                self._last = self.space.key(architecture)
                return architecture
            self._tuner.receive(self._worst())
        self._last = None
        return self.space.sample(rng)

    def _known(self, key: str) -> float:
        index = self._index_of.get(key)
        return self._worst() if index is None else self._scalarised()[index]

    def _worst(self) -> float:
        return max(self._scalarised(), default=0.0)

    def _scalarised(self) -> list[float]:
        """One loss for each thing told, the worst for failed ones; reckoned once after each."""
        if self._scalars is None:
            self._scalars = self._reckoned()
        return self._scalars

    def _reckoned(self) -> list[float]:
        succeeded = [index for index, losses in enumerate(self._losses_told) if losses is not None]
        if not succeeded:
            return [0.0] * len(self._losses_told)
        losses = np.array([self._losses_told[index] for index in succeeded], dtype=float)
        values = losses[:, 0] if len(self.directions) == 1 else _places(losses)
        found = np.full(len(self._losses_told), values.max())
        found[succeeded] = values
        return [float(value) for value in found]


def _places(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """0 for the best; losses that are equal in all objectives stay in the order in which they were told."""
    minimize: list[Direction] = ["minimize"] * losses.shape[1]
    ranks = non_dominated_sort(losses, minimize)
    order = np.lexsort((-crowding_distance(losses, minimize, ranks), ranks))
    places = np.empty(len(losses))
    places[order] = np.arange(len(losses))
    return places


@register_controller("nni:tpe")
class NniTPE(_NniController):
    """NNI's TPE, its default tuner: each parameter on its own.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
        startup: values of a parameter that are drawn at random before it is modelled, at least 1.
        candidates: draws of which the one with the best ratio of densities is proposed, at least 1.
        history: most things told that the densities are made of, at least 20: the best tenth and the latest.

    Raises:
        UserMistake: an option is out of its range, or NNI cannot be imported.
    """

    def __init__(
        self,
        space: SearchSpace,
        directions: Sequence[Direction],
        seed: int = 0,
        *,
        startup: int = 20,
        candidates: int = 24,
        history: int = 200,
    ) -> None:
        super().__init__(space, directions, seed)
        check_count(self.name, "startup", startup, 1)
        check_count(self.name, "candidates", candidates, 1)
        check_count(self.name, "history", history, 20)
        from nas.controllers._nni_tuners import Tpe

        self._tuner = Tpe(self._codes, self.name, startup=startup, candidates=candidates, history=history)


@register_controller("nni:evolution")
class NniEvolution(_NniController):
    """NNI's Evolution ("naive"): of two at random the worse dies and the better is mutated.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
        population: architectures that live, at least 2; as many are random at first.

    Raises:
        UserMistake: an option is out of its range, or NNI cannot be imported.
    """

    def __init__(
        self, space: SearchSpace, directions: Sequence[Direction], seed: int = 0, *, population: int = 32
    ) -> None:
        super().__init__(space, directions, seed)
        check_count(self.name, "population", population, 2)
        from nas.controllers._nni_populations import Evolution

        self._tuner = Evolution(self._codes, self.name, population=population, seed=seed)


@register_controller("nni:regularized_evolution")
class NniRegularizedEvolution(_NniController):
    """NNI's RegularizedEvolution: the best of a sample is mutated, the oldest dies; numbers move on a grid of 256.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
        population: architectures that live, at least 2; as many are random at first. NNI's default; use less
            than a third of the trials.
        sample: how many are drawn, with repetition, to find a parent, at least 1.

    Raises:
        UserMistake: an option is out of its range, or NNI cannot be imported.
    """

    def __init__(
        self,
        space: SearchSpace,
        directions: Sequence[Direction],
        seed: int = 0,
        *,
        population: int = 100,
        sample: int = 25,
    ) -> None:
        super().__init__(space, directions, seed)
        check_count(self.name, "population", population, 2)
        check_count(self.name, "sample", sample, 1)
        from nas.controllers._nni_populations import RegularizedEvolution

        self._tuner = RegularizedEvolution(
            self._codes, self.name, population=population, sample=sample, seed=seed
        )


@register_controller("nni:anneal")
class NniAnneal(_NniController):
    """NNI's Anneal, by hyperopt: random steps from one of the best, ever smaller ones.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
        history: most things told that it sees, at least 20: the best tenth and the latest.

    Raises:
        UserMistake: an option is out of its range, or NNI or hyperopt 0.3 cannot be imported.
    """

    def __init__(
        self, space: SearchSpace, directions: Sequence[Direction], seed: int = 0, *, history: int = 200
    ) -> None:
        super().__init__(space, directions, seed)
        check_count(self.name, "history", history, 20)
        from nas.controllers._nni_tuners import Anneal

        self._tuner = Anneal(self._codes, self.name, history=history)


@register_controller("nni:gp")
class NniGP(_NniController):
    """NNI's GP: expected improvement under a Gaussian process; for few, mostly numerical parameters.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
        startup: architectures that are random at first, at least 1.
        candidates: random points of which the one with the most expected improvement is proposed, at least 1
            (NNI takes 100,000, which is half a minute in a space of 50 parameters).
        history: most things told that the process is fitted to, at least 20: the best tenth and the latest.

    Raises:
        UserMistake: an option is out of its range, or NNI cannot be imported.
    """

    # Each further proposal fits the process again.
    proposals_per_ask = 3

    def __init__(
        self,
        space: SearchSpace,
        directions: Sequence[Direction],
        seed: int = 0,
        *,
        startup: int = 10,
        candidates: int = 500,
        history: int = 200,
    ) -> None:
        super().__init__(space, directions, seed)
        check_count(self.name, "startup", startup, 1)
        check_count(self.name, "candidates", candidates, 1)
        check_count(self.name, "history", history, 20)
        from nas.controllers._nni_tuners import GaussianProcess

        self._tuner = GaussianProcess(
            self._codes, self.name, startup=startup, candidates=candidates, history=history
        )


@register_controller("nni:random")
class NniRandom(_NniController):
    """NNI's Random: every parameter uniformly, whatever was told."""

    def __init__(self, space: SearchSpace, directions: Sequence[Direction], seed: int = 0) -> None:
        super().__init__(space, directions, seed)
        from nas.controllers._nni_tuners import RandomDraws

        self._tuner = RandomDraws(self._codes, self.name)
