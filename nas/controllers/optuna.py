"""TPE by Optuna: densities of the good and of the bad architectures, and the candidate where their ratio is best.

Bergstra, Bardenet, Bengio, Kegl, "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011; several objectives:
Ozaki et al., "Multiobjective Tree-Structured Parzen Estimator", JAIR 73, 2022. The estimators are those of
optuna.samplers.TPESampler(multivariate=True); groups of parameters and pending architectures are handled as its
group=True and constant_liar=True do. What the sampler sees of a long history is bounded (option ``history``).

Other samplers of Optuna do not fit: GPSampler needs torch, CmaEsSampler and QMCSampler know no categories,
NSGAIISampler is replaced by :mod:`nas.controllers.nsga2` for the reasons given there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from nas.controllers import register_controller
from nas.controllers.base import Controller, Losses, check_count
from nas.errors import ArchitectureError
from nas.pareto import Direction, crowding_distance, non_dominated_sort
from spaces import Choice, Float, Int, Parameter, Scalar

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from nas.controllers._optuna_study import Draw
    from spaces import Architecture, SearchSpace

__all__ = ["TPE"]

_GOOD_SHARE = 0.1
"""Optuna's share of good architectures (with one objective, at most 25)."""
_DRAWS = 5
"""Draws of one proposal that may break constraints of the space."""


@register_controller("tpe")
class TPE(Controller):
    """Optuna's multivariate, grouped TPE; failed, pruned and pending architectures count among the bad ones.

    Args:
        space: the search space.
        directions: "maximize" or "minimize" for each objective.
        seed: see :class:`nas.controllers.base.Controller`.
        startup: successful architectures that come before the model, at random; at least 2.
        candidates: draws from the good density of which the best is proposed, at least 1.
        history: most architectures that the densities are made of, at least 40: the good ones and the latest.
            It bounds the time of one proposal, whatever the number of trials.

    Raises:
        UserMistake: an option is out of its range.
    """

    # Every further proposal costs as much as the first, and a mutant of it is nearly as good.
    proposals_per_ask = 3

    def __init__(
        self,
        space: SearchSpace,
        directions: Sequence[Direction],
        seed: int = 0,
        *,
        startup: int = 10,
        candidates: int = 24,
        history: int = 400,
    ) -> None:
        from nas.controllers._optuna_study import OptunaStudy

        super().__init__(space, directions, seed)
        check_count(self.name, "startup", startup, 2)
        check_count(self.name, "candidates", candidates, 1)
        check_count(self.name, "history", history, 40)
        self._startup = startup
        self._history = history
        self._codecs = {
            name: _Codec(parameter) for name, parameter in space.parameters.items() if parameter.size != 1
        }
        distributions = {name: codec.distribution() for name, codec in self._codecs.items()}
        self._study = OptunaStudy(len(self.directions), distributions, candidates)
        self._told_trials: list[_Told] = []
        self._groups: list[tuple[str, ...]] = []

    def _learn(self, architecture: Architecture, key: str, losses: Losses | None) -> None:
        codes = self._codes(architecture)
        trial = self._study.trial(len(self._told_trials), codes, losses)
        self._told_trials.append(_Told(architecture, losses, trial))
        self._groups = _refined(self._groups, codes)

    def _propose(self, rng: Random) -> Architecture:
        succeeded = [told for told in self._told_trials if told.losses is not None]
        if len(succeeded) < self._startup or not self._codecs:
            return self.space.sample(rng)
        best = self._best(succeeded)
        draw = self._study.draw(self._shown(best), rng.getrandbits(32))
        for _ in range(_DRAWS):
            try:
                return self.space.canonical(_Drawn(self.space.parameters, self._codecs, self._groups, draw))
            except ArchitectureError:
                continue
        return self.space.mutate(best[0].architecture, rng)

    def _codes(self, architecture: Architecture) -> dict[str, float]:
        return {
            name: self._codecs[name].encode(value)
            for name, value in architecture.items()
            if name in self._codecs
        }

    def _best(self, succeeded: list[_Told]) -> list[_Told]:
        """All that the sampler may take for good among what it is shown, best first."""
        losses = np.array([told.losses for told in succeeded])
        good = math.ceil(_GOOD_SHARE * min(len(succeeded), self._history))
        if losses.shape[1] == 1:
            return [succeeded[index] for index in np.argsort(losses[:, 0], kind="stable")[:good].tolist()]
        minimize: list[Direction] = ["minimize"] * losses.shape[1]
        ranks = non_dominated_sort(losses, minimize)
        # Of the last rank that counts as good the sampler takes a part, by hypervolume: it gets some to choose from.
        tied = np.flatnonzero(ranks <= np.sort(ranks)[good - 1])
        crowding = crowding_distance(losses[tied], minimize, ranks[tied])
        order = tied[np.lexsort((-crowding, ranks[tied]))]
        return [succeeded[index] for index in order[: 2 * good].tolist()]

    def _shown(self, best: list[_Told]) -> list[FrozenTrial]:
        """What the densities are made of, in the order of trial numbers: the best, the latest, the pending."""
        told = [told.trial for told in self._told_trials]
        room = self._history - len(best)
        if len(told) > self._history:
            numbers = {told.trial.number for told in best}
            others = [trial for trial in told if trial.number not in numbers]
            told = sorted([told.trial for told in best] + others[-room:], key=lambda trial: trial.number)
        number = len(self._told_trials)
        pending = [self._codes(architecture) for architecture in self._pending.values()]
        return told + [self._study.trial(number + index, codes, None) for index, codes in enumerate(pending)]


