"""NNI's evolutions: the tuners whose population goes on from one thing told to the next."""

from __future__ import annotations

import copy
import math
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np

from nas.controllers._nni_codes import Code, Codes, SpaceCodes
from nas.controllers._nni_import import nni_module
from nas.controllers._nni_tuners import Observation, Tuner, nni_space

__all__ = ["Evolution", "RegularizedEvolution"]

_ID = 0
_LEVELS = 256
"""Values that a tuner without numbers is given of a number, at most."""
_random_module = threading.Lock()


class _Population(Tuner):
    """What both evolutions share: a population that changes with what is told, and a copy of it for each ask."""

    carries_on = True

    def __init__(self, codes: SpaceCodes) -> None:
        super().__init__(codes)
        self._asked: Any = None
        self._proposed: Any = None

    def start(
        self, told: Sequence[Observation], losses: Sequence[float], pending: Sequence[Codes], rng: Random
    ) -> None:
        self._asked = self._copy(losses)
        self._reseed(self._asked, rng)
        for _ in pending:
            self._generate(self._asked)

    def propose(self) -> Codes:
        self._proposed = self._generate(self._asked)
        return self._read(self._proposed)

    def receive(self, loss: float) -> None:
        self._insert(self._asked, self._proposed, loss, None)

    def record(self, told: Sequence[Observation], losses: Sequence[float], rng: Random) -> None:
        # One thing proposed and one thing told, as if it had been asked for here: the proposal itself is only kept
        # for the genes that do not count in it.
        tuner = self._copy(losses[:-1])
        self._reseed(tuner, rng)
        genes = self._generate(tuner)
        codes = told[-1].codes
        architecture = self._codes.decode(self._read(genes))
        if architecture is None or self._codes.encode(architecture) != codes:
            genes = self._write(self._codes.with_draws(codes, rng))
        if told[-1].succeeded:
            self._insert(tuner, genes, losses[-1], len(told) - 1)
        else:
            self._replace_failed(tuner)
        self._keep(tuner)

    @abstractmethod
    def _copy(self, losses: Sequence[float]) -> Any: ...

    @abstractmethod
    def _keep(self, tuner: Any) -> None: ...

    @abstractmethod
    def _reseed(self, tuner: Any, rng: Random) -> None: ...

    @abstractmethod
    def _generate(self, tuner: Any) -> Any: ...

    @abstractmethod
    def _insert(self, tuner: Any, genes: Any, loss: float, index: int | None) -> None: ...

    @abstractmethod
    def _replace_failed(self, tuner: Any) -> None: ...

    @abstractmethod
    def _read(self, genes: Any) -> Codes: ...

    @abstractmethod
    def _write(self, codes: Codes) -> Any: ...


class Evolution(_Population):
    """Evolution: of two at random the worse is removed and the better mutated in one parameter."""

    def __init__(self, codes: SpaceCodes, name: str, *, population: int, seed: int) -> None:
        super().__init__(codes)
        self._nni = nni_module("algorithms.hpo.evolution_tuner", name)
        self._tuner = self._nni.EvolutionTuner("minimize", population_size=0)
        self._tuner.update_search_space(nni_space(codes))
        self._tuner.population_size = population
        self._tuner.random_state = np.random.RandomState(Random(f"{seed}:population").getrandbits(32))
        for _ in range(population):
            self._tuner._random_generate_individual()

    def _copy(self, losses: Sequence[float]) -> Any:
        tuner = copy.copy(self._tuner)
        tuner.population = [copy.copy(individual) for individual in self._tuner.population]
        tuner.running_trials = {}
        for individual in tuner.population:
            if individual.info is not None:
                individual.result = -losses[individual.info]
        return tuner

    def _keep(self, tuner: Any) -> None:
        self._tuner = tuner

    def _reseed(self, tuner: Any, rng: Random) -> None:
        tuner.random_state = np.random.RandomState(rng.getrandbits(32))
        self._rng = Random(rng.getrandbits(63))

    def _generate(self, tuner: Any) -> Any:
        if not tuner.population:  # more are pending than live
            tuner._random_generate_individual()
        with _drawing_from(self._nni, self._rng):
            tuner.generate_parameters(_ID)
        return tuner.running_trials.pop(_ID).config

    def _insert(self, tuner: Any, genes: Any, loss: float, index: int | None) -> None:
        tuner.population.append(self._nni.Individual(config=genes, info=index, result=-loss))

    def _replace_failed(self, tuner: Any) -> None:
        tuner._random_generate_individual()

    def _read(self, genes: Any) -> Codes:
        return {
            name: float(gene["_index"] if isinstance(gene, dict) else gene) for name, gene in genes.items()
        }

    def _write(self, codes: Codes) -> Any:
        each = self._codes.each
        return {
            name: {"_index": int(number), "_value": int(number)}
            if each[name].kind == "categorical"
            else number
            for name, number in codes.items()
        }


