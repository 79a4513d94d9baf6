"""Measuring models that are named by texts, in a fresh process that holds the device.

A model that crashes, hangs or eats the memory is named among the failures, and the others are measured without it.
What hangs is told by silence: each model has its own time to be built and to answer its first call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserMistake
from nas.latency.gate import PATIENCE_SECONDS, DeviceGate, GateTimeout, LeaseLost
from nas.latency.identity import describe_inputs
from nas.latency.measure import Options, measure_together
from nas.latency.reference import check_scale_file
from nas.latency.result import Session
from nas.latency.rounds import Plan
from nas.latency.runtimes import RUNTIMES
from nas.latency.target import Target
from nas.source_inputs import Extent

if TYPE_CHECKING:
    from nas.executors import Outcome
    from nas.sources import Source

__all__ = ["measure_sources"]

_MEMORY_SHARE = 0.9
_BUILD_SECONDS = 300.0
"""What one model may take to be built or to answer its first call before it counts as hanging."""

_COMPILE_SECONDS = 900.0
"""The same where the runtime exports or compiles it."""

_START_SECONDS = 300.0
"""For the start of the process: a cold disk and a loaded machine take a minute to import what it needs."""

_LOOK_SECONDS = 1.0


def measure_sources(
    texts: Sequence[str],
    target: str,
    *,
    size: str | None = None,
    plan: Plan | None = None,
    compare: bool = False,
    against: str | None = None,
    margin: float | None = None,
    memory: bool = False,
    energy: bool = False,
    priority: str = "auto",
    scale: Path | None = None,
    stall_seconds: float | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> Session:
    """Measure the models that ``texts`` name, together, in a process of their own.

    Args:
        texts: in the forms of ``nas.sources``; one that is given again is named ``TEXT (2)``.
        target: text of the target.
        size: input size, as for ``nas.sources.load_source``; by default that of the target, else of each model.
        plan: how much to measure; 30 seconds by default.
        compare: also compare every two of them, or each with ``against``.
        margin: a smaller difference than this share is not called one; 1 % by default.
        memory, energy: measure these as well.
        priority: ``auto`` or ``off``.
        scale: file of the reference's times; sessions that share it share a scale, and their figures compare.
        stall_seconds: silence after which a model counts as hanging while it is built and first called (in the rounds
            ``plan.max_seconds`` more). By default 300, or 900 where the runtime compiles.
        on_progress: told which model is visited (``visit``), that the device is waited for (``wait``, with ``held_by``
            while another process measures on it: its id, or None where that is not known), which round was made
            (``round``), and which model was left out (``failed``, with its ``reason``).

    Raises:
        UserMistake: an unknown model or target, a size that does not fit, models with different inputs that are to be
            compared, a ``scale`` that is another kind of file, an ONNX file for a runtime that reads none.
    """
    parsed = Target.parse(target)
    parsed.check()
    if size is not None:
        _check_size(parsed, size)
    if scale is not None:
        check_scale_file(scale)
    _check_onnx(texts, parsed)
    plan = plan or Plan(max_seconds=30.0)
    payload = {
        "target": target,
        "size": size if size is not None else parsed.size,
        "plan": asdict(plan),
        "compare": compare or against is not None,
        "against": against,
        "margin": margin,
        "options": {"priority": priority, "energy": energy},
        "scale": None if scale is None else str(scale.resolve()),
    }
    named = _named(texts)
    if against is not None and against not in named:
        raise UserMistake(f"against={against!r} is not among the models: {', '.join(named)}")
    if stall_seconds is None:
        stall_seconds = _BUILD_SECONDS if parsed.runtime == "eager" else _COMPILE_SECONDS
    tell = on_progress or (lambda event: None)
    left, failures = list(named), dict[str, str]()
    while left:
        watch = _Watch(left, stall_seconds, plan.max_seconds, tell)
        found = _attempt(payload, {name: named[name] for name in left}, watch)
        if isinstance(found, Session):
            session = replace(found, failures=failures)
            return _with_memory(session, named, payload) if memory else session
        failures[watch.touched] = found
        tell({"failed": watch.touched, "reason": found})
        left = [name for name in left if name not in failures]
        if against in failures:
            break
    return Session(target=str(parsed), results={}, failures=failures)


def _check_size(target: Target, size: str) -> None:
    """Raises UserMistake naming the option: the same syntax as in a target, but not given there."""
    Extent.parse(size)
    try:
        replace(target, size=size)
    except UserMistake as mistake:
        raise UserMistake(f"--size {size}: {str(mistake).partition('; ')[2] or mistake}") from None


def _check_onnx(texts: Sequence[str], target: Target) -> None:
    """Before anything is asked of the file: what it lacks does not matter to a runtime that cannot read it."""
    found = [path for text in texts if (path := Path(text)).suffix.lower() == ".onnx" and path.is_file()]
    if found and not RUNTIMES.get(target.runtime).reads_onnx:
        raise UserMistake(
            f"target {str(target)!r}: {found[0]} is an ONNX file, which {target.runtime} does not read; "
            "use +onnxruntime, +openvino or +tensorrt"
        )


def _attempt(payload: dict[str, Any], texts: dict[str, str], watch: _Watch) -> Session | str:
    """One process for these models: their session, or why the model that it was at must be left out."""
    from nas.executors import LocalExecutor

    with LocalExecutor(1, retries=0, memory_limit_bytes=_memory_limit()) as executor:
        future = executor.submit(
            "nas.measure_sources:job", {**payload, "texts": texts}, on_event=watch.on_event, tag="measurement"
        )
        outcome = watch.outcome(future)
        if outcome is None:
            executor.close(kill=True)
            return watch.silence()
    if outcome.value is None:
        return outcome.failure.reason if outcome.failure else "no outcome"
    if "mistake" in outcome.value:
        raise UserMistake(outcome.value["mistake"])
    return Session.from_dict(outcome.value)


class _Watch:
    """A measuring process from outside: which model it is at, and whether it still gives signs of life."""

    def __init__(
        self,
        names: Sequence[str],
        stall_seconds: float,
        max_seconds: float,
        tell: Callable[[dict[str, Any]], None],
    ):
        self.touched = names[0]
        self._names, self._tell = frozenset(names), tell
        self._stall, self._in_rounds = stall_seconds, stall_seconds + max_seconds
        self._usual = stall_seconds
        self._limit = _START_SECONDS + stall_seconds
        self._signs = 0

    def on_event(self, event: dict[str, Any]) -> None:
        """What the process tells; called by another thread than ``outcome``."""
        visit = event.get("visit")
        if visit in self._names:
            self.touched = visit
        elif (
            visit is not None
        ):  # the reference: what crashes there is what was visited before; all are built by now
            self._usual = self._in_rounds
        self._limit = PATIENCE_SECONDS + self._stall if "wait" in event else self._usual
        self._signs += 1
        self._tell(event)

    def outcome(self, future: Future[Outcome]) -> Outcome | None:
        """Waits for the end; None when nothing was heard for too long."""
        tick = min(_LOOK_SECONDS, self._stall / 4)
        silent, heard, before = 0.0, self._signs, time.monotonic()
        while not wait([future], timeout=tick).done:
            now = time.monotonic()
            # While this process itself was stopped it could hear nothing: only the time that it looked counts.
            silent = silent + min(now - before, 2 * tick) if heard == self._signs else 0.0
            heard, before = self._signs, now
            if silent >= self._limit:
                return None
        return future.result()

    def silence(self) -> str:
        """Why the model that it is at is left out."""
        doing = "in the rounds" if self._usual == self._in_rounds else "while it was built and first called"
        return f"hangs: no sign of life for {self._limit:g} s {doing}; left out"


def memory_job(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
    """Peak memory of one model, for a process that has run nothing before: used memory is used again unseen."""
    from nas.latency.extras import peak_memory
    from nas.latency.runner import inputs_for, make_runner, session
    from nas.sources import load_source

    target = _sized(payload)
    source = load_source(payload["text"], size=payload["size"])
    inputs = inputs_for(target, source.make_inputs)
    with session(target, 1):
        runner = make_runner(_content(source), inputs, target)
        with DeviceGate(str(target.torch_device()), stale_after=_BUILD_SECONDS).exclusive():
            found = peak_memory(runner, target)
        return {"bytes": found.bytes, "how": found.how}


def _memory_limit() -> int:
    import psutil

    return int(_MEMORY_SHARE * psutil.virtual_memory().available)


def _content(source: Source) -> Any:
    return source.onnx if source.model is None else source.model


def _sized(payload: dict[str, Any]) -> Target:
    return replace(Target.parse(payload["target"]), size=payload["size"])


def _with_memory(session: Session, named: dict[str, str], payload: dict[str, Any]) -> Session:
    from nas.executors import LocalExecutor

    results = dict(session.results)
    for name, result in results.items():
        with LocalExecutor(1, retries=0, memory_limit_bytes=_memory_limit()) as executor:
            asked = {**payload, "text": named[name]}
            outcome = executor.submit(
                "nas.measure_sources:memory_job", asked, time_limit=_BUILD_SECONDS
            ).result()
        found = outcome.value or {"bytes": None, "how": outcome.failure.reason if outcome.failure else ""}
        results[name] = replace(result, peak_memory_bytes=found["bytes"], peak_memory_how=found["how"])
    return replace(session, results=results)


def _named(texts: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for text in texts:
        copies = sum(found == text for found in named.values())
        named[text if not copies else f"{text} ({copies + 1})"] = text
    return named


def job(payload: dict[str, Any], channel: Any) -> dict[str, Any]:
    """What the process does. Returns the dict form of a session, or ``{"mistake": text}``."""
    from nas.latency.runner import inputs_for
    from nas.sources import load_source

    scale = None if payload["scale"] is None else Path(payload["scale"])
    margin = {} if payload["margin"] is None else {"margin": payload["margin"]}
    models, keys = {}, {}
    try:
        target = _sized(payload)
        for name, text in payload["texts"].items():
            channel.event({"visit": name})
            source = load_source(text, size=payload["size"])
            inputs = inputs_for(target, source.make_inputs, seed=payload["plan"]["seed"])
            if not all(inputs):
                raise UserMistake(
                    f"model {text!r}: takes no inputs; a model is measured by calls with tensors, "
                    "and a file may be empty or cut short"
                )
            models[name] = (_content(source), inputs)
            keys[name] = source.key
        if payload["compare"]:
            _check_alike({name: describe_inputs(inputs) for name, (_, inputs) in models.items()})
        gate = DeviceGate(str(target.torch_device()), stale_after=_BUILD_SECONDS)
        channel.event({"wait": "device", **_held(gate)})
        with gate.exclusive() as lease:
            return measure_together(
                models,
                target,
                plan=Plan(**payload["plan"]),
                pairs=payload["compare"],
                against=payload["against"],
                options=Options(**payload["options"], keys=keys, scale=scale),
                lease=lease,
                progress=channel.event,
                **margin,
            ).to_dict()
    except (UserMistake, GateTimeout) as mistake:
        return {"mistake": str(mistake)}
    except LeaseLost as lost:
        return {"mistake": f"the device was taken over by another process meanwhile ({lost}); measure again"}


def _held(gate: DeviceGate) -> dict[str, int | None]:
    """Who measures on the device just now; empty when nobody does."""
    files = gate._files
    number = files.latest()
    if not number or files.over(number):
        return {}
    owner = files.owner(number)
    return {"held_by": None if owner is None else owner.pid}


def _check_alike(inputs: Mapping[str, list[list[Any]]]) -> None:
    """Which of two models is faster is a question only where both are given the same. Raises UserMistake."""
    first, *others = inputs
    for other in others:
        if inputs[other] != inputs[first]:
            raise UserMistake(
                f"--compare: models with different inputs cannot be compared: {first!r} takes "
                f"{_inputs_text(inputs[first])}, {other!r} takes {_inputs_text(inputs[other])}; "
                "give one --size that fits both, or leave --compare out"
            )


def _inputs_text(described: list[list[Any]], most: int = 4) -> str:
    texts = [f"{'x'.join(map(str, shape))} {dtype}" for shape, dtype in described]
    return " and ".join([*texts[:most], *["others"] * (len(texts) > most)])
