"""Where the time of a call goes, module by module: hooks around every module, called in turn with bare runs.

Only for eager execution: a compiler or another runtime merges modules, so there is nothing left to hook. The figures
are for reading where the time goes; a latency is measured without hooks by ``nas.latency.measure``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from nas.errors import UserMistake
from nas.latency.gate import DeviceGate
from nas.latency.runner import session
from nas.latency.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LayerTime", "LayerTimes", "Mark", "check_layers", "layer_times", "per_layer", "per_layer_of"]

_WARMUP = 3
_LEAST_REPEATS = 3


@dataclass(frozen=True)
class LayerTime:
    """One module, over all its calls in one call of the model.

    Attributes:
        name: as in ``model.named_modules()``; empty for the model itself. A module under several names has its first.
        type: name of its class.
        depth: dots in the name plus one; 0 for the model itself.
        self_ms: what it did itself, outside the modules that it called; median over the repeats.
        total_ms: ``self_ms`` plus that of all it called; for the model itself the sum of every ``self_ms``.
        share: ``self_ms`` over the model's ``total_ms``; the shares sum to 1.
        calls: how often it was called.
    """

    name: str
    type: str
    depth: int
    self_ms: float
    total_ms: float
    share: float
    calls: int


@dataclass(frozen=True)
class LayerTimes:
    """Where the time went.

    Attributes:
        target: text of the target.
        clock: ``cpu`` (time of the thread, of a target with one), ``wall`` (more threads) or ``events`` (CUDA).
        layers: in the order of ``named_modules``; modules that are never called are not among them.
        plain_ms: median of the calls without hooks, by the same clock.
        hooked_ms: median of the calls with hooks.
        overhead: ``hooked_ms / plain_ms - 1``. The time inside the hooks is in no layer's figure on a CPU; what is
            left of the overhead is.
        repeats: calls of each kind.
    """

    target: str
    clock: str
    layers: tuple[LayerTime, ...]
    plain_ms: float
    hooked_ms: float
    overhead: float
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}


class Mark(NamedTuple):
    """A module entered or left, in nanoseconds: ``begun`` when the hook began, ``done`` when it was about to end."""

    module: int
    entered: bool
    begun: float
    done: float


def per_layer(
    model: nn.Module,
    inputs: Sequence[Tensor],
    target: Target,
    repeats: int = 20,
    *,
    max_seconds: float = 60.0,
) -> LayerTimes:
    """Time every module of ``model``; a copy is converted and run, alternately with and without hooks.

    The caller keeps the device free meanwhile (``nas.latency.DeviceGate``).

    Args:
        model: on any device, in any mode.
        inputs: what it is called with.
        target: ``cpu`` or ``cuda`` without ``+compile`` or another runtime.
        repeats: calls of each kind, at least 3.
        max_seconds: no further repeat is begun after this, once three are done.

    Raises:
        UserMistake: a target under which hooks do not see the modules, or that is not there; too few repeats.
    """
    import torch

    check_layers(target, repeats)
    target.check()
    device, dtype = target.torch_device(), target.torch_dtype()
    prepared: Any = copy.deepcopy(model).eval().to(device)
    arguments = [x.to(device) for x in inputs]
    if dtype != torch.float32:
        prepared = prepared.to(dtype)
        arguments = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
    if target.channels_last:
        prepared = prepared.to(memory_format=torch.channels_last)
        arguments = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in arguments]
    with session(target, 1):
        call = functools.partial(prepared, *arguments)
        clock = _clock(target)
        readings = _Events() if clock == "events" else _Readings(clock)
        for _ in range(_WARMUP):
            call()
        plain, hooked, marks = _repeat(prepared, call, readings, repeats, max_seconds)
    names = [(name, type(module).__name__) for name, module in prepared.named_modules()]
    before, after = statistics.median(plain), statistics.median(hooked)
    layers = tuple(layer_times(names, marks))
    return LayerTimes(str(target), clock, layers, before, after, after / before - 1, len(plain))


def per_layer_of(
    text: str,
    target: Target,
    *,
    size: str | None = None,
    repeats: int = 20,
    seed: int = 0,
    max_seconds: float = 60.0,
) -> LayerTimes:
    """``per_layer`` of the model that ``text`` names (see ``nas.sources``), with the device to itself.

    For a distribution of lengths that is its middle.

    Raises UserMistake as ``per_layer`` and ``load_source``, and for a file that is no torch module (ONNX).
    """
    import torch

    from nas.sources import load_source

    target = target if size is None else replace(target, size=size)
    check_layers(target, repeats)
    source = load_source(text, size=target.size)
    if source.model is None:
        raise UserMistake(f"--per-layer: model {text!r} is an ONNX file, which has no torch modules to time")
    middle = None if target.lengths is None else sum(target.lengths) // 2
    inputs = source.make_inputs(target.batch, torch.Generator().manual_seed(seed), length=middle)
    with DeviceGate(str(target.torch_device())).exclusive():
        return per_layer(source.model, inputs, target, repeats, max_seconds=max_seconds)


def check_layers(target: Target, repeats: int = 20) -> None:
    """Raises UserMistake for a target under which modules cannot be timed apart, and for too few repeats."""
    if target.runtime != "eager":
        raise UserMistake(
            f"--per-layer with target {str(target)!r}: {target.runtime} does not run module by module; "
            "leave the runtime out (eager)"
        )
    if target.device_kind not in ("cpu", "cuda"):
        raise UserMistake(
            f"--per-layer with target {str(target)!r}: only cpu and cuda can be timed by module"
        )
    if repeats < _LEAST_REPEATS:
        raise UserMistake(f"repeats={repeats} must be at least {_LEAST_REPEATS}")


# -- running -----------------------------------------------------------------------------------------------------------


def _clock(target: Target) -> str:
    """A short module is never preempted and the whole call often is: only CPU time keeps parts and whole consistent."""
    if target.is_cuda:
        return "events"
    return "cpu" if target.cpu_threads() == 1 else "wall"


class _Readings:
    """Marks by a clock of the host, in nanoseconds."""

    def __init__(self, clock: str):
        self.now: Callable[[], float] = time.thread_time_ns if clock == "cpu" else time.perf_counter_ns
        self._marks: list[Mark] = []

    def mark(self, module: int, entered: bool, begun: float) -> None:
        self._marks.append(Mark(module, entered, begun, self.now()))

    def span(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        begun = self.now()
        call()
        return (self.now() - begun) / 1e6

    def take(self) -> list[Mark]:
        """The marks since the last time."""
        taken, self._marks = self._marks, []
        return taken


class _Events(_Readings):
    """Marks by events on the CUDA stream. The host's hooks are in them only where the device waits for it."""

    def __init__(self) -> None:
        super().__init__("wall")
        self.now = lambda: 0.0
        self._recorded: list[tuple[int, bool, Any]] = []
        self._spare: list[Any] = []

    def _record(self) -> Any:
        import torch

        new: Any = torch.cuda.Event
        event = self._spare.pop() if self._spare else new(enable_timing=True)
        event.record()
        return event

    def mark(self, module: int, entered: bool, begun: float) -> None:
        self._recorded.append((module, entered, self._record()))

    def span(self, call: Callable[[], Any]) -> float:
        start = self._record()
        call()
        end = self._record()
        end.synchronize()
        self._spare += [start, end]
        return float(start.elapsed_time(end))

    def take(self) -> list[Mark]:
        recorded, self._recorded = self._recorded, []
        if not recorded:
            return []
        recorded[-1][2].synchronize()
        first = recorded[0][2]
        times = [first.elapsed_time(event) * 1e6 for _, _, event in recorded]
        self._spare += [event for _, _, event in recorded]
        return [
            Mark(module, entered, at, at) for (module, entered, _), at in zip(recorded, times, strict=True)
        ]


