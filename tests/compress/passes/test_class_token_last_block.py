"""Exact, and only where the classifier reads nothing but the class token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.measuring import count
from compress.passes import make_pass
from compress.passes.base import Context
from compress.structure import StructureError, recognise
from tests.compress.models import set_fused, small_vit

CONTEXT = Context(example=(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)),))
EXACT: dict[str, dict[str, Any]] = {
    "deit": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 3},
    "deit3": {"init_values": 0.1, "no_embed_class": True},
    "normed": {"qk_norm": True},
    "no bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", EXACT)
def test_outputs_stay(kind: str, fused: bool) -> None:
    model = small_vit(**EXACT[kind])
    set_fused(model, fused)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = make_pass("class_token_last_block").apply(model, CONTEXT)
    x = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)
    assert count(result, CONTEXT.example)["macs"] < 0.8 * count(model, CONTEXT.example)["macs"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(recognise(result).blocks) == 3


def test_pooling_over_all_tokens_is_refused() -> None:
    with pytest.raises(StructureError, match="pools its tokens with 'avg'"):
        make_pass("class_token_last_block").apply(small_vit(global_pool="avg"), CONTEXT)


def test_a_classifier_that_reads_more_than_it_says_is_noticed() -> None:
    model: Any = small_vit()
    model.forward_head = lambda x, pre_logits=False: model.head(x.mean(1))
    with pytest.raises(StructureError, match=r"the outputs change by"):
        make_pass("class_token_last_block").apply(model, CONTEXT)
