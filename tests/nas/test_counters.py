"""Three counters of parameters, MACs and activations: they agree with each other and with closed forms."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.cli.main import main
from nas.errors import UserMistake
from nas.profile import COUNTERS, Comparison, compare, count, formulas, inclusive, profile, register_formula
from spaces import SearchSpace, get_space, list_spaces
from spaces.attention import list_attention, make_attention
from spaces.attention.cosformer import cosformer_macs
from spaces.attention.relative import relative_macs
from spaces.attention.softmax import softmax_macs
from spaces.sequence.efficient_transformer import (
    count_macs,
    count_translation_macs,
    image_plan,
    translation_plan,
)
from spaces.sequence.hiformer import count_macs as hiformer_macs
from spaces.sequence.hiformer import hiformer_plan
from spaces.signature import ClickThroughRateSignature, ImageSignature, TranslationSignature


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def agreed(model: nn.Module, *inputs: Tensor) -> tuple[int, int, int]:
    """Parameters, MACs and activations that all three counters found, module by module."""
    found = compare(model, inputs)
    assert found.failures == {}
    assert [str(line) for line in found.disagreements] == []
    assert list(found.counts) == ["fvcore", "thop", "torch"] == list(COUNTERS)
    figures = {(each.params, each.macs, each.activations) for each in found.counts.values()}
    assert len(figures) == 1
    return figures.pop()


# -- operators ---------------------------------------------------------------------------------------------------------

BATCH, CHANNELS, SIDE = 2, 3, 8
NUMBERS = BATCH * CHANNELS * SIDE * SIDE  # of the input
SQUARE = SIDE * SIDE
ATTENTION = (2 * NUMBERS * SIDE, 2 * NUMBERS)  # as long as it is wide
sdpa = F.scaled_dot_product_attention


@pytest.mark.parametrize(
    ("function", "work"),
    [
        (lambda x: sdpa(x, x, x), ATTENTION),
        (lambda x: sdpa(x, x, x, is_causal=True), ATTENTION),
        (lambda x: sdpa(x, x, x, attn_mask=x.new_zeros(SIDE, SIDE)), ATTENTION),
        (lambda x: sdpa(x, x[:1], x[:1]), ATTENTION),
        (lambda x: sdpa(x[0], x[0], x[0]), (ATTENTION[0] // 2, ATTENTION[1] // 2)),
        (lambda x: sdpa(query=x, key=x[:, :, :5], value=x[:, :, :5, :4]), (6 * 8 * 5 * 12, 6 * 8 * (5 + 4))),
        (lambda x: sdpa(x.repeat(1, 2, 1, 1), x, x, enable_gqa=True), (2 * ATTENTION[0], 2 * ATTENTION[1])),
        (lambda x: x @ x, (NUMBERS * SIDE, NUMBERS)),
        (lambda x: torch.matmul(input=x, other=x.mT), (NUMBERS * SIDE, NUMBERS)),
        (lambda x: x[0, 0] @ x, (NUMBERS * SIDE, NUMBERS)),
        (lambda x: x @ x[0, 0, 0], (NUMBERS, NUMBERS // SIDE)),
        (lambda x: x[0, 0, 0] @ x, (NUMBERS, NUMBERS // SIDE)),
        (lambda x: torch.Tensor.__rmatmul__(x, x), (NUMBERS * SIDE, NUMBERS)),
        (lambda x: torch.linalg.matmul(x, x), (NUMBERS * SIDE, NUMBERS)),
        (lambda x: torch.inner(x, x[0]), (NUMBERS * 3 * 8, NUMBERS * 3)),
        (lambda x: torch.mm(x[0, 0], x[0, 1]), (SQUARE * SIDE, SQUARE)),
        (lambda x: torch.ops.aten.mm(x[0, 0], x[0, 1]), (SQUARE * SIDE, SQUARE)),
        (lambda x: torch.bmm(x[0], x[0]), (3 * SQUARE * SIDE, 3 * SQUARE)),
        (lambda x: torch.baddbmm(x[0], x[0], x[0]), (3 * SQUARE * SIDE, 3 * SQUARE)),
        (lambda x: x[0].clone().baddbmm_(x[0], x[0]), (3 * SQUARE * SIDE, 3 * SQUARE)),
        (lambda x: torch.addbmm(x[0, 0], x[0], x[0]), (3 * SQUARE * SIDE, SQUARE)),
        (lambda x: torch.addmm(x[0, 0], mat1=x[0, 0], mat2=x[0, 0]), (SQUARE * SIDE, SQUARE)),
        (lambda x: x[0, 0].clone().addmm_(x[0, 0], x[0, 0]), (SQUARE * SIDE, SQUARE)),
        (lambda x: torch.mv(x[0, 0], x[0, 0, 0]), (SQUARE, SIDE)),
        (lambda x: torch.addmv(x[0, 0, 0], x[0, 0], x[0, 0, 1]), (SQUARE, SIDE)),
        (lambda x: torch.dot(x[0, 0, 0], x[0, 0, 0]), (SIDE, 1)),
        (lambda x: torch.tensordot(x, x, ([2, 3], [2, 3])), (36 * SQUARE, 36)),
        (lambda x: F.linear(input=x, weight=x[0, 0, :5]), (NUMBERS * 5, NUMBERS // SIDE * 5)),
        (lambda x: F.conv2d(x, x.new_zeros(6, 1, 3, 3), padding=1, groups=3), (2 * SQUARE * 6 * 9, 12 * SQUARE)),
        (lambda x: F.conv2d(x, x.new_zeros(6, 3, 4, 4), padding="same"), (12 * SQUARE * 48, 12 * SQUARE)),
        (lambda x: F.conv2d(x[0], x.new_zeros(6, 3, 4, 4)), (6 * 25 * 48, 6 * 25)),
        (lambda x: F.conv1d(x[0], x.new_zeros(6, 8, 3)), (3 * 6 * 6 * 24, 3 * 6 * 6)),
        (lambda x: F.conv3d(x[None], x.new_zeros(4, 2, 2, 2, 2)), (4 * 98 * 16, 4 * 98)),
        (lambda x: F.conv_transpose2d(x, x.new_zeros(3, 6, 2, 2), stride=2), (NUMBERS * 24, 12 * 256)),
        (lambda x: F.conv_transpose2d(x, x.new_zeros(3, 2, 2, 2), stride=2, groups=3), (NUMBERS * 8, 12 * 256)),
        (lambda x: (x @ x, x)[1], (NUMBERS * SIDE, NUMBERS)),  # work counts even if its result is thrown away
        (lambda x: F.fold(F.unfold(x, 3), (8, 8), 3), (0, 0)),
        (lambda x: F.gelu(x).softmax(-1) + F.interpolate(x, scale_factor=1, mode="bilinear").relu_(), (0, 0)),
        (lambda x: torch.outer(x[0, 0, 0], x[0, 0, 0]) * F.avg_pool2d(x, 1), (0, 0)),
    ],
)  # fmt: skip
def test_operators(function: Callable[[Tensor], Tensor], work: tuple[int, int]) -> None:
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    assert agreed(Function(function), x) == (0, *work)


def fourier(batch: int, points: int, factor: float) -> int:
    return batch * round(factor * points * math.log2(points))


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (torch.fft.fft, fourier(48, 8, 1.25)),  # of real numbers
        (lambda x: torch.fft.fft(x, n=5), fourier(48, 5, 1.25)),
        (lambda x: torch.fft.fft(torch.complex(x, x), dim=1), fourier(128, 3, 2.5)),
        (torch.fft.fft2, fourier(6, 64, 2.5)),
        (torch.fft.ifftn, fourier(1, NUMBERS, 2.5)),
        (lambda x: torch.fft.rfft(x, n=6, dim=2), fourier(48, 6, 1.25)),
        (lambda x: torch.fft.rfft(x, n=x.shape[1]), fourier(48, 3, 1.25)),
        (lambda x: torch.fft.rfft2(x, dim=(1, 2), norm="ortho"), fourier(16, 24, 1.25)),
        (lambda x: torch.fft.rfft2(x, s=(4, 6)), fourier(6, 24, 1.25)),
        (lambda x: torch.fft.rfftn(x, s=(4, 4)), fourier(6, 16, 1.25)),
        (lambda x: torch.fft.irfft(torch.complex(x, x), n=7), fourier(48, 7, 1.25)),
        (lambda x: torch.fft.irfft2(torch.complex(x, x), s=(8, 7)), fourier(6, 56, 1.25)),
        (torch.fft.hfft, fourier(48, 14, 1.25)),
        (torch.fft.ihfft, fourier(48, 8, 1.25)),
    ],
)
def test_fourier_transforms(function: Callable[[Tensor], Tensor], macs: int) -> None:
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    assert agreed(Function(function), x)[1:] == (macs, function(x).numel())


@pytest.mark.parametrize(
    ("equation", "work"),
    [
        ("bchw,bdhw->bcd", (18 * 64, 18)),
        ("...ij,...jk->...ik", (NUMBERS * 8, NUMBERS)),
        ("bcij, bcjk", (NUMBERS * 8, 64)),  # without a result: b and c are summed, so are they in the product
        ("bcij,bcij->", (NUMBERS, 1)),
        ("bcij,bcij->bcij", (0, 0)),
        ("bcij,bckl->bcijkl", (0, 0)),
        ("bcii,bcij->bcj", (NUMBERS, 48)),
        ("bcij,bcjk,bckl->bil", (2 * NUMBERS * 8, NUMBERS + 128)),
        ("bcij->bij", (0, 0)),
    ],
)
def test_einsum(equation: str, work: tuple[int, int]) -> None:
    factors = equation.split("->")[0].count(",") + 1
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    macs = agreed(Function(lambda x: torch.einsum(equation, *[x] * factors)), x)[1:]
    if equation == "bcij, bcjk":
        assert macs[0] == work[0]
    else:
        assert macs == work


def test_einsum_with_indices_and_with_a_list() -> None:
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    expected = (0, NUMBERS * 8, NUMBERS)
    assert agreed(Function(lambda x: torch.einsum(x, [..., 2, 3], x, [..., 3, 4])), x) == expected
    assert agreed(Function(lambda x: torch.einsum("bcij,bcjk->bcik", [x, x])), x) == expected


@pytest.mark.parametrize("seed", range(12))
def test_einsum_of_any_form_agrees(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {letter: rng.choice([1, 2, 3, 5]) for letter in "abcdef"}
    terms = ["".join(rng.sample("abcdef", rng.randint(1, 4))) for _ in range(rng.choice([2, 3, 4]))]
    used = sorted(set("".join(terms)))
    equation = f"{','.join(terms)}->{''.join(rng.sample(used, rng.randint(0, min(3, len(used)))))}"
    factors = [torch.randn([sizes[letter] for letter in term]) for term in terms]
    agreed(Function(lambda *x: torch.einsum(equation, *x)), *factors)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.cdist(x, x), "cdist"),
        (lambda x: torch.linalg.svd(x)[1], "linalg_svd"),
        (lambda x: F.grid_sample(x, x.new_zeros(2, 4, 4, 2), align_corners=False), "grid_sampler"),
        (lambda x: F.bilinear(x, x, x.new_zeros(4, 8, 8)), "bilinear"),
    ],
)
def test_work_without_a_formula_is_named_by_every_counter(
    function: Callable[[Tensor], Tensor], name: str
) -> None:
    found = compare(Function(function), (torch.randn(2, 3, 8, 8),))
    assert all(each.uncounted for each in found.counts.values())
    assert name in found.uncounted
    assert found.disagreements == ()


def test_what_some_counters_cannot_look_into_is_named_and_disagrees() -> None:
    found = compare(Function(lambda x: torch.fft.hfft2(x)), (torch.randn(2, 8, 8),))
    assert found.counts["torch"].macs > found.counts["thop"].macs == 0
    assert found.counts["thop"].uncounted == found.counts["fvcore"].uncounted == ("fft_hfft2",)
    assert found.disagreements


# -- modules -----------------------------------------------------------------------------------------------------------

T, B, E, H = 5, 2, 8, 6  # steps, batch, width, hidden width


@pytest.mark.parametrize(
    ("module", "gates", "hidden"),
    [(nn.RNN, 1, H), (nn.GRU, 3, H), (nn.LSTM, 4, H)],
)
def test_recurrent_layers(module: Any, gates: int, hidden: int) -> None:
    x = torch.randn(T, B, E)
    both = gates * hidden * (E + hidden)
    assert agreed(module(E, hidden), x)[1:] == (T * B * both, T * B * 2 * gates * hidden)
    assert agreed(module(E, hidden, bidirectional=True, bias=False), x)[1] == 2 * T * B * both
    assert agreed(module(E, hidden), x[:, 0])[1] == T * both  # without a batch
    cell: Any = getattr(nn, f"{module.__name__}Cell")
    assert agreed(cell(E, hidden), x[0])[1] == B * both
    assert agreed(cell(E, hidden), x[0, 0])[1] == both


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(E, H, proj_size=3)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
        data: Tensor = self.lstm(packed)[0].data
        return data


def test_packed_sequences_count_what_is_in_them() -> None:
    assert agreed(Packed(), torch.randn(T, B, E))[1] == (5 + 3) * (4 * H * (E + 3) + 3 * H)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_multi_head_attention(options: dict[str, bool]) -> None:
    x = torch.randn(T, B, E)
    batch, length = (T, B) if "batch_first" in options else (B, T)
    attended = length + 2 * ("add_bias_kv" in options)
    macs = batch * (4 * length * E * E + 2 * length * attended * E)
    activations = batch * (5 * length * E + 2 * length * attended)
    assert agreed(nn.MultiheadAttention(E, 2, **options), x, x, x)[1:] == (macs, activations)


def test_multi_head_attention_across_widths() -> None:
    q, k, v = torch.randn(T, B, E), torch.randn(7, B, 6), torch.randn(7, B, 4)
    macs = B * (2 * T * E * E + 7 * (6 + 4) * E + 2 * T * 7 * E)
    assert agreed(nn.MultiheadAttention(E, 2, kdim=6, vdim=4), q, k, v)[1] == macs


def test_transformer_layers() -> None:
    x = torch.randn(T, B, E)
    encoder = B * (T * (4 * E * E + 2 * E * 16) + 2 * T * T * E)
    assert agreed(nn.TransformerEncoderLayer(E, 2, 16), x)[1] == encoder
    decoder = encoder + B * (T * 4 * E * E + 2 * T * T * E)
    assert agreed(nn.Transformer(E, 2, 1, 1, 16), x, x)[1] == encoder + decoder


def test_shared_modules_count_each_call_and_each_parameter_once() -> None:
    shared = nn.Linear(E, E)
    conv = nn.Conv1d(5, 5, 3, padding=1)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU(), conv), shared, nn.Sequential(conv))
    per_call = B * T * E * E, B * E * 5 * 5 * 3
    params = E * E + E + 5 * 5 * 3 + 5
    assert agreed(model, torch.randn(B, T, E))[:2] == (params, 3 * per_call[0] + 2 * per_call[1])


class Odd(nn.Module):
    """Everything that hooks on modules do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, E))
        self.linear = nn.Linear(E, E)
        self.derived = type("Derived", (nn.Linear,), {})(E, E)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(E, E))
        self.turned = nn.ConvTranspose1d(E, E, 3, stride=2)
        self.unbatched = nn.Conv1d(E, E, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.cat((self.token.expand(len(x), 1, E), x), 1)
        x = F.linear(x, self.linear.weight)  # the module itself is never called
        x = self.linear.forward(x)  # nor are its hooks
        x = self.normed(self.derived(x))
        return {"turned": self.turned(x.mT), "unbatched": self.unbatched(input=x[0].mT)}


def test_what_modules_do_not_show() -> None:
    params, macs, _ = agreed(Odd(), torch.randn(B, T, E))
    tokens = B * (T + 1)
    assert params == sum(p.numel() for p in Odd().parameters())
    assert macs == 4 * tokens * E * E + tokens * E * E * 3 + (T - 1) * E * E * 3


def test_spectral_norm_of_a_hook_is_counted_too() -> None:
    model = nn.utils.spectral_norm(nn.Linear(8, 4))
    assert agreed(model, torch.randn(3, 8))[1] == 3 * 32 + 32 + 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", list_attention())
def test_attention_mechanisms(kind: str, causal: bool) -> None:
    """A new mechanism needs a line here: its work in closed form."""
    core = {"softmax": softmax_macs, "cosformer": cosformer_macs, "relative": relative_macs}[kind]
    attention = make_attention(kind, dim=32, num_heads=2, causal=causal)
    tokens = 150  # more than a chunk of causal cosFormer
    macs = agreed(attention, torch.randn(1, tokens, 32))[1]
    if kind == "relative":
        table = next(p for name, p in attention.named_parameters() if p.dim() == 2 and p.shape[1] == 16)
        expected = 2 * tokens * (2 * tokens + len(table)) * 16
    else:
        expected = 2 * core(tokens, tokens, 16, causal=causal)
    assert macs == 4 * tokens * 32 * 32 + expected


# -- models ------------------------------------------------------------------------------------------------------------


def vit(width: int, depth: int = 12, classes: int = 1000, extra: int = 1) -> int:
    tokens = 196 + extra
    block = tokens * 12 * width * width + 2 * tokens * tokens * width
    return 196 * width * 768 + depth * block + extra * width * classes


def stages(widths: Sequence[int], depths: Sequence[int], per_token: Callable[[int], int]) -> int:
    """Pyramids of 4x4 patches that halve each side between stages through 2x2 patches."""
    macs = 56 * 56 * 48 * widths[0] + 1000 * widths[-1]
    for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        tokens = (56 >> index) ** 2
        macs += depth * tokens * per_token(width)
        if index:
            macs += tokens * 4 * widths[index - 1] * width
    return macs


def swin(width: int) -> int:
    return 12 * width * width + 2 * 49 * width


def convnext(width: int) -> int:
    return 49 * width + 8 * width * width


WIDTHS = (96, 192, 384, 768)


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("deit_tiny_patch16_224", 5_717_416, 1_253_683_200),
        ("deit_small_patch16_224", 22_050_664, 4_598_882_304),
        ("deit_base_patch16_224", 86_567_656, 17_563_828_224),
        ("deit_tiny_distilled_patch16_224", 5_910_800, 1_261_003_776),
        ("vit_base_patch16_224", 86_567_656, 17_563_828_224),
        ("deit3_small_patch16_224", 22_059_496, 4_598_882_304),
        ("swin_tiny_patch4_window7_224", 28_288_354, 4_490_566_656),
        ("convnext_tiny", 28_589_128, 4_455_531_264),
        ("resnet50", 25_557_032, 4_089_184_256),
        ("efficientnet_b0", 5_288_548, 385_814_752),
        ("mobilevit_xs", 2_317_848, 1_025_911_808),
        ("pvt_v2_b0", 3_666_760, 566_065_664),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("tnt_s_patch16_224", 23_768_584, 5_216_875_008),
                ("coat_tiny", 5_498_540, 4_316_447_208),  # shares modules between blocks
                ("xcit_nano_12_p16_224", 3_053_224, 550_952_448),
                ("cait_xxs24_224", 11_956_264, 2_523_475_200),  # modules that are called with parameters
                ("crossvit_tiny_240", 7_014_800, 1_562_734_080),
                ("levit_128s", 7_777_058, 304_660_832),
                ("lambda_resnet26t", 10_958_272, 3_003_465_728),
                ("halonet26t", 12_480_288, 3_172_810_752),
                ("hiera_tiny_224", 27_910_216, 4_900_830_720),
            )
        ),
    ],
)
def test_models_of_timm(name: str, params: int, macs: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = agreed(model, torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    assert found[:2] == (params, macs)


def test_the_figures_of_timm_models_are_their_closed_forms() -> None:
    assert vit(192) == 1_253_683_200
    assert vit(384) == 4_598_882_304
    assert vit(768) == 17_563_828_224
    assert vit(192, extra=2) == 1_261_003_776
    assert stages(WIDTHS, (2, 2, 6, 2), swin) == 4_490_566_656
    assert stages(WIDTHS, (3, 3, 9, 3), convnext) == 4_455_531_264


def test_a_batch_costs_as_many_times_as_it_has_samples() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224", depth=2)
    one, three = (agreed(model, torch.empty(batch, 3, 224, 224)) for batch in (1, 3))
    assert (three[0], three[1], three[2]) == (one[0], 3 * one[1], 3 * one[2])


def scales() -> Iterator[str]:
    for name, names in list_spaces().items():
        for scale in names:
            yield f"{name}:{scale}"


@pytest.mark.parametrize("scale", scales())
def test_architectures_of_the_spaces(scale: str) -> None:
    space = get_space(scale)
    assert space.baseline is not None
    _check(space, [space.published[space.baseline], space.sample(random.Random(0))])


@pytest.mark.slow
@pytest.mark.parametrize("scale", scales())
def test_every_published_architecture_of_the_spaces(scale: str) -> None:
    space = get_space(scale)
    rng = random.Random(1)
    _check(space, [*space.published.values(), *(space.sample(rng) for _ in range(3))])


def _check(space: SearchSpace, architectures: Sequence[Any]) -> None:
    for architecture in architectures:
        model, inputs, macs = built(space, architecture)
        counted = agreed(model, *inputs)[1]
        assert macs in (counted, None), space.key(architecture)


def built(space: SearchSpace, architecture: Any) -> tuple[nn.Module, tuple[Tensor, ...], int | None]:
    """A model, inputs, and its MACs in closed form; those of other spaces are in their own tests."""
    scale = space.name.partition(":")[2]
    signature: Any
    if space.task == "translation":
        signature = TranslationSignature(100, 100, 32)
        with torch.device("meta"):
            model = space.build(architecture, signature)
        plan = translation_plan(scale, architecture)
        inputs = torch.ones(1, 11, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)
        return model, inputs, count_translation_macs(11, 9, **plan) + 9 * plan["dims"][1] * 100
    if space.task == "click_through_rate":
        signature = ClickThroughRateSignature((9, 8, 7, 6), (1, 1, 3, 1), 5, outputs=2)
        with torch.device("meta"):
            model = space.build(architecture, signature)
        features = torch.ones(1, 6, dtype=torch.long), torch.ones(1, 5)
        return model, features, hiformer_macs(signature, **hiformer_plan(architecture, signature))
    side = 32 if scale == "small" else 224
    signature = ImageSignature(3, side, side, 10)
    with torch.device("meta"):
        model = space.build(architecture, signature)
    ours = space.name.startswith("efficient_transformer")
    macs = count_macs(signature, **image_plan(architecture, signature)) if ours else None
    return model, (torch.empty(1, 3, side, side),), macs


def test_the_sheet_of_efficient_transformer() -> None:
    """Figures of the official modules for softmax attention, which ours does alike."""
    space = get_space("efficient_transformer:cifar10")
    model, inputs, _ = built(space, space.published["searched_87.4_softmax"])
    assert agreed(model, *inputs)[:2] == (24_357_386, 5_139_462_912)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x


class Hidden(nn.Module):
    """A product that a jit trace shows as one opaque node."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, 8), Function(lambda x: Square.apply(x)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


def hidden() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """For the command line."""
    return Hidden(), (torch.randn(1, 8, 8),)


def test_a_disagreement_names_the_module() -> None:
    found = compare(*hidden())
    assert [(line.module, line.figure) for line in found.disagreements] == [
        ("blocks.1", "macs"),
        ("blocks.1", "activations"),
    ]
    assert found.disagreements[0].values == {"fvcore": 0, "thop": 512, "torch": 512}
    assert str(found.disagreements[0]) == "blocks.1: macs fvcore 0, thop 512, torch 512"
    assert found.uncounted == ("prim::PythonOp.Square",)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["agree"] is False
    assert plain["counters"]["torch"]["modules"]["blocks"]["macs"] == 1024


def test_kernels_of_others_until_somebody_gives_a_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    product: Any = torch.library.custom_op("nas_counters::product", mutates_args=())(_product)
    product.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
    model = Function(lambda a, b: product(b=b, a=a))
    inputs = torch.randn(3, 4), torch.randn(4, 5)
    before = compare(model, inputs)
    assert {each.uncounted for each in before.counts.values()} == {("nas_counters::product",)}
    assert before.counts["torch"].macs == 0
    monkeypatch.setattr(formulas, "_REGISTERED", {})
    register_formula("nas_counters::product", lambda given, made: (given[0][1] * 15, 15))
    assert agreed(model, *inputs) == (0, 60, 15)
    assert compare(model, inputs).uncounted == ()


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@pytest.mark.parametrize("name", ["product", "aten::mm", "nas_counters::", "::product"])
def test_formulas_are_for_operators_of_others(name: str) -> None:
    with pytest.raises(ValueError, match="must be 'library::name' of a library other than aten"):
        register_formula(name, lambda given, made: (0, 0))


class Unpadded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        tokens: Tensor = self.linear(x[keep])
        return F.scaled_dot_product_attention(tokens[None], tokens[None], tokens[None])


def test_control_flow_that_reads_values_is_counted_with_data() -> None:
    keep = torch.tensor([True, True, True, False])
    assert agreed(Unpadded(), torch.randn(4, 4), keep)[1] == 3 * 4 * 5 + 2 * 3 * 3 * 5
    found = compare(Unpadded(), (torch.randn(4, 4), keep))
    assert {each.method for each in found.counts.values()} == {"data"}


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("not for tracing")
        return x @ x


def test_a_counter_that_cannot_follow_is_told_of_and_the_others_go_on() -> None:
    found = compare(Untraceable(), (torch.randn(4, 4),))
    assert found.failures == {"fvcore": "not for tracing"}
    assert {each.macs for each in found.counts.values()} == {64}
    assert found.to_dict()["agree"] is False


def test_a_model_that_fails_fails_with_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        compare(nn.Linear(4, 4), (torch.randn(2, 5),))


def test_unknown_and_missing_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserMistake, match=r"counter 'thob' must be one of fvcore, thop, torch.*thop"):
        count("thob", nn.Linear(2, 2), (torch.randn(1, 2),))
    for name in ("fvcore.nn", "thop.profile"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("fvcore", "thop"):
        with pytest.raises(UserMistake, match=f"counter {name} cannot be imported .*pip install {name}"):
            count(name, nn.Linear(2, 2), (torch.randn(1, 2),))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compare(model, (torch.randn(2, 4),))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_alone_they_miss_attention() -> None:
    """What our handlers are for; should a counter learn it, this says that the handler can go."""
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224").eval()
        image = torch.empty(1, 3, 224, 224)
    attention = 12 * 2 * 197 * 197 * 192
    thop = importlib.import_module("thop.profile")
    alone = thop.profile(model, (image,), verbose=False)[0]
    assert alone < 1_253_683_200 - 0.9 * attention  # it also counts norms, which the convention leaves out
    assert profile(model, (image,)).macs == 1_253_683_200


def test_inclusive_sums() -> None:
    own = {"a.b.c": formulas.Work(1, 10), "a": formulas.Work(2, 20), "": formulas.Work(4, 40)}
    assert inclusive(own) == {"": (7, 70), "a": (3, 30), "a.b": (1, 10), "a.b.c": (1, 10)}


# -- command line ------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["profile", *arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out + printed.err


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    code, text = run(
        capsys, "timm:deit_tiny_patch16_224", "--batch", "2", "--per-module", "--json", str(path)
    )
    assert code == 0
    assert "called with 2x3x224x224" in text
    assert text.count("2,507,366,400") == 4  # three counters and the model in the table of modules
    assert text.index("blocks.9.mlp.fc2") < text.index("blocks.10.mlp.fc2")
    assert text.splitlines()[-1] == "fvcore, thop, torch agree exactly, module by module"
    plain = json.loads(path.read_text())
    assert plain["agree"] is True
    assert plain["inputs"] == [[2, 3, 224, 224]]
    assert plain["counters"]["thop"]["modules"]["blocks.0.attn.qkv"]["macs"] == 2 * 197 * 192 * 576


def test_the_command_warns_of_a_disagreement(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, f"{__file__}:hidden", "--per-module")
    assert code == 1
    assert "warning: the counters disagree on blocks.1: macs fvcore 0, thop 512, torch 512" in text
    assert "MACs fvcore" in text
    assert "not counted: prim::PythonOp.Square" in text
    assert "agree exactly" not in text


def test_the_command_with_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "timm:deit_tinny_patch16_224")
    assert code == 2
    assert text.startswith("error: ")


def test_a_comparison_of_one_counter_has_nothing_to_disagree_with() -> None:
    found: Comparison = compare(nn.Linear(2, 3), (torch.randn(1, 2),), ["thop"])
    assert (list(found.counts), found.disagreements) == (["thop"], ())
