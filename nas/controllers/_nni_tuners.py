"""NNI's tuners as pure functions of what was told: every random draw of theirs comes from a generator given here.

NNI's own bookkeeping (numbered parameter sets, the fixed-order grid that replaces repeats, global random numbers) would
make what is proposed depend on what was asked before. So a :class:`Tuner` is set up anew for each ask from the told
observations; only the evolutions (_nni_populations.py) carry something on, and only through what is told.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import numpy as np

from nas.controllers._nni_codes import Code, Codes, SpaceCodes
from nas.controllers._nni_import import nni_module
from nas.errors import UserMistake

__all__ = ["Anneal", "GaussianProcess", "Observation", "RandomDraws", "Tpe", "Tuner", "nni_space"]

_ID = 0


@dataclass(frozen=True)
class Observation:
    """Something told: the codes of its active parameters, and whether there were objectives."""

    codes: Codes
    succeeded: bool


class Tuner(ABC):
    """One of NNI's tuners; it minimises one loss over codes of all parameters.

    For one ask: ``start`` with all that was told, then ``propose``, and as long as the proposal is of no use
    ``receive`` its loss and ``propose`` again. ``record`` follows each thing told if ``carries_on``.
    """

    carries_on: ClassVar[bool] = False

    def __init__(self, codes: SpaceCodes) -> None:
        self._codes = codes

    @abstractmethod
    def start(
        self, told: Sequence[Observation], losses: Sequence[float], pending: Sequence[Codes], rng: Random
    ) -> None:
        """Begins an ask. ``losses`` has a number for each of ``told``, failed ones included."""

    @abstractmethod
    def propose(self) -> Codes:
        """Codes of all parameters."""

    def receive(self, loss: float) -> None:  # noqa: B027  (a tuner need not learn)
        """The loss of what was proposed last, for the ask at hand."""

    def record(  # noqa: B027  (for those that carry something on)
        self, told: Sequence[Observation], losses: Sequence[float], rng: Random
    ) -> None:
        """The last of ``told`` is new; ``rng`` draws as it did when one worker asked for it."""


class RandomDraws(Tuner):
    """Random: every parameter on its own, uniformly."""

    def __init__(self, codes: SpaceCodes, name: str) -> None:
        super().__init__(codes)
        self._suggest = nni_module("algorithms.hpo.random_tuner", name).suggest
        self._space = nni_module("common.hpo_utils", name).format_search_space(nni_space(codes))
        self._rng = np.random.default_rng(0)

    def start(
        self, told: Sequence[Observation], losses: Sequence[float], pending: Sequence[Codes], rng: Random
    ) -> None:
        self._rng = np.random.default_rng(rng.getrandbits(63))

    def propose(self) -> Codes:
        return _flat(self._suggest(self._rng, self._space))


class Tpe(Tuner):
    """TPE: every parameter on its own, from the trials in which it was active; pending ones lie as NNI's do."""

    def __init__(self, codes: SpaceCodes, name: str, *, startup: int, candidates: int, history: int) -> None:
        super().__init__(codes)
        self._limit = history
        self._nni = nni_module("algorithms.hpo.tpe_tuner", name)
        self._space = nni_module("common.hpo_utils", name).format_search_space(nni_space(codes))
        self._arguments = self._nni.TpeArguments(n_startup_jobs=startup, n_ei_candidates=candidates)
        self._history: dict[tuple[str], list[Any]] = {}
        self._rng = np.random.default_rng(0)
        self._proposed: Codes = {}

    def start(
        self, told: Sequence[Observation], losses: Sequence[float], pending: Sequence[Codes], rng: Random
    ) -> None:
        self._rng = np.random.default_rng(rng.getrandbits(63))
        self._history = defaultdict(list)
        liar = self._nni.create_liar(self._arguments.constant_liar_type)
        for index in _shown(losses, self._limit):
            self._remember(told[index].codes, losses[index])
            liar.update(losses[index])
        for codes in pending:
            self._remember(codes, liar.lie())

    def propose(self) -> Codes:
        self._proposed = _flat(self._nni.suggest(self._arguments, self._rng, self._space, self._history))
        return self._proposed

    def receive(self, loss: float) -> None:
        self._remember(self._proposed, loss)

    def _remember(self, codes: Mapping[str, float], loss: float) -> None:
        for name, number in codes.items():
            value = int(number) if self._codes.each[name].kind == "categorical" else number
            self._history[(name,)].append(self._nni.Record(value, loss))


