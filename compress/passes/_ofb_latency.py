"""Meeting a latency by measuring: multiply-accumulates are only the handle that is turned."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from compress.measuring import measure_against
from compress.passes.base import Context

__all__ = ["fit_latency"]

_ROUNDS = 6
_NEAR = 0.95
_SECONDS = 2.0


def fit_latency(
    at: Callable[[float], tuple[nn.Module, float]],
    limit: float,
    reference: nn.Module,
    share: float,
    context: Context,
) -> nn.Module:
    """The costliest model found whose measured latency is surely at most ``share`` of that of ``reference``.

    Args:
        at: a model of a cost of at most the number given, and that cost; raises UserMistake where there is none.
        limit: cost to begin with.
        share: of the reference's latency; the upper end of the measured ratio's interval has to stay below it.

    Raises:
        UserMistake: not even the narrowest model is fast enough.
    """
    best: tuple[float, nn.Module] | None = None
    for turn in range(4 * _ROUNDS):
        model, cost = at(limit)
        ratio, surely = _ratio(model, reference, context)
        context.report(
            f"ofb: {cost:.4g} MACs take {ratio:.3f} (surely at most {surely:.3f}) of {share:.3f} allowed"
        )
        if surely <= share and (best is None or cost > best[0]):
            best = (cost, model)
        if best is not None and (turn >= _ROUNDS - 1 or _NEAR * share <= surely <= share):
            break
        # A little below the target, lest noise makes every round end just above it; a fixed overhead makes latency fall
        # more slowly than the cost, and the next rounds make up for it.
        limit = min(cost, limit) * min(0.97 * share / surely, 2.0)
        if best is not None and limit <= best[0]:
            break
    if best is None:
        model, _ = at(0.0)  # names what the narrowest costs, and raises
        return model
    return best[1]


def _ratio(model: nn.Module, reference: nn.Module, context: Context) -> tuple[float, float]:
    models = {"narrower": model, "reference": reference}
    session = measure_against(
        models, "reference", context.example, context.target, seconds=_SECONDS, seed=context.seed
    )
    pair = session.pair("narrower", "reference")
    return pair.ratio, pair.high
