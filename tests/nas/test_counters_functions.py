"""Three counters on operators that are called with functions, and on models that cannot be counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nas.errors import UserMistake
from nas.profile import compare, formulas, profile, register_formula
from tests.nas._counting import Function, agreed

HEADS, LENGTH, WIDTH = 4, 16, 8
SCORES = 2 * HEADS * LENGTH * LENGTH
ATTENTION = (2 * SCORES * WIDTH, SCORES + 2 * HEADS * LENGTH * WIDTH)


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


MASK = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu")


def masked_inside(q: Tensor) -> Any:
    return flex_attention(
        q, q, q, block_mask=create_block_mask(causal, None, None, LENGTH, LENGTH, device=str(q.device))
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda q: flex_attention(q, q, q),
        lambda q: flex_attention(q, q[:, :2], q[:, :2], enable_gqa=True),
        lambda q: flex_attention(q, q, q, block_mask=MASK),  # a mask saves nothing here, as in all attention
        lambda q: flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + (i - j)),
        masked_inside,
    ],
)
def test_flex_attention_is_two_products(function: Callable[[Tensor], Tensor]) -> None:
    q = torch.randn(2, HEADS, LENGTH, WIDTH)
    assert agreed(Function(function), q) == (0, *ATTENTION)
    assert compare(Function(function), (q,)).uncounted == ()


def test_flex_attention_belongs_to_its_module() -> None:
    q = torch.randn(2, HEADS, LENGTH, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Function(lambda q: flex_attention(q, q, q)))
    found = compare(model, (q,))
    assert found.disagreements == ()
    assert {each.modules["1"] for each in found.counts.values()} == {ATTENTION}
    assert profile(model, (q,)).macs == ATTENTION[0] + q.numel() * WIDTH


def choosing(x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, (x,))


def test_other_functions_of_functions_are_named() -> None:
    for model in (Function(choosing), nn.Sequential(Function(choosing))):
        found = compare(model, (torch.randn(4, 4),))
        assert found.failures == {}
        assert {each.uncounted for each in found.counts.values()} == {("higher_order::cond",)}
        assert {each.macs for each in found.counts.values()} == {0}
    assert profile(Function(choosing), (torch.randn(4, 4),)).uncounted == ("higher_order::cond",)


def test_a_formula_can_be_given_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "_REGISTERED", {})
    register_formula("higher_order::cond", lambda given, made: (64, 16))
    found = profile(Function(choosing), (torch.randn(4, 4),))
    assert (found.macs, found.uncounted) == (64, ())
    assert compare(Function(choosing), (torch.randn(4, 4),), ["thop"]).counts["thop"].macs == 64


def test_torch_compile_is_as_it_was() -> None:
    before = torch.compile
    compare(Function(lambda q: flex_attention(q, q, q)), (torch.randn(1, 1, 4, 8),))
    assert torch.compile is before


# -- models that cannot be counted -------------------------------------------------------------------------------------


def scripted() -> nn.Module:
    made: Any = torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4))
    assert isinstance(made, nn.Module)
    return made


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            scripted(),
            "the model is a TorchScript module, which cannot be counted; give the model that torch.jit",
        ),
        (nn.Sequential(nn.Linear(4, 4), scripted()), "1 is a TorchScript module"),
        (nn.LazyLinear(3), "weight of LazyLinear has no shape yet; call the model once"),
        (nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()), "1.weight of Sequential has no shape yet"),
    ],
)
def test_models_that_cannot_be_counted_are_mistakes_of_one_line(model: nn.Module, message: str) -> None:
    for call in (profile, compare):
        with pytest.raises(UserMistake, match=message) as caught:
            call(model, (torch.zeros(2, 4),))
        assert "\n" not in str(caught.value)


def test_a_model_on_the_meta_device_is_counted_unless_it_reads_values() -> None:
    assert profile(nn.Linear(4, 4, device="meta"), (torch.zeros(1, 4),)).macs == 16
    reading = nn.Sequential(
        nn.Linear(4, 4, device="meta"), Function(lambda x: x if float(x.sum()) > 0 else -x)
    )
    for call in (profile, compare):
        with pytest.raises(
            UserMistake, match=r"on the meta device and it cannot run without data .*on the CPU"
        ):
            call(reading, (torch.zeros(1, 4),))