class GaussianProcess(Tuner):
    """GP: expected improvement of random points under a Gaussian process over the codes, all taken for numbers.

    NNI's refinement of the best points by L-BFGS is off: it fails in scipy 1.11 and later, and most codes are indices.
    """

    def __init__(self, codes: SpaceCodes, name: str, *, startup: int, candidates: int, history: int) -> None:
        super().__init__(codes)
        self._make = nni_module("algorithms.hpo.gp_tuner.gp_tuner", name).GPTuner
        self._startup = startup
        self._candidates = candidates
        self._limit = history
        self._tuner: Any = None
        self._proposed: dict[str, Any] = {}

    def start(
        self, told: Sequence[Observation], losses: Sequence[float], pending: Sequence[Codes], rng: Random
    ) -> None:
        self._tuner = self._make(
            "minimize",
            cold_start_num=self._startup,
            selection_num_warm_up=self._candidates,
            selection_num_starting_points=0,
        )
        self._tuner._random_state.seed(rng.getrandbits(32))
        self._tuner._gp.n_restarts_optimizer = 1  # of NNI's 25: the kernel has one length only
        self._tuner.update_search_space(nni_space(self._codes, ordered="quniform"))
        latest = {}
        for index in _shown(losses, self._limit):
            point = self._codes.with_defaults(told[index].codes)
            latest[tuple(point.items())] = losses[index]
        for items, loss in latest.items():
            self._tuner.receive_trial_result(_ID, dict(items), loss)

    def propose(self) -> Codes:
        self._proposed = self._tuner.generate_parameters(_ID)
        return {name: float(number) for name, number in self._proposed.items()}

    def receive(self, loss: float) -> None:
        architecture = self._codes.decode(self._proposed)
        point = self._proposed
        if architecture is not None:
            point = self._codes.with_defaults(self._codes.encode(architecture))
        space = self._tuner._space
        # It writes to the standard output when it is told the same twice, and learns nothing from it.
        if space.params_to_array(point) not in space:
            self._tuner.receive_trial_result(_ID, point, loss)


class Anneal(Tuner):
    """Anneal: a random step, ever smaller, from one of the best; NNI's wrapper of hyperopt."""

    def __init__(self, codes: SpaceCodes, name: str, *, history: int) -> None:
        super().__init__(codes)
        self._make = nni_module("algorithms.hpo.hyperopt_tuner", name).HyperoptTuner
        version = importlib.metadata.version("hyperopt")
        if version.startswith(("0.0", "0.1", "0.2")):
            raise UserMistake(
                f"controller {name!r} needs hyperopt 0.3 or later, but version {version} is installed, "
                "which fails with current numpy; install it with: pip install 'hyperopt>=0.3'"
            )
        self._limit = history
        self._tuner: Any = None

    def start(
        self, told: Sequence[Observation], losses: Sequence[float], pending: Sequence[Codes], rng: Random
    ) -> None:
        self._tuner = self._make("anneal", "minimize")
        self._tuner.update_search_space(nni_space(self._codes))
        self._tuner.rval.rstate = np.random.RandomState(rng.getrandbits(32))
        for index in _shown(losses, self._limit):
            full = self._codes.with_draws(told[index].codes, Random(index))
            self._tuner.total_data[_ID] = {name: self._indexed(name, number) for name, number in full.items()}
            self._tuner.receive_trial_result(_ID, None, losses[index])

    def propose(self) -> Codes:
        # `generate_parameters` would replace repeats by random draws of its own.
        self._tuner.total_data[_ID] = self._tuner._get_suggestion()
        return {
            name: float(value["_index"] if isinstance(value, dict) else value)
            for name, value in self._tuner.total_data[_ID].items()
        }

    def receive(self, loss: float) -> None:
        self._tuner.receive_trial_result(_ID, None, loss)

    def _indexed(self, name: str, number: float) -> Any:
        if self._codes.each[name].kind == "categorical":
            return {"_index": int(number), "_value": int(number)}
        return number


def _shown(losses: Sequence[float], limit: int) -> list[int]:
    """Indices of the best tenth and the latest, at most ``limit`` in all and in the order in which they were told."""
    if len(losses) <= limit:
        return list(range(len(losses)))
    best = sorted(range(len(losses)), key=losses.__getitem__)[: limit // 10]
    chosen = set(best)
    for index in reversed(range(len(losses))):
        if len(chosen) == limit:
            break
        chosen.add(index)
    return sorted(chosen)


def nni_space(codes: SpaceCodes, *, ordered: str = "uniform") -> dict[str, Any]:
    """NNI's search space over the codes; ordered indices are rounded, by NNI ("quniform") or on decoding."""
    return {name: _spec(code, ordered) for name, code in codes.each.items()}


def _spec(code: Code, ordered: str) -> dict[str, Any]:
    if code.kind == "categorical":
        return {"_type": "choice", "_value": list(range(code.size))}
    if code.kind == "interval":
        return {"_type": "uniform", "_value": [code.low, code.high]}
    step = [1] if ordered == "quniform" else []
    return {"_type": ordered, "_value": [*code.stretched, *step]}


def _flat(parameters: Mapping[tuple[str], Any]) -> Codes:
    return {key[0]: float(number) for key, number in parameters.items()}
