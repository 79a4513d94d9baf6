"""Batched beam search for any encoder-decoder, with the length penalty of GNMT (Wu et al. 2016, section 7).

The model is used through ``encode(source) -> memory`` and ``decode(target_in, memory) -> logits`` when it has both, so
that the source is encoded once; ``memory`` may be anything built of tensors (batch first), tuples, lists and dicts. A
model without them is called as ``model(source, target_in)`` at every step, which gives the same result more slowly.

Letters: B sentences, K beam, S source length, T target length so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["beam_search", "select_rows"]

_Hypothesis = tuple[float, list[int]]


def select_rows(memory: Any, rows: Tensor) -> Any:
    """The same structure with every tensor replaced by its ``rows`` (indices into dimension 0; may repeat).

    Raises TypeError for anything but tensors, tuples, lists, dicts, numbers, strings and None.
    """
    if isinstance(memory, Tensor):
        return memory.index_select(0, rows)
    if isinstance(memory, tuple):
        parts = [select_rows(part, rows) for part in memory]
        return type(memory)(*parts) if hasattr(memory, "_fields") else tuple(parts)
    if isinstance(memory, list):
        return [select_rows(part, rows) for part in memory]
    if isinstance(memory, dict):
        return {name: select_rows(part, rows) for name, part in memory.items()}
    if memory is None or isinstance(memory, bool | int | float | str):
        return memory
    raise TypeError(f"encode() returned a {type(memory).__name__}; use tensors in tuples, lists or dicts")


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    source: Tensor,
    *,
    begin: int,
    end: int,
    padding: int,
    max_length: int,
    beam: int = 4,
    length_penalty: float = 0.6,
) -> list[list[int]]:
    """The best translation found of each source sentence, without ``begin`` and ``end``.

    A hypothesis Y, ``end`` included, scores log P(Y) / ((5 + |Y|) / 6) ** ``length_penalty``. The search of a
    sentence ends when K hypotheses are complete, or when no living one can still beat the best complete one.

    Args:
        model: in eval mode; see the module's docstring.
        source: (B, S) int64.
        begin, end, padding: special ids; ``begin`` and ``padding`` are never produced.
        max_length: most tokens of a translation, ``end`` included (T never exceeds it); at least 1.
        beam: K, at least 1; 1 is greedy search.
        length_penalty: at least 0; 0 compares log-probabilities alone.

    Returns:
        B lists of token ids, each at most ``max_length`` - 1 long.
    """
    if beam < 1 or max_length < 1 or length_penalty < 0:
        raise ValueError(
            f"beam={beam} and max_length={max_length} must be >= 1, length_penalty={length_penalty} >= 0"
        )
    memory, decode = _prepared(model, source)
    device, count = source.device, source.shape[0]
    memory = select_rows(memory, torch.arange(count, device=device).repeat_interleave(beam))
    prefix = torch.full((count * beam, 1), begin, dtype=torch.int64, device=device)
    scores = torch.full((count, beam), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams start alike; one alone may grow at the first step
    finished: list[list[_Hypothesis]] = [[] for _ in range(count)]
    active = list(range(count))  # sentence of each group of K rows
    for length in range(1, max_length + 1):
        log_probs = decode(prefix, memory)[:, -1].float().log_softmax(-1)  # (B*K, V)
        log_probs[:, [begin, padding]] = -torch.inf
        if length == max_length:
            log_probs[:, :end] = log_probs[:, end + 1 :] = -torch.inf
        candidates, origins, tokens = _best(scores, log_probs, end)
        _collect(finished, active, prefix, candidates, origins, tokens, end, _penalty(length, length_penalty))
        candidates = candidates.masked_fill(tokens == end, -torch.inf)
        scores, picks = candidates.topk(beam, dim=1)
        rows = origins.gather(1, picks) + beam * torch.arange(len(active), device=device)[:, None]
        prefix = torch.cat([prefix[rows.flatten()], tokens.gather(1, picks).flatten()[:, None]], dim=1)
        bounds = (scores[:, 0] / _penalty(max_length, length_penalty)).tolist()
        going = [g for g, n in enumerate(active) if not _settled(finished[n], bounds[g], beam)]
        if not going:
            break
        if len(going) < len(active):
            groups = torch.tensor(going, device=device)
            kept = (groups[:, None] * beam + torch.arange(beam, device=device)).flatten()
            prefix, scores, memory = prefix[kept], scores[groups], select_rows(memory, kept)
            active = [active[g] for g in going]
    return [max(hypotheses)[1] if hypotheses else [] for hypotheses in finished]


def _prepared(model: nn.Module, source: Tensor) -> tuple[Any, Callable[[Tensor, Any], Tensor]]:
    encode, decode = getattr(model, "encode", None), getattr(model, "decode", None)
    if callable(encode) and callable(decode):
        return encode(source), decode
    return source, lambda target_in, repeated: model(repeated, target_in)


def _penalty(length: int, alpha: float) -> float:
    return float(((5 + length) / 6) ** alpha)


def _best(scores: Tensor, log_probs: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """The 2K best continuations of each sentence, best first: score, beam they continue, token; (B, 2K) each.

    2K, because at most K of them end and K must live on.
    """
    count, beam = scores.shape
    vocabulary = log_probs.shape[-1]
    totals = (scores[:, :, None] + log_probs.view(count, beam, vocabulary)).flatten(1)
    best, places = totals.topk(min(2 * beam, totals.shape[1]), dim=1)
    return best, places // vocabulary, places % vocabulary


def _collect(
    finished: list[list[_Hypothesis]],
    active: list[int],
    prefix: Tensor,
    candidates: Tensor,
    origins: Tensor,
    tokens: Tensor,
    end: int,
    penalty: float,
) -> None:
    """Adds the complete ones among the K best continuations of each sentence to ``finished``."""
    beam = prefix.shape[0] // len(active)
    ended = (tokens[:, :beam] == end) & candidates[:, :beam].isfinite()
    if not ended.any():
        return
    values, beams = candidates.tolist(), origins.tolist()
    for group, rank in ended.nonzero().tolist():
        row = group * beam + beams[group][rank]
        finished[active[group]].append((values[group][rank] / penalty, prefix[row, 1:].tolist()))


def _settled(hypotheses: list[_Hypothesis], bound: float, beam: int) -> bool:
    """Log-probabilities only fall and the penalty only grows, so ``bound`` is the most a living beam can reach."""
    return bool(hypotheses) and (len(hypotheses) >= beam or max(hypotheses)[0] >= bound)
