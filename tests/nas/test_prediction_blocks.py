"""Blocks of models, and latency looked up in a table of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from nas.errors import UserMistake
from nas.files import write_record
from nas.latency.prediction import BlockTable, blocks_of


class Layers(nn.Module):
    def __init__(self, widths: list[int]):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, w), nn.Linear(w, 8)) for w in widths])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(x)
        return out


class Wide(nn.Module):
    """One block per width, so that the table has little to learn."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.inside = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x).sum(-1, keepdim=True)


def test_equal_blocks_have_one_signature() -> None:
    model = nn.Sequential(Wide(4, 1), Wide(4, 1), Wide(6, 1), Wide(4, 2), Wide(4, 1))
    blocks = blocks_of(model, (torch.zeros(2, 8),))
    assert [b.name for b in blocks] == ["0", "1", "2", "3", "4"]
    names = [b.signature for b in blocks]
    assert names[0] == names[1] == names[4]
    assert len(set(names)) == 3
    assert all(b.inputs[0].shape == (2, 8) for b in blocks)
    assert blocks_of(model, (torch.zeros(1, 8),))[0].signature != names[0]


def test_default_blocks_of_a_vision_transformer() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, num_classes=5)
    model.train()
    blocks = blocks_of(model, (torch.zeros(1, 3, 32, 32),))
    names = [b.name for b in blocks]
    assert [n for n in names if n.startswith("blocks")] == ["blocks.0", "blocks.1", "blocks.2"]
    assert "head" in names
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_table_sums_and_is_calibrated(tmp_path: Path) -> None:
    table = BlockTable(identity="here")
    models = [[Wide(w, 1) for w in widths] for widths in ([4, 4], [4, 6, 6], [6], [4, 4, 4, 6])]
    lists = [blocks_of(nn.Sequential(*blocks), (torch.zeros(2, 8),)) for blocks in models]
    missing = table.missing([b for blocks in lists for b in blocks])
    assert len(missing) == 2
    with pytest.raises(UserMistake, match="1 of 1 distinct blocks were not measured"):
        table.total(lists[0])
    for block, ms in zip(missing, (1.0, 3.0), strict=True):
        table.add(block.signature, ms)
    assert [table.total(blocks) for blocks in lists] == [2.0, 7.0, 3.0, 6.0]
    table.calibrate(lists, [0.5 + 0.8 * x for x in (2.0, 7.0, 3.0, 6.0)])
    assert (table.rest_ms, table.scale) == (pytest.approx(0.5), pytest.approx(0.8))
    table.save(tmp_path / "table.json")
    again = BlockTable.load(tmp_path / "table.json", identity="here")
    assert again.total(lists[1]) == table.total(lists[1])
    with pytest.raises(UserMistake, match="identity='there' differs from 'here'"):
        BlockTable.load(tmp_path / "table.json", identity="there")
    with pytest.raises(UserMistake, match="at least three"):
        table.calibrate(lists[:2], [1.0, 2.0])
    with pytest.raises(UserMistake, match="milliseconds=0 of a block must be positive"):
        table.add("x", 0)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserMistake, match="say what a block is with is_block"):
        blocks_of(Layers([4]), (torch.zeros(1, 8),), is_block=lambda name, module: False)
    assert (
        len(blocks_of(Layers([4, 4]), (torch.zeros(1, 8),), is_block=lambda name, _: name.count(".") == 1))
        == 2
    )


# Blocks that are called with more than tensors.


