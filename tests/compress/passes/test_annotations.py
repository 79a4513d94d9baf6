"""Values of options against the annotations of a pass's ``__init__``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy
import pytest
from torch import nn

from compress.passes import _REGISTRY, make_pass, parse_pass
from compress.passes._annotations import check_types, check_words
from compress.passes.base import Context, Pass
from nas.errors import UserMistake

MISTAKES = {
    "low_rank:rank=four": "rank='four' must be a whole number or null",
    "low_rank:only=3": "only=3 must be a word or a list of words",
    "low_rank:keep=all": "keep='all'",
    "low_rank:batches=null": "batches=null must be a whole number",
    "low_rank:sensitivity=3": "sensitivity=3 must be true or false",
    "structured:ratio=abc": "ratio='abc'",
    "structured:batches=null": "batches=",
    "token_merging:inflection=x": "inflection='x' must be a number",
    "token_merging:epochs=1.5": "epochs=1.5 must be a whole number or null",
    "activation_pruning:share=x": "share='x' must be a number",
    "activation_pruning:layers=3": "layers=3 must be a word or a list of words or null",
    "dynamic_quantization:skip=3": "skip=3 must be a list of words",
    "dynamic_quantization:keep_anyway=1": "keep_anyway=1 must be true or false",
    "sit:keep=half": "keep='half'",
    "sit:slim_after=[a]": "slim_after=",
    "ofb:target=half": "target='half'",
    "emoe:experts=x": "experts='x'",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_options_of_every_pass_are_named_with_their_values(text: str) -> None:
    with pytest.raises(UserMistake) as caught:
        parse_pass(text)
    said = str(caught.value)
    assert MISTAKES[text] in said
    assert text.partition(":")[0] in said
    assert "not supported" not in said
    assert len(said.splitlines()) == 1


class Typed(Pass):
    """One option of every kind; it looks at none of them itself."""

    name = "typed"

    def __init__(
        self,
        whole: int = 1,
        *,
        real: float = 1.0,
        flag: bool = False,
        word: str | None = None,
        pair: tuple[int, int] = (1, 2),
        many: Sequence[float] | None = None,
        mode: Literal["slow", "fast"] = "slow",
        size: Literal["all"] | int = "all",
        anything: dict[str, int] | None = None,
    ):
        self.given = (whole, real, flag, word, pair, many, mode, size, anything)

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        return model


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTRY._found, "typed", Typed)


GOOD: dict[str, Any] = {
    "whole": [3, numpy.int64(3)],
    "real": [3, 0.5, numpy.float32(0.5)],
    "flag": [True],
    "word": ["a", None],
    "pair": [(3, 4), [3, 4]],
    "many": [[1, 0.5], (), None],
    "mode": ["fast"],
    "size": ["all", 3],
    "anything": [{"a": 1}, None, 3],
}
BAD: dict[str, Any] = {
    "whole": [True, 0.5, "3", None],
    "real": ["0.5", False, None, [1]],
    "flag": [1, "yes", None],
    "word": [3, ["a"]],
    "pair": [3, "34", [0.5, 1]],
    "many": ["12", 3, ["a"]],
    "mode": ["quick", 3, None],
    "size": ["some", 0.5],
}


@pytest.mark.usefixtures("typed")
@pytest.mark.parametrize("option", GOOD)
def test_each_kind(option: str) -> None:
    for value in GOOD[option]:
        assert any(one is value for one in make_pass("typed", **{option: value}).given)  # type: ignore[attr-defined]
    for value in BAD.get(option, ()):
        with pytest.raises(UserMistake, match=rf"pass 'typed': {option}=.* (must be|allowed:) "):
            make_pass("typed", **{option: value})


@pytest.mark.usefixtures("typed")
def test_words_have_the_nearest_one_named() -> None:
    with pytest.raises(UserMistake, match=r"mode='fats' \(did you mean 'fast'\?\); allowed: slow, fast"):
        make_pass("typed", mode="fats")


def test_what_goes_wrong_within_a_pass_is_told_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fragile(Pass):
        name = "fragile"

        def __init__(self, size: Any = 1):
            self.size = 3 / size if size else int("x")

        def apply(self, model: nn.Module, context: Context) -> nn.Module:
            return model

    monkeypatch.setitem(_REGISTRY._found, "fragile", Fragile)
    with pytest.raises(
        UserMistake, match=r"'fragile': cannot be made with size=\[1\] \(unsupported .*are size"
    ):
        make_pass("fragile", size=[1])
    with pytest.raises(UserMistake, match=r"'fragile': cannot be made with size=0 \(invalid literal"):
        make_pass("fragile", size=0)


def test_annotations_that_only_a_type_checker_can_read_are_left_to_the_pass() -> None:
    def make(size: NotImported) -> None:  # type: ignore[name-defined]  # noqa: F821
        pass

    check_types(make, "own", {"size": 3})
    check_words(make, "own", {"size": 3})
