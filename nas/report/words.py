"""Architectures in a few words."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from nas.report.formats import one_line

__all__ = ["abbreviate", "summarize"]

_INDEXED = re.compile(r"([^\d]*?)[_-]?(\d+)")


def abbreviate(words: Iterable[str]) -> dict[str, str]:
    """Long words -> their shortest prefix of at least four letters that no other of ``words`` shares.

    Give every word that may occur, so that one prefix never stands for two of them.
    """
    known = sorted(set(words))
    short = {}
    for word in known:
        if len(word) <= 6:
            continue
        others = [other for other in known if other != word]
        lengths = (n for n in range(4, len(word)) if not any(other.startswith(word[:n]) for other in others))
        short[word] = word[: next(lengths, len(word))]
    return short


def _label_parts(key: str) -> tuple[tuple[str, bool], ...]:
    """``layer0.attention`` -> ((layer, indexed), (attention, plain))."""
    parts = []
    for segment in key.split("."):
        match = _INDEXED.fullmatch(segment)
        parts.append((match[1], True) if match else (segment, False))
    return tuple(parts)


def _labels(templates: Iterable[tuple[tuple[str, bool], ...]]) -> dict[tuple[tuple[str, bool], ...], str]:
    """The shortest label of each group that no other group has."""
    known = list(templates)
    short = {t: ".".join(stem for stem, indexed in t if not indexed) or t[-1][0] for t in known}
    full = {t: ".".join(stem for stem, _ in t if stem) for t in known}
    uses, full_uses = Counter(short.values()), Counter(full.values())
    labels = {}
    for template in known:
        unique = uses[short[template]] == 1 and bool(short[template])
        star = "*" if full_uses[full[template]] > 1 and any(indexed for _, indexed in template) else ""
        labels[template] = short[template] if unique else f"{full[template]}{star}"
    return labels


def _value_text(value: Any, short: Mapping[str, str]) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.3g}"
    return one_line(short.get(value, value) if isinstance(value, str) else value)


def summarize(architecture: Mapping[str, Any], short: Mapping[str, str] | None = None) -> str:
    """A flat architecture in a few words: ``embed=64 attention=cosf,soft,soft ffn=128×6``.

    Parameters that differ only in numbers (layer0.ffn, layer1.ffn) become one list in their order, a value that
    occurs three times or more in a row is written once with its count. ``short`` (from ``abbreviate``) replaces
    long words.
    """
    groups: dict[tuple[tuple[str, bool], ...], list[str]] = defaultdict(list)
    for key, value in architecture.items():
        groups[_label_parts(key)].append(_value_text(value, short or {}))
    labels = _labels(groups)
    return " ".join(
        f"{one_line(labels[template])}={_run_lengths(texts)}" for template, texts in groups.items()
    )


def _run_lengths(texts: Sequence[str]) -> str:
    parts: list[str] = []
    for text, run in groupby(texts):
        count = len(list(run))
        parts.extend([f"{text}×{count}"] if count > 2 else [text] * count)
    return ",".join(parts)
