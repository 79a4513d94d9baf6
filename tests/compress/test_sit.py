"""The sit pass: where it slims, what it trains, what it leaves behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from compress.origins import base_of, origin_of
from compress.passes import list_passes, make_pass, parse_pass
from compress.passes.base import Adjustable, Context, PassFailed
from compress.passes.sit import (
    PRESETS,
    Recalibration,
    Sit,
    balanced_groups,
    block_tokens,
    insert_slimmings,
    recalibrate,
    recalibration_loss,
    recover,
    reverse_modules,
)
from compress.saved import describe, rebuild, tensors_of
from compress.structure import StructureError, recognise
from nas.profile import profile
from spaces import ImageSignature, UserMistake, get_space
from spaces.layers.token_slimming import ReverseTokenSlimming, TokenSlimming
from spaces.vision.lv_vit import LVViT, load_lv_vit, load_reverse_modules
from tests.golden_vectors import golden, golden_json

SIZE = 16


def deit(**options: Any) -> VisionTransformer:
    arguments = {
        "img_size": SIZE,
        "patch_size": 4,
        "num_classes": 5,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 2,
    }
    return VisionTransformer(**(arguments | options)).eval()


def lv_vit(**options: Any) -> LVViT:
    arguments: dict[str, Any] = {"size": (SIZE, SIZE), "classes": 5, "dim": 24, "depth": 4, "heads": 2}
    return LVViT(**(arguments | {"reduction": 4} | options)).eval()


def batches(count: int = 2, size: int = 6, channels: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, channels, SIZE, SIZE), torch.randint(5, (size,))) for _ in range(count)]


def context(**changes: Any) -> Context:
    return Context(example=(torch.zeros(1, 3, SIZE, SIZE),), train=batches()).with_changes(**changes)


def slimmings(model: nn.Module) -> list[TokenSlimming]:
    return [module for module in model.modules() if isinstance(module, TokenSlimming)]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


HOSTS = [
    pytest.param(deit, 1, id="deit"),
    pytest.param(lambda: deit(reg_tokens=3), 4, id="registers"),
    pytest.param(lambda: deit(class_token=False, global_pool="avg"), 0, id="pooled"),
    pytest.param(lambda: deit(init_values=0.1, no_embed_class=True), 1, id="deit3"),
    pytest.param(
        lambda: timm.create_model(
            "deit_tiny_distilled_patch16_224",
            img_size=SIZE,
            patch_size=4,
            num_classes=5,
            embed_dim=24,
            num_heads=2,
        ).eval(),
        2,
        id="distilled",
    ),
    pytest.param(lv_vit, 1, id="lv_vit"),
    pytest.param(lambda: lv_vit(stem="patch", aux_head=True), 1, id="lv_vit-aux"),
]


class TestGoldenLoss:
    def test_recalibration(self) -> None:
        vectors = golden("sit-frd-loss")
        args = vectors.facts["args"]
        students = {
            role: {key.partition(".")[2]: v for key, v in vectors.state.items() if key.startswith(f"{role}.")}
            for role in ("student", "teacher")
        }
        own, other = (
            load_lv_vit(students[role], heads=args["model"]["num_heads"], skip_division=1.0)
            for role in students
        )
        x = vectors.inputs["x"]
        with torch.no_grad():
            logits, tokens = block_tokens(own, x)
            taught, taught_tokens = block_tokens(other, x)
            parts = recalibration_loss(
                nn.functional.cross_entropy(logits, vectors.inputs["soft_target"]),
                logits,
                recover(tokens, load_reverse_modules(students["student"])),
                taught,
                taught_tokens,
                token_weight=args["lambda_token"],
                logit_weight=args["lambda_logits"],
                temperature=args["tau"],
            )
        torch.testing.assert_close(taught, vectors.mid["teacher_logits"], atol=1e-5, rtol=1e-5)
        for ours, name in zip(parts, ("loss", "loss_cls", "loss_token", "loss_logits"), strict=True):
            torch.testing.assert_close(ours.reshape(1), vectors.outputs[name], atol=1e-5, rtol=1e-5)

    def test_a_student_that_is_its_teacher(self) -> None:
        model = deit()
        logits, tokens = block_tokens(model, torch.randn(2, 3, SIZE, SIZE))
        reverse = reverse_modules([16] * 4, 16, 24)
        parts = recalibration_loss(torch.zeros(()), logits, recover(tokens, reverse), logits, tokens)
        assert float(parts.tokens.detach()) == 0
        assert float(parts.logits.detach().abs()) < 1e-6


class TestReverseModules:
    def test_one_for_each_block_from_the_first_slimming(self) -> None:
        modules = reverse_modules([16, 8, 8, 4], 16, 24, ratio=2)
        assert [type(module) for module in modules] == [nn.Identity, *[ReverseTokenSlimming] * 3]
        tokens = [torch.randn(2, count, 24) for count in (16, 8, 8, 4)]
        assert [tuple(one.shape) for one in recover(tokens, modules)] == [(2, 16, 24)] * 4

    @pytest.mark.parametrize("name", ["tiny", "xsmall", "small", "medium", "large"])
    def test_published_counts(self, name: str) -> None:
        facts = golden_json("sit-variants")[f"sit_lvvit_{name}"]
        short = {"tiny": "t", "xsmall": "xs", "small": "s", "medium": "m", "large": "l"}[name]
        architecture = get_space("lv_vit:imagenet").published[f"sit_{short}"]
        counts = [
            facts["tokens_per_stage"][sum(place <= block for place in facts["slim_after_block"])]
            for block in range(1, int(str(architecture["depth"])) + 1)
        ]
        with torch.device("meta"):
            modules = reverse_modules(
                counts,
                counts[0] if counts[0] in (196, 324) else facts["tokens_per_stage"][0],
                int(str(architecture["dim"])),
            )
        assert sum(p.numel() for p in modules.parameters()) == facts["params_reverse_modules"]


class TestPresets:
    @pytest.mark.parametrize("official", ["tiny", "xsmall", "small", "medium", "large"])
    def test_published_counts(self, official: str) -> None:
        facts = golden_json("sit-variants")[f"sit_lvvit_{official}"]
        preset = {"tiny": "sit_t", "xsmall": "sit_xs", "small": "sit_s", "medium": "sit_m", "large": "sit_l"}[
            official
        ]
        side = facts["input"][-1]
        host = {"sit_t": "lv_vit_t", "sit_m": "lv_vit_m", "sit_l": "lv_vit_l"}.get(preset, "lv_vit_s")
        image = torch.empty(1, 3, side, side, device="meta")
        with torch.device("meta"):
            space = get_space("lv_vit:imagenet")
            model = space.build(space.published[host], ImageSignature(3, side, side, 1000))
            found = Sit(preset=preset).apply(model, Context(example=(image,), probe=True))
        assert sum(p.numel() for p in found.parameters()) == facts["params"]
        assert profile(found, (image,)).macs == facts["macs"]
        assert [module.tokens for module in slimmings(found)] == facts["tokens_per_stage"][1:]

    def test_for_another_depth(self) -> None:
        with pytest.raises(
            StructureError, match=r"preset='sit_s' is for the 16 blocks of lv_vit_s, but .* has 4"
        ):
            Sit(preset="sit_s").apply(deit(), context())

    def test_names(self) -> None:
        assert PRESETS == ("sit_t", "sit_xs", "sit_s", "sit_m", "sit_l")
        with pytest.raises(UserMistake, match="unknown preset of sit 'sit_x'"):
            Sit(preset="sit_x")


class TestHosts:
    @pytest.mark.parametrize(("make", "prefix"), HOSTS)
    def test_slims_trains_and_leaves_the_original(self, make: Any, prefix: int) -> None:
        model = make()
        before = copy.deepcopy(model)
        found = Sit(epochs=1, learning_rate=1e-3).apply(model, context())
        assert same_state(model, before)
        assert not slimmings(model)
        assert [module.config()["prefix"] for module in slimmings(found)] == [prefix] * 3
        assert [module.tokens for module in slimmings(found)] == [8, 4, 2]
        assert not found.training
        assert not any(isinstance(module, ReverseTokenSlimming) for module in found.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.modules())
        for size in (1, 7):
            assert found(torch.randn(size, 3, SIZE, SIZE)).shape == (size, 5)
        assert all(torch.isfinite(p).all() for p in found.parameters())
        image = (torch.zeros(1, 3, SIZE, SIZE),)
        assert profile(found, image).macs < profile(model, image).macs

    @pytest.mark.parametrize(("make", "prefix"), HOSTS)
    def test_saved_and_built_again(self, make: Any, prefix: int) -> None:
        found = Sit(epochs=0, start="random").apply(make(), context())
        origin = origin_of(found)
        if prefix == 0:  # a class token that is not there is told by the constructor alone
            origin["kwargs"] |= {"class_token": False, "global_pool": "avg"}
        again = rebuild(describe(found, base_of(origin)), base_of(origin))
        tensors = tensors_of(found)
        with torch.no_grad():
            for name, value in tensors_of(again).items():
                value.copy_(tensors[name])
        x = torch.randn(2, 3, SIZE, SIZE)
        assert torch.equal(again.eval()(x), found(x))

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [deit, lv_vit])
    def test_exports(self, make: Any, tmp_path: Path) -> None:
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        found = Sit(epochs=0, start="random").apply(make(), context())
        path = str(tmp_path / "model.onnx")
        torch.onnx.export(
            found,
            (torch.randn(2, 3, SIZE, SIZE),),
            path,
            input_names=["x"],
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for size in (1, 7):
            x = torch.randn(size, 3, SIZE, SIZE)
            [out] = session.run(None, {"x": x.numpy()})
            np.testing.assert_allclose(out, found(x).detach().numpy(), atol=1e-5, rtol=1e-4)

    def test_structure_is_still_recognised(self) -> None:
        found = Sit(epochs=0).apply(deit(), context())
        assert len(recognise(found).blocks) == 4

    def test_refusals(self) -> None:
        swin = timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            patch_size=2,
            embed_dim=12,
            depths=(1, 1),
        )
        with pytest.raises(StructureError, match="SwinTransformer has no 'blocks'"):
            Sit().apply(swin, context())
        slimmed = Sit(epochs=0).apply(deit(), context())
        with pytest.raises(StructureError, match="slims its tokens already"):
            Sit().apply(slimmed, context())
        twice = deit()
        twice.blocks = nn.Sequential(*[twice.blocks[0]] * 4)
        with pytest.raises(StructureError, match="runs one block more than once"):
            Sit().apply(twice, context())

    def test_tokens_that_reach_the_output(self) -> None:
        class PerToken(VisionTransformer):
            def forward(self, x: Tensor) -> Tensor:
                return self.forward_features(x)  # type: ignore[no-any-return]

        model = PerToken(img_size=SIZE, patch_size=4, embed_dim=24, depth=4, num_heads=2)
        with pytest.raises(StructureError, match=r"outputs of PerToken depend on the number of tokens"):
            Sit().apply(model, context())

    def test_a_class_token_that_joins_later(self) -> None:
        model = timm.create_model(
            "cait_xxs24_224", img_size=SIZE, patch_size=4, depth=4, embed_dim=24, num_heads=2, num_classes=5
        )
        found = Sit(epochs=0).apply(model.eval(), context())
        assert [module.config()["prefix"] for module in slimmings(found)] == [0, 0, 0]
        assert [module.tokens for module in slimmings(found)] == [8, 4, 2]

    def test_a_single_patch(self) -> None:
        with pytest.raises(StructureError, match="has 1 patch tokens; there is nothing to slim"):
            Sit().apply(deit(patch_size=SIZE), context())

    def test_rotary_positions(self) -> None:
        model = timm.create_model(
            "eva02_tiny_patch14_224",
            img_size=16,
            patch_size=4,
            depth=4,
            embed_dim=24,
            num_heads=2,
            num_classes=5,
        )
        with pytest.raises(StructureError, match="does not run with fewer tokens"):
            Sit().apply(model, context())


class TestPlaces:
    @pytest.mark.parametrize(
        ("options", "depth", "places"),
        [
            ({}, 12, [3, 6, 9]),
            ({"span": 0.25}, 12, [1, 2, 3]),
            ({"span": 0.5}, 12, [2, 4, 6]),
            ({}, 4, [1, 2, 3]),
            ({}, 2, [1]),
            ({"slim_after": [2, 3]}, 4, [2, 3]),
            ({"slimmings": 1}, 8, [6]),
        ],
    )
    def test_by_default_and_given(self, options: dict[str, Any], depth: int, places: list[int]) -> None:
        found = Sit(epochs=0, **options).apply(deit(depth=depth), context(probe=True))
        kinds = [isinstance(block, TokenSlimming) for block in found.blocks]  # type: ignore[union-attr]
        seen = [number - sum(kinds[:number]) for number, slims in enumerate(kinds) if slims]
        assert seen == places

    def test_tokens_given(self) -> None:
        found = Sit(slim_after=[1, 2], tokens=[9, 9], epochs=0).apply(deit(), context())
        assert [module.tokens for module in slimmings(found)] == [9, 9]

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"slim_after": [4]}, r"slim_after=\[4\] must rise within 1..3"),
            ({"slim_after": [2, 2]}, r"slim_after=\[2, 2\] must rise"),
            (
                {"slim_after": [1], "tokens": [20]},
                r"tokens=\[20\] must be at least 1 and not rise, .* 16 patches",
            ),
            ({"slim_after": [1], "tokens": [2, 1]}, r"with one number in tokens=\[2, 1\] each"),
        ],
    )
    def test_out_of_range(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(UserMistake, match=text):
            Sit(**options).apply(deit(), context())

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"keep": 0}, r"keep=0 must be in \(0, 1\]"),
            ({"span": 1.0}, r"span=1.0 must be in \(0, 1\)"),
            ({"start": "zero"}, "start='zero' must be neighbours or random"),
            ({"learning_rate": 0}, "learning_rate=0 must be above 0"),
            ({"preset": "sit_t", "slim_after": [1]}, "preset='sit_t' tells where to slim"),
        ],
    )
    def test_options(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(UserMistake, match=text):
            Sit(**options)

    def test_found_by_name(self) -> None:
        assert "sit" in list_passes()
        one = parse_pass("sit:slim_after=[1, 2],keep=0.7,epochs=3")
        assert isinstance(one, Sit)
        assert (one.slim_after, one.keep, one.epochs) == ([1, 2], 0.7, 3)
        assert make_pass("sit", **one.options()).options() == one.options()


class TestStrength:
    @pytest.mark.parametrize("options", [{}, {"slim_after": [2, 3]}, {"tokens": [9, 5, 3]}])
    def test_cost_never_rises(self, options: dict[str, Any]) -> None:
        one, model, image = Sit(**options), deit(img_size=32, depth=6), torch.zeros(1, 3, 32, 32)
        assert isinstance(one, Adjustable)
        costs = []
        for step in range(9):
            found = one.with_strength(step / 8).apply(model, Context(example=(image,), probe=True))
            costs.append(profile(found, (image,)).macs)
        assert costs == sorted(costs, reverse=True)
        assert costs[0] == profile(model, (image,)).macs
        assert costs[-1] < 0.62 * costs[0]

    def test_a_probe_has_the_shape_of_the_result(self) -> None:
        one = Sit(epochs=1)
        shapes = [
            {
                name: tuple(value.shape)
                for name, value in one.apply(deit(), context(probe=probe)).state_dict().items()
            }
            for probe in (True, False)
        ]
        assert shapes[0] == shapes[1]


class TestTraining:
    def test_the_loss_falls_and_the_seed_decides(self) -> None:
        told: list[str] = []
        model = deit()
        train = batches(1, 8)
        run = context(train=train, teacher=copy.deepcopy(model), report=told.append)
        first = Sit(epochs=8, learning_rate=2e-3).apply(model, run)
        losses = [float(line.rpartition(" ")[2]) for line in told if "loss" in line]
        assert len(losses) == 8
        assert losses[-1] < 0.8 * losses[0]
        assert same_state(first, Sit(epochs=8, learning_rate=2e-3).apply(model, run))

    def test_starts_as_means_of_neighbours(self) -> None:
        torch.manual_seed(1)
        model = deit()
        nn.init.normal_(model.pos_embed)  # trained positions tell tokens apart
        found = Sit(slim_after=[1], epochs=0).apply(model, context(train=batches(2, 64)))
        [slimming] = slimmings(found)
        seen: list[Tensor] = []
        slimming.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, 1:]))
        found(torch.randn(32, 3, SIZE, SIZE))
        weights = slimming.weights(seen[0]).mean(0)  # (8, 16)
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        groups = balanced_groups(torch.stack((rows, columns), -1).flatten(0, 1).float(), 8)
        shares = torch.stack([weights[group, groups == group].sum() for group in range(8)])
        assert shares.min() > 0.8

    def test_groups_are_balanced_neighbourhoods(self) -> None:
        rows, columns = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
        places = torch.stack((rows, columns), -1).flatten(0, 1).float()
        for count in (196, 98, 49, 24, 7, 1):
            groups = balanced_groups(places, count)
            sizes = groups.bincount(minlength=count)
            assert len(sizes) == count
            assert sizes.max() <= 2 * sizes.min()
        for group in range(49):
            own = places[balanced_groups(places, 49) == group]
            assert (own.amax(0) - own.amin(0)).max() <= 3

    def test_a_teacher_of_another_make(self) -> None:
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5)).eval()
        found = Sit(epochs=1).apply(deit(), context(teacher=teacher))
        assert found(torch.randn(1, 3, SIZE, SIZE)).shape == (1, 5)

    def test_decisions_of_a_hard_teacher(self) -> None:
        model, sure = deit(), nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5)).eval()
        nn.init.zeros_(sure[1].weight)
        with torch.no_grad():
            sure[1].bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0]))
        student = copy.deepcopy(model)
        insert_slimmings(student, [1], [4])
        how = Recalibration(6, 2e-3, token_weight=0, logit_weight=0, hard_teacher=sure, hard_weight=50)
        recalibrate(student, model, context(), how, prefix=1)
        assert (student(torch.randn(9, 3, SIZE, SIZE)).argmax(-1) == 2).all()

    def test_nan(self) -> None:
        bad = [(torch.full((4, 3, SIZE, SIZE), float("nan")), torch.zeros(4, dtype=torch.long))]
        with pytest.raises(PassFailed, match="the loss became nan in epoch 1; lower learning_rate=0"):
            Sit(epochs=1, start="random").apply(deit(), context(train=bad))

    def test_no_data(self) -> None:
        with pytest.raises(UserMistake, match="give train=, or epochs=0"):
            Sit().apply(deit(), context(train=None))
        with pytest.raises(PassFailed, match="gave no batch"):
            Sit(start="random", epochs=1).apply(deit(), context(train=[]))
        with pytest.raises(UserMistake, match="gave no batch"):
            Sit().apply(deit(), context(train=[]))


def test_a_text_is_no_list_of_blocks() -> None:
    with pytest.raises(UserMistake, match=r"slim_after='9\+12' must be a list of numbers"):
        parse_pass("sit:slim_after=9+12")
