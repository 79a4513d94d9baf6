"""The sit pass against the published code and counts, and in every host that has blocks."""

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
from compress.passes.base import Context
from compress.passes.sit import PRESETS, Sit, block_tokens, recalibration_loss, recover, reverse_modules
from compress.saved import describe, rebuild, tensors_of
from compress.structure import StructureError, recognise
from nas.profile import profile
from spaces import ImageSignature, UserMistake, get_space
from spaces.layers.token_slimming import ReverseTokenSlimming
from spaces.vision.lv_vit import load_lv_vit, load_reverse_modules
from tests.compress._sit_models import SIZE, context, deit, lv_vit, same_state, slimmings
from tests.golden_vectors import golden, golden_json

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