class Translator(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.body = nn.Transformer(16, 2, depth, depth, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = self.body.generate_square_subsequent_mask(target.shape[1])
        out: Tensor = self.head(self.body(source, target, tgt_mask=mask))
        return out


def test_blocks_with_keywords_are_taken_and_measured() -> None:
    inputs = torch.zeros(1, 5, 16), torch.zeros(1, 4, 16)
    two, three = (blocks_of(Translator(depth), inputs) for depth in (2, 3))
    layers = [f"body.{part}.layers.{place}" for part in ("encoder", "decoder") for place in range(2)]
    assert [b.name for b in two if "layers" in b.name] == layers
    assert (len(two), len(three)) == (4 + 3, 6 + 3)
    table = BlockTable()
    for block in table.missing([*two, *three]):
        block.module(*block.inputs)  # tensors alone
        table.add(block.signature, 1.0)
    assert len(table) == 5  # a layer and a norm of each side, and the head
    assert (table.total(two), table.total(three)) == (7.0, 9.0)
    shorter = blocks_of(Translator(2), (inputs[0], torch.zeros(1, 3, 16)))
    assert {b.name for b in table.missing(shorter)} >= {"body.decoder.layers.0", "head"}


class Chain(nn.Module):
    """Calls its layers with whatever is asked for."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__()
        self.layers = nn.ModuleList([Flexible(), Flexible()])
        self.arguments, self.keywords = arguments, keywords

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *self.arguments, **self.keywords)
        return x


class Flexible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self.seen = arguments, keywords
        out: Tensor = self.linear(x)
        return out


def test_other_arguments_are_part_of_what_a_block_is() -> None:
    x = torch.zeros(1, 8)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}), ((None,), {}), ((2,), {}), ((3,), {}), ((2.0,), {}), ((), {"scale": 2}), (((x, None),), {}),
        ((torch.zeros(2, 8),), {}), ((), {"mask": x}), ((), {"mask": x.bool()}), ((), {"dtype": torch.float16}),
        ((), {"mask": {"a": x, "b": "causal"}}),
    ]  # fmt: skip
    models = [Chain(*arguments, **keywords) for arguments, keywords in calls]
    signatures = []
    for model in models:
        blocks = blocks_of(model, (x,))
        assert [b.name for b in blocks] == ["layers.0", "layers.1"]
        signatures.append(blocks[0].signature)
        assert blocks[1].signature == signatures[-1]
        assert blocks[1].module(*blocks[1].inputs).shape == (1, 8)
    assert len(set(signatures)) == len(models)


def test_a_block_is_called_again_as_it_was() -> None:
    x = torch.ones(1, 8)
    block = blocks_of(Chain(2, (None, x * 3), mask=x), (x,))[0]
    assert [float(v.mean()) for v in block.inputs] == [1.0, 3.0, 1.0]
    layer = next(module for module in block.module.modules() if isinstance(module, Flexible))
    block.module(x, x * 5, x * 7)
    (number, (nothing, tensor)), keywords = layer.seen
    assert (number, nothing, float(tensor.mean()), float(keywords["mask"].mean())) == (2, None, 5.0, 7.0)


def test_a_block_with_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(
        UserMistake, match=r"the block layers.0 \(Flexible\) is called with a object, .* is_block"
    ):
        blocks_of(Chain(cache=object()), (torch.zeros(1, 8),))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return out


def test_multi_head_attention_is_a_block() -> None:
    assert [b.name for b in blocks_of(Attends(), (torch.zeros(3, 1, 8),))] == ["attention", "head"]


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    model = Layers([4]).train()
    model.stem.eval()
    blocks_of(model, (torch.zeros(1, 8),))
    assert (model.training, model.stem.training, model.head.training) == (True, False, True)


@pytest.mark.parametrize("value", ["x", None, float("nan"), -1.0])
def test_blocks_take_positive_milliseconds(value: Any) -> None:
    table = BlockTable()
    with pytest.raises(UserMistake, match=r"milliseconds=.* of a block must be positive"):
        table.add("a", value)
    table.add("a", 1.0)
    with pytest.raises(UserMistake, match=r"milliseconds=.* of model 1 must be positive"):
        table.calibrate([["a"]] * 3, [1.0, value, 1.0])


def test_a_file_that_is_no_table_is_a_mistake(tmp_path: Path) -> None:
    write_record(tmp_path / "x.json", {"format": 1})
    with pytest.raises(UserMistake, match="lacks identity, rest_ms, scale, blocks"):
        BlockTable.load(tmp_path / "x.json")
