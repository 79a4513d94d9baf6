"""OFB: the original's options, and states of its modules at sizes that the reference vectors do not have.

Expected values are closed forms of the published algorithm: V by its definition, and a plain module whose weights are
multiplied by it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor

from compress.passes._ofb_gate import (
    Gate,
    channel_options,
    embedding_options,
    head_options,
    hidden_options,
)
from compress.passes._ofb_losses import sparsity_losses
from compress.passes.ofb import Dimensions, Supernet, expand, extract, load_searching
from nas.errors import UserMistake
from tests.compress.ofb_models import vit

__all__ = ["CHANNELS", "CLOSE", "HEADS", "HIDDEN", "LAM", "bimask", "wave"]

CLOSE: dict[str, Any] = {"atol": 2e-6, "rtol": 1e-5}
LAM = 0.4

HEADS = {2: [2], 3: [2], 4: [2, 4], 5: [2, 4], 6: [2, 4, 6], 20: list(range(2, 21, 2))}
CHANNELS = {
    3: [0, 1, 2, 3],
    8: [2, 3, 4, 5, 6, 7, 8],
    20: [5, 7, 9, 11, 13, 15, 17, 19],
    22: [5, 7, 9, 11, 13, 14, 17, 19, 21],
}
HIDDEN = {
    60: [15, 22, 29, 36, 43, 50, 57],
    64: [16, 24, 32, 40, 48, 56, 64],
    84: [21, 31, 41, 50, 61, 71, 81],
    100: [25, 37, 49, 61, 73, 85, 97],
}


def wave(size: tuple[int, ...], seed: int) -> Tensor:
    """Numbers without ties, in [-1, 1]."""
    return torch.sin(torch.arange(1, math.prod(size) + 1) * (0.7 + 0.11 * seed)).reshape(size)


def bimask(alpha: Tensor, score: Tensor, heads: int, options: tuple[list[int], list[int]]) -> Tensor:
    """The multiplier of every unit by definition, one unit at a time; (heads, channels)."""
    channels = score.shape[1] if score.shape[1] > 1 else options[1][-1]
    p = alpha.flatten().softmax(0).reshape(alpha.shape)
    score = score.expand(heads, channels)
    sums = score.sigmoid().sum(1)
    out = torch.zeros(heads, channels)
    for h in range(heads):
        place = int((sums > sums[h]).sum())
        for c in range(channels):
            rank = int((score[h] > score[h, c]).sum())
            v = sum(
                float(p[i, j])
                for i, most in enumerate(options[0])
                for j, width in enumerate(options[1])
                if place < most and rank < width
            )
            out[h, c] = LAM * score[h, c].sigmoid() + (1 - LAM) * v
    return out


# Options


def test_options_of_the_original() -> None:
    assert {n: list(head_options(n, official=True)) for n in HEADS} == HEADS
    assert head_options(1, official=True) == ()
    assert {n: list(channel_options(n, official=True)) for n in CHANNELS} == CHANNELS
    assert {n: list(hidden_options(n, official=True)) for n in HIDDEN} == HIDDEN
    counts = {160: 17, 192: 17, 224: 17, 320: 17, 384: 17, 640: 27, 768: 33, 1024: 43}
    assert {n: len(embedding_options(n, official=True)) for n in counts} == counts
    assert embedding_options(640, official=True)[-1] == 632
    assert embedding_options(192, official=True)[:3] == (96, 102, 108)


def test_options_of_a_search_of_ours_have_the_same_steps_and_everything() -> None:
    assert embedding_options(192) == embedding_options(192, official=True)
    assert embedding_options(640) == (*embedding_options(640, official=True), 640)
    assert hidden_options(60) == (*HIDDEN[60], 60)
    assert head_options(2) == (2,)
    assert head_options(3, 2) == (2, 3)


def test_sizes_that_the_original_cannot_have_are_refused() -> None:
    with pytest.raises(UserMistake, match="the original has none for 24 units"):
        Supernet(vit(embed_dim=24), Dimensions(official_options=True))
    with pytest.raises(UserMistake, match="the original has no option for 1 heads"):
        Supernet(Attention(8, 1), Dimensions(official_options=True))
    with pytest.raises(UserMistake, match="the original has no number of heads for a single head"):
        load_searching(Supernet(Attention(8, 1)), {})


# States of one module


def attention_case(heads: int, channels: int, kind: str) -> tuple[Attention, dict[str, Tensor], Any]:
    model = Attention(heads * channels, heads, qkv_bias=True)
    options = (
        [heads] if kind == "channels" else HEADS[heads],
        [channels] if kind == "heads" else CHANNELS[channels],
    )
    alpha = wave((len(options[0]), len(options[1])), 1)
    score = wave((1 if kind == "channels" else heads, 1 if kind == "heads" else channels), 2)
    state = {name: 0.3 * wave(tuple(x.shape), i) for i, (name, x) in enumerate(model.state_dict().items())}
    return model, {**state, "alpha": alpha, "score": score}, options


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize(
    ("heads", "channels", "kind"),
    [
        (2, 8, "both"),
        (3, 8, "both"),
        (5, 8, "both"),
        (4, 20, "both"),
        (4, 22, "both"),
        (2, 3, "both"),
        (2, 8, "heads"),
        (3, 8, "heads"),
        (3, 20, "channels"),
    ],
)
def test_an_attention_of_any_size(heads: int, channels: int, kind: str, switch: bool) -> None:
    model, state, options = attention_case(heads, channels, kind)
    wanted = Dimensions(
        calibrated=False, heads=kind != "channels", channels=kind != "heads", official_options=switch
    )
    supernet = Supernet(model, wanted).eval()
    load_searching(supernet, state)
    supernet.schedule(LAM, 1.0)
    gate = next(supernet.gates())
    assert (list(gate.head_options), list(gate.channel_options)) == options
    assert supernet.dimensions.official_options
    factor = bimask(state["alpha"], state["score"], heads, options)
    torch.testing.assert_close(gate.bimask(), factor, **CLOSE)
    model.load_state_dict({name: x for name, x in state.items() if name not in ("alpha", "score")})
    with torch.no_grad():
        model.qkv.weight *= factor.reshape(-1).repeat(3)[:, None]
        model.qkv.bias *= factor.reshape(-1).repeat(3)
    x = wave((2, 5, heads * channels), 3)
    torch.testing.assert_close(supernet(x), model(x), **CLOSE)


@pytest.mark.parametrize("hidden", sorted(HIDDEN))
def test_an_mlp_of_any_size(hidden: int) -> None:
    model = Mlp(12, hidden)
    state = {name: 0.3 * wave(tuple(x.shape), i) for i, (name, x) in enumerate(model.state_dict().items())}
    alpha, score = wave((1, len(HIDDEN[hidden])), 1), wave((1, hidden), 2)
    supernet = Supernet(model, Dimensions(calibrated=False)).eval()
    load_searching(supernet, {**state, "alpha": alpha, "score": score})
    supernet.schedule(LAM, 1.0)
    model.load_state_dict(state)
    factor = bimask(alpha, score, 1, ([1], HIDDEN[hidden]))
    with torch.no_grad():
        model.fc1.weight *= factor.T
        model.fc1.bias *= factor[0]
    x = wave((2, 5, 12), 3)
    torch.testing.assert_close(supernet(x), model(x), **CLOSE)


def test_two_heads_have_a_ranking_each() -> None:
    supernet = Supernet(Attention(16, 2, qkv_bias=True))
    gate = next(supernet.gates())
    assert gate.score.shape == (2, 8)
    with torch.no_grad():
        gate.score.copy_(wave((2, 8), 2))
        gate.alpha.fill_(-20.0)
        gate.alpha[gate.head_options.index(2), gate.channel_options.index(3)] = 20.0
    best = gate.score.topk(3, dim=1).indices.tolist()
    assert set(best[0]) != set(best[1])
    supernet.compress(0.2)
    assert dict(zip(gate.head_ids, gate.channel_ids, strict=True)) == dict(enumerate(best))


def test_units_beyond_the_largest_option_go_when_it_is_decided() -> None:
    model, state, _ = attention_case(3, 8, "both")
    supernet = Supernet(model, Dimensions(calibrated=False)).eval()
    load_searching(supernet, state)
    gate = next(supernet.gates())
    assert gate.sparsity().gt(0).any(1).sum() == 2
    supernet.compress(0.2)
    assert gate.heads == (3 if int(gate.alive.sum()) > 1 else 2)
    supernet.compress(0.2, force=True)
    assert (gate.heads, supernet.host.num_heads) == (2, 2)


def test_a_module_of_one_option_is_decided_by_the_first_deletion() -> None:
    model, state, options = attention_case(3, 8, "heads")
    supernet = Supernet(model, Dimensions(calibrated=False, channels=False, official_options=True)).eval()
    load_searching(supernet, state)
    assert options[0] == [2]
    assert sparsity_losses(supernet.gates()) == {}
    supernet.schedule(LAM, 1.0)
    supernet.compress(0.2)
    gate = next(supernet.gates())
    kept = state["score"].sigmoid().flatten().sort(descending=True).values[:2]
    assert gate.decided
    torch.testing.assert_close(gate.score.flatten(), LAM * kept + 1 - LAM)


def test_an_attention_left_without_channels_is_refused() -> None:
    model, state, _ = attention_case(2, 3, "both")
    state["alpha"] = torch.tensor([[5.0, -5.0, -5.0, -5.0]])
    supernet = Supernet(model)
    load_searching(supernet, state)
    with pytest.raises(UserMistake, match="an attention of 3 channels is left with none"):
        supernet.compress(0.2, force=True)


def test_options_that_the_original_deleted_stay_deleted() -> None:
    model = Mlp(12, 64)
    state = {name: 0.3 * wave(tuple(x.shape), i) for i, (name, x) in enumerate(model.state_dict().items())}
    state["score"] = wave((1, 64), 2)

    def gate_after(alpha: list[float]) -> Gate:
        supernet = Supernet(model, Dimensions(calibrated=False)).eval()
        load_searching(supernet, {**state, "alpha": torch.tensor([alpha])})
        return next(supernet.gates())

    gate = gate_after([1.0, 0.5, 0.0, 0.7, 0.0, 0.3, 0.2])
    assert gate.alive.tolist() == [[True, True, False, True, False, True, True]]
    assert gate_after([0.0] * 7).alive.all()
    assert gate_after([0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]).alive.all()  # 32 units would have been cut to
    gate = gate_after([0.0] * 6 + [3.0])
    assert gate.decided
    factor = gate.multiplier()
    assert factor is not None
    torch.testing.assert_close(factor, state["score"])


def test_an_own_scale_of_the_softmax_survives_the_cut() -> None:
    model, state, _ = attention_case(4, 8, "both")
    model.load_state_dict({name: x for name, x in state.items() if name not in ("alpha", "score")})
    model.scale, model.fused_attn = 0.3, False
    supernet = Supernet(model, Dimensions(calibrated=False)).eval()
    load_searching(supernet, state)
    supernet.compress(0.2, force=True)
    gate = next(supernet.gates())
    assert gate.channels < 8
    supernet.fuse()
    x = wave((2, 5, 32), 3)
    full = copy.deepcopy(model)
    with torch.no_grad():
        dead = torch.ones(4, 8)
        for (head, channel), factor in zip(gate.present(), gate.score.flatten().tolist(), strict=True):
            dead[head, channel] = 1 - factor
        full.qkv.weight *= (1 - dead).reshape(-1).repeat(3)[:, None]
        full.qkv.bias *= (1 - dead).reshape(-1).repeat(3)
    torch.testing.assert_close(supernet(x), full(x), **CLOSE)
    torch.testing.assert_close(extract(expand(model, supernet), supernet)(x), full(x), **CLOSE)
