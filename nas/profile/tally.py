"""What one counter found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nas.errors import UserMistake
from nas.profile.formulas import NOTHING, Work

__all__ = ["Count", "MissingCounter", "Tally", "inclusive"]


class MissingCounter(UserMistake):
    """The package of a counter is not there; others can count."""

    def __init__(self, counter: str, why: ImportError, packages: str):
        super().__init__(f"the counter {counter} cannot be imported ({why}); pip install {packages}")


@dataclass
class Tally:
    """Filled while a counter runs.

    Attributes:
        params: numbers in all parameters, shared ones once.
        own: by module, the work of its own forward, without that of the modules in it.
        uncounted: operators that did work without a formula.
    """

    params: int = 0
    own: dict[str, Work] = field(default_factory=dict)
    uncounted: set[str] = field(default_factory=set)

    @property
    def total(self) -> Work:
        """Work of all modules."""
        return sum(self.own.values(), NOTHING)

    def add(self, module: str, work: Work) -> None:
        """Put ``work`` down to ``module``."""
        self.own[module] = self.own.get(module, NOTHING) + work


@dataclass(frozen=True)
class Count:
    """The figures of one counter.

    Attributes:
        counter: ``fvcore``, ``thop`` or ``torch``.
        params: numbers in all parameters, shared ones once.
        macs: multiply-accumulates of one call.
        activations: numbers written by convolutions, matrix products and Fourier transforms.
        modules: own (macs, activations) of every module that did any; ``""`` is the model itself.
        uncounted: operators that did work which ``macs`` does not contain.
        method: ``meta`` (without data) or ``data``.
    """

    counter: str
    params: int
    macs: int
    activations: int
    modules: Mapping[str, Work]
    uncounted: tuple[str, ...] = ()
    method: str = "meta"

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``modules`` with all that is in them."""
        return {
            "params": self.params,
            "macs": self.macs,
            "activations": self.activations,
            "uncounted": list(self.uncounted),
            "method": self.method,
            "modules": {
                name: {"macs": work.macs, "activations": work.activations}
                for name, work in inclusive(self.modules).items()
            },
        }


def inclusive(own: Mapping[str, Work]) -> dict[str, Work]:
    """Work of every module with all modules in it, by names; parents that did nothing themselves appear too."""
    totals: dict[str, Work] = {}
    for name, work in own.items():
        parts = name.split(".") if name else []
        for length in range(len(parts) + 1):
            key = ".".join(parts[:length])
            totals[key] = totals.get(key, NOTHING) + work
    return dict(sorted(totals.items()))
