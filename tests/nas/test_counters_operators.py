"""Three counters of MACs and activations on single operators and modules: closed forms of each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.profile import compare
from spaces.attention import list_attention, make_attention
from spaces.attention.cosformer import cosformer_macs
from spaces.attention.relative import relative_macs
from spaces.attention.softmax import softmax_macs
from tests.nas._counting import Function, agreed

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
        # Dot products are products however many there are; what sums over no index is element-wise.
        (lambda x: torch.linalg.vecdot(x, x), (NUMBERS, NUMBERS // SIDE)),
        (lambda x: torch.linalg.vecdot(x[:1], x, dim=1), (NUMBERS, BATCH * SQUARE)),
        (lambda x: torch.linalg.vecdot(x[0, 0, 0], x[0, 0, 0]), (SIDE, 1)),
        (lambda x: torch.ops.aten.linalg_vecdot(x, x), (NUMBERS, NUMBERS // SIDE)),
        (lambda x: torch.kron(x[0, 0], x[0, 0]), (0, 0)),
        (lambda x: torch.addr(x[0, 0], x[0, 0, 0], x[0, 0, 1]), (0, 0)),
        (lambda x: torch.ger(x[0, 0, 0], x[0, 0, 0]), (0, 0)),
        (lambda x: torch.einsum("i,j->ij", x[0, 0, 0], x[0, 0, 0]), (0, 0)),
        (lambda x: F.cosine_similarity(x, x) + (x * x).sum(1), (0, 0)),
        (lambda x: torch.linalg.multi_dot([x[0, 0], x[0, 0, :, :2], x[0, 0, :2]]), (2 * SQUARE * 2, SQUARE + 16)),
        (lambda x: torch.linalg.multi_dot([x[0, 0, 0], x[0, 0], x[0, 0]]), (2 * SQUARE, 2 * SIDE)),
        (lambda x: torch.linalg.multi_dot([x[0, 0]] * 4), (3 * SQUARE * SIDE, 3 * SQUARE)),
        (lambda x: torch.chain_matmul(x[0, 0], x[0, 0], x[0, 0]), (2 * SQUARE * SIDE, 2 * SQUARE)),
        (lambda x: torch.linalg.matrix_power(x, 5), (3 * NUMBERS * SIDE, 3 * NUMBERS)),
        (lambda x: x.matrix_power(1), (0, 0)),
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
        (torch.det, "linalg_det"),
        (torch.slogdet, "slogdet"),
        (torch.pinverse, "pinverse"),
        (torch.inverse, "linalg_inv"),
        (torch.matrix_exp, "linalg_matrix_exp"),
        (
            lambda x: F.affine_grid(x[:, 0, :2, :3], [2, 1, 4, 4], align_corners=False),
            "affine_grid_generator",
        ),
        (lambda x: torch.sparse.addmm(x[0, 0], x[0, 0].to_sparse(), x[0, 0]), "_sparse_addmm"),
        (lambda x: torch.conv_tbc(x[0], x.new_zeros(3, 8, 4), x.new_zeros(4)), "conv_tbc"),
    ],
)
def test_work_without_a_formula_is_named_by_every_counter(
    function: Callable[[Tensor], Tensor], name: str
) -> None:
    found = compare(Function(function), (torch.randn(2, 3, 8, 8),))
    assert all(each.uncounted for each in found.counts.values())
    assert name in found.uncounted
    assert found.disagreements == ()


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
