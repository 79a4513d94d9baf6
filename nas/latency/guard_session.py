"""What a session shows by itself of the machine it ran on: signs that its figures are of no machine in particular.

``nas.latency.guard`` reads counters of this system, which know nothing of who else uses the processor from outside of a
virtual machine. The reference workload does. Where the bounds come from: 18 sessions of ten models, 12 s each on one
core, beside test runs that came and went on both cores of a virtual machine. A session's error is how far its models'
ratios lay from their medians over the quieter sessions. On a calm machine the level does not change at all, the drift
is below 10 %, and raw and corrected times are within 5 % of each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection

__all__ = ["unsteady"]

DRIFT = 1.25
"""How far apart the reference's first and last third may be. Ratios to neighbouring visits bear a slow change: sessions
of 0.81 and 1.16 were 1 % off (the worst model 4 %); those of 0.74 and 1.32 had models 12 to 18 % off."""

LEVEL_VISITS = 18
"""Visits of the reference that one level must last on average. A level is the median of nine visits; where it lasts for
less than two times nine, there is none to measure at. With fewer, sessions were 1.5 to 6 % off, the worst model 5 to
24 %; with more, 1 to 3 % except where raw times told."""

LEAST_SPLITS = 3
"""Fewer changes of the level say nothing of how long levels last."""

RAW = 1.15
"""How far the plain medians may be from those of the quiet visits, for the model in the middle. Up to 1.09 sessions
were 1 to 4 % off; from 1.15 on 2 to 6 %, the worst model 7 to 24 %: what the quiet visits were, most were not."""


def unsteady(*, drift: float, splits: int, visits: int, raw_over_corrected: Collection[float]) -> list[str]:
    """Reasons not to trust a session for what its own times show, one line each; none for a steady one.

    Args:
        drift: the reference's last third over its first third.
        splits: how often the reference's level changed by more than 5 %.
        visits: of the reference.
        raw_over_corrected: of each model, the median of all its visits over its ratio times the reference's time in
            this session (not its long-run time, which ``nas.latency.guard.displaced`` judges); none if empty.
    """
    reasons = []
    # Written so that NaN, too, is a reason.
    if not 1 / DRIFT <= drift <= DRIFT:
        reasons.append(
            f"the reference's time changed by {drift - 1:+.0%} from the first third of the session to the last (bound "
            f"{DRIFT:g} times): the machine's speed changed"
        )
    if splits >= LEAST_SPLITS and splits * LEVEL_VISITS > visits:
        reasons.append(
            f"the reference's level changed {splits} times in {visits} visits (bound 1 in {LEVEL_VISITS}): the machine "
            "had no level to measure at"
        )
    raw = statistics.median(raw_over_corrected) if raw_over_corrected else 1.0
    if not 1 / RAW <= raw <= RAW:
        reasons.append(
            f"plain medians are {raw:.2f} times those of the quiet visits (bound {RAW:g}): most of the session was "
            "disturbed"
        )
    return reasons
