"""Parameters and multiply-accumulates against closed forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.profile import Profile, profile


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("deit_tiny_patch16_224", 5_717_416, 1_253_683_200),
        ("deit_small_patch16_224", 22_050_664, 4_598_882_304),
        ("resnet18", 11_689_512, 1_814_073_344),
    ],
)
def test_known_models_have_their_published_counts(name: str, params: int, macs: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert profile(model, (torch.empty(1, 3, 224, 224),)) == Profile(params, params, macs)


def test_the_deit_figure_is_its_closed_form() -> None:
    width, depth, tokens, patches = 192, 12, 197, 196
    block = tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width
    assert patches * width * 3 * 16 * 16 + depth * block + width * 1000 == 1_253_683_200


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x: F.scaled_dot_product_attention(x, x, x), 2 * 3 * 8 * 8 * 8),
        (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), 2 * 3 * 8 * 8 * 8),
        (lambda x: torch.einsum("bchw,bdhw->bcd", x, x), 3 * 3 * 64),
        (lambda x: torch.mv(x[0, 0], x[0, 0, 0]), 64),
        (lambda x: torch.addmv(x[0, 0, 0], x[0, 0], x[0, 0, 1]), 64),
        (lambda x: torch.dot(x[0, 0, 0], x[0, 0, 0]), 8),
        (lambda x: F.conv2d(x, x.new_zeros(6, 1, 3, 3), padding=1, groups=3), 64 * 6 * 9),
        (lambda x: F.conv_transpose2d(x, x.new_zeros(3, 6, 2, 2), stride=2), 64 * 3 * 6 * 4),
        (lambda x: F.gelu(x).softmax(-1) + F.interpolate(x, scale_factor=1, mode="bilinear").relu_(), 0),
        (lambda x: x.unfold(2, 3, 1).lgamma(), 0),
        (lambda x: F.fold(F.unfold(x, 3), (8, 8), 3), 0),
        (torch.fft.rfft2, 3 * 480),  # 1.25 N log2 N for N = 64 real points
    ],
)
def test_operators_by_their_closed_form(function: Callable[[Tensor], Tensor], macs: int) -> None:
    assert profile(Function(function), (torch.randn(1, 3, 8, 8),)) == Profile(0, 0, macs)


def test_fused_encoder_layers_are_counted_whole() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    tokens = 10
    expected = tokens * (4 * 64 * 64 + 2 * 64 * 128) + 2 * tokens * tokens * 64
    fast = torch.backends.mha.get_fastpath_enabled()
    assert profile(layer, (torch.randn(1, tokens, 64),)).macs == expected
    assert torch.backends.mha.get_fastpath_enabled() is fast


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.cdist(x, x), "_cdist_forward"),
        (lambda x: torch.linalg.svd(x)[1], "_linalg_svd"),
        (lambda x: F.grid_sample(x, x.new_zeros(1, 4, 4, 2), align_corners=False), "grid_sampler_2d"),
    ],
)
def test_work_without_a_formula_is_named(function: Callable[[Tensor], Tensor], name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Function(function))
    counted = profile(model, (torch.randn(1, 3, 8, 8),))
    assert counted.macs == 9 * 64
    assert counted.uncounted == (name,)


def test_kernels_of_others_are_named_with_their_library() -> None:
    twice: Any = torch.library.custom_op("nas_tests::twice", mutates_args=())(_twice)
    twice.register_fake(lambda x: torch.empty_like(x))
    assert profile(Function(lambda x: twice(x)), (torch.randn(2),)).uncounted == ("nas_tests::twice",)


def _twice(x: Tensor) -> Tensor:
    return x * 2


def test_control_flow_that_reads_values_is_counted_with_data_and_says_so() -> None:
    class Unpadded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            tokens: Tensor = self.linear(x[keep])
            return F.scaled_dot_product_attention(tokens[None], tokens[None], tokens[None])

    keep = torch.tensor([True, True, True, False])
    counted = profile(Unpadded(), (torch.randn(4, 4), keep))
    assert counted == Profile(25, 25, 3 * 4 * 5 + 2 * 3 * 3 * 5, (), "data")


def test_the_model_is_not_changed_and_its_own_error_comes_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile(model, (torch.randn(2, 4),))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        profile(model, (torch.randn(2, 5),))


def test_shared_and_frozen_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["b"].bias.requires_grad_(False)
    counted = profile(nn.Sequential(model["a"], model["b"]), (torch.randn(3, 4),))
    assert (counted.params, counted.trainable, counted.macs) == (20, 16, 2 * 3 * 16)


def test_tensors_that_are_no_parameters_follow() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = torch.randn(4, 4)
            self.derived = nn.Parameter(torch.ones(4)) * 2  # not a leaf, which an ordinary deep copy refuses
            self.register_buffer("buffer", torch.randn(4, 4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.plain @ self.get_buffer("buffer")) * self.derived

    assert profile(Table(), (torch.randn(2, 4),)) == Profile(0, 0, 2 * 2 * 16)


def test_integers_as_inputs_and_the_json_form() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    counted = profile(model, (torch.randint(10, (2, 7)),))
    assert counted.macs == 2 * 7 * 40
    assert json.loads(json.dumps(counted.to_dict())) == {
        "params": 90, "trainable": 90, "macs": 560, "uncounted": [], "method": "meta",
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_on_a_gpu_counts_the_same() -> None:
    model = timm.create_model("deit_tiny_patch16_224").cuda()
    assert profile(model, (torch.randn(1, 3, 224, 224, device="cuda"),)).macs == 1_253_683_200
