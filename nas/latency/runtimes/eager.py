"""The model as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nas.latency.runtimes.base import RUNTIMES, InputSets, Runtime, twin

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from nas.latency.target import Target

__all__ = ["Eager", "on_device"]

logger = logging.getLogger(__name__)


@RUNTIMES.register("eager")
class Eager(Runtime):
    """Torch runs one operation after the other."""

    def __init__(self, model: nn.Module, sets: InputSets, target: Target):
        self._model: Any = twin(
            model, target.torch_dtype(), target.torch_device(), channels_last=target.channels_last
        )
        self._sets = on_device(sets, target)
        self._inputs = self._sets[0]
        self._on_cpu = target.device_kind == "cpu"

    def stage(self, number: int) -> None:
        self._inputs = self._sets[number]

    def run(self) -> Any:
        return self._model(*self._inputs)

    def move(self) -> Callable[[], None] | None:
        return self._all_copied() if self._on_cpu else None

    def _all_copied(self) -> Callable[[], None]:
        """The model's own objects are copied too: a small one spends its time among these."""
        try:
            model = copy.deepcopy(self._model).eval()
        except Exception as error:  # whatever a model keeps from one call to the next may refuse
            logger.info("%s: only its weights are moved in memory: %s", type(self._model).__name__, error)
            return self._weights_copied()
        if _kinds(model) != _kinds(self._model):  # a copy of its own making forgets what was converted
            return self._weights_copied()
        sets = _copied(self._sets)
        return lambda: self._take(model, sets)

    def _weights_copied(self) -> Callable[[], None]:
        import torch

        # Parameters of a class of their own (quantised ones, for instance) hold memory that ``data`` does not show.
        weights = [
            one for one in self._model.parameters() if type(one.data) is torch.Tensor and not one.is_sparse
        ]
        copies, sets = [weight.data.clone() for weight in weights], _copied(self._sets)

        def switch() -> None:
            for weight, other in zip(weights, copies, strict=True):
                weight.data = other
            self._take(self._model, sets)

        return switch

    def _take(self, model: Any, sets: list[tuple[Tensor, ...]]) -> None:
        number = next(place for place, one in enumerate(self._sets) if one is self._inputs)
        self._model, self._sets, self._inputs = model, sets, sets[number]


def _copied(sets: InputSets) -> list[tuple[Tensor, ...]]:
    """The same inputs in other memory."""
    return [tuple(x.clone() for x in tensors) for tensors in sets]


def _kinds(model: nn.Module) -> list[tuple[str, torch.dtype, torch.device]]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(name, x.dtype, x.device) for name, x in tensors]


def on_device(sets: InputSets, target: Target) -> list[tuple[Tensor, ...]]:
    """The inputs where and how the target wants them: floating point in its dtype, images in its memory format."""
    import torch

    device, dtype = target.torch_device(), target.torch_dtype()

    def placed(x: Tensor) -> Tensor:
        x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
        image = target.channels_last and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if image else x

    return [tuple(placed(x) for x in tensors) for tensors in sets]
