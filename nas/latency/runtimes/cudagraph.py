"""The model captured once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from nas.errors import TrialFailure
from nas.latency.runtimes.base import (
    RUNTIMES,
    InputSets,
    Runtime,
    check_outputs,
    distinct_shapes,
    tensors_of,
    twin,
)
from nas.latency.runtimes.eager import on_device

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.latency.target import Target

__all__ = ["CudaGraph"]

_WARM_UPS = 3


class _Captured(NamedTuple):
    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    outputs: Any


@RUNTIMES.register("cudagraph")
class CudaGraph(Runtime):
    """One graph for every shape of the inputs.

    The time is that of the replay alone: the inputs are copied into the graph's buffers before the clock starts and
    the outputs stay in its buffers. A server that copies both pays that on top.
    """

    devices = ("cuda",)

    def __init__(self, model: nn.Module, sets: InputSets, target: Target):
        self._model: Any = twin(
            model, target.torch_dtype(), target.torch_device(), channels_last=target.channels_last
        )
        self._sets = on_device(sets, target)
        self._graphs = {_shapes(self._sets[n]): self._captured(self._sets[n]) for n in distinct_shapes(sets)}
        self._graph = next(iter(self._graphs.values()))
        self._verify(target)

    def stage(self, number: int) -> None:
        self._graph = self._graphs[_shapes(self._sets[number])]
        for buffer, x in zip(self._graph.inputs, self._sets[number], strict=True):
            buffer.copy_(x)

    def run(self) -> Any:
        self._graph.replay()
        return self._graph.outputs

    def _captured(self, inputs: tuple[Tensor, ...]) -> _Captured:
        buffers = tuple(x.clone() for x in inputs)
        try:
            replay, outputs = self._capture(buffers)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            raise TrialFailure("error", f"cudagraph: the model cannot be captured: {why}") from error
        return _Captured(buffers, replay, outputs)

    def _capture(self, buffers: tuple[Tensor, ...]) -> tuple[Callable[[], None], Any]:
        import torch

        # Torch wants the first calls, which choose algorithms and allocate workspaces, on another stream.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._model(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._model(*buffers)
        return graph.replay, outputs

    def _verify(self, target: Target) -> None:
        """With a set that the graph was not captured with: a value that was baked in shows only then."""
        others = {_shapes(tensors): number for number, tensors in enumerate(self._sets)}
        for number in others.values():
            expected = [x.clone() for x in tensors_of(self._model(*self._sets[number]))]
            self.stage(number)
            check_outputs(expected, tensors_of(self.run()), target)


def _shapes(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(x.shape) for x in tensors)
