"""Can this machine be measured at all? Ten known models, twice."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nas.errors import UserMistake
from nas.latency.gate import DeviceGate
from nas.latency.measure import Options, measure_together
from nas.latency.rounds import Plan
from nas.latency.target import Target

__all__ = ["LEAST_TAU", "MOST_DEVIATION", "SelfTest", "agreement", "self_test"]

LEAST_TAU = 0.95
MOST_DEVIATION = 0.03

# Depth, width, image size: ViTs a step of about a fifth apart, so that an order has to be found.
_MODELS = (
    (2, 96, 64),
    (3, 96, 64),
    (2, 128, 80),
    (3, 128, 80),
    (2, 192, 80),
    (3, 192, 80),
    (4, 192, 80),
    (3, 192, 96),
    (4, 192, 96),
    (5, 192, 96),
)


@dataclass(frozen=True)
class SelfTest:
    """How well two measurements of the same ten models agree.

    Attributes:
        target: text of the target.
        tau: Kendall's rank correlation of the two.
        median_deviation: median over the models of the relative difference.
        clock, priority: by which clock, and what the system granted.
        reasons: what was out of bounds, with figures.
        first_ms, second_ms: both measurements by model.
    """

    target: str
    tau: float
    median_deviation: float
    clock: str
    priority: str
    reasons: tuple[str, ...]
    first_ms: dict[str, float]
    second_ms: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether latencies taken here may be called measured."""
        return self.tau >= LEAST_TAU and self.median_deviation <= MOST_DEVIATION

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "reasons": list(self.reasons), "passed": self.passed}


def self_test(
    target: Target, *, max_seconds: float = 20.0, progress: Callable[[dict[str, Any]], None] | None = None
) -> SelfTest:
    """Measure ten small ViTs twice, in two sessions of ``max_seconds`` each, from newly built models.

    Raises:
        UserMistake: the target is not there, or names an input size.
        GateTimeout: others have kept the device for ten minutes.
    """
    if target.size is not None:
        raise UserMistake(f"--target {target}: the self-test has inputs of its own; leave /{target.size} out")
    target.check()
    sessions = []
    # One scale for both, as for the candidates of a search: the reference's time is that of the first trusted session.
    with tempfile.TemporaryDirectory(prefix="nas-self-test-") as folder:
        options = Options(retries=0, scale=Path(folder) / "reference.json")
        for attempt in range(2):
            with DeviceGate(str(target.torch_device())).exclusive() as lease:
                sessions.append(
                    measure_together(
                        _models(target.batch),
                        target,
                        plan=Plan(max_seconds, seed=attempt),
                        options=options,
                        lease=lease,
                        progress=progress,
                    )
                )
    first, second = ({name: r.median_ms for name, r in s.results.items()} for s in sessions)
    tau, deviation = agreement(first, second)
    some = next(iter(sessions[0].results.values()))
    reasons = dict.fromkeys(reason for s in sessions for r in s.results.values() for reason in r.reasons)
    return SelfTest(str(target), tau, deviation, some.clock, some.priority, tuple(reasons), first, second)


def agreement(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, float]:
    """Kendall's tau-b and the median relative difference of two measurements of the same models."""
    from scipy.stats import kendalltau

    names: Sequence[str] = list(first)
    tau = kendalltau([first[name] for name in names], [second[name] for name in names]).statistic
    return float(tau), statistics.median(abs(second[name] / first[name] - 1) for name in names)


def _models(batch: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    import torch
    from timm.models.vision_transformer import VisionTransformer

    found = {}
    for depth, width, size in _MODELS:
        model = VisionTransformer(
            img_size=size, patch_size=16, embed_dim=width, depth=depth, num_heads=width // 32, num_classes=10
        )
        found[f"vit-{depth}x{width}-{size}px"] = (model, (torch.randn(batch, 3, size, size),))
    return found
