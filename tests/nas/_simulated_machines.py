"""Machines of which it is known what is true; time passes there only while something runs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from nas.latency.rounds import Plan, Rounds
from nas.latency.runner import Times

__all__ = ["Machine", "Memory"]


class Machine:
    """Time passes only while something runs; ``slowness`` is what a drifting machine multiplies it with."""

    def __init__(
        self, seed: int = 0, noise: float = 0.0, slowness: Callable[[float], float] = lambda at: 1.0
    ):
        self.at = 0.0
        self.seen: list[str] = []
        self._rng, self._noise, self._slowness = random.Random(seed), noise, slowness

    def model(self, name: str, milliseconds: float, cold: Sequence[float] = ()) -> Callable[[], Times]:
        extra = list(cold)

        def run() -> Times:
            self.seen.append(name)
            ms = milliseconds * self._slowness(self.at) * math.exp(self._rng.gauss(0, self._noise))
            ms += extra.pop(0) if extra else 0.0
            self.at += ms / 1000
            return Times(ms, ms, math.nan)

        return run

    def now(self) -> float:
        return self.at

    def session(self, models: dict[str, float], plan: Plan, **options: Any) -> Rounds:
        made = {name: self.model(name, ms) for name, ms in models.items()}
        rounds = Rounds(
            made, self.model("reference", 1.0), plan, lambda calls: "wall", now=self.now, **options
        )
        rounds.warm_up()
        rounds.run()
        return rounds


class Memory(Machine):
    """Where a model lies makes it slower or faster by about ``spread``, until it is moved."""

    def __init__(self, seed: int, noise: float, spread: float):
        super().__init__(seed, noise)
        self._spread, self._here = spread, dict[str, float]()

    def model(self, name: str, milliseconds: float, cold: Sequence[float] = ()) -> Callable[[], Times]:
        run = super().model(name, milliseconds, cold)

        def here() -> Times:
            share = self._here.setdefault(name, math.exp(self._rng.gauss(0, self._spread)))
            times = run()
            self.at += (share - 1) * times.wall / 1000
            return Times(times.wall * share, times.cpu * share, math.nan)

        return here

    def relocate(self) -> bool:
        self.at += 0.02
        self._here.clear()
        return True
