"""A model made ready for timed calls, and the surroundings in which they are made."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nas.latency.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Runner", "Times", "session"]

_INPUT_COPIES = 4


class Times(NamedTuple):
    """One call, in milliseconds by each clock; NaN by a clock that the target does not have."""

    wall: float
    cpu: float
    events: float


class Runner:
    """A private copy of a model, ready to be called with inputs that take turns; a call returns its times."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], target: Target):
        import torch

        device, dtype = target.torch_device(), target.torch_dtype()
        prepared: Any = (
            copy.deepcopy(model).eval().to(device=device, dtype=None if dtype == torch.float32 else dtype)
        )
        self._model = torch.compile(prepared) if target.compile else prepared
        self._inputs = [[_like(x, number).to(device) for x in inputs] for number in range(_INPUT_COPIES)]
        if dtype != torch.float32:
            self._inputs = [
                [x.to(dtype) if x.is_floating_point() else x for x in row] for row in self._inputs
            ]
        self._calls = 0
        self._events = _events() if target.is_cuda else None

    def __call__(self) -> Times:
        inputs = self._inputs[self._calls % _INPUT_COPIES]
        self._calls += 1
        if self._events is None:
            cpu = time.thread_time_ns()
            begun = time.perf_counter_ns()
            self._model(*inputs)
            wall = (time.perf_counter_ns() - begun) / 1e6
            return Times(wall, (time.thread_time_ns() - cpu) / 1e6, math.nan)
        start, end = self._events
        begun = time.perf_counter_ns()
        start.record()
        self._model(*inputs)
        end.record()
        end.synchronize()
        wall = (time.perf_counter_ns() - begun) / 1e6
        return Times(wall, math.nan, start.elapsed_time(end))


@contextlib.contextmanager
def session(target: Target, models: int) -> Iterator[None]:
    """Threads, device, collector and compiler as the measurement needs them; everything is put back afterwards."""
    import torch

    threads = torch.get_num_threads()
    collecting = gc.isenabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        if collecting:
            stack.callback(gc.enable)
        gc.disable()
        if target.is_cuda:
            stack.enter_context(torch.cuda.device(target.torch_device()))
        else:
            torch.set_num_threads(target.cpu_threads())
        if target.compile:
            stack.enter_context(_own_compilation(models))
        stack.enter_context(torch.inference_mode())
        yield


@contextlib.contextmanager
def _own_compilation(models: int) -> Iterator[None]:
    """Compile each model for itself: after eight of one class torch would quietly run the ninth without compiling."""
    import torch
    import torch._dynamo.config as config

    wanted = {"recompile_limit": models + 8, "cache_size_limit": models + 8}
    refuse = {"fail_on_recompile_limit_hit": True, "fail_on_cache_limit_hit": True}
    chosen = [
        next({name: value} for name, value in pair.items() if hasattr(config, name))
        for pair in (wanted, refuse)
    ]
    torch.compiler.reset()
    with config.patch({**chosen[0], **chosen[1]}):
        yield
    torch.compiler.reset()


def _like(x: Tensor, number: int) -> Tensor:
    """The same values in another order; integers (token ids) within each row, so that paddings stay as many."""
    import torch

    generator = torch.Generator().manual_seed(number)
    values = x.detach().cpu()
    if x.dim() == 0 or x.dtype == torch.bool:
        return values.clone()
    if x.is_floating_point():
        return values.flatten()[torch.randperm(values.numel(), generator=generator)].reshape(values.shape)
    return values[..., torch.randperm(values.shape[-1], generator=generator)]


def _events() -> tuple[Any, Any]:
    import torch

    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)
