"""A model made ready for timed calls, and the surroundings in which they are made.

What the times of one call hold, by clock:

- ``wall``: the host's clock from before the call until its result is there. On a GPU the queue is empty before it, so
  this is the host time of one request: launching is part of it.
- ``cpu``: CPU time of the thread that calls (of the process, where an engine works in threads of its own). It stands
  in for ``wall`` only when the target has one thread.
- ``events``: between two CUDA events around the call on its stream: the device time, with the gaps in which the
  device waits for launches, without the host's work before the first launch. A CUDA graph has no such gaps.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nas.errors import UserMistake
from nas.latency.runtimes import RUNTIMES
from nas.latency.target import Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["Runner", "Times", "inputs_for", "make_runner", "relocate", "session"]

_INPUT_COPIES = 4
_LENGTHS = 8
_SPIN_CYCLES = 200_000  # about 0.1 ms


class Times(NamedTuple):
    """One call, in milliseconds by each clock; NaN by a clock that the target does not have."""

    wall: float
    cpu: float
    events: float


class Runner:
    """A private copy of a model, ready to be called with inputs that take turns; a call returns its times.

    Inputs of one shape: at least four sets take turns, so that no cache serves the same values twice. Inputs of
    several shapes (a distribution of lengths): every call runs each set once and returns the mean time of one, so that
    every call is the same work, whatever was called before.

    Args:
        model: on any device, in any mode; it is not changed. Or an ONNX file, for the runtimes that read one.
        inputs: the model's positional inputs, or several sets of them (see ``inputs_for``). Fewer than four sets of
            one shape are filled up with copies whose values are permuted.
        target: where and how to run it.

    Attributes:
        runtime_versions: version by name of what the times depend on.

    Raises:
        UserMistake: no inputs, ``+channels_last`` without an image among them, or a file that the runtime cannot read.
        TrialFailure: the model cannot be run by the target's runtime, or computes something else there.
    """

    def __init__(self, model: nn.Module | Path, inputs: Any, target: Target):
        sets = _sets(inputs, target)
        kind = RUNTIMES.get(target.runtime)
        if isinstance(model, Path) and not kind.reads_onnx:
            raise UserMistake(
                f"target {str(target)!r}: {model.name} is an ONNX file, which {target.runtime} does not read; "
                "use +onnxruntime, +openvino or +tensorrt"
            )
        self._runtime = kind(model, sets, target)
        self.runtime_versions: dict[str, str] = {**kind.versions(target), **self._runtime.found}
        several = len({tuple(tuple(x.shape) for x in tensors) for tensors in sets}) > 1
        self._turns = [list(range(len(sets)))] if several else [[number] for number in range(len(sets))]
        self._calls = 0
        self._clock = _clock(target, kind.cpu_clock)

    def __call__(self) -> Times:
        turn = self._turns[self._calls % len(self._turns)]
        self._calls += 1
        with _on_stream(self._runtime.stream):
            if len(turn) == 1:
                self._runtime.stage(turn[0])
                return self._clock(self._runtime.run)
            found = []
            for number in turn:
                self._runtime.stage(number)
                found.append(self._clock(self._runtime.run))
        return Times(*(sum(column) / len(turn) for column in zip(*found, strict=True)))

    def move(self) -> Callable[[], None] | None:
        """See ``Runtime.move``."""
        return self._runtime.move()

    def close(self) -> None:
        """Let go of the model and of the engine's memory; no call is possible afterwards."""
        self._runtime.close()


def relocate(models: Sequence[Runner], reference: Runner | None = None) -> bool:
    """Move all models and the reference to fresh places in memory, in random order; False when no model can be moved.

    For a moment everything is there twice.

    Where weights, inputs and Python's own objects lie decides which of them share sets of a cache, and with it one per
    cent and more of a model's time (Curtsinger and Berger, "Stabilizer", ASPLOS 2013): an accident of this process that
    says nothing of the model.
    """
    moved = [runner.move() for runner in random.Random().sample(models, len(models))]
    if not any(moved):
        return False
    # All copies are made before the first original is let go, or they would take each other's places.
    moved.append(None if reference is None else reference.move())
    for switch in moved:
        if switch is not None:
            switch()
    return True


def make_runner(model: nn.Module | Path, inputs: Any, target: Target) -> Runner:
    """``Runner(model, inputs, target)``: a callable that times one call of the model."""
    return Runner(model, inputs, target)


def inputs_for(
    target: Target, make_inputs: Callable[..., tuple[Tensor, ...]], *, seed: int = 0
) -> list[tuple[Tensor, ...]]:
    """Sets of inputs for a target, the same at every call.

    For a distribution of lengths there are eight sets; all models of a comparison meet the same lengths.

    Args:
        target: its batch and size.
        make_inputs: called as ``make_inputs(batch, generator)``. For a distribution it may have a parameter
            ``length``, and is then given one drawn from each eighth of the range; or draw a length itself, first of
            all from the generator; or always make the longest inputs, of which every tensor that is so long in its
            second dimension is cut to the drawn length.
        seed: of the lengths and of the values.

    Raises:
        UserMistake: a distribution of lengths for inputs without a second dimension of that length.
    """
    import torch

    def made(number: int, **options: int) -> tuple[Tensor, ...]:
        # One generator each: how much randomness another model's inputs take must not change the lengths.
        generator = torch.Generator().manual_seed(1000 * seed + number)
        return tuple(make_inputs(target.batch, generator, **options))

    if target.lengths is None:
        return [made(number) for number in range(_INPUT_COPIES)]
    drawn = list(enumerate(_drawn_lengths(*target.lengths, seed)))
    if "length" in inspect.signature(make_inputs).parameters:
        return [made(number, length=length) for number, length in drawn]
    sets = [made(number) for number, _ in drawn]
    longest = target.lengths[1]
    if all(any(_is_long(x, longest) for x in row) for row in sets):
        return [
            tuple(x[:, :length] if _is_long(x, longest) else x for x in row)
            for (_, length), row in zip(drawn, sets, strict=True)
        ]
    if len({tuple(tuple(x.shape) for x in row) for row in sets}) == 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in sets[0])
        raise UserMistake(
            f"target {str(target)!r}: size {target.size} is a range of lengths, but no input has {longest} as its "
            f"second dimension (shapes: {shapes}); give a single size"
        )
    return sets


