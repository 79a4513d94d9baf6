"""Samples as arrays, checked, and the conditions that they have in common."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.errors import UserMistake
from nas.files import canonical_json

__all__ = [
    "check_identity",
    "checked_samples",
    "feature_matrix",
    "finite_number",
    "first_features",
    "plain_features",
    "pooled_identity",
    "stored_fields",
    "stored_samples",
]

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


def check_identity(given: str | None, known: str | None, *, joining: bool = False) -> None:
    """Raises UserMistake when measurements of ``given`` do not belong to a predictor of ``known``.

    None is vouched for by the caller, but not where samples come later to those of a known identity (``joining``).
    """
    if known is None or given == known or (given is None and not joining):
        return
    if given is None:
        raise UserMistake(
            f"identity=None of samples that are to join those measured under {known!r}; if theirs is the same, say so "
            f"with identity={known!r}, else fit another predictor"
        )
    raise UserMistake(
        f"identity={given!r} differs from {known!r}, under which this predictor was measured; "
        "fit another one, or move it with transfer and 5 to 10 samples"
    )


def finite_number(value: Any, name: str, must: str, *, zero: bool = False) -> float:
    """``value`` as a float. Raises UserMistake ("NAME=VALUE MUST") unless it is a finite number above 0 (or is 0)."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (0 < number < math.inf or (zero and number == 0)):
        raise UserMistake(f"{name}={value!r} {must}")
    return number


def stored_fields(data: Any, names: Sequence[str], what: str) -> None:
    """Raises UserMistake unless ``data`` is a mapping with all of ``names``."""
    if not isinstance(data, Mapping):
        raise UserMistake(
            f"{what} is a {type(data).__name__} and must be a mapping; give what to_dict returned"
        )
    missing = [name for name in names if name not in data]
    if missing:
        raise UserMistake(f"{what} lacks {', '.join(missing)}; give what was stored, or measure and fit anew")


def stored_samples(data: Mapping[str, Any]) -> tuple[tuple[str, ...], list[dict[str, float]], list[float]]:
    """Features, work and milliseconds of a stored predictor. Raises UserMistake when they are missing or do not fit."""
    stored_fields(data, ("identity", "coverage", "features", "samples", "source"), "a stored predictor")
    names, samples = data["features"], data["samples"]
    whole = isinstance(names, (list, tuple)) and isinstance(samples, (list, tuple))
    if not whole or any(not isinstance(row, (list, tuple)) or len(row) != len(names) + 1 for row in samples):
        raise UserMistake(
            "samples of a stored predictor must be lists, each with one number for every feature and the milliseconds; "
            "give what was stored, or measure and fit anew"
        )
    work = [dict(zip(names, row[:-1], strict=True)) for row in samples]
    return tuple(names), work, [row[-1] for row in samples]


def plain_features(work: Any) -> dict[str, float]:
    """Features by name, of counted work or of a mapping. Raises UserMistake for anything else."""
    to_dict: Callable[[], dict[str, float]] | None = getattr(work, "to_dict", None)
    if to_dict is None and not isinstance(work, Mapping):
        raise UserMistake(
            f"work={work!r} must be counted work (of count_work) or a mapping of features by name, or a list of them"
        )
    return dict(work) if to_dict is None else to_dict()


def first_features(work: Any) -> tuple[str, ...]:
    """Names of the features that samples have, in the order of the first. Raises UserMistake for no list of samples."""
    if isinstance(work, (str, bytes, Mapping)) or not isinstance(work, Sequence):
        raise UserMistake(f"work={work!r} must be a list with the counted work of each model")
    return tuple(plain_features(work[0])) if len(work) else ()


def feature_matrix(work: Sequence[Any], names: Sequence[str]) -> Array:
    """Features in the order of ``names``, (samples, features). Raises UserMistake for other or impossible ones."""
    if not isinstance(work, Sequence):
        raise UserMistake(f"work={work!r} must be a list with the counted work of each model")
    rows: list[list[float]] = []
    for item in work:
        plain = plain_features(item)
        if set(plain) != set(names):
            odd = ", ".join(sorted(set(plain) ^ set(names)))
            raise UserMistake(f"features {odd} are missing or unknown; all samples need the same ones")
        must = f"of sample {len(rows)} must be finite and not negative"
        rows.append([finite_number(plain[name], f"feature {name}", must, zero=True) for name in names])
    return np.array(rows, dtype=np.float64)


def checked_samples(
    work: Sequence[Any], milliseconds: Sequence[float], names: Sequence[str]
) -> tuple[Array, Array]:
    """Features (samples, features) and milliseconds (samples,). Raises UserMistake for what cannot be measured."""
    for name, given in (("work", work), ("milliseconds", milliseconds)):
        if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__len__"):
            raise UserMistake(f"{name}={given!r} must be a list with one entry for each model")
    if not len(work) or len(work) != len(milliseconds):
        raise UserMistake(
            f"{len(work)} models and {len(milliseconds)} latencies: give one latency each, at least one"
        )
    must = "of sample {} must be positive and finite; measure it again"
    ms = [finite_number(x, "milliseconds", must.format(place)) for place, x in enumerate(milliseconds)]
    return feature_matrix(work, names), np.array(ms)
