"""Heads taken out of a mechanism: what is left computes what the whole did with the others at zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spaces.attention import Attention, make_attention
from spaces.attention.softmax import SoftmaxAttention
from spaces.errors import UserMistake
from spaces.layers.projection import HeadProjection

DIM, HEADS = 24, 4
MECHANISMS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "softmax, causal, wide heads": ("softmax", {"causal": True, "head_dim": 10}),
    "softmax, no bias": ("softmax", {"bias": False}),
    "softmax, cross": ("softmax", {"kdim": 14}),
    "relative": ("relative", {"distance": 3}),
    "relative, cross": ("relative", {"kdim": 14, "distance": 2, "head_dim": 5}),
    "cosformer": ("cosformer", {"max_length": 30}),
    "cosformer, causal": ("cosformer", {"causal": True, "eps": 1e-3, "chunk": 4}),
    "cosformer, cross": ("cosformer", {"kdim": 14, "own_lengths": True}),
    "cosformer, values of their own": ("cosformer", {"kdim": 14, "vdim": 9}),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(5)
    kind, options = MECHANISMS[name]
    made = make_attention(kind, DIM, HEADS, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return made.to(dtype).eval()


def tokens(name: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Inputs of a call, and which keys are padding."""
    options, random = MECHANISMS[name][1], torch.Generator().manual_seed(6)
    widths = [DIM, options.get("kdim", DIM), options.get("vdim", options.get("kdim", DIM))]
    if "kdim" not in options:
        widths = widths[:1]
    given = [
        torch.randn(2, 7 if i == 0 else 9, wide, generator=random).to(dtype) for i, wide in enumerate(widths)
    ]
    if "vdim" not in options:
        given = given[:2]
    padding = torch.zeros(2, given[-1].shape[1], dtype=torch.bool)
    padding[1, -2:] = True
    return given, padding


def zeroed(attention: Attention, kept: list[int]) -> Attention:
    made: Any = copy.deepcopy(attention)
    wide = made.out_proj.in_features // HEADS
    with torch.no_grad():
        for head in set(range(HEADS)) - set(kept):
            made.out_proj.weight[:, head * wide : (head + 1) * wide] = 0
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("kept", [[0, 3], [2], [3, 1, 0]])
@pytest.mark.parametrize("name", MECHANISMS)
@torch.no_grad()
def test_the_rest_computes_what_it_did(name: str, kept: list[int]) -> None:
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        whole = build(name, dtype)
        cut = copy.deepcopy(whole)
        cut.keep_heads(kept)
        given, padding = tokens(name, dtype)
        wanted = zeroed(whole, kept)(*given, key_padding_mask=padding)
        torch.testing.assert_close(cut(*given, key_padding_mask=padding), wanted, rtol=0, atol=close)
        assert not torch.allclose(wanted, whole(*given, key_padding_mask=padding), atol=1e-2)


@torch.no_grad()
def test_a_fused_map_also_serves_another_sequence() -> None:
    whole = build("softmax")
    cut = copy.deepcopy(whole)
    cut.keep_heads(torch.tensor([1, 2]))
    x, y = torch.randn(2, 5, DIM).double(), torch.randn(2, 8, DIM).double()
    torch.testing.assert_close(cut(x, y), zeroed(whole, [1, 2])(x, y), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MECHANISMS)
def test_sizes_are_true(name: str) -> None:
    made: Any = build(name)
    wide, sides = made.head_dim, made.in_proj.maps_by_head()
    before = sum(p.numel() for p in made.parameters())
    made.keep_heads([0, 2])
    assert (made.num_heads, made.head_dim, made.inner_dim, made.dim) == (2, wide, 2 * wide, DIM)
    assert (made.in_proj.num_heads, made.in_proj.inner_dim) == (2, 2 * wide)
    assert made.out_proj.in_features == 2 * wide
    assert sum(layer.out_features for layer, _ in sides) == 3 * 2 * wide
    gone = sum(layer.weight[0].numel() + (layer.bias is not None) for layer, rows in sides for _ in rows)
    assert before - sum(p.numel() for p in made.parameters()) == 2 * wide * (gone + DIM)
    assert made.head_columns().shape == (2, wide)


def test_what_is_frozen_stays_frozen_and_types_stay() -> None:
    made: Any = build("relative", torch.bfloat16).train()
    made.in_proj.fused.weight.requires_grad_(False)
    made.out_proj.bias.requires_grad_(False)
    made.keep_heads([1])
    learning = {name for name, p in made.named_parameters() if p.requires_grad}
    assert learning == {"position_keys", "in_proj.fused.bias", "out_proj.weight"}
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.training
    made.float()(torch.randn(1, 3, DIM)).sum().backward()
    assert made.in_proj.fused.bias.grad.shape == (3 * 6,)


