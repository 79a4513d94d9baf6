"""Latency of one candidate: predicted where that is enough to discard it, else measured alone on its device."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nas.errors import TrialFailure
from nas.executors.ray_targets import split_ray_target
from nas.latency import DeviceGate, LatencyResult, LeaseLost, Options, Session, Target, measure

if TYPE_CHECKING:
    from torch import nn

    from nas.latency.identity import Identity
    from nas.latency.measure import Lease
    from nas.tasks.base import Task

__all__ = [
    "against",
    "alone_on",
    "conditions_of",
    "identity_here",
    "measure_candidate",
    "over_budget",
    "predicted_over_budget",
]

logger = logging.getLogger(__name__)

LEAST_MEASURED = 10
"""Measurements of a run from which on the latency of further candidates is predicted."""

_T = TypeVar("_T")
_TAKEOVERS = 3

_SEEN_VERSIONS: dict[str, list[dict[str, str]]] = {}
"""What this process has measured with, by target: some runtimes tell their versions only once they have a model."""


def over_budget(budget: float | None, latency: Mapping[str, Any]) -> str | None:
    """Why a measured latency does not hold the budget (milliseconds): only the upper end of its interval counts.

    An untrusted latency below the budget does not discard its candidate, or a search on a busy machine would find
    nothing. Nor does it hold the budget: the report says so until a trusted measurement does, at the latest that of
    the finalists (``RunReport.budget_doubt``).
    """
    if budget is None or latency["high_ms"] <= budget:
        return None
    interval = f"{latency['median_ms']:.3g} ms ({latency['low_ms']:.3g}-{latency['high_ms']:.3g})"
    how = "exceed" if latency["low_ms"] > budget else "may exceed"
    doubt = "" if latency.get("trusted", True) else f" (untrusted: {'; '.join(latency['reasons'])})"
    return f"{interval} {how} the latency budget of {budget:g} ms{doubt}"


def predicted_over_budget(skeleton: nn.Module, task: Task, payload: Mapping[str, Any]) -> str | None:
    """Why all of the predicted interval is over the latency budget; None when it is not, or nobody can tell.

    The predictor is fitted anew to what the run has measured under the conditions of this machine as they are now, by
    the clock of the latest of these measurements. To be called where the candidate would be measured. Given
    architectures are always measured, so that a report can compare with them.
    """
    config, measured = payload["config"], payload.get("measured") or []
    budget, measured = config["latency_budget"], [sample for sample in measured if sample["trusted"]]
    if budget is None or payload.get("named") or len(measured) < LEAST_MEASURED:
        return None
    from nas.latency.prediction import LatencyPredictor, decide

    target = Target.parse(split_ray_target(config["target"])[1])
    here = _digests_here(target)
    identity = next((s["conditions"] for s in reversed(measured) if _digest(s["conditions"]) in here), None)
    samples = [sample for sample in measured if sample["conditions"] == identity]
    if identity is None or len(samples) < LEAST_MEASURED:
        return None
    predictor = LatencyPredictor(identity=identity, coverage=_coverage(len(samples)))
    predictor.fit([sample["work"] for sample in samples], [sample["median_ms"] for sample in samples])
    found = predictor.predict(_work(skeleton, task, target))
    if decide(found, budget) != "over":
        return None
    return (
        f"predicted {found.median_ms:.3g} ms ({found.low_ms:.3g}-{found.high_ms:.3g} at "
        f"{_coverage(len(samples)):.0%}, from {len(samples)} measured), "
        f"over the latency budget of {budget:g} ms; not built"
    )


def identity_here(target: Target) -> Identity:
    """What a measurement on ``target`` would be made under now, in this process, without measuring anything.

    Takes the priority and the cores that a measurement would be granted, for a tenth of a second. Of the ``versions``
    those that a runtime tells only of a model are missing; inputs and key are empty.
    """
    from nas.latency.identity import identity_of
    from nas.latency.priority import undisturbed

    threads = target.cpu_threads() if target.device == "cpu" else 1
    with undisturbed(threads) as granted:
        return identity_of(target, [], None, priority=granted.kind, affinity=granted.affinity)


def conditions_of(identity: Mapping[str, Any], clock: str) -> str:
    """Under which conditions a latency was measured, as ``DIGEST-CLOCK``: only those of equal ones compare."""
    from nas.latency.identity import Identity
    from nas.latency.prediction import pooled_identity

    return f"{pooled_identity(Identity.from_dict(identity).to_dict())}-{clock}"


def _digest(conditions: str) -> str:
    return conditions.rpartition("-")[0]


def _digests_here(target: Target) -> set[str]:
    """Digests of the conditions that hold now, for each set of versions that this process has measured with."""
    here = identity_here(target)
    seen = [here.versions, *_SEEN_VERSIONS.get(str(target), [])]
    return {_digest(conditions_of(replace(here, versions=versions).to_dict(), "")) for versions in seen}


def _coverage(samples: int) -> float:
    """The widest interval that so few left-out errors can give: (n + 1) * coverage must not exceed n."""
    return 0.99 if samples >= 100 else 0.95 if samples >= 19 else 0.9


def measure_candidate(
    model: nn.Module, task: Task, target: Target, payload: Mapping[str, Any], *, seconds: float = 1.0
) -> dict[str, Any]:
    """JSON form of the latency on ``target``, with the counted ``work`` and the ``conditions`` beside it.

    Raises TrialFailure when the latency is no number, or the device was lost to others again and again.
    """
    # Before the search there is no run directory yet, and nothing may be written.
    scale = Path(payload["scale"]) if "scale" in payload else None
    keys = {"model": payload["key"]} if "key" in payload else {}
    options = Options(scale=scale, keys=keys, ours=_family() if target.is_cuda else ())
    inputs = task.example_inputs(target.batch, target.torch_device())

    def alone(lease: Lease) -> LatencyResult:
        return measure(
            model,
            inputs,
            target,
            max_seconds=seconds,
            limit_ms=payload["config"]["latency_budget"],
            options=options,
            lease=lease,
        )

    result = alone_on(target, alone)
    if not math.isfinite(result.median_ms) or result.median_ms <= 0:
        raise TrialFailure("nan", f"latency is {result.median_ms}")
    seen, versions = _SEEN_VERSIONS.setdefault(str(target), []), result.identity["versions"]
    if versions not in seen:
        seen.append(versions)
    return {
        **result.to_dict(),
        "work": _work(model, task, target),
        "conditions": conditions_of(result.identity, result.clock),
    }


def _family() -> tuple[int, ...]:
    """The other workers of our driver: they keep their place on the device, but rest while we measure."""
    import psutil

    with contextlib.suppress(psutil.Error):
        driver = psutil.Process(os.getppid())
        return (driver.pid, *(child.pid for child in driver.children(recursive=True)))
    return ()


def alone_on(target: Target, work: Callable[[Lease], _T]) -> _T:
    """Do ``work`` while nothing else of ours runs on the device; again if another process took it over meanwhile.

    Raises TrialFailure when that happens several times.
    """
    for _ in range(_TAKEOVERS):
        try:
            with DeviceGate(str(target.torch_device())).exclusive() as lease:
                return work(lease)
        except LeaseLost as lost:
            logger.info("measured again: %s", lost)
    raise TrialFailure("error", f"the device was taken over {_TAKEOVERS} times during the measurement")


def against(found: Session, label: str, base: str) -> dict[str, Any]:
    """JSON form of a result and its ``conditions``, with its ratio to ``base`` in place of that to the reference."""
    result = found.results[label]
    measured = {**result.to_dict(), "conditions": conditions_of(result.identity, result.clock)}
    if label == base:
        return {**measured, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0, "verdict": None}
    pair = found.pair(label, base)
    ratios = {"ratio": pair.ratio, "ratio_low": pair.low, "ratio_high": pair.high}
    return {**measured, **ratios, "verdict": pair.verdict}


def _work(model: nn.Module, task: Task, target: Target) -> dict[str, float]:
    import torch

    from nas.latency.prediction import count_work

    return count_work(model, task.example_inputs(target.batch, torch.device("cpu"))).to_dict()
