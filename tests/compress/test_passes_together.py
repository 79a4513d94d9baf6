"""Lists of passes: refused before one has trained, and not thrown away where one has nothing left to do."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from compress import compress
from compress.passes import make_pass
from compress.passes.base import Context, NothingLeft, Pass
from compress.structure import StructureError
from nas.errors import UserMistake
from tests.compress.models import batches, small_vit

QUICK: dict[str, Any] = {"measure_seconds": 0}


class Trains(Pass):
    """Notes whether it was only asked for shapes."""

    name = "trains"
    changes = frozenset({"fusion"})
    asked: ClassVar[list[bool]] = []

    def __init__(self, epochs: int | None = None):
        self.epochs = epochs

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        self.asked.append(context.probe)
        return copy.deepcopy(model)


class Refuses(Pass):
    name = "refuses"
    changes = frozenset({"fusion"})

    def __init__(self, error: type[UserMistake] = StructureError):
        self._error = error

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        raise self._error("there is none to merge")


@pytest.fixture(autouse=True)
def _none_asked() -> None:
    Trains.asked.clear()


def test_a_refusal_comes_before_anything_has_trained() -> None:
    with pytest.raises(StructureError, match="pass 'refuses': there is none"):
        compress(small_vit(), [Trains(), Refuses()], train=batches(1), **QUICK)
    assert Trains.asked == [True]


@pytest.mark.parametrize("budget", [None, "params=1"])
def test_all_are_tried_and_then_applied(budget: str | None) -> None:
    compress(small_vit(), [Trains(), Trains()], train=batches(1), budget=budget, **QUICK)
    assert Trains.asked == [True, True, False, False]


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        ([Trains()], {"train": batches(1)}),
        ([Trains(), Trains()], {}),
        ([Trains(0), Trains()], {"train": batches(1)}),
        ([Trains(), Trains()], {"train": batches(1), "epochs": 0}),
    ],
)
def test_without_an_early_training_nothing_is_tried(passes: list[Pass], options: dict[str, Any]) -> None:
    compress(small_vit(), passes, **options, **QUICK)
    assert Trains.asked == [False] * len(passes)


def test_real_passes() -> None:
    said: list[str] = []
    with pytest.raises(UserMistake, match="emoe: experts=23 must divide"):
        compress(
            small_vit(),
            ["structured:ratio=0.4,epochs=1", "emoe:experts=23,last=1"],
            train=batches(1),
            report=said.append,
            **QUICK,
        )
    assert not any(line.startswith("pass 1/2") for line in said)


def test_nothing_left_to_do_behind_a_pass_that_makes_the_same_change() -> None:
    result = compress(
        small_vit(), ["activation_pruning:epochs=1", "reparameterize"], train=batches(1), **QUICK
    )
    assert result.final.params == result.steps[1].params < result.original.params
    assert "an earlier pass left it nothing to do, the model stays as it was" in result.final.notes[0]
    x = torch.randn(2, 3, 32, 32)
    assert result.model(x).isfinite().all()


def test_nothing_left_to_do_alone_or_behind_another_kind_is_a_mistake() -> None:
    for passes in (["reparameterize"], ["token_merging:r=2", "reparameterize"]):
        with pytest.raises(NothingLeft, match=r"pass 'reparameterize': .* nothing to merge"):
            compress(small_vit(), passes, **QUICK)
    for error in (NothingLeft, StructureError):
        with pytest.raises(StructureError, match="pass 'refuses'"):
            compress(small_vit(), [make_pass("token_merging", r=2), Refuses(error)], **QUICK)
    assert len(compress(small_vit(), [Trains(), Refuses(NothingLeft)], **QUICK).steps) == 3
