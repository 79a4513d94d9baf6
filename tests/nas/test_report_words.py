"""Numbers, intervals and architectures in few words."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.report.formats import (
    as_number,
    format_count,
    format_interval,
    format_ms,
    format_seconds,
    format_value,
    objective_label,
    one_line,
)
from nas.report.words import abbreviate, summarize

# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (512, "512"), (999, "999"), (999.6, "1 k"), (34_100, "34.1 k"), (3_400_000, "3.4 M"),
     (999_999, "1 M"), (1_250_000_000, "1.25 G"), (2e12, "2 T"), (5e15, "5,000 T")],
)  # fmt: skip
def test_counts_carry_a_unit(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4213, "0.421 ms"), (12.345, "12.3 ms"), (123.4, "123 ms"), (999.7, "1,000 ms"), (1234.5, "1,234 ms")],
)
def test_latencies_carry_three_digits(value: float, text: str) -> None:
    assert format_ms(value) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((0.4213, 0.4102, 0.4301), "0.42 (0.41-0.43)"), ((0.4213, 0.4205, 0.4221), "0.421 (0.420-0.422)"),
     ((12.345, 12.2, 12.51), "12.3 (12.2-12.5)"), ((1234.5, 1200.0, 1301.0), "1,234 (1,200-1,301)"),
     ((0.42, None, 0.5), "0.42"), ((0.42, math.nan, 0.5), "0.42"), ((0.0, 0.0, 0.0), "0.0000 (0.0000-0.0000)")],
)  # fmt: skip
def test_intervals_show_what_they_support(
    arguments: tuple[float, float | None, float | None], text: str
) -> None:
    assert format_interval(*arguments) == text


def test_other_values() -> None:
    assert format_value("accuracy", 0.98124) == "0.9812"
    assert format_value("bleu", 27.431) == "27.43"
    assert format_value("loss", 1.23456) == "1.235"
    assert format_value("params", 34_100) == "34.1 k"
    assert format_value("latency_ms", 0.42) == "0.42 ms"
    assert format_value("rate", 1e-6) == "1e-06"
    assert [format_seconds(s) for s in (None, 0.44, 12, 200, 7500)] == [
        "",
        "0.4 s",
        "12 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert objective_label("latency_ms") == "latency (ms)"
    assert [as_number(x) for x in (True, None, "1", math.nan, math.inf, 2)] == [
        None,
        None,
        None,
        None,
        None,
        2.0,
    ]


def test_text_from_outside_stays_on_one_line() -> None:
    assert one_line("a\nb\x1b[2J\tc\u2028d") == "a b [2J c d"
    assert one_line("abcdef", 4) == "abc…"


# -- architectures in words --------------------------------------------------------------------------------------------


def test_layers_are_summarised_by_parameter() -> None:
    made = {
        "embed": 64,
        "layer0.attention": "cosformer",
        "layer1.attention": "softmax",
        "layer2.attention": "softmax",
    }
    made |= {f"layer{i}.ffn": 128 for i in range(3)}
    assert summarize(made) == "embed=64 attention=cosformer,softmax,softmax ffn=128×3"
    assert (
        summarize(made, abbreviate(["softmax", "cosformer"])) == "embed=64 attention=cosf,soft,soft ffn=128×3"
    )


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            {"encoder0.heads": 4, "encoder1.heads": 8, "decoder0.heads": 2},
            "encoder.heads=4,8 decoder.heads=2",
        ),
        ({"width": 8, "block1.width": 16}, "width=8 block.width=16"),
        ({"ffn0": 1, "ffn1": 2}, "ffn=1,2"),
        ({"layer": 1, "layer0": 2}, "layer=1 layer*=2"),
        ({"stage1.block0.k": 3, "stage1.block1.k": 5}, "k=3,5"),
        ({"dropout": 0.12345, "norm": True, "extra": None}, "dropout=0.123 norm=yes extra=none"),
        ({}, ""),
    ],
)
def test_summaries_of_any_flat_dictionary(made: dict[str, Any], text: str) -> None:
    assert summarize(made) == text


def test_abbreviations_stay_apart() -> None:
    short = abbreviate(["linear_relu", "linear_elu", "softmax", "soft", "performer"])
    assert short["performer"] == "perf"
    assert short["softmax"] != "soft"
    assert len(set(short.values()) | {"soft"}) == 5


@given(st.sets(st.text("abcd_", min_size=1, max_size=12), max_size=12))
def test_an_abbreviation_stands_for_one_word(words: set[str]) -> None:
    short = abbreviate(words)
    written = [short.get(word, word) for word in words]
    assert len(set(written)) == len(words)
