"""LV-ViT and SiT: official vectors and counts, files of the original's layout, the search space."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.passes.sit import block_tokens, recover
from nas.profile import profile
from spaces import ImageSignature, SpaceError, TranslationSignature, UserMistake, get_space
from spaces.layers.token_slimming import TokenSlimming
from spaces.vision.lv_vit import (
    SLIM_AFTER,
    LVViT,
    LVViTBlock,
    count_macs,
    load_lv_vit,
    load_reverse_modules,
    plan,
    slimmed,
)
from tests.golden_vectors import golden, golden_json

OFFICIAL = golden_json("sit-variants")
NAMES = {
    "sit_lvvit_tiny": "sit_t",
    "sit_lvvit_xsmall": "sit_xs",
    "sit_lvvit_small": "sit_s",
    "sit_lvvit_medium": "sit_m",
    "sit_lvvit_large": "sit_l",
}
SMALL = ImageSignature(3, 32, 32, 5)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


class TestGolden:
    @pytest.mark.parametrize("name", ["sit-e2e", "sit-e2e-naive"])
    def test_network(self, name: str) -> None:
        vectors = golden(name)
        args = vectors.facts["args"]
        model = load_lv_vit(vectors.state, heads=args["num_heads"], skip_division=args["skip_lam"])
        reverse = load_reverse_modules(vectors.state)
        with torch.no_grad():
            logits, tokens = block_tokens(model, vectors.inputs["x"])
            recovered = recover(tokens, reverse)
        close(logits, vectors.outputs["logits"])
        close(logits, vectors.outputs["logits_train"])
        close(model(vectors.inputs["x"]), vectors.outputs["logits"])
        for number in range(args["depth"]):
            close(tokens[number], vectors.mid[f"tokens_eval.{number}"])
            close(recovered[number], vectors.mid[f"tokens_train_recovered.{number}"])
        assert parameters(model) == vectors.facts["params_total"] - vectors.facts["params_rtsm_training_only"]
        assert parameters(reverse) == vectors.facts["params_rtsm_training_only"]
        assert model.config()["slim_after"] == vectors.facts["slim_index"]
        assert model.config()["tokens"] == vectors.facts["keeped_patches"][1:]

    @pytest.mark.parametrize("fused", [True, False])
    @torch.no_grad()
    def test_another_scale_of_the_products(self, fused: bool) -> None:
        vectors = golden("sit-e2e")
        args = vectors.facts["args"]
        state, scale = dict(vectors.state), 0.3
        own = (args["embed_dim"] // args["num_heads"]) ** -0.5
        for name in [one for one in state if one.endswith("attn.qkv.weight")]:
            rows = state[name].shape[0] // 3
            state[name] = torch.cat((state[name][:rows] * own / scale, state[name][rows:]))
        options = {"heads": args["num_heads"], "skip_division": args["skip_lam"]}
        assert not any(one.endswith("attn.qkv.bias") for one in state)
        model = load_lv_vit(state, qk_scale=scale, **options)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        close(model(vectors.inputs["x"]), vectors.outputs["logits"])

    def test_a_file_for_deployment(self) -> None:
        vectors = golden("sit-e2e")
        state = {key: value for key, value in vectors.state.items() if not key.startswith("rtsm.")}
        with pytest.raises(UserMistake, match="does not tell after which blocks; give slim_after"):
            load_lv_vit(state, heads=4)
        with pytest.raises(UserMistake, match="must name 2 blocks"):
            load_lv_vit(state, heads=4, slim_after=[1])
        with pytest.raises(UserMistake, match="state has no reverse modules"):
            load_reverse_modules(state)
        model = load_lv_vit(state, heads=4, slim_after=(1, 3), aux_head=False)
        close(model(vectors.inputs["x"]), vectors.outputs["logits"])
        assert not hasattr(model, "aux_head")

    def test_foreign_states(self) -> None:
        state = golden("sit-e2e").state
        with pytest.raises(UserMistake, match="state lacks 'pos_embed'"):
            load_lv_vit({"weight": torch.zeros(1)})
        with pytest.raises(UserMistake, match="does not give the 25 patches"):
            load_lv_vit(state, heads=4, size=(64, 80))
        with pytest.raises(UserMistake, match=r"is not of an LV-ViT or SiT: .*proj\.bias"):
            load_lv_vit({key: v for key, v in state.items() if "proj.bias" not in key}, heads=4)


class TestPublished:
    @pytest.mark.parametrize("official", list(OFFICIAL))
    def test_counts(self, official: str) -> None:
        facts, space = OFFICIAL[official], get_space("lv_vit:imagenet")
        student = NAMES[official.removesuffix("__teacher")]
        name = SLIM_AFTER[student][0] if official.endswith("__teacher") else student
        side = facts["input"][-1]
        signature = ImageSignature(3, side, side, 1000)
        with torch.device("meta"):
            model = space.build(space.published[name], signature)
        assert isinstance(model, LVViT)
        assert parameters(model) == facts["params"]
        assert profile(model, (torch.empty(1, 3, side, side, device="meta"),)).macs == facts["macs"]
        assert count_macs(**plan(space.published[name], signature)) == facts["macs"]
        slimmings = [block for block in model.blocks if isinstance(block, TokenSlimming)]
        assert sum(map(parameters, slimmings)) == facts.get("params_slimming_modules", 0)
        assert [block.tokens for block in slimmings] == facts.get("tokens_per_stage", [0])[1:]
        assert model.config()["slim_after"] == facts.get("slim_after_block", [])
        assert parameters(model.aux_head) == facts.get("params_aux_head_unused", parameters(model.aux_head))

    def test_auxiliary_head(self) -> None:
        model = LVViT(3, (32, 32), 5, dim=16, depth=2, heads=2, reduction=4, aux_head=True)
        assert not any(p.requires_grad for p in model.aux_head.parameters())
        assert model.token_logits(torch.randn(2, 3, 32, 32)).shape == (2, 64, 5)
        with pytest.raises(UserMistake, match="needs a model with aux_head=True"):
            LVViT(3, (32, 32), 5, dim=16, depth=2, heads=2, reduction=4).token_logits(
                torch.randn(2, 3, 32, 32)
            )


class TestNetwork:
    @pytest.mark.parametrize("stem", ["4c", "6c", "patch"])
    @pytest.mark.parametrize(("size", "reduction"), [((36, 20), 4), ((33, 47), 8), ((64, 80), 16)])
    def test_macs_and_shapes(self, stem: str, size: tuple[int, int], reduction: int) -> None:
        plan: dict[str, Any] = {
            "channels": 2,
            "size": size,
            "classes": 7,
            "dim": 16,
            "depth": 4,
            "heads": 2,
            "stem": stem,
            "reduction": reduction,
            "slim_after": (1, 3),
            "tokens": (5, 2),
        }
        model = LVViT(**plan).eval()
        image = torch.randn(3, 2, *size)
        logits, tokens = block_tokens(model, image)
        assert logits.shape == (3, 7)
        assert [one.shape[1] for one in tokens] == [5, 5, 2, 2]
        assert profile(model, (image[:1],)).macs == count_macs(**plan)
        torch.testing.assert_close(model(image[:1]), logits[:1], atol=1e-5, rtol=1e-5)

    def test_config_makes_the_same_model(self) -> None:
        model = LVViT(
            1,
            (28, 28),
            3,
            dim=24,
            depth=3,
            heads=3,
            reduction=4,
            slim_after=[1],
            tokens=[9],
            slim_ratio=7 / 24,
        )
        again = LVViT(**model.config())
        again.load_state_dict(model.state_dict())
        x = torch.randn(2, 1, 28, 28)
        assert torch.equal(again.eval()(x), model.eval()(x))

    def test_block_config(self) -> None:
        block = LVViTBlock(24, 3, 40, head_dim=4, skip_division=3, qkv_bias=True, drop_path=0.1)
        again = LVViTBlock(**block.config())
        again.load_state_dict(block.state_dict())
        x = torch.randn(2, 5, 24)
        torch.testing.assert_close(again.eval()(x), block.eval()(x))
        fused = block(x)
        block.attn.fused_attn = False
        torch.testing.assert_close(block(x), fused)

    def test_both_branches_are_divided(self) -> None:
        x = torch.randn(2, 5, 24)
        block = LVViTBlock(24, 3, 40, skip_division=1)
        halved = LVViTBlock(24, 3, 40, skip_division=2)
        halved.load_state_dict(block.state_dict())
        middle = x + block.attn(block.norm1(x)) / 2
        torch.testing.assert_close(halved(x), middle + block.mlp(block.norm2(middle)) / 2)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"stem": "5c"}, "stem='5c' must be one of 4c, 6c, patch"),
            ({"reduction": 6}, "reduction=6 to be 1, 2, 4, 8 or 16"),
            ({"dim": 20, "heads": 2}, "dim=20 to be divisible by 8"),
            ({"heads": 3}, "dim=16 must be divisible by heads=3"),
            ({"slim_after": (2, 1), "tokens": (3, 2)}, r"slim_after=\[2, 1\] must rise within 1..3"),
            ({"slim_after": (4,), "tokens": (3,)}, r"slim_after=\[4\] must rise within 1..3"),
            ({"slim_after": (1,)}, "with one number in tokens"),
            ({"slim_after": (1, 2), "tokens": (5, 6)}, r"tokens=\[5, 6\] must not rise, starting from 64"),
        ],
    )
    def test_contradictions(self, change: dict[str, Any], text: str) -> None:
        plan = {"size": (32, 32), "dim": 16, "depth": 4, "heads": 2, "reduction": 4} | change
        with pytest.raises(UserMistake, match=text):
            LVViT(**plan)


class TestSpace:
    def test_small_images_keep_a_grid(self) -> None:
        space = get_space("lv_vit")
        for side, patches in ((8, 64), (28, 49), (32, 64), (64, 64)):
            model = space.build(space.published["plain"], ImageSignature(1, side, side, 10))
            assert model.pos_embed.shape[1] == patches + 1

    def test_the_sheet_is_inside(self) -> None:
        space = get_space("lv_vit:imagenet")
        base = space.published["lv_vit_m"]
        for after in ((), (1,), (1, 2, 3, 19), (5, 10)):
            for keep in (0.25, 0.5, 0.7, 0.9):
                for ratio in (0.25, 0.5, 1.0):
                    architecture = slimmed(base, after, keep=keep, ratio=ratio)
                    assert count_macs(
                        **plan(space.canonical(architecture), ImageSignature(3, 224, 224, 1000))
                    )

    def test_places_rise(self) -> None:
        space = get_space("lv_vit:imagenet")
        for after in ((3, 3), (4, 2), (1, 20)):
            with pytest.raises(UserMistake, match="slimmings come one behind the other"):
                space.validate(slimmed(space.published["lv_vit_m"], after))
        rng = random.Random(3)
        drawn = [space.sample(rng) for _ in range(200)]
        assert {architecture["slimmings"] for architecture in drawn} >= set(range(4))
        near = space.neighbors(slimmed(space.published["lv_vit_m"], (1, 2, 3)))
        assert 4 in {architecture["slimmings"] for architecture in near}

    def test_other_tasks_are_refused(self) -> None:
        space = get_space("lv_vit")
        with pytest.raises(SpaceError, match="lv_vit is for images, but the task is translation"):
            space.build(space.published["plain"], TranslationSignature(10, 10, 5))
