"""Hiformer: the formulas, other people's blocks, published counts, what must be equal to what, the spaces."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.profile import profile
from spaces import ClickThroughRateSignature, ImageSignature, SpaceError, UserMistake, get_space
from spaces.layers.heterogeneous import (
    KINDS,
    CompositeLinear,
    HeterogeneousAttention,
    Kind,
    TokenFeedForward,
    TokenLinear,
    break_even_rank,
)
from spaces.sequence.hiformer import (
    FIELDS,
    FeatureTokens,
    Hiformer,
    InteractionSpec,
    count_interaction,
    count_macs,
    hiformer_plan,
    load_formula_attention,
    load_formula_ffn,
    load_unirank,
)
from tests.golden_vectors import golden, golden_json

PUBLISHED = golden_json("hiformer-variants")
OUTSIDE = 631_000
"""Parameters that the published figures have beyond the layers, of unknown shape."""
PAPER = ClickThroughRateSignature((50,) * FIELDS, (1,) * FIELDS, 30)
SMALL = ClickThroughRateSignature((9, 5, 7), (1, 3, 1), 4, outputs=2)
FORMULA = golden("hiformer-formula")


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def exact(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def attention(kind: Kind, tokens: int = 5, **options: Any) -> HeterogeneousAttention:
    torch.manual_seed(0)
    ranks = {"key_rank": 3, "value_rank": 4} if kind == "composite_low_rank" else {}
    return HeterogeneousAttention(tokens, 6, 2, 3, 4, kind=kind, **{**ranks, **options}).double().eval()


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(signature: ClickThroughRateSignature, batch: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.randint(0, vocabulary, (batch, width), generator=generator)
        for vocabulary, width in zip(signature.vocabularies, signature.widths, strict=True)
    ]
    return torch.cat(columns, 1), torch.randn(batch, signature.dense, generator=generator)


class TestGolden:
    @torch.no_grad()
    def test_scores(self) -> None:
        """The products of queries and keys before the softmax; published without any of what follows."""
        own = load_formula_attention(FORMULA.state)
        x = FORMULA.inputs["tokens"]
        q, k = (part(x).unflatten(2, (2, -1)).transpose(1, 2) for part in (own.query, own.key))
        close(q @ k.transpose(2, 3) / 3**0.5, FORMULA.mid["scores_hetero"])

    @pytest.mark.parametrize(
        ("kind", "name"),
        [("heterogeneous", "hetero"), ("composite", "composite"), ("composite_low_rank", "lowrank")],
    )
    @torch.no_grad()
    def test_attention(self, kind: Kind, name: str) -> None:
        x, expected = FORMULA.inputs["tokens"], FORMULA.outputs
        pruned = load_formula_attention(FORMULA.state, kind, queries=2)(x)
        close(pruned, expected[f"attn_{name}_task_only"])
        whole = load_formula_attention(FORMULA.state, kind)(x)
        close(whole[:, -2:], pruned)
        if kind != "composite_low_rank":
            close(whole, expected[f"attn_{name}"])

    @torch.no_grad()
    def test_feed_forward(self) -> None:
        expected = FORMULA.outputs
        close(load_formula_ffn(FORMULA.state)(expected["attn_hetero"]), expected["ffn_hetero"])
        pruned = load_formula_ffn(FORMULA.state, queries=2)(expected["attn_lowrank_task_only"])
        close(pruned, expected["ffn_lowrank_task_only"])

    @torch.no_grad()
    def test_blocks_of_unirank(self) -> None:
        vectors = golden("hiformer-thirdparty-blocks")
        x = vectors.inputs["x"]
        blocks = load_unirank(vectors.state, num_heads=2)
        first: Any = blocks.layers[0]
        close(first.attention(first.attention_norm(x)), vectors.mid["attention_first_layer"])
        close(blocks(x), vectors.outputs["y"])
        prefixed = {f"unified_interaction_layers.{key}": value for key, value in vectors.state.items()}
        assert torch.equal(load_unirank(prefixed, num_heads=2)(x), blocks(x))

    def test_what_does_not_load(self) -> None:
        state = golden("hiformer-thirdparty-blocks").state
        with pytest.raises(UserMistake, match="num_heads=3 must divide the width 8"):
            load_unirank(state, num_heads=3)
        with pytest.raises(UserMistake, match=r"no 'mixer_layers\.0"):
            load_unirank({}, num_heads=2)
        with pytest.raises(UserMistake, match=r"no tensor 'pffn_norms\.1\.bias'"):
            load_unirank({k: v for k, v in state.items() if k != "pffn_norms.1.bias"}, num_heads=2)
        with pytest.raises(UserMistake, match=r"query\.map\.up\.weight: shape \(39, 6\) must be \(40, 6\)"):
            key = "mixer_layers.0.W_q.up_proj.weight"
            load_unirank({**state, key: state[key][1:]}, num_heads=2)
        with pytest.raises(UserMistake, match="kind='shared' must be heterogeneous, composite"):
            load_formula_attention(FORMULA.state, "shared")
        with pytest.raises(UserMistake, match="no tensor 'K_left'"):
            load_formula_attention(
                {k: v for k, v in FORMULA.state.items() if k != "K_left"}, "composite_low_rank"
            )


class TestCounts:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_published(self, name: str) -> None:
        space = get_space("hiformer:google_play")
        plan = hiformer_plan(space.published[name], PAPER)
        parameters, macs = count_interaction(38, 1, **plan)
        assert (parameters + OUTSIDE, macs) == (PUBLISHED[name]["params"], PUBLISHED[name]["macs"])
        with torch.device("meta"):
            model = space.build(space.published[name], PAPER)
        assert isinstance(model, Hiformer)
        assert model.features.tokens == 38
        norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
        assert parameters == sum(p.numel() for p in model.layers.parameters() if id(p) not in norms)
        assert profile(model, inputs(PAPER, 1)).macs == count_macs(PAPER, **plan)

    @pytest.mark.parametrize("scale", ["small", "google_play"])
    def test_closed_forms_of_samples(self, scale: str) -> None:
        space, rng = get_space(f"hiformer:{scale}"), random.Random(3)
        for _ in range(4):
            architecture = space.sample(rng)
            plan = hiformer_plan(architecture, SMALL)
            with torch.device("meta"):
                model: Any = space.build(architecture, SMALL)
            tokens = model.features.tokens
            norms = sum(
                p.numel()
                for m in model.layers.modules()
                if isinstance(m, nn.LayerNorm)
                for p in m.parameters()
            )
            parameters, _ = count_interaction(tokens, SMALL.outputs, **plan)
            assert parameters == sum(p.numel() for p in model.layers.parameters()) - norms
            assert profile(model, inputs(SMALL, 1)).macs == count_macs(SMALL, **plan)

    def test_growth_with_the_number_of_tokens(self) -> None:
        """Heterogeneous layers grow linearly with the tokens, composite keys and values quadratically."""
        shape: dict[str, Any] = {"dim": 8, "heads": 2, "key_dim": 4, "value_dim": 4}

        def counted(kind: Kind, tokens: int) -> int:
            return count_interaction(tokens, 1, layers=[InteractionSpec(kind, 32)], **shape)[0]

        linear = [counted("heterogeneous", tokens) for tokens in (10, 20, 30)]
        assert linear[2] - linear[1] == linear[1] - linear[0] == 10 * 8 * 2 * 8
        rest = counted("heterogeneous", 0)
        assert counted("composite", 40) - rest == 4 * (counted("composite", 20) - rest)

    def test_break_even(self) -> None:
        assert break_even_rank(128, 64) * (128 + 64) == 128 * 64
        full = CompositeLinear(4, 8, 4, 12)
        for rank, is_cheaper in ((19, True), (20, False)):  # 32 * 48 / 80 = 19.2
            thin = CompositeLinear(4, 8, 4, 12, rank)
            sizes = [sum(p.numel() for p in one.parameters()) for one in (thin, full)]
            assert (sizes[0] < sizes[1]) is is_cheaper


class TestEqualities:
    """What the paper says is the same, in float64."""

    @pytest.mark.parametrize("kind", KINDS)
    @torch.no_grad()
    def test_the_pruned_layer_gives_the_last_rows(self, kind: Kind) -> None:
        whole, pruned = attention(kind), attention(kind, queries=2)
        state = {
            key: value if value.shape == pruned.state_dict()[key].shape else value[-2:]
            for key, value in whole.state_dict().items()
        }
        pruned.load_state_dict(state)
        exact(pruned(some(4, 5, 6)), whole(some(4, 5, 6))[:, -2:])

    @torch.no_grad()
    def test_equal_matrices_are_ordinary_attention(self) -> None:
        shared, own = attention("shared"), attention("heterogeneous")
        own.load_state_dict({key: value.T.expand(5, -1, -1) for key, value in shared.state_dict().items()})
        exact(own(some(3, 5, 6)), shared(some(3, 5, 6)))

    @torch.no_grad()
    def test_ordinary_attention_is_the_formula(self) -> None:
        own, x = attention("shared"), some(3, 5, 6)
        q, k, v = (part(x).view(3, 5, 2, -1).transpose(1, 2) for part in (own.query, own.key, own.value))
        chances = (q @ k.transpose(2, 3) / 3**0.5).softmax(3)
        exact(own(x), own.out((chances @ v).transpose(1, 2).reshape(3, 5, 8)))

    @torch.no_grad()
    def test_block_diagonal_composite_is_heterogeneous(self) -> None:
        own, composite = attention("heterogeneous"), attention("composite")
        state = {key: value for key, value in own.state_dict().items() if key.startswith(("query", "out"))}
        for name in ("key", "value"):
            blocks = [matrix.T for matrix in own.state_dict()[f"{name}.weight"]]
            state[f"{name}.map.weight"] = torch.block_diag(*blocks)
        composite.load_state_dict(state)
        exact(composite(some(3, 5, 6)), own(some(3, 5, 6)))

    @torch.no_grad()
    def test_low_rank_is_its_product(self) -> None:
        thin, full = attention("composite_low_rank"), attention("composite")
        state = {key: value for key, value in thin.state_dict().items() if key.startswith(("query", "out"))}
        for name in ("key", "value"):
            factors: Any = thin.get_submodule(f"{name}.map")
            state[f"{name}.map.weight"] = factors.up.weight @ factors.down.weight
        full.load_state_dict(state)
        exact(full(some(3, 5, 6)), thin(some(3, 5, 6)))

    @torch.no_grad()
    def test_permuted_tokens_permute_the_output(self) -> None:
        own, permuted = attention("heterogeneous"), attention("heterogeneous")
        order = torch.tensor([3, 0, 4, 1, 2])
        permuted.load_state_dict({key: value[order] for key, value in own.state_dict().items()})
        exact(permuted(some(3, 5, 6)[:, order]), own(some(3, 5, 6))[:, order])

    @pytest.mark.parametrize("norm", ["pre", "post", "none"])
    @pytest.mark.parametrize("kind", KINDS)
    @torch.no_grad()
    def test_pruning_the_last_layer_changes_nothing(self, kind: Kind, norm: Any) -> None:
        ranks: dict[str, Any] = {"key_rank": 5, "value_rank": 6} if kind == "composite_low_rank" else {}
        first, last = (
            InteractionSpec(kind, 16, **ranks),
            InteractionSpec(kind, 16, shared_ffn=kind == "shared", **ranks),
        )
        options: dict[str, Any] = {
            "dim": 8, "heads": 2, "key_dim": 3, "value_dim": 5, "dense_tokens": 2, "layers": [first, last], "norm": norm
        }  # fmt: skip
        whole = Hiformer(SMALL, prune_last=False, **options).double().eval()
        pruned = Hiformer(SMALL, prune_last=True, **options).double().eval()
        wanted = pruned.state_dict()
        pruned.load_state_dict(
            {
                key: value if value.shape == wanted[key].shape else value[-2:]
                for key, value in whole.state_dict().items()
            }
        )
        ids, dense = inputs(SMALL, 6)
        exact(pruned(ids, dense.double()), whole(ids, dense.double()))
        assert profile(pruned, inputs(SMALL, 1)).macs < profile(whole, inputs(SMALL, 1)).macs

    @torch.no_grad()
    def test_feed_forward_with_equal_weights_is_the_shared_one(self) -> None:
        shared, own = TokenFeedForward(3, 4, 6, shared=True).double(), TokenFeedForward(3, 4, 6).double()
        state = {}
        for key, value in shared.state_dict().items():
            oriented = value.T if value.dim() == 2 else value
            state[key] = oriented.expand(3, *oriented.shape)
        own.load_state_dict(state)
        exact(own(some(2, 3, 4)), shared(some(2, 3, 4)))


class TestFeatures:
    @torch.no_grad()
    def test_tokens(self) -> None:
        """Fields have rows of their own, sets are means without their padding, numbers and tasks come last."""
        features = FeatureTokens(SMALL, 4, 2)
        table = features.table.weight
        ids = torch.tensor([[8, 2, 4, 0, 6], [0, 0, 0, 0, 1]])
        tokens = features(ids, torch.randn(2, 4))
        assert tokens.shape == (2, 3 + 2 + 2, 4)
        close(tokens[0, 0], table[8])
        close(tokens[0, 1], (table[9 + 2] + table[9 + 4]) / 2)
        close(tokens[0, 2], table[9 + 5 + 6])
        assert not tokens[1, 1].any()
        assert torch.equal(tokens[1, -2:], features.task_tokens)
        strange, unknown = torch.tensor([[9, 5, 4, -1, 7], [0, 0, 4, 0, 0]]).split(1)
        dense = torch.randn(1, 4)
        assert torch.equal(features(strange, dense), features(unknown, dense))

    @torch.no_grad()
    def test_order_and_padding_of_a_set_do_not_matter(self) -> None:
        space = get_space("hiformer")
        model = space.build(space.published["hiformer_1layer"], SMALL).eval()
        dense = torch.randn(1, 4)
        results = [model(torch.tensor([[1, *some_set, 2]]), dense) for some_set in ([2, 3, 0], [0, 3, 2])]
        close(*results)

    def test_without_numbers(self) -> None:
        signature = ClickThroughRateSignature((4, 5), (1, 1), 0)
        space = get_space("hiformer")
        model: Any = space.build(space.published["heteroatt_2layer"], signature)
        assert model.features.tokens == 3
        assert model(torch.ones(2, 2, dtype=torch.long), torch.empty(2, 0)).shape == (2, 1)
        plan = hiformer_plan(space.published["heteroatt_2layer"], signature)
        example = torch.ones(1, 2, dtype=torch.long), torch.empty(1, 0)
        assert profile(model, example).macs == count_macs(signature, **plan)

    @pytest.mark.parametrize(
        "arguments",
        [
            ((), (), 1),
            ((5,), (1, 1), 1),
            ((1,), (1,), 1),
            ((5,), (0,), 1),
            ((5,), (1,), -1),
            ((5,), (1,), 1, 0),
        ],
    )
    def test_signatures_that_make_no_sense(self, arguments: Any) -> None:
        with pytest.raises(ValueError, match="vocabularies="):
            ClickThroughRateSignature(*arguments)

    def test_a_signature_from_lists_is_the_same(self) -> None:
        listed: Any = ([9, 5], [1, 1], 3)
        assert ClickThroughRateSignature(*listed) == ClickThroughRateSignature((9, 5), (1, 1), 3)


class TestSpaces:
    def test_shares_of_the_break_even_rank_are_always_cheaper(self) -> None:
        space, rng = get_space("hiformer"), random.Random(5)
        seen = 0
        for _ in range(60):
            plan = hiformer_plan(space.sample(rng), SMALL)
            tokens = 3 + plan["dense_tokens"] + 2
            for layer in plan["layers"]:
                for rank, width in ((layer.key_rank, "key_dim"), (layer.value_rank, "value_dim")):
                    limit = break_even_rank(tokens * plan["dim"], tokens * plan["heads"] * plan[width])
                    seen += rank is not None
                    assert rank is None or 1 <= rank <= limit / 2
        assert seen > 20

    def test_ranks_of_the_paper_must_be_cheaper(self) -> None:
        space = get_space("hiformer:google_play")
        low = {**space.published["hiformer_1layer_lowrank_rk128_rv1024"], "embed": 32, "heads": 1}
        with pytest.raises(UserMistake, match=r"layer1\.value_rank must be below the rank"):
            space.validate(low)
        space.validate({**low, "layer1.value_rank": 512})

    def test_the_published_layers(self) -> None:
        layers = hiformer_plan(
            get_space("hiformer:google_play").published["hiformer_1layer_lowrank_rk128_rv1024"], PAPER
        )["layers"]
        wanted = InteractionSpec("composite_low_rank", 512, key_rank=128, value_rank=1024)
        assert layers == [wanted]
        assert replace(wanted, key_rank=1) != wanted

    def test_it_is_for_clicks(self) -> None:
        space = get_space("hiformer")
        with pytest.raises(SpaceError, match="hiformer is for click-through rates, but the task is image_"):
            space.build(space.published["hiformer_1layer"], ImageSignature(3, 8, 8, 2))

    @pytest.mark.parametrize("kind", KINDS)
    def test_half_precision_and_gradients(self, kind: Kind) -> None:
        ranks: dict[str, Any] = {"key_rank": 5, "value_rank": 6} if kind == "composite_low_rank" else {}
        layers = [InteractionSpec(kind, 16, **ranks)] * 2
        model = Hiformer(
            SMALL, dim=8, heads=2, key_dim=4, value_dim=8, dense_tokens=1, layers=layers, norm="post"
        )
        exact_output = model(*inputs(SMALL, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(*inputs(SMALL, 8))
        close(output.float(), exact_output, 0.05)
        output.float().square().mean().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kind": "mixed"}, "kind='mixed' must be one of shared"),
            ({"queries": 6}, r"queries=6 must lie in 1\.\.5"),
            ({"queries": 0}, r"queries=0 must lie in 1\.\.5"),
            ({"key_rank": 2}, "key_rank=2 must be given for composite_low_rank and for nothing else"),
            ({"kind": "composite_low_rank", "key_rank": 2}, "value_rank=None must be given"),
            ({"project_out": False}, "heads=2 times value_dim=4 must be dim=6"),
        ],
    )
    def test_attention_that_cannot_be(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HeterogeneousAttention(5, 6, 2, 3, 4, **options)


def test_token_linear_is_a_linear_per_token() -> None:
    own = TokenLinear(3, 4, 5).double()
    nn.init.normal_(own.bias)  # type: ignore[arg-type]
    x, expected = some(2, 3, 4), []
    for token in range(3):
        assert own.bias is not None
        expected.append(x[:, token] @ own.weight[token] + own.bias[token])
    exact(own(x), torch.stack(expected, 1))