def _is_long(x: Tensor, length: int) -> bool:
    return x.dim() > 1 and x.shape[1] == length


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
        elif target.device_kind == "cpu":
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

    limit = models * (_LENGTHS + 1) + 8
    wanted = {"recompile_limit": limit, "cache_size_limit": limit}
    refuse = {"fail_on_recompile_limit_hit": True, "fail_on_cache_limit_hit": True}
    chosen = [
        next({name: value} for name, value in pair.items() if hasattr(config, name))
        for pair in (wanted, refuse)
    ]
    torch.compiler.reset()
    with config.patch({**chosen[0], **chosen[1]}):
        yield
    torch.compiler.reset()


# -- clocks ------------------------------------------------------------------------------------------------------------

_Clock = Callable[[Callable[[], Any]], Times]


def _clock(target: Target, cpu_clock: str) -> _Clock:
    if target.is_cuda:
        import torch

        event: Any = torch.cuda.Event
        return EventClock(
            event(enable_timing=True),
            event(enable_timing=True),
            spin=lambda: torch.cuda._sleep(_SPIN_CYCLES),
            synchronize=torch.cuda.synchronize,
        )
    if target.device_kind == "mps":
        import torch

        return WaitingClock(torch.mps.synchronize)
    return HostClock(time.thread_time_ns if cpu_clock == "thread" else time.process_time_ns)


class HostClock:
    """Wall and CPU time of a call that returns when it is done."""

    def __init__(self, cpu_ns: Callable[[], int]):
        self._cpu_ns = cpu_ns

    def __call__(self, run: Callable[[], Any]) -> Times:
        cpu = self._cpu_ns()
        begun = time.perf_counter_ns()
        run()
        wall = (time.perf_counter_ns() - begun) / 1e6
        return Times(wall, (self._cpu_ns() - cpu) / 1e6, math.nan)


class WaitingClock:
    """Wall time of a call on a device without timed events, until the device is done."""

    def __init__(self, synchronize: Callable[[], object]):
        self._synchronize = synchronize

    def __call__(self, run: Callable[[], Any]) -> Times:
        self._synchronize()
        begun = time.perf_counter_ns()
        run()
        self._synchronize()
        return Times((time.perf_counter_ns() - begun) / 1e6, math.nan, math.nan)


class EventClock:
    """Wall time until the device is done, and the time between two events around the call.

    The device spins first, so that it has not gone to sleep, and is then awaited with all copies of the inputs: both
    clocks start with an empty queue.
    """

    def __init__(
        self, start: Any, end: Any, *, spin: Callable[[], object], synchronize: Callable[[], object]
    ):
        self._start, self._end = start, end
        self._spin, self._synchronize = spin, synchronize

    def __call__(self, run: Callable[[], Any]) -> Times:
        self._spin()
        self._synchronize()
        begun = time.perf_counter_ns()
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        wall = (time.perf_counter_ns() - begun) / 1e6
        return Times(wall, math.nan, float(self._start.elapsed_time(self._end)))


def _on_stream(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[Any]:
    if stream is None:
        return contextlib.nullcontext()
    import torch

    found: contextlib.AbstractContextManager[Any] = torch.cuda.stream(stream)
    return found


# -- inputs ------------------------------------------------------------------------------------------------------------


def _sets(inputs: Any, target: Target) -> list[tuple[Tensor, ...]]:
    """Sets of inputs on the CPU: as given when they are enough, else with permuted copies of one shape."""
    import torch

    given = list(inputs)
    if not given or not all(given if not isinstance(given[0], torch.Tensor) else [True]):
        raise UserMistake("inputs: there is none; give the tensors that the model is called with")
    rows = [given] if isinstance(given[0], torch.Tensor) else [list(row) for row in given]
    plain = [tuple(x.detach().cpu() for x in row) for row in rows]
    if target.channels_last and not any(x.dim() == 4 for row in plain for x in row):
        raise UserMistake(
            f"target {str(target)!r}: +channels_last is for images, but no input has 4 dimensions; leave it out"
        )
    if len({tuple(tuple(x.shape) for x in row) for row in plain}) > 1 or len(plain) >= _INPUT_COPIES:
        return plain
    return [
        tuple(_like(x, number) for x in plain[number % len(plain)])
        for number in range(len(plain) * math.ceil(_INPUT_COPIES / len(plain)))
    ]


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


def _drawn_lengths(low: int, high: int, seed: int) -> list[int]:
    """One uniform draw from each eighth of the range: the mean time over them varies less than over free draws."""
    rng = random.Random(f"lengths:{low}-{high}:{seed}")
    width = (high - low + 1) / _LENGTHS
    drawn = [low + int((part + rng.random()) * width) for part in range(_LENGTHS)]
    rng.shuffle(drawn)
    return drawn
