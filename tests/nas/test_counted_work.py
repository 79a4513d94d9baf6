"""The work of a model by kind: closed forms, and the sums that the profile finds."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from nas.errors import UserMistake
from nas.latency.prediction import Work, count_work
from nas.profile import profile
from spaces import get_space
from spaces.signature import ImageSignature, TranslationSignature
from tests.nas._latency_samples import transformer

# Counted work.


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"]
)
def test_the_kinds_of_macs_add_up_to_the_profile(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    inputs = (torch.empty(2, 3, 224, 224),)
    work = count_work(model, inputs)
    assert work.macs == profile(model, inputs).macs
    assert work.batch == 2


def test_deit_tiny_by_its_closed_form() -> None:
    width, depth, tokens, patches = 192, 12, 197, 196
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    work = count_work(model, (torch.empty(1, 3, 224, 224),))
    assert work.linear_macs == depth * tokens * width * width * 12 + width * 1000
    assert work.attention_macs == depth * 2 * tokens * tokens * width
    assert work.embedding_macs == patches * width * 768
    assert work.softmax_elements == depth * 3 * tokens * tokens
    assert work.parameter_bytes == 4 * 5_717_416
    assert work.products == 1 + depth * 6 + 1


class Function(nn.Module):
    def __init__(self, function: Any):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def flex(x: Tensor, w: Tensor) -> Any:
    return flex_attention(x[None], x[None], x[None])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # The first product that sees the input embeds it, the second is linear.
        (lambda x, w: x @ w @ w, {"embedding_macs": 256, "linear_macs": 256}),
        # A weight that is computed stays a weight.
        (lambda x, w: (x @ w) @ (w.t() * 2 + 1), {"embedding_macs": 256, "linear_macs": 256}),
        (lambda x, w: F.softmax(x @ x.transpose(1, 2), -1), {"attention_macs": 128, "softmax_elements": 16}),
        (lambda x, w: x.view(4, 8).t()[1:].unsqueeze(0), {"launches": 0, "elements": 0}),
        (lambda x, w: x.relu_() + 1, {"launches": 2, "elements": 64}),
        (lambda x, w: F.embedding(x[0, :, 0].long().abs(), w), {"embedding_macs": 32}),
        (lambda x, w: torch.mv(w, (x @ w)[0, 0]), {"linear_macs": 64}),
        (lambda x, w: torch.addbmm(w[:4, :4], x, x.mT), {"attention_macs": 128, "products": 1}),
        (lambda x, w: w.clone().addmm_(w, w), {"linear_macs": 512}),
        (flex, {"attention_macs": 2 * 4 * 4 * 8, "softmax_elements": 16, "products": 2}),
    ],
)  # fmt: skip
def test_operators_go_to_their_kind(function: Any, expected: dict[str, float]) -> None:
    found = count_work(Function(function), (torch.zeros(1, 4, 8),)).to_dict()
    assert {name: found[name] for name in expected} == expected


def test_a_model_that_reads_values_is_counted_with_data() -> None:
    def branching(x: Tensor, w: Tensor) -> Tensor:
        return x @ w @ w if float(x.sum()) > 0 else x

    work = count_work(Function(branching), (torch.ones(1, 4, 8),))
    assert (work.embedding_macs, work.linear_macs) == (256, 256)


def test_what_calls_functions_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def choosing(x: Tensor, w: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x @ x.mT, lambda x: x @ x.mT * 2, (x,))

    assert count_work(Function(choosing), (torch.ones(1, 4, 8),)).macs == 0
    assert "the work inside of higher_order::cond in Function is not counted" in caplog.text


def test_parameters_without_a_shape_are_refused() -> None:
    with pytest.raises(UserMistake, match="weight of LazyLinear has no shape yet; call the model once"):
        count_work(nn.LazyLinear(3), (torch.ones(1, 4),))


def test_counting_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_work(model, (torch.randn(4, 8),))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scale", ["small", "small_translation"])
def test_models_of_the_spaces(scale: str) -> None:
    space = get_space(f"efficient_transformer:{scale}")
    if scale == "small":
        signature: Any = ImageSignature(1, 8, 8, 10)
        inputs: tuple[Tensor, ...] = (torch.zeros(3, 1, 8, 8),)
    else:
        signature = TranslationSignature(40, 40, 24)
        inputs = (torch.ones(3, 7, dtype=torch.long), torch.ones(3, 6, dtype=torch.long))
    rng = random.Random(0)
    for _ in range(3):
        model = space.build(space.sample(rng), signature)
        work = count_work(model, inputs)
        gathers = 0 if scale == "small" else work.embedding_macs
        assert work.macs - gathers == profile(model, inputs).macs
        assert work.attention_macs > 0
        assert work.embedding_macs > 0
        assert work.batch == 3


def test_work_survives_json() -> None:
    work = transformer(random.Random(0))
    assert Work.from_dict(json.loads(json.dumps(work.to_dict()))) == work
    with pytest.raises(ValueError, match="keys \\['macs'\\] are missing or unknown"):
        Work.from_dict({**work.to_dict(), "macs": 1.0})
