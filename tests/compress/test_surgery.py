"""What is cut away computes what it would compute with the removed parts at zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from compress.passes import make_pass
from compress.passes.base import Context
from compress.structure import StructureError, find_mlps, recognise
from compress.surgery import keep_embedding, keep_head_channels, keep_heads, keep_mlp_units, remove_block
from nas.errors import UserMistake
from tests.compress.models import set_fused, small_vit

KINDS: dict[str, dict[str, Any]] = {
    "deit": {},
    "distilled": {"distilled": True},
    "deit3": {"init_values": 0.1, "no_embed_class": True},
    "registers": {"reg_tokens": 2},
    "avg": {"global_pool": "avg", "class_token": False},
    "no bias": {"qkv_bias": False},
}


@pytest.fixture(params=[True, False], ids=["fused", "explicit"])
def fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def close(one: nn.Module, other: nn.Module) -> None:
    x = image()
    torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def zero(weight: Tensor | None, index: Any, dim: int = 0) -> None:
    if weight is not None:
        weight.index_fill_(dim, torch.as_tensor(index), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_units(kind: str, fused: bool) -> None:
    model = small_vit(**KINDS[kind])
    set_fused(model, fused)
    cut = copy.deepcopy(model)
    block = recognise(model).blocks[1]
    gone = [unit for unit in range(192) if unit % 3]
    zero(block.mlp.fc2.weight, gone, 1)
    keep_mlp_units(recognise(cut).blocks[1], [unit for unit in range(192) if unit % 3 == 0])
    assert recognise(cut).blocks[1].mlp.hidden == 64
    assert recognise(cut).blocks[1].mlp.fc1.out_features == 64
    close(cut, model)


@pytest.mark.parametrize("kind", KINDS)
def test_heads(kind: str, fused: bool) -> None:
    model = small_vit(**KINDS[kind])
    set_fused(model, fused)
    cut = copy.deepcopy(model)
    zero(recognise(model).blocks[2].proj.weight, range(16, 32), 1)
    keep_heads(recognise(cut).blocks[2], [0, 2])
    attention = recognise(cut).blocks[2].attention
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (2, 16, 32)
    close(cut, model)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_heads_differ_between_heads_and_between_keys_and_values(kind: str, fused: bool) -> None:
    model = small_vit(**KINDS[kind])
    set_fused(model, fused)
    cut = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    matched = [torch.randperm(16, generator=generator)[:10] for _ in range(3)]
    carried = [torch.randperm(16, generator=generator)[:10] for _ in range(3)]
    block = recognise(model).blocks[0]
    with torch.no_grad():
        for head in range(3):
            queries = [head * 16 + c for c in range(16) if c not in matched[head].tolist()]
            values = [head * 16 + c for c in range(16) if c not in carried[head].tolist()]
            for start in (0, 48):
                zero(block.qkv.weight, [start + c for c in queries])
                zero(block.qkv.bias, [start + c for c in queries])
            zero(block.proj.weight, values, 1)
    keep_head_channels(recognise(cut).blocks[0], matched, carried)
    attention = recognise(cut).blocks[0].attention
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (3, 10, 30)
    assert attention.scale == pytest.approx(10**-0.5)
    close(cut, model)


def test_both_paths_agree_after_channels_are_cut() -> None:
    model = small_vit()
    keep_head_channels(recognise(model).blocks[1], list(range(5)))
    other = copy.deepcopy(model)
    set_fused(model, True)
    set_fused(other, False)
    close(model, other)


class _MaskedNorm(nn.Module):
    """A layer norm whose statistics come from the kept channels alone, on the full width."""

    def __init__(self, norm: Any, kept: Tensor):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        part = x[..., self.kept]
        made = torch.zeros_like(x)
        weight, bias = self.norm.weight[self.kept], self.norm.bias[self.kept]
        made[..., self.kept] = nn.functional.layer_norm(part, (len(self.kept),), weight, bias, self.norm.eps)
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_embedding(kind: str, fused: bool) -> None:
    model: Any = small_vit(**KINDS[kind])
    set_fused(model, fused)
    cut: Any = copy.deepcopy(model)
    kept = torch.tensor([c for c in range(48) if c % 4])
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _MaskedNorm(module, kept))
    keep_embedding(recognise(cut), kept)
    assert cut.embed_dim == cut.num_features == 36
    assert recognise(cut).width == 36
    close(cut, model)


def test_a_removed_block_leaves_a_model_that_runs_without_it() -> None:
    model: Any = small_vit()
    expected: Any = copy.deepcopy(model)
    expected.blocks[1] = nn.Identity()
    structure = remove_block(recognise(model), 1)
    assert [block.name for block in structure.blocks] == ["blocks.0", "blocks.1"]
    close(model, expected)
    with pytest.raises(UserMistake, match="block 5: the model has 2"):
        remove_block(structure, 5)


def test_a_removed_block_takes_its_merging_along() -> None:
    context = Context(example=(image(1),))
    model: Any = make_pass("token_merging", r=[1, 2, 3]).apply(small_vit(), context)
    remove_block(recognise(model), -2)
    assert model.blocks.amounts == (1, 3)
    assert model(image()).shape == (3, 5)


def test_wrong_positions_are_refused() -> None:
    block = recognise(small_vit()).blocks[0]
    with pytest.raises(UserMistake, match=r"hidden units: positions must be in \[0, 192\)"):
        keep_mlp_units(block, [0, 192])
    with pytest.raises(UserMistake, match="heads: give a non-empty list"):
        keep_heads(block, [])
    with pytest.raises(UserMistake, match="each once"):
        keep_heads(block, [1, 1])
    with pytest.raises(UserMistake, match="as many for each"):
        keep_head_channels(block, [[0], [0, 1], [0]])


def test_normed_queries_keep_all_channels() -> None:
    block = recognise(small_vit(qk_norm=True)).blocks[0]
    with pytest.raises(StructureError, match=r"blocks\.0: queries and keys are normalised"):
        keep_head_channels(block, [0, 1])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(StructureError, match="ResNet: no 'blocks'"):
        recognise(timm.create_model("resnet18"))
    with pytest.raises(StructureError, match=r"no 'patch_embed\.proj'"):
        model: Any = small_vit()
        model.patch_embed = nn.Identity()
        recognise(model)
    with pytest.raises(StructureError, match=r"blocks\.0\.attn\.qkv must be a plain nn\.Linear"):
        model = small_vit()
        model.blocks[0].attn.qkv = nn.Identity()
        recognise(model)
    with pytest.raises(StructureError, match=r"no 'blocks'"):
        recognise(timm.create_model("convnext_atto"))


@pytest.mark.parametrize(("name", "size"), [("swin_tiny_patch4_window7_224", 224), ("convnext_atto", 64)])
def test_hidden_units_of_hierarchical_models(name: str, size: int) -> None:
    small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)} if "swin" in name else {}
    model = timm.create_model(name, **small).eval()
    cut = copy.deepcopy(model)
    for masked, mlp in zip(find_mlps(model), find_mlps(cut), strict=True):
        zero(masked.fc2.weight, range(1, mlp.hidden, 2), 1)
        keep_mlp_units(mlp, range(0, mlp.hidden, 2))
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(cut(x), model(x), rtol=1e-5, atol=1e-5)
