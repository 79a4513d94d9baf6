"""Measuring models that are named by texts, in a fresh process that holds the device.

A model that crashes, hangs or eats the memory is named among the failures, and the others are measured without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserMistake
from nas.latency.gate import PATIENCE_SECONDS, DeviceGate, GateTimeout, LeaseLost
from nas.latency.measure import Options, measure_together
from nas.latency.result import Session
from nas.latency.rounds import Plan
from nas.latency.target import Target

if TYPE_CHECKING:
    from nas.executors import Outcome
    from nas.sources import Source

__all__ = ["measure_sources"]

_MEMORY_SHARE = 0.9
_BUILD_SECONDS = 300.0
"""What building, exporting or compiling one model may take before its process counts as hanging."""


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
        on_progress: told which model is visited and which round was made.

    Raises:
        UserMistake: an unknown model or target, a size that does not fit.
    """
    from nas.executors import LocalExecutor

    parsed = Target.parse(target)
    parsed.check()
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
    left, failures = list(named), dict[str, str]()
    with LocalExecutor(1, retries=0, memory_limit_bytes=_memory_limit()) as executor:
        while left:
            touched = left[0]

            def on_event(event: dict[str, Any]) -> None:
                nonlocal touched
                # The reference is ours: what crashes there is what was visited before it.
                touched = event["visit"] if event.get("visit") in named else touched
                if on_progress is not None:
                    on_progress(event)

            outcome: Outcome = executor.submit(
                "nas.measure_sources:job",
                {**payload, "texts": {name: named[name] for name in left}},
                on_event=on_event,
                time_limit=PATIENCE_SECONDS + 2 * (plan.max_seconds + _BUILD_SECONDS * len(left)),
                tag="measurement",
            ).result()
            if outcome.value is not None:
                if "mistake" in outcome.value:
                    raise UserMistake(outcome.value["mistake"])
                session = replace(Session.from_dict(outcome.value), failures=failures)
                return _with_memory(session, named, payload) if memory else session
            reason = outcome.failure.reason if outcome.failure else "no outcome"
            failures[touched] = reason
            left = [name for name in left if name not in failures]
            if against in failures:
                break
    return Session(target=str(parsed), results={}, failures=failures)


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

    target = _sized(payload)
    scale = None if payload["scale"] is None else Path(payload["scale"])
    margin = {} if payload["margin"] is None else {"margin": payload["margin"]}
    models, keys = {}, {}
    try:
        for name, text in payload["texts"].items():
            channel.event({"visit": name})
            source = load_source(text, size=payload["size"])
            inputs = inputs_for(target, source.make_inputs, seed=payload["plan"]["seed"])
            models[name] = (_content(source), inputs)
            keys[name] = source.key
        gate = DeviceGate(str(target.torch_device()), stale_after=_BUILD_SECONDS)
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