def test_what_is_left_stays_on_its_device() -> None:
    made = build("softmax, cross").to("meta")
    made.keep_heads([2, 3])
    assert {p.device.type for p in made.parameters()} == {"meta"}


def test_all_heads_in_another_order_change_nothing() -> None:
    whole = build("cosformer")
    cut = copy.deepcopy(whole)
    cut.keep_heads([3, 0, 2, 1])
    x = torch.randn(1, 6, DIM).double()
    torch.testing.assert_close(cut(x), whole(x), rtol=0, atol=1e-10)


class PerHead(SoftmaxAttention):
    """A mechanism that holds one number by head."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.amounts = nn.Parameter(torch.linspace(0.5, 2, num_heads))

    def forward(self, query: Tensor, *others: Any, **options: Any) -> Tensor:
        q, k, v = self.in_proj(query)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v * self.amounts[:, None, None]
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def keep_heads(self, index: Any) -> None:
        super().keep_heads(index)
        self.amounts = nn.Parameter(self.amounts.detach()[index])


def test_a_mechanism_takes_more_out_by_itself() -> None:
    whole = PerHead(DIM, HEADS).double()
    cut = copy.deepcopy(whole)
    cut.keep_heads([3, 1])
    x = torch.randn(2, 5, DIM).double()
    torch.testing.assert_close(cut(x), zeroed(whole, [3, 1])(x), rtol=0, atol=1e-10)


class Interleaved(SoftmaxAttention):
    """The first channel of every head, then the second of every head, and so on."""

    def forward(self, query: Tensor, *others: Any, **options: Any) -> Tensor:
        q, k, v = self.in_proj(query)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out_proj(mixed.permute(0, 2, 3, 1).flatten(2))  # type: ignore[no-any-return]

    def head_columns(self) -> Tensor:
        return torch.arange(self.inner_dim).view(-1, self.num_heads).T


@pytest.mark.parametrize("kept", [[0, 2], [3, 0, 1]])
@torch.no_grad()
def test_a_mechanism_that_reads_heads_in_another_order_tells_it(kept: list[int]) -> None:
    whole = Interleaved(DIM, HEADS).double()
    cut, zero = copy.deepcopy(whole), copy.deepcopy(whole)
    cut.keep_heads(kept)
    for head in set(range(HEADS)) - set(kept):
        zero.out_proj.weight[:, head::HEADS] = 0
    x = torch.randn(2, 5, DIM).double()
    torch.testing.assert_close(cut(x), zero(x), rtol=0, atol=1e-10)


class TestRefused:
    @pytest.mark.parametrize("index", [[], [4], [-1], [1, 1], [0.5], [True, False]])
    def test_positions_that_are_none(self, index: Any) -> None:
        for made in (build("softmax"), HeadProjection(DIM, HEADS, 6)):
            with pytest.raises(
                UserMistake, match=r"heads: (give a non-empty list|positions must be in \[0, 4\))"
            ):
                made.keep_heads(index)

    def refused(self, made: Any, match: str) -> None:
        before = {name: p.shape for name, p in made.named_parameters()}
        with pytest.raises(UserMistake, match=match):
            made.keep_heads([0])
        assert {name: p.shape for name, p in made.named_parameters()} == before
        assert made.num_heads == HEADS

    def test_nothing_that_reads_heads_one_by_one(self) -> None:
        plain = make_attention("cosformer", DIM, HEADS, has_out_proj=False)
        self.refused(plain, r"has no out_proj \(a plain nn\.Linear, but Identity\)")
        thin: Any = build("softmax")
        thin.out_proj = nn.Sequential(nn.Linear(DIM, 3), nn.Linear(3, DIM))
        self.refused(thin, r"has no out_proj \(a plain nn\.Linear, but Sequential\)")

    def test_maps_that_are_no_linear_ones(self) -> None:
        made: Any = build("softmax, cross")
        made.in_proj.key = nn.Sequential(nn.Linear(14, DIM))
        self.refused(made, r"HeadProjection: key must be a plain nn\.Linear, but is Sequential")
        made.in_proj = nn.Identity()
        self.refused(made, r"has no in_proj \(HeadProjection\)")

    def test_an_out_proj_that_heads_do_not_divide(self) -> None:
        made: Any = build("softmax")
        made.out_proj = nn.Linear(DIM - 1, DIM)
        self.refused(made, "has an out_proj of 23 inputs, which num_heads=4 does not divide")
