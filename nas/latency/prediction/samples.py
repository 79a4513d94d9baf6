"""Samples as arrays, checked, and the conditions that they have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.errors import UserMistake
from nas.files import canonical_json

__all__ = ["checked_samples", "feature_matrix", "plain_features", "pooled_identity"]

Array = NDArray[np.float64]

# What changes from sample to sample in a pooled predictor; the counted work says it.
_POOLED = ("key", "batch", "inputs")


def pooled_identity(identity: Mapping[str, Any]) -> str:
    """Digest of a measurement's conditions without its batch and input sizes, 16 hex digits.

    Counted work holds those two, so that one predictor may learn from several batches and sizes.

    Args:
        identity: JSON form of a ``nas.latency.identity.Identity``.
    """
    conditions = {name: value for name, value in identity.items() if name not in _POOLED}
    if conditions.get("affinity") is not None:
        conditions["affinity"] = len(
            conditions["affinity"]
        )  # which cores of one kind they were does not matter
    return hashlib.blake2b(canonical_json(conditions).encode("ascii"), digest_size=8).hexdigest()


def plain_features(work: Any) -> dict[str, float]:
    """Features by name, of counted work or of a mapping."""
    to_dict: Callable[[], dict[str, float]] | None = getattr(work, "to_dict", None)
    return dict(work) if to_dict is None else to_dict()


def feature_matrix(work: Sequence[Any], names: Sequence[str]) -> Array:
    """Features in the order of ``names``, (samples, features). Raises UserMistake for other or impossible ones."""
    rows = []
    for item in work:
        plain = plain_features(item)
        if set(plain) != set(names):
            odd = ", ".join(sorted(set(plain) ^ set(names)))
            raise UserMistake(f"features {odd} are missing or unknown; all samples need the same ones")
        rows.append([float(plain[name]) for name in names])
    found = np.array(rows, dtype=np.float64)
    wrong = np.argwhere(~np.isfinite(found) | (found < 0))
    if len(wrong):
        row, column = map(int, wrong[0])
        raise UserMistake(
            f"feature {names[column]}={found[row, column]} of sample {row} must be finite and not negative"
        )
    return found


def checked_samples(
    work: Sequence[Any], milliseconds: Sequence[float], names: Sequence[str]
) -> tuple[Array, Array]:
    """Features (samples, features) and milliseconds (samples,). Raises UserMistake for what cannot be measured."""
    ms = np.array([float(value) for value in milliseconds], dtype=np.float64)
    if not len(work) or len(work) != len(ms):
        raise UserMistake(f"{len(work)} models and {len(ms)} latencies: give one latency each, at least one")
    wrong = np.flatnonzero(~np.isfinite(ms) | (ms <= 0))
    if len(wrong):
        raise UserMistake(
            f"milliseconds={ms[wrong[0]]} of sample {int(wrong[0])} must be positive and finite; measure it again"
        )
    return feature_matrix(work, names), ms
