"""Random search: every proposal is drawn from the space, whatever was told."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from nas.controllers import register_controller
from nas.controllers.base import Controller

if TYPE_CHECKING:
    from spaces import Architecture

__all__ = ["RandomSearch"]


@register_controller("random")
class RandomSearch(Controller):
    """Samples the space, without repetition. The yardstick that every other controller has to beat."""

    def _propose(self, rng: Random) -> Architecture:
        return self.space.sample(rng)