def _repeat(
    model: nn.Module, call: Callable[[], Any], readings: _Readings, repeats: int, max_seconds: float
) -> tuple[list[float], list[float], list[list[Mark]]]:
    """Milliseconds without hooks, with them, and the marks of each call with hooks."""
    plain: list[float] = []
    hooked: list[float] = []
    marks: list[list[Mark]] = []

    def with_hooks() -> None:
        with _hooks(model, readings):
            hooked.append(readings.span(call))
        marks.append(readings.take())

    with_hooks()  # the first marks allocate
    del hooked[:], marks[:]
    deadline = time.monotonic() + max_seconds
    while len(plain) < repeats and (len(plain) < _LEAST_REPEATS or time.monotonic() < deadline):
        # Which of the two comes first alternates, so that neither always finds what the other left in the caches.
        if len(plain) % 2:
            with_hooks()
        plain.append(readings.span(call))
        if len(hooked) < len(plain):
            with_hooks()
    return plain, hooked, marks


@contextlib.contextmanager
def _hooks(model: nn.Module, readings: _Readings) -> Iterator[None]:
    handles = []

    def enter(module: int, *_: Any) -> None:
        readings.mark(module, True, readings.now())

    def leave(module: int, *_: Any) -> None:
        readings.mark(module, False, readings.now())

    try:
        for number, module in enumerate(model.modules()):
            handles.append(module.register_forward_pre_hook(functools.partial(enter, number), prepend=True))
            handles.append(module.register_forward_hook(functools.partial(leave, number)))
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- reckoning ---------------------------------------------------------------------------------------------------------


def layer_times(modules: Sequence[tuple[str, str]], repeats: Sequence[Sequence[Mark]]) -> list[LayerTime]:
    """The layers of marks: self times as medians over the repeats, totals as their sums along the calls.

    Args:
        modules: name and type of each module, in the order that marks number them.
        repeats: marks of each repeat, in order of time. A module called again within itself counts once in its total.
    """
    own: dict[tuple[int, ...], list[float]] = defaultdict(list)
    calls: dict[int, int] = defaultdict(int)
    for marks in repeats:
        for path, nanoseconds in _self_times(marks).items():
            own[path].append(nanoseconds / 1e6)
    for mark in repeats[-1] if repeats else ():
        calls[mark.module] += mark.entered
    self_ms: dict[int, float] = defaultdict(float)
    total_ms: dict[int, float] = defaultdict(float)
    for path, values in own.items():
        # A path that only some inputs take is worth what it costs on average over the repeats it was taken in.
        middle = statistics.median(values) * len(values) / len(repeats)
        self_ms[path[-1]] += middle
        for module in set(path):
            total_ms[module] += middle
    whole = sum(self_ms.values())
    return [
        LayerTime(
            name,
            kind,
            name.count(".") + 1 if name else 0,
            self_ms[number],
            total_ms[number],
            self_ms[number] / whole,
            calls[number],
        )
        for number, (name, kind) in enumerate(modules)
        if number in self_ms
    ]


def _self_times(marks: Sequence[Mark]) -> dict[tuple[int, ...], float]:
    """Nanoseconds that each chain of calls spent in its last module, outside the hooks and the modules it called."""
    times: dict[tuple[int, ...], float] = defaultdict(float)
    path: list[int] = []
    since = 0.0
    for mark in marks:
        if path:
            times[tuple(path)] += mark.begun - since
        if mark.entered:
            path.append(mark.module)
        else:
            path.pop()
        since = mark.done
    return dict(times)