class RegularizedEvolution(_Population):
    """RegularizedEvolution: the best of a random sample is mutated in one parameter, and the oldest dies."""

    def __init__(self, codes: SpaceCodes, name: str, *, population: int, sample: int, seed: int) -> None:
        super().__init__(codes)
        self._nni = nni_module("algorithms.hpo.regularized_evolution_tuner", name)
        self._exhausted = nni_module("common.hpo_utils.dedup", name).nni.NoMoreTrialError
        self._tuner = self._nni.RegularizedEvolutionTuner(
            "minimize", population_size=population, sample_size=sample
        )
        layers = {key: {"_type": "layer_choice", "_value": _levels(code)} for key, code in codes.each.items()}
        self._rng = Random(f"{seed}:population")
        with _drawing_from(self._nni, self._rng):
            self._tuner.update_search_space(layers)

    def _copy(self, losses: Sequence[float]) -> Any:
        tuner = copy.copy(self._tuner)
        tuner.initial_population = self._tuner.initial_population.copy()
        tuner.history, tuner._from_initial = {}, {}
        tuner.population = deque(copy.copy(member) for member in self._tuner.population)
        for member in tuner.population:
            member.result = -losses[member.parameter_id]
        return tuner

    def _keep(self, tuner: Any) -> None:
        self._tuner = tuner

    def _reseed(self, tuner: Any, rng: Random) -> None:
        self._rng = Random(rng.getrandbits(63))

    def _generate(self, tuner: Any) -> Any:
        with _drawing_from(self._nni, self._rng):
            try:
                return tuner.generate_parameters(_ID)
            except self._exhausted:  # everything is pending, nothing has a result
                tuner._from_initial[_ID] = True
                return tuner._random_model()

    def _insert(self, tuner: Any, genes: Any, loss: float, index: int | None) -> None:
        tuner.population.append(self._nni.FinishedIndividual(index, genes, -loss))
        if len(tuner.population) > tuner.population_size:
            tuner.population.popleft()

    def _replace_failed(self, tuner: Any) -> None:
        if tuner._from_initial[_ID]:
            with _drawing_from(self._nni, self._rng):
                tuner.initial_population.append(tuner._random_model())

    def _read(self, genes: Any) -> Codes:
        return {name: float(gene["_value"]) for name, gene in genes.items()}

    def _write(self, codes: Codes) -> Any:
        return {name: {"_value": number} for name, number in codes.items()}


@contextmanager
def _drawing_from(module: Any, rng: Random) -> Iterator[None]:
    """Makes ``module``, which draws from Python's global generator, draw from ``rng`` instead."""
    with _random_module:
        original, module.random = module.random, rng
        try:
            yield
        finally:
            module.random = original


def _levels(code: Code) -> list[float]:
    """All indices, or a grid of numbers where there are too many."""
    if code.kind != "interval" and code.size <= _LEVELS:
        return list(range(code.size))
    grid = np.linspace(code.low, code.high, _LEVELS)
    return [float(number) if code.kind == "interval" else float(math.floor(number)) for number in grid]
