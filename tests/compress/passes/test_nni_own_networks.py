"""NNI chooses heads and hidden units of networks whose attentions are mechanisms of ``spaces.attention``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.passes import make_pass, nni_pruning
from compress.passes.base import Context
from compress.structure import StructureError, find_heads, find_mlps
from spaces.attention import make_attention
from spaces.attention.softmax import SoftmaxAttention
from tests.compress.passes._own_networks import (
    CONTEXT,
    SENTENCE,
    X,
    assert_exact,
    classifier,
    heads_of,
    speaker,
)

with_nni = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("nni") is None, reason="NNI is not installed: pip install 'nas-toolkit[nni]'"
    ),
]


def test_units_are_taken_out_where_all_of_their_weights_are_masked() -> None:
    """Without NNI: masks as it makes them."""
    model, made = speaker(), speaker()
    rows, columns = torch.ones(20, 16), torch.ones(16, 16)
    rows[[0, 5, 19]] = 0
    columns[:, 8:] = 0
    masks = {
        "encoder.1.ffn.fc1": {"weight": rows},
        "encoder.2.attention.out_proj": {"weight": columns},
        "decoder.0.cross.out_proj": {"weight": columns[:12]},
    }
    nni_pruning._remove(nni_pruning._parts(made), masks)
    assert [one.name for one in find_heads(made) if one.num_heads == 1] == [
        "encoder.2.attention",
        "decoder.0.cross",
    ]
    assert [mlp.hidden for mlp in find_mlps(made)] == [20, 17, 20, 20, 16, 16]
    assert_exact(made, model, *SENTENCE)


class TestWithNni:
    pytestmark = with_nni

    @pytest.mark.parametrize("pruner", ["l1", "taylor", "fpgm"])
    @pytest.mark.parametrize("units", ["heads", "mlp", "heads+mlp"])
    def test_the_extracted_model_is_the_masked_one(self, pruner: str, units: str) -> None:
        model = classifier((4, 1, 2, 4)).float()
        context = CONTEXT.with_changes(
            example=(X[:1].float(),),
            train=[(x.float(), y) for x, y in CONTEXT.train],  # type: ignore[union-attr]
        )
        made = make_pass("nni", ratio=0.5, pruner=pruner, units=units, steps=6).apply(model, context)
        assert heads_of(made) == ([2, 1, 1, 2] if "heads" in units else [4, 1, 2, 4])
        assert {mlp.hidden for mlp in find_mlps(made)} == ({20} if "mlp" in units else {40})
        assert_exact(made.double(), model.double(), X)

    def test_the_heads_with_the_smallest_readers_go(self) -> None:
        model = speaker()
        made = make_pass("nni", units="heads").apply(model, Context(example=SENTENCE))
        for old, new in zip(find_heads(model), find_heads(made), strict=True):
            weight: Any = old.attention.out_proj.weight  # type: ignore[union-attr]
            best = int(weight.detach().abs().sum(0).reshape(2, -1).sum(1).argmax())
            assert torch.equal(new.attention.out_proj.weight, weight[:, 8 * best : 8 * best + 8])  # type: ignore[union-attr, arg-type]

    def test_mechanisms_that_cannot_lose_heads_are_refused_by_name(self) -> None:
        model: Any = classifier()
        model.layers[2].attention = make_attention("cosformer", 24, 4, has_out_proj=False).double()
        with pytest.raises(
            StructureError,
            match=r"layers\.2\.attention cannot lose heads: CosformerAttention has no out_proj",
        ):
            make_pass("nni", units="heads").apply(model, CONTEXT)

    def test_heads_that_are_not_one_behind_the_other_are_refused(self) -> None:
        model: Any = classifier()
        model.layers[1].attention = Interleaved(24, 4).double().eval()
        made = make_pass("structured", units="heads").apply(model, CONTEXT)
        assert_exact(made, model, X)
        with pytest.raises(
            StructureError, match=r"layers\.1\.attention does not read its heads one behind the other"
        ):
            make_pass("nni", units="heads").apply(model, CONTEXT)


class Interleaved(SoftmaxAttention):
    """Channels of all heads in turn behind the heads."""

    def forward(self, query: Tensor, *others: Any, **options: Any) -> Tensor:
        q, k, v = self.in_proj(query)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out_proj(mixed.permute(0, 2, 3, 1).flatten(2))  # type: ignore[no-any-return]

    def head_columns(self) -> Tensor:
        return torch.arange(self.inner_dim).view(-1, self.num_heads).T
