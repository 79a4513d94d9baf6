"""Int8 layers compute nearly the same, and stay only where they are faster."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress import compress
from compress.measuring import count
from compress.passes import dynamic_quantization, make_pass
from compress.passes.base import Context
from compress.structure import StructureError
from nas.errors import UserMistake
from nas.latency import Pair, Target
from spaces.layers.int8_linear import DynamicInt8Linear
from tests.compress.models import small_vit

CONTEXT = Context(example=(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)),))


def verdict(word: Any, ratio: float) -> Any:
    return lambda *args, **options: Pair(
        "candidate", "other", ratio, ratio - 0.01, ratio + 0.01, word, 0.01, 20
    )


def test_kept_when_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_quantization, "compare_on_target", verdict("faster", 0.5))
    model = small_vit()
    made: Any = make_pass("dynamic_quantization").apply(model, CONTEXT)
    assert isinstance(made.blocks[0].mlp.fc1, DynamicInt8Linear)
    assert type(made.head) is nn.Linear
    x = CONTEXT.example[0]
    with torch.no_grad():
        gap = (made(x) - model(x)).abs().max() / model(x).abs().max()
    assert 0 < gap < 0.1
    assert count(made, CONTEXT.example) == count(model, CONTEXT.example)


@pytest.mark.parametrize("word", ["cannot tell", "slower"])
def test_otherwise_the_model_stays_and_it_is_said(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setattr(dynamic_quantization, "compare_on_target", verdict(word, 1.01))
    told: list[str] = []
    model = small_vit()
    made = make_pass("dynamic_quantization").apply(model, CONTEXT.with_changes(report=told.append))
    assert not any(isinstance(module, DynamicInt8Linear) for module in made.modules())
    assert "not surely faster: the model stays as it was" in told[0]


def test_after_the_class_token_block_its_queries_stay_in_floats() -> None:
    model = make_pass("class_token_last_block").apply(small_vit(), CONTEXT)
    made: Any = make_pass("dynamic_quantization", keep_anyway=True).apply(model, CONTEXT)
    assert type(made.blocks[2].attn.qkv) is nn.Linear
    assert isinstance(made.blocks[1].attn.qkv, DynamicInt8Linear)
    assert made(CONTEXT.example[0]).shape == (1, 5)


@torch.no_grad()
def test_kernel_and_its_form_in_floats_agree_and_copies_work() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 24).eval()
    quantised = DynamicInt8Linear.of(layer)
    x = torch.randn(2, 5, 40)
    torch.testing.assert_close(quantised(x), quantised._in_floats(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantised(x), layer(x), rtol=0.1, atol=0.1)
    assert torch.equal(copy.deepcopy(quantised)(x), quantised(x))


def test_targets_without_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserMistake, match="needs torchao, which is not installed"):
        make_pass("dynamic_quantization").apply(
            small_vit(), CONTEXT.with_changes(target=Target.parse("cuda"))
        )
    with pytest.raises(UserMistake, match=r"torch's int8 kernels are for a CPU target in fp32"):
        make_pass("dynamic_quantization").apply(
            small_vit(), CONTEXT.with_changes(target=Target.parse("cpu:1+bf16"))
        )


@pytest.mark.slow
def test_torchao_where_it_is_installed(tmp_path: Path) -> None:
    """On a CPU it is no faster than floats, so that it would not stay; it must come to that conclusion by itself."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    model, told = small_vit(), list[str]()
    context = CONTEXT.with_changes(report=told.append)
    x = CONTEXT.example[0]
    made: Any = make_pass("dynamic_quantization", backend="torchao", keep_anyway=True).apply(model, context)
    with torch.no_grad():
        gap = (made(x) - model(x)).abs().max() / model(x).abs().max()
    assert 0 < gap < 0.1
    assert type(made.blocks[0].mlp.fc1.weight.data) is not torch.Tensor
    assert type(made.head.weight.data) is torch.Tensor
    result = compress(
        model, "dynamic_quantization:backend=torchao,keep_anyway=true", example=x, measure_seconds=2
    )
    assert result.final.ratio is not None
    with pytest.raises(
        StructureError, match="a tensor of another package, which cannot be saved; save the model from"
    ):
        result.save(tmp_path / "saved")
    stayed: Any = make_pass("dynamic_quantization", backend="torchao", seconds=2.0).apply(model, context)
    kept = "kept" in told[-1]
    assert kept or "the model stays as it was" in told[-1]
    assert (type(stayed.blocks[0].mlp.fc1.weight.data) is torch.Tensor) == (not kept)
