"""``compressed.json``, the record of a saved result: what it must hold, looked at before any of it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nas.errors import UserMistake
from nas.files import CorruptFile, read_record

__all__ = ["DESCRIPTION", "FORMAT", "Step", "read_description"]

FORMAT = "nas-compressed-1"
DESCRIPTION = "compressed.json"
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Step:
    """The model after one pass (or the original, the first step).

    Attributes:
        name: of the pass, with its options.
        params, macs: numbers, and multiply-accumulates of one sample; ``uncounted`` operators are not in them.
        latency: ``nas.latency.LatencyResult`` as JSON, in the session of all steps; None when not measured.
        ratio: ``nas.latency.Pair`` against the original as JSON.
        metrics: of the validation data; ``accuracy`` among them for classes.
        agreement: share of the validation samples with the same predicted class as the original, in [0, 1].
        seconds: what the pass took.
        notes: what it had to say.
    """

    name: str
    params: int
    macs: int
    uncounted: tuple[str, ...] = ()
    latency: dict[str, Any] | None = None
    ratio: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "uncounted": list(self.uncounted), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Step:
        """The inverse of ``to_dict``. Raises ValueError that names the first entry that no step has written."""
        for name, holds in _OF_A_STEP.items():
            if name not in data or not holds(data[name]):
                raise ValueError(f"its {name} is {data.get(name, 'missing')!r}")
        if unknown := sorted(data.keys() - {one.name for one in fields(cls)}):
            raise ValueError(f"its {unknown[0]!r} is unknown")
        return cls(**{**data, "uncounted": tuple(data["uncounted"]), "notes": tuple(data["notes"])})


def read_description(path: Path) -> dict[str, Any]:
    """The record in ``path``, with everything that a loader asks for; ``frozen`` is empty where it is an older one's.

    Raises:
        UserMistake: there is no such file, it cannot be read, or it is of another format.
        CorruptFile: it is damaged, or holds what no version has written.
    """
    try:
        record = read_record(path) if path.is_file() else None
    except OSError as error:
        raise UserMistake(f"{path}: cannot be read ({error.strerror or error})") from None
    if record is None:
        what = f"file {path.name}" if path.exists() else path.name  # a directory of that name
        raise UserMistake(
            f"{path.parent}: holds no {what}; give a directory written by 'nas compress' or .save()"
        )
    if record.get("format") != FORMAT:
        raise UserMistake(f"{path}: format {record.get('format')!r}; this version reads {FORMAT}")
    record.setdefault("frozen", [])
    for name, (holds, text) in _OF_A_RECORD.items():
        if name not in record or not holds(record[name]):
            raise CorruptFile(path, f"its {name} is {_short(record.get(name, 'missing'))}, not {text}")
    for number, step in enumerate(record["steps"]):
        try:
            Step.from_dict(step)
        except ValueError as error:
            raise CorruptFile(path, f"step {number}: {error}") from None
    return record


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _figures(*names: str) -> Callable[[Any], bool]:
    """None, or a mapping with these numbers among others."""
    return lambda value: (
        value is None or (isinstance(value, Mapping) and all(_number(value.get(name)) for name in names))
    )


def _digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_OF_A_STEP: Mapping[str, Callable[[Any], bool]] = {
    "name": _text,
    "params": _whole,
    "macs": _whole,
    "uncounted": _texts,
    "latency": _figures("median_ms", "low_ms", "high_ms"),
    "ratio": _figures("ratio", "low", "high"),
    "metrics": lambda value: isinstance(value, Mapping) and all(_number(one) for one in value.values()),
    "agreement": lambda value: value is None or _number(value),
    "seconds": _number,
    "notes": _texts,
}

_OF_A_RECORD: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "origin": (_mapping, "a mapping"),
    "structure": (_mapping, "a mapping"),
    "weights_sha256": (_digest, "64 hex digits"),
    "example_sha256": (_digest, "64 hex digits"),
    "steps": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_mapping, value)),
        "a list of steps, the original first",
    ),
    "target": (_text, "a text"),
    "budget": (lambda value: value is None or isinstance(value, str), "a text or null"),
    "facts": (_mapping, "a mapping"),
    "frozen": (_texts, "a list of names"),
}
