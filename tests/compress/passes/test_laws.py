"""Options of a wrong type or out of range are named when the pass is made, from text or from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compress.passes import parse_pass
from compress.passes._laws import Law, number, optional, whole, wholes, word
from compress.passes.ofb import Ofb
from compress.passes.sit import Sit
from compress.passes.structured import Structured
from nas.errors import UserMistake


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (
            Sit,
            {"slim_after": 3},
            r"sit: slim_after=3 must be a list of numbers of blocks, whole and at least 1",
        ),
        (Sit, {"slim_after": [1.5, 2]}, r"slim_after=\[1.5, 2\] must be a list"),
        (Sit, {"slim_after": [0]}, r"slim_after=\[0\] must be a list"),
        (Sit, {"tokens": 7}, r"sit: tokens=7 must be a list of numbers of tokens"),
        (Sit, {"slimmings": True}, r"slimmings=True must be at least 1, a whole number"),
        (Sit, {"keep": float("nan")}, r"keep=nan must be in \(0, 1\]"),
        (Sit, {"keep": "half"}, r"keep='half' must be in \(0, 1\]"),
        (Ofb, {"target": True}, r"ofb: target=True must be in \(0, 1\]"),
        (Ofb, {"target": 0}, r"ofb: target=0 must be in \(0, 1\]"),
        (Ofb, {"epochs": 1.5}, r"epochs=1.5 must be at least 0, a whole number"),
        (Ofb, {"mlp": "no"}, r"mlp='no' must be true or false"),
        (Ofb, {"measure": ["macs"]}, r"measure=\['macs'\] must be macs, params or latency"),
        (Ofb, {"learning_rate": float("inf")}, r"learning_rate=inf must be above 0"),
        (Structured, {"ratio": "abc"}, r"structured: ratio='abc' must be in \[0, 1\)"),
        (Structured, {"epochs": -1}, r"epochs=-1 must be at least 0, a whole number"),
        (Structured, {"multiple": 2.0}, r"multiple=2.0 must be at least 1, a whole number"),
        (Structured, {"distillation": 2}, r"distillation=2 must be in \[0, 1\]"),
        (Structured, {"units": 5}, r"units=5 must be a list of, or a text"),
        (Structured, {"units": []}, r"units=\[\] must be a list of, or a text"),
        (Structured, {"units": [5]}, r"unknown units 5; known: heads"),
        (Structured, {"scope": "all"}, r"scope='all' must be uniform or global"),
    ],
)
def test_mistakes(make: Callable[..., Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserMistake, match=text) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["sit:slim_after=3", "sit:slim_after=[1.5,2]", "sit:tokens=7", "ofb:target=true", "structured:ratio=abc"],
)
def test_mistakes_in_texts(text: str) -> None:
    option = text.partition(":")[2].partition("=")[0]
    with pytest.raises(UserMistake, match=rf"{option}=.* must be "):
        parse_pass(text)


@pytest.mark.parametrize(
    ("law", "allowed", "refused"),
    [
        (number("(0, 1]"), [1, 0.5, np.float32(0.1)], [0, 1.01, True, "1", None]),
        (number("[0, 0.5)"), [0, 0.49], [0.5, -0.1]),
        (number("above 0"), [1e-9, 7], [0, float("inf")]),
        (number("at least 0"), [0, 0.0], [-1e-9]),
        (whole(2), [2, np.int64(3)], [1, 2.0, True]),
        (wholes("blocks", "x=[1]"), [[], (1, 2)], ["12", [0], 1, [True]]),
        (optional(word("a", "b")), [None, "a"], ["c", 1, ["a"]]),
    ],
)
def test_laws(law: Law, allowed: list[Any], refused: list[Any]) -> None:
    assert all(law.holds(value) for value in allowed)
    assert not any(law.holds(value) for value in refused)
