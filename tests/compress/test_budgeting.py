"""Which passes a budget makes stronger, and how strong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compress import compress
from compress.budgeting import Costs, fitting_passes
from compress.measuring import count
from compress.passes.base import Budget, Context, Pass
from nas.errors import UserMistake
from tests.compress.models import batches, small_vit

QUICK: dict[str, Any] = {"measure_seconds": 0, "epochs": 0}
SIT = "sit:slim_after=[1],keep=0.7,start=random"


class Widths(Pass):
    """Hidden units of a two-layer network: all of them at strength 0, one at 1; ``extra`` more than there were."""

    name = "widths"
    changes = frozenset({"widths"})

    def __init__(self, part: int, *, extra: int = 0, jump: bool = False, strength: float = 0.5):
        self.part, self.extra, self.jump, self.strength = part, extra, jump, strength

    def with_strength(self, strength: float) -> Pass:
        return Widths(self.part, extra=self.extra, jump=self.jump, strength=strength)

    def apply(self, model: Any, context: Context) -> Any:
        result = copy.deepcopy(model)
        hidden = result[self.part][0].out_features
        share = 1 - self.strength
        if self.jump and self.strength:
            share = min(share, 0.5)
        units = max(1, int(share * hidden)) + (self.extra if self.strength else 0)
        result[self.part] = nn.Sequential(nn.Linear(8, units), nn.Linear(units, 8))
        return result


def network() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 100), nn.Linear(100, 8)) for _ in range(2))).eval()


def fit(passes: list[Pass], budget: str) -> tuple[list[float], list[str]]:
    """Strengths found, and what was said."""
    said: list[str] = []
    model, example = network(), (torch.randn(1, 8),)
    context = Context(example=example, budget=Budget.parse(budget), report=said.append)
    costs = Costs(model, count(model, example), context, 0)

    def apply_all(several: Any) -> nn.Module:
        made = model
        for one in several:
            made = one.apply(made, context)
        return made

    found: Any = fitting_passes(passes, costs, apply_all).passes
    return [one.strength for one in found], said


def test_a_pass_that_raises_what_the_budget_is_of_stays_as_it_is() -> None:
    strengths, said = fit([Widths(0), Widths(1, extra=200, strength=0.0)], "params=0.7")
    assert strengths[1] == 0
    assert 0.55 < strengths[0] < 0.65
    assert any("does not lower the params; it stays as it is" in line for line in said)


def test_nothing_is_done_for_a_budget_that_is_met() -> None:
    strengths, _ = fit([Widths(0), Widths(1)], "params=1")
    assert strengths == [0, 0]


def test_a_pass_that_can_only_do_much_is_left_out_where_little_is_asked_for() -> None:
    strengths, said = fit([Widths(0), Widths(1, jump=True)], "params=0.996")
    assert strengths[1] == 0
    assert 0 < strengths[0] < 0.05
    assert "widths: is not needed for the budget; strength 0" in said
    strengths, _ = fit([Widths(0), Widths(1, jump=True)], "params=0.6")
    assert 0.25 < strengths[0] == strengths[1] < 0.35


def test_the_same_strength_for_all_where_all_are_needed() -> None:
    strengths, _ = fit([Widths(0), Widths(1)], "macs=0.5")
    assert strengths[0] == strengths[1] == pytest.approx(0.5, abs=0.02)


def test_no_pass_lowers_it() -> None:
    with pytest.raises(
        UserMistake, match=r"cannot be met: .* none lowers it further: params is still .* allow more"
    ):
        fit([Widths(0, extra=200)], "params=0.5")


def test_slimming_is_not_made_stronger_for_a_budget_of_parameters() -> None:
    model = small_vit(img_size=16, patch_size=4, depth=2)
    result = compress(model, ["structured", SIT], train=batches(1, 2, image=16), budget="params=0.7", **QUICK)
    assert result.final.params <= 0.7 * result.original.params
    assert result.steps[2].name.startswith("sit:")
    assert "keep=0.7" in result.steps[2].name


def test_slimming_is_not_inserted_for_nothing() -> None:
    result = compress(small_vit(), ["structured", SIT], train=batches(2), budget="macs=1", **QUICK)
    assert [step.macs for step in result.steps] == [result.original.macs] * 3
    assert result.final.params == result.original.params
