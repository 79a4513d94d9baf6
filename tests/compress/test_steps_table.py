"""The table of a result: names and figures are whole at every width."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from compress.result import CompressionResult, Step

LONG = "ofb:target=0.5,structures=[heads, mlp, embedding],epochs=12,search_epochs=4,learning_rate=0.00025"
LATENCY = {"median_ms": 123.456, "low_ms": 120.123, "high_ms": 129.987}
RATIO = {"ratio": 0.6123, "low": 0.5876, "high": 0.6511}


def result(*names: str) -> CompressionResult:
    steps = [Step("original", 86_567_656, 17_564_000_000, ("aten::x",), LATENCY, None, {"accuracy": 0.9876})]
    steps += [
        Step(name, 55_123, 937_000, (), LATENCY, RATIO, {"accuracy": 0.9754}, agreement=0.9912)
        for name in names
    ]
    return CompressionResult(
        nn.Identity(), tuple(steps), "cpu:1", "latency <= 0.6 of the original", (torch.zeros(1, 1),)
    )


def printed(one: CompressionResult, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(one.report())
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 41, 60, 79, 80, 81, 100, 105, 120, 200])
def test_nothing_is_cut(width: int) -> None:
    one = result("structured:ratio=0.4", "emoe:layers=[0, 2]")
    text = printed(one, width)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    for row in one.rows():
        for cell in row:
            assert cell in text
    for head in one._heads()[1:]:
        assert head in text
    assert "latency <= 0.6" in text


@pytest.mark.parametrize("width", [40, 80, 140])
def test_a_name_longer_than_the_line_goes_on_in_the_next(width: int) -> None:
    text = printed(result(LONG), width)
    assert LONG.replace(" ", "") in "".join(text.split())


def test_options_are_no_markup() -> None:
    assert "structured:units=[mlp, heads]" in printed(result("structured:units=[mlp, heads]"), 200)


def test_rows_where_they_fit() -> None:
    one = result("structured:ratio=0.4")
    wide, narrow = printed(one, 160).splitlines(), printed(one, 80).splitlines()
    assert any("structured:ratio=0.4" in line and "97.54 %" in line for line in wide)
    assert "structured:ratio=0.4" in narrow
    assert "  of original   0.612 [0.588, 0.651]" in narrow
    assert one.report().row_count == 2
