"""The model through ``torch.compile``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nas.errors import UserMistake
from nas.latency.runtimes.base import RUNTIMES, InputSets, distinct_shapes, installed
from nas.latency.runtimes.eager import Eager

if TYPE_CHECKING:
    from torch import nn

    from nas.latency.target import Target

__all__ = ["Compile"]


@RUNTIMES.register("compile")
class Compile(Eager):
    """``torch.compile`` with its default mode. The first call compiles."""

    def __init__(self, model: nn.Module, sets: InputSets, target: Target):
        import torch

        super().__init__(model, sets, target)
        # Not left to torch: having seen another model's shapes it would compile this one for shapes of any size, so
        # that a figure would depend on what was measured before.
        self._model = torch.compile(self._model, dynamic=len(distinct_shapes(sets)) > 1)

    def _all_copied(self) -> Callable[[], None]:
        return self._weights_copied()  # another module would be compiled anew

    @classmethod
    def check(cls, target: Target) -> None:
        super().check(target)
        if target.is_cuda and find_spec("triton") is None:
            raise UserMistake(
                f"target {str(target)!r}: +compile on CUDA needs triton; install it, or leave +compile out"
            )
        if not target.is_cuda and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            raise UserMistake(
                f"target {str(target)!r}: +compile needs a C++ compiler; install g++ or leave it out"
            )

    @classmethod
    def versions(cls, target: Target) -> dict[str, str]:
        found = super().versions(target)
        return {**found, "triton": installed("triton")} if target.is_cuda else found
