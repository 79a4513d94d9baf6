"""Beam search against brute force and greedy search, on models whose probabilities are drawn."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas.tasks.beam_search import beam_search, select_rows

PADDING, BEGIN, END = 0, 1, 2


class Lookup(nn.Module):
    """Log-probabilities that depend on the source and on the whole target so far, drawn once."""

    def __init__(self, vocabulary: int, seed: int, ends: float = 0.0):
        super().__init__()
        self.vocabulary, self.seed, self.ends = vocabulary, seed, ends
        self.encoded = 0

    def row(self, source: list[int], target: list[int]) -> Tensor:
        drawn = np.random.default_rng([self.seed, *source, 99, *target]).normal(0, 2, self.vocabulary)
        drawn[END] += self.ends
        return torch.tensor(drawn, dtype=torch.float32)

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        rows = [
            torch.stack([self.row(s, t[: i + 1]) for i in range(len(t))])
            for s, t in zip(source.tolist(), target_in.tolist(), strict=True)
        ]
        return torch.stack(rows)


class Memory(NamedTuple):
    source: Tensor
    more: dict[str, Any]


class LookupWithMemory(Lookup):
    def encode(self, source: Tensor) -> Memory:
        self.encoded += 1
        return Memory(source, {"mask": (None, [source == PADDING]), "heads": 2})

    def decode(self, target_in: Tensor, memory: Memory) -> Tensor:
        assert memory.more["mask"][1][0].shape == memory.source.shape
        return self.forward(memory.source, target_in)


def score(model: Lookup, source: list[int], sentence: tuple[int, ...], length: int, penalty: float) -> float:
    """Penalised log-probability of ``sentence`` and ``end``, from the definition."""
    total, target = 0.0, [BEGIN]
    for position, token in enumerate([*sentence, END], start=1):
        log_probs = model.row(source, target).log_softmax(-1)
        if position < length or token == END:
            total += float(log_probs[token])
        target.append(token)
    return float(total / ((5 + len(sentence) + 1) / 6) ** penalty)


@pytest.mark.parametrize("kind", [Lookup, LookupWithMemory])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_wide_beam_equals_brute_force(kind: type[Lookup], penalty: float) -> None:
    vocabulary, length = 5, 4
    source = torch.tensor([[3, 4, 2], [4, 2, 0], [3, 3, 2]])
    for seed in range(5):
        model = kind(vocabulary, seed, ends=2.0)
        found = beam_search(
            model,
            source,
            begin=BEGIN,
            end=END,
            padding=PADDING,
            max_length=length,
            beam=20,
            length_penalty=penalty,
        )
        for row, sentence in zip(source.tolist(), found, strict=True):
            everything = [s for n in range(length) for s in itertools.product((3, 4), repeat=n)]
            best = max(everything, key=lambda s: score(model, row, s, length, penalty))
            assert tuple(sentence) == best, (seed, penalty)


def greedy(model: Lookup, source: list[int], length: int) -> list[int]:
    target = [BEGIN]
    while len(target) < length:
        log_probs = model.row(source, target)
        log_probs[[PADDING, BEGIN]] = -math.inf
        token = int(log_probs.argmax())
        if token == END:
            break
        target.append(token)
    return target[1:]


def test_beam_one_is_greedy() -> None:
    source = torch.tensor([[3, 4, 2], [5, 2, 0], [6, 3, 2], [4, 4, 2]])
    lengths = set()
    for seed in range(10):
        model = LookupWithMemory(8, seed, ends=1.0)
        found = beam_search(model, source, begin=BEGIN, end=END, padding=PADDING, max_length=9, beam=1)
        assert found == [greedy(model, row, 9) for row in source.tolist()]
        assert model.encoded == 1
        lengths |= {len(sentence) for sentence in found}
    assert len(lengths) > 3  # some ended by themselves, some were cut


def test_wider_beam_scores_no_worse_than_greedy() -> None:
    source = torch.tensor([[3, 4, 2], [5, 2, 0]])
    better = 0
    for seed in range(15):
        model = Lookup(8, seed, ends=1.0)
        for row, narrow, wide in zip(
            source.tolist(),
            beam_search(model, source, begin=BEGIN, end=END, padding=PADDING, max_length=6, beam=1),
            beam_search(model, source, begin=BEGIN, end=END, padding=PADDING, max_length=6, beam=8),
            strict=True,
        ):
            gain = score(model, row, tuple(wide), 6, 0.6) - score(model, row, tuple(narrow), 6, 0.6)
            assert gain > -1e-4
            better += gain > 1e-4
    assert better > 5


class Fork(nn.Module):
    """First 3, ``END`` or 4, in this order; 3 leads nowhere, 4 ends for sure."""

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        chances = {
            BEGIN: [0.0, 0.0, 0.34, 0.36, 0.30],
            3: [0.0, 0.0, 1e-6, 0.5, 0.5],
            4: [0.0, 0.0, 1.0, 0.0, 0.0],
        }
        table = torch.tensor([chances.get(token, [0.2] * 5) for token in range(5)]).clamp_min(1e-9).log()
        return table[target_in]


def test_a_completed_hypothesis_takes_no_place_of_a_living_one() -> None:
    options: dict[str, Any] = {"begin": BEGIN, "end": END, "padding": PADDING, "max_length": 5}
    source = torch.tensor([[3, 2]])
    assert beam_search(Fork(), source, beam=2, length_penalty=2.0, **options) == [[4]]
    assert beam_search(Fork(), source, beam=2, length_penalty=0.0, **options) == [[]]


def test_batch_does_not_change_the_translation() -> None:
    model = LookupWithMemory(9, 4, ends=1.5)
    source = torch.tensor([[3, 4, 2], [5, 6, 2], [6, 3, 2], [8, 4, 2], [7, 7, 2]])
    options: dict[str, int] = {"begin": BEGIN, "end": END, "padding": PADDING, "max_length": 12, "beam": 3}
    together = beam_search(model, source, **options)
    assert together == [beam_search(model, row[None], **options)[0] for row in source]


def test_select_rows_repeats_every_tensor() -> None:
    tensor = torch.arange(6).view(3, 2)
    rows = torch.tensor([2, 2, 0])
    memory = Memory(tensor, {"list": [tensor, None, 3], "text": "kept"})
    found = select_rows(memory, rows)
    assert isinstance(found, Memory)
    assert found.source.tolist() == [[4, 5], [4, 5], [0, 1]]
    assert found.more["list"][0].tolist() == found.source.tolist()
    assert found.more["list"][1:] == [None, 3]
    with pytest.raises(TypeError, match=r"encode\(\) returned a set; use tensors"):
        select_rows({1, 2}, rows)


def test_beam_search_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="beam=0"):
        beam_search(Lookup(5, 0), torch.tensor([[3]]), begin=1, end=2, padding=0, max_length=3, beam=0)
