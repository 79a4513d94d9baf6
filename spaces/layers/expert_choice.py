"""Which experts a token takes, with which weights, and who finds room in them. Source: ``spaces.layers.expert_mlp``.

Letters: T tokens of the whole batch, N experts, k of them for each token.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["WEIGHTINGS", "by_expert", "choose", "room"]

WEIGHTINGS = ("ones", "shares", "scores")
"""Each chosen expert counts with weight 1; with a share of a common total; or with its value of the softmax."""


def choose(
    logits: Tensor, k: int, weighting: str, *, total: float, capacity: float, prioritised: bool
) -> tuple[Tensor, Tensor | None]:
    """Experts of each token, best first, (T, k), and their weights (T, k); None where all are 1.

    Args:
        logits: of the gate, (T, N).
        weighting: one of ``WEIGHTINGS``.
        total: what shares sum up to.
        capacity: see ``room``; 0 for no limit. The weight of what finds no room is 0.
        prioritised: tokens that are surest of their first choice come first, else those in front of the batch.
    """
    # Not those of the softmax: where one expert is far ahead, the others' are all 0.
    chosen = logits.topk(k, dim=1).indices
    scores = logits.softmax(dim=1).gather(1, chosen)
    weights: Tensor | None = None
    if weighting == "shares":
        weights = scores * (total / scores.sum(dim=1, keepdim=True))
    elif weighting == "scores":
        weights = scores
    if capacity:
        fits = _within_capacity(scores[:, 0], chosen, logits.shape[1], capacity, prioritised)
        weights = fits if weights is None else weights * fits
    return chosen, weights


def by_expert(
    chosen: Tensor, weights: Tensor | None, experts: int, capacity: float
) -> tuple[Tensor, list[int]]:
    """Positions among the T k choices, sorted by expert and without those that found no room; how many each has."""
    pairs = chosen.reshape(-1)
    if pairs.is_meta:  # only shapes are asked for
        count = len(pairs)
        if capacity:
            count = min(count, experts * room(len(chosen), experts, chosen.shape[1], capacity))
        each, more = divmod(count, experts)
        return pairs[:count], [each + (e < more) for e in range(experts)]
    if capacity and weights is not None:
        pairs = pairs.masked_fill(weights.reshape(-1) == 0, experts)
    loads = torch.bincount(pairs, minlength=experts)[:experts].tolist()
    return pairs.argsort(stable=True)[: sum(loads)], loads


def room(tokens: int, experts: int, k: int, capacity: float) -> int:
    """``k * int(capacity * ceil(T / N))``: how many tokens one expert takes."""
    # In whole numbers, because a size that an exporter keeps open cannot go through int(float); and in positive
    # ones, because ONNX divides towards zero.
    share = Fraction(capacity).limit_denominator(10_000)
    return k * (((tokens + experts - 1) // experts * share.numerator) // share.denominator)


def _within_capacity(
    best: Tensor, chosen: Tensor, experts: int, capacity: float, prioritised: bool
) -> Tensor:
    """1 for those of the (T, k) choices that find room in their experts, else 0; first choices before second ones."""
    tokens, k = best.shape[0], chosen.shape[1]
    # By topk, and sizes by shape: exporters know neither a stable sort nor len of what they keep open.
    order = best.topk(tokens).indices if prioritised else torch.arange(tokens, device=best.device)
    rivals = functional.one_hot(chosen[order].t().reshape(-1), experts)  # (k T, N), first choices in front
    place = (rivals.cumsum(0) * rivals).sum(1)
    fits = (place <= room(tokens, experts, k, capacity)).to(best.dtype).view(k, -1).t()
    return torch.zeros_like(fits).scatter(0, order[:, None].expand(-1, k), fits)
