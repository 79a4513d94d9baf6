"""Samples of click prediction as arrays, and a generated set of them whose clicks depend on pairs of features.

Letters: N samples, I columns of ids, D dense numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spaces.signature import ClickThroughRateSignature

__all__ = ["GENERATED", "ClickData", "Field", "auc_of", "generate_clicks"]

GENERATED = "generated-clicks"

Floats = NDArray[np.float64]
_VOCABULARIES = (4, 6, 8, 12, 20, 30, 50, 80)
_SET_VOCABULARY, _SET_WIDTH = 16, 3
_DENSE = 4
_LATENT, _RANK = 4, 2
# Numbers of fields; the last is the set. Wide ones meet narrow ones, so that 30,000 samples show each pair often.
_PAIRS = ((0, 7), (1, 6), (2, 5), (3, 4), (1, 8), (0, 5))
_PAIRS_DEVIATION, _SINGLE_DEVIATION, _DENSE_DEVIATION, _MEAN = 1.7, 0.5, 0.7, -0.4


@dataclass(frozen=True)
class Field:
    """A categorical field: ids 0 to ``vocabulary`` - 1 in ``width`` columns, see ``ClickThroughRateSignature``.

    ``is_identity`` marks ids of things that come and go (users, films): a model meets new ones.
    """

    name: str
    vocabulary: int
    width: int = 1
    is_identity: bool = False


@dataclass(frozen=True)
class ClickData:
    """Samples of all splits, those of training first, then validation, then test.

    Attributes:
        ids: (N, I) int32.
        dense: (N, D) float32, of zero mean and unit variance over the training samples.
        clicks: (N,) bool.
        ends: where training and where validation ends.
        fields: of ``ids``, in order.
        dense_names: of the columns of ``dense``.
        facts: JSON for the report.
    """

    ids: NDArray[np.int32]
    dense: NDArray[np.float32]
    clicks: NDArray[np.bool_]
    ends: tuple[int, int]
    fields: tuple[Field, ...]
    dense_names: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def signature(self) -> ClickThroughRateSignature:
        """What a model of these samples must take."""
        return ClickThroughRateSignature(
            tuple(field.vocabulary for field in self.fields),
            tuple(field.width for field in self.fields),
            len(self.dense_names),
        )

    def rows(self, part: str) -> range:
        """Numbers of the samples of ``train``, ``validation`` or ``test``."""
        bounds = (0, *self.ends, len(self.clicks))
        number = ("train", "validation", "test").index(part)
        return range(bounds[number], bounds[number + 1])


def generate_clicks(seed: int, train: int = 30_000, held_out: int = 8_000) -> ClickData:
    """``train`` + 2 * ``held_out`` samples of nine fields and four numbers, the same for the same seed.

    What decides a click: for six pairs of fields a bilinear form of rank 2 between hidden properties of the two
    values, by far the most; a dense number whose effect depends on a field; and, weakly, the single features. Two of
    the dense numbers mean nothing. A model of single features alone cannot do well here.
    """
    rng = np.random.default_rng([abs(seed), 5])
    count = train + 2 * held_out
    columns = [_draw(rng, size, count) for size in _VOCABULARIES]
    sets = _draw(rng, _SET_VOCABULARY, count * _SET_WIDTH).reshape(count, _SET_WIDTH)
    there = np.arange(_SET_WIDTH) < rng.integers(1, _SET_WIDTH + 1, (count, 1))
    properties = [rng.normal(size=(size, _LATENT)) for size in (*_VOCABULARIES, _SET_VOCABULARY)]
    hidden = [table[column] for table, column in zip(properties, columns, strict=False)]
    hidden.append((properties[-1][sets] * there[:, :, None]).sum(1) / there.sum(1, keepdims=True))
    dense = rng.normal(size=(count, _DENSE))
    logits = _MEAN + _logits(rng, hidden, dense)
    chances = 1 / (1 + np.exp(-logits))
    clicks = rng.random(count) < chances
    fields = [Field(f"field{number}", size + 1) for number, size in enumerate(_VOCABULARIES)]
    ends = (train, train + held_out)
    return ClickData(
        ids=np.column_stack([*(column + 1 for column in columns), np.where(there, sets + 1, 0)]).astype(
            np.int32
        ),
        dense=dense.astype(np.float32),
        clicks=clicks,
        ends=ends,
        fields=(*fields, Field("set", _SET_VOCABULARY + 1, _SET_WIDTH)),
        dense_names=tuple(f"number{number}" for number in range(_DENSE)),
        facts={
            "source": GENERATED,
            "generated": True,
            "cut": "drawn alike",
            # nobody can do better than to know the chances themselves
            "best_possible_auc": {
                "validation": auc_of(clicks[ends[0] : ends[1]], chances[ends[0] : ends[1]]),
                "test": auc_of(clicks[ends[1] :], chances[ends[1] :]),
            },
        },
    )


def auc_of(clicks: NDArray[Any], scores: NDArray[Any]) -> float:
    """Chance that a click has a higher score than a sample without one; ties count half. Both must occur."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(clicks, scores))


def _draw(rng: np.random.Generator, size: int, count: int) -> NDArray[np.int64]:
    """Values 0 to ``size`` - 1, the first several times as frequent as the last."""
    weights = 1 / (np.arange(size) + 3.0)
    return rng.choice(size, count, p=weights / weights.sum())


def _logits(rng: np.random.Generator, hidden: list[Floats], dense: Floats) -> Floats:
    pairs = np.zeros(len(dense))
    for one, other in _PAIRS:
        form = rng.normal(size=(_LATENT, _RANK)) @ rng.normal(size=(_RANK, _LATENT))
        pairs += _unit(np.einsum("na,ab,nb->n", hidden[one], form, hidden[other]))
    single = np.sum([_unit(values @ rng.normal(size=_LATENT)) for values in hidden], axis=0) + dense[:, 1]
    mixed = dense[:, 0] * (hidden[1] @ rng.normal(size=_LATENT))
    return (
        _PAIRS_DEVIATION * _unit(pairs) + _SINGLE_DEVIATION * _unit(single) + _DENSE_DEVIATION * _unit(mixed)
    )


def _unit(values: Floats) -> Floats:
    return np.asarray((values - values.mean()) / values.std())
