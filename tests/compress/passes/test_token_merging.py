"""Against the algorithm of the paper, written once more in its plainest form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from compress.passes import make_pass, parse_pass
from compress.passes.base import Context
from compress.passes.token_merging import schedule
from compress.structure import StructureError
from nas.errors import UserMistake
from spaces.layers.class_token_block import ClassTokenBlock
from spaces.layers.token_merging import match_tokens
from tests.compress.models import set_fused, small_vit

CONTEXT = Context(example=(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)),))


def merged_one_by_one(
    x: Tensor, size: Tensor, metric: Tensor, r: int, prefix: int
) -> tuple[list[Tensor], list[float]]:
    """ToMe, section 3, on one sample: A and B alternate, each in A has its best edge, the r best edges merge."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    first, second = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for a in first:
        if a < prefix:
            continue
        score, b = max((float(metric[a] @ metric[b]), b) for b in second if b >= prefix)
        edges.append((score, a, b))
    edges.sort(reverse=True)
    gone = {a: b for _, a, b in edges[:r]}
    sums = {b: (x[b] * size[b], float(size[b])) for b in second}
    for a, b in gone.items():
        value, weight = sums[b]
        sums[b] = (value + x[a] * size[a], weight + float(size[a]))
    left = [(x[a], float(size[a])) for a in first if a not in gone]
    right = [(value / weight, weight) for value, weight in sums.values()]
    head = [(right if place % 2 else left)[place // 2] for place in range(prefix)]
    rest = left[(prefix + 1) // 2 :] + right[prefix // 2 :]
    return [value for value, _ in head + rest], [weight for _, weight in head + rest]


@pytest.mark.parametrize("prefix", [1, 2, 3])
@pytest.mark.parametrize("tokens", [16, 17, 30])
def test_matching_is_the_papers(prefix: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens + prefix)
    x, metric = torch.randn(2, tokens, 6, generator=generator), torch.randn(2, tokens, 4, generator=generator)
    size = torch.randint(1, 5, (2, tokens, 1), generator=generator).float()
    matching = match_tokens(metric, 5, prefix)
    assert matching is not None
    total = matching.sum(size)
    mean = matching.sum(x * size) / total
    assert mean.shape == (2, tokens - 5, 6)
    for sample in range(2):
        values, weights = merged_one_by_one(x[sample], size[sample], metric[sample], 5, prefix)
        torch.testing.assert_close(mean[sample], torch.stack(values))
        assert total[sample].flatten().tolist() == weights


def test_no_more_than_half_can_go() -> None:
    assert match_tokens(torch.randn(1, 17, 4), 0, 1) is None
    matching = match_tokens(torch.randn(1, 17, 4), 100, 1)
    assert matching is not None
    assert matching.sum(torch.ones(1, 17, 1)).shape == (1, 9, 1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"distilled": True}, {"init_values": 0.1, "no_embed_class": True}, {"qk_norm": True}]
)
def test_exact_at_r_0(options: dict[str, Any], fused: bool) -> None:
    model = small_vit(**options)
    set_fused(model, fused)
    result = make_pass("token_merging", r=0).apply(model, CONTEXT)
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_proportional_attention_makes_merging_equal_tokens_exact() -> None:
    """Two equal tokens are one of size 2: the output must not change when they are merged (equation 1)."""
    model: Any = small_vit()
    tokens = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(0))
    # The class token, then every patch token twice, side by side: the odd one is the even one's twin.
    x = torch.cat([tokens[:, :1], tokens[:, 1:].repeat_interleave(2, dim=1)], dim=1)
    merged: Any = make_pass("token_merging", r=[8, 0, 0]).apply(model, CONTEXT)
    torch.testing.assert_close(merged.blocks(x)[:, 0], model.blocks(x)[:, 0], rtol=1e-4, atol=1e-5)
    plain: Any = make_pass("token_merging", r=[8, 0, 0], proportional=False).apply(model, CONTEXT)
    assert not torch.allclose(plain.blocks(x)[:, 0], model.blocks(x)[:, 0], atol=1e-2)


def test_works_before_and_after_the_class_token_block() -> None:
    model = small_vit()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    merge, last = parse_pass("token_merging:r=3"), parse_pass("class_token_last_block")
    with torch.no_grad():
        one = last.apply(make_pass("token_merging", r=[3, 3, 0]).apply(model, CONTEXT), CONTEXT)(x)
        other = merge.apply(last.apply(model, CONTEXT), CONTEXT)(x)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_schedules() -> None:
    assert schedule(8, 4) == [8, 8, 8, 8]
    assert schedule(8, 12, -1.0) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]


def test_mistakes() -> None:
    with pytest.raises(UserMistake, match="r=-1 must be a whole number"):
        make_pass("token_merging", r=-1)
    with pytest.raises(UserMistake, match="not both"):
        make_pass("token_merging", r=3, strength=0.5)
    with pytest.raises(UserMistake, match="r has 2 numbers, the model has 3 blocks"):
        make_pass("token_merging", r=[1, 2]).apply(small_vit(), CONTEXT)
    once = make_pass("token_merging", r=2)
    with pytest.raises(StructureError, match="merged already"):
        once.apply(once.apply(small_vit(), CONTEXT), CONTEXT)


class _Doubling(Block):
    """A user's block: the parts of timm's, and something else done with them."""

    def forward(self, x: Tensor, *given: Any, **others: Any) -> Tensor:
        made: Tensor = super().forward(x, *given, **others)
        return made + x


@pytest.mark.parametrize("name", ["token_merging", "class_token_last_block"])
def test_blocks_that_only_look_like_the_usual_ones_are_refused(name: str) -> None:
    with pytest.raises(StructureError, match=r"no plain .* \(the outputs change by"):
        make_pass(name).apply(small_vit(block_fn=_Doubling), CONTEXT)


@pytest.mark.parametrize("name", ["token_merging", "class_token_last_block"])
def test_norms_behind_attention_are_refused(name: str) -> None:
    with pytest.raises(StructureError, match=r"has no 'ls1'|no plain one"):
        make_pass(name).apply(small_vit(block_fn=ResPostBlock, init_values=0.1), CONTEXT)


@pytest.mark.parametrize("name", ["token_merging", "class_token_last_block"])
def test_blocks_that_get_more_than_the_tokens_are_refused(name: str) -> None:
    model: Any = small_vit()
    model.blocks = _Twice(*model.blocks)
    with pytest.raises(StructureError, match=r"no plain"):
        make_pass(name).apply(model, CONTEXT)


class _Twice(nn.Sequential):
    """Gives each block a word besides the tokens, as models with rotary positions do."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x, rope=None) if isinstance(block, ClassTokenBlock) else block(x) * 1.1
        return x


def test_gradient_checkpointing_does_not_go_past_the_merging() -> None:
    plain: Any = small_vit()
    model: Any = small_vit()
    model.set_grad_checkpointing(True)
    merging = make_pass("token_merging", r=3)
    made: Any = merging.apply(model, CONTEXT)
    assert not made.grad_checkpointing
    assert model.grad_checkpointing
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(made(x), merging.apply(plain, CONTEXT)(x))
    assert not torch.equal(made(x), plain(x))


class _OneByOne(VisionTransformer):
    """Calls its blocks itself instead of what holds them."""

    def forward_features(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


def test_a_model_that_calls_its_blocks_one_by_one_is_refused() -> None:
    model = _OneByOne(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5).eval()
    with pytest.raises(StructureError, match="does not call 'blocks' as a whole"):
        make_pass("token_merging", r=3).apply(model, CONTEXT)
    make_pass("token_merging", r=0).apply(model, CONTEXT)