@dataclass(frozen=True)
class _Told:
    architecture: Architecture
    losses: Losses | None
    trial: FrozenTrial


class _Codec:
    """Values of one parameter as the numbers that Optuna models; to Optuna, True, 1 and 1.0 would be one category."""

    def __init__(self, parameter: Parameter) -> None:
        self._parameter = parameter
        self._codes: dict[tuple[type, Scalar], float] = {}
        if isinstance(parameter, Choice):
            self._codes = {(type(value), value): index for index, value in enumerate(parameter.values)}

    def distribution(self) -> BaseDistribution:
        from nas.controllers import _optuna_study as optuna_study

        parameter = self._parameter
        if isinstance(parameter, Float):
            return optuna_study.interval(parameter.low, parameter.high, parameter.log)
        if isinstance(parameter, Int):
            return optuna_study.steps(parameter.size)
        return optuna_study.categories(len(self._codes))

    def encode(self, value: Any) -> float:
        """The code of a canonical value."""
        parameter = self._parameter
        if isinstance(parameter, Float):
            return float(value)
        if isinstance(parameter, Int):
            return float((value - parameter.low) // parameter.step)
        return self._codes[type(value), value]

    def decode(self, code: float) -> Scalar:
        """The value of a code."""
        parameter = self._parameter
        if isinstance(parameter, Float):
            # Optuna goes through logarithms and back, which can leave the range by a rounding error.
            return min(max(float(code), parameter.low), parameter.high)
        return parameter.at(int(code))


class _Drawn(Mapping[str, Scalar]):
    """An architecture that is drawn while it is read: a group of parameters when the first of them is asked for.

    Reading it in the order of declaration, as a space does to find what is active, draws active groups only.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        codecs: Mapping[str, _Codec],
        groups: Sequence[tuple[str, ...]],
        draw: Draw,
    ) -> None:
        self._parameters = parameters
        self._codecs = codecs
        self._group_of = {name: group for group in groups for name in group}
        self._draw = draw
        self._codes: dict[str, float] = {}

    def __getitem__(self, name: str) -> Scalar:
        codec = self._codecs.get(name)
        if codec is None:
            return self._parameters[name].at(0)
        if name not in self._codes:
            self._codes.update(self._draw(self._group_of.get(name, (name,))))
        return codec.decode(self._codes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _refined(groups: list[tuple[str, ...]], active: Mapping[str, object]) -> list[tuple[str, ...]]:
    """The coarsest partition of which ``active`` and all former unions of ``groups`` are unions.

    Parameters of one group have always been active together, so that their joint density is known.
    """
    known = {name for group in groups for name in group}
    split = [tuple(name for name in active if name not in known)]
    for group in groups:
        split.append(tuple(name for name in group if name in active))
        split.append(tuple(name for name in group if name not in active))
    return [group for group in split if group]
