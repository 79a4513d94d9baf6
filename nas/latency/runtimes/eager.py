"""The model as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nas.latency.runtimes.base import RUNTIMES, InputSets, Runtime, twin

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.latency.target import Target

__all__ = ["Eager", "on_device"]


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

    def weights(self) -> list[Tensor]:
        import torch

        if not self._on_cpu:
            return []
        # Parameters of a class of their own (quantised ones, for instance) hold memory that ``data`` does not show.
        return [
            one for one in self._model.parameters() if type(one.data) is torch.Tensor and not one.is_sparse
        ]


def on_device(sets: InputSets, target: Target) -> list[tuple[Tensor, ...]]:
    """The inputs where and how the target wants them: floating point in its dtype, images in its memory format."""
    import torch

    device, dtype = target.torch_device(), target.torch_dtype()

    def placed(x: Tensor) -> Tensor:
        x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
        image = target.channels_last and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if image else x

    return [tuple(placed(x) for x in tensors) for tensors in sets]
