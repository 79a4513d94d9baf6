"""The activation_pruning pass: what it merges, how it fades, what it leaves as it was."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from compress import compress, load
from compress.origins import base_of, origin_of
from compress.passes import list_passes, parse_pass
from compress.passes._activation_training import AnnealedBatches, Fading
from compress.passes.activation_pruning import ActivationPruning, find_pairs, merge_pairs
from compress.passes.base import Adjustable
from compress.saved import describe, rebuild, tensors_of
from nas.profile import profile
from spaces import ImageSignature, UserMistake, get_space
from spaces.vision.vanillanet import VanillaNet
from tests.compress._activation_models import IMAGE, context, conv_net, deit, settled


def batches(count: int = 2, size: int = 6, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 3, 16, 16), torch.randint(classes, (size,))) for _ in range(count)]


def linear_at(model: nn.Module, *names: str) -> Any:
    """A copy with these activations taken away."""
    other = copy.deepcopy(model)
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(other.get_submodule(parent), last, nn.Identity())
    return other


class TestMerging:
    @pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, functools.partial(nn.ReLU, inplace=True)])
    def test_convolutions_and_linear_layers(self, activation: Callable[[], nn.Module]) -> None:
        model = settled(conv_net(activation)).double()
        before = copy.deepcopy(model)
        example = (torch.randn(5, 3, 16, 16, dtype=torch.float64),)
        result: Any = ActivationPruning(epochs=0).apply(model, context())
        torch.testing.assert_close(
            result(*example), linear_at(model, "2", "11")(*example), atol=1e-10, rtol=1e-10
        )
        kinds = [type(module).__name__ for module in result if not isinstance(module, nn.Identity)]
        assert kinds == [
            *("Conv2d", "Dropout", type(activation()).__name__),
            *("AdaptiveAvgPool2d", "Flatten", "Linear"),
        ]
        single = ActivationPruning(epochs=0).apply(model.float(), context())
        image = example[0].float()
        torch.testing.assert_close(single(image), linear_at(model, "2", "11")(image), atol=1e-4, rtol=1e-4)
        assert profile(single, IMAGE).macs < profile(model, IMAGE).macs
        assert str(model) == str(before)
        assert all(
            torch.equal(a, b.float()) for a, b in zip(model.parameters(), before.parameters(), strict=True)
        )

    def test_a_chain_becomes_one_layer(self) -> None:
        model = settled(
            nn.Sequential(
                nn.Linear(6, 8),
                nn.BatchNorm1d(8),
                nn.ReLU(),
                nn.Linear(8, 8),
                nn.BatchNorm1d(8),
                nn.Tanh(),
                nn.Linear(8, 3),
                nn.BatchNorm1d(3),
            )
        ).double()
        x = torch.randn(4, 6, dtype=torch.float64)
        straight = linear_at(model, "2", "5")
        for order in (1, -1):
            merged = copy.deepcopy(model)
            merge_pairs(merged, find_pairs(model, (x,)).pairs[::order])
            assert [n for n, m in merged.named_children() if not isinstance(m, nn.Identity)] == ["0"]
            torch.testing.assert_close(merged(x), straight(x), atol=1e-10, rtol=1e-10)

    def test_transformer(self) -> None:
        model = settled(deit())
        result: Any = ActivationPruning(epochs=0, layers="blocks.[02].mlp.act").apply(model, context())
        image = torch.randn(3, 3, 16, 16)
        wanted = linear_at(model, "blocks.0.mlp.act", "blocks.2.mlp.act")(image)
        torch.testing.assert_close(result(image), wanted, atol=1e-4, rtol=1e-4)
        assert tuple(result.blocks[0].mlp.fc1.weight.shape) == (12, 12)
        assert tuple(result.blocks[1].mlp.fc1.weight.shape) == (48, 12)

    @pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224"])
    def test_other_models_of_timm(self, name: str) -> None:
        small: dict[str, Any] = {
            "depths": (1, 1),
            "img_size": 32,
            "embed_dim": 8,
            "num_heads": (1, 1),
            "window_size": 4,
        }
        if name.startswith("convnext"):
            small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
        model = timm.create_model(name, num_classes=4, **small).eval()
        example = (torch.zeros(1, 3, 32, 32),)
        found = find_pairs(model, example)
        assert found.pairs
        assert all(pair.act.endswith("mlp.act") for pair in found.pairs)
        result = ActivationPruning(epochs=0).apply(model, context(example=example))
        assert profile(result, example).macs < profile(model, example).macs


class TestVanillaNet:
    def test_a_finished_one_comes_out_merged(self) -> None:
        model = settled(VanillaNet(classes=4, dims=(6, 8, 12), strides=(1, 2), terms=1)).double()
        result = ActivationPruning(epochs=0).apply(model, context())
        assert isinstance(result, VanillaNet)
        assert result.config() == {**model.config(), "form": "merged"}
        image = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(result(image), model(image), atol=1e-10, rtol=1e-10)
        by_itself = model.merge().state_dict()
        assert result.state_dict().keys() == by_itself.keys()
        for key, value in result.state_dict().items():
            torch.testing.assert_close(value, by_itself[key], atol=1e-12, rtol=1e-12)

    def test_the_schedule_ends_with_a_merged_one(self) -> None:
        torch.manual_seed(0)
        model = VanillaNet(classes=4, dims=(6, 8), strides=(2,), terms=1).eval()
        model.set_identity(0)
        result: Any = ActivationPruning(epochs=3).apply(model, context(train=batches()))
        assert result.config()["form"] == "merged"
        assert model.config()["form"] == "deep"
        assert not any(isinstance(module, Fading) for module in result.modules())

    def test_saved_and_loaded(self) -> None:
        space = get_space("vanillanet")
        signature = ImageSignature(3, 16, 16, 4)
        made = settled(space.build(space.published["deep"] | {"width": 16}, signature))
        text = "spaces.vision._vanillanet_network:VanillaNet"
        origin = {"kind": "class", "class": text, "kwargs": made.config()}
        for model, home in ((made, origin), (settled(deit()), None)):
            result = ActivationPruning(epochs=0).apply(model, context())
            base = base_of(home or origin_of(model))
            again = rebuild(json.loads(json.dumps(describe(result, base))), base)
            tensors = tensors_of(again)
            for name, value in tensors_of(result).items():
                tensors[name].data.copy_(value)
            image = torch.randn(2, 3, 16, 16)
            assert torch.equal(again.eval()(image), result(image))

    def test_the_whole_way(self, tmp_path: Path) -> None:
        model = settled(deit(depth=2))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        origin = {
            "kind": "class",
            "class": "timm.models.vision_transformer:VisionTransformer",
            "kwargs": {
                "img_size": 16,
                "patch_size": 8,
                "embed_dim": 12,
                "depth": 2,
                "num_heads": 2,
                "num_classes": 4,
            },
        }
        data = batches()
        found = compress(
            model,
            "activation_pruning:epochs=1",
            train=data,
            validation=data,
            budget="macs=0.8",
            origin=origin,
            measure_seconds=0,
        )
        assert profile(found.model, IMAGE).macs <= 0.8 * profile(model, IMAGE).macs
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        found.save(tmp_path / "saved")
        image = data[0][0]
        assert torch.equal(load(tmp_path / "saved").model(image), found.model(image))

    @pytest.mark.slow
    def test_exports(self, tmp_path: Path) -> None:
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        model = settled(VanillaNet(classes=4, dims=(6, 8, 12), strides=(1, 2), terms=1))
        found = ActivationPruning(epochs=0).apply(model, context())
        path = str(tmp_path / "model.onnx")
        torch.onnx.export(
            found,
            (torch.randn(2, 3, 16, 16),),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        session = runtime.InferenceSession(path)
        for size in (1, 7):
            image = torch.randn(size, 3, 16, 16)
            [logits] = session.run(None, {session.get_inputs()[0].name: image.numpy()})
            wanted = found(image).detach()
            assert float(wanted.std()) > 1e-3
            torch.testing.assert_close(torch.from_numpy(logits), wanted, atol=1e-4, rtol=1e-4)


class TestSchedule:
    def test_shares_by_epoch(self) -> None:
        fading = Fading(nn.ReLU())
        seen = []
        data = AnnealedBatches(batches(), [fading], 2, "linear")
        for _ in range(4):
            for _ in data:
                seen.append(fading.share)
        assert seen == [0, 0, 0.5, 0.5, 1, 1, 1, 1]
        assert len(data) == 2

    def test_fading(self) -> None:
        x = torch.randn(50)
        for share in (0.0, 0.3, 1.0):
            wanted = nn.functional.leaky_relu(x, share)
            torch.testing.assert_close(Fading(nn.ReLU(inplace=True), share)(x.clone()), wanted)
            torch.testing.assert_close(
                Fading(nn.GELU(), share)(x), (1 - share) * nn.functional.gelu(x) + share * x
            )

    def test_training_sees_the_shares_and_ends_linear(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shares: list[float] = []
        forward = Fading.forward

        def noted(self: Fading, x: Tensor) -> Tensor:
            shares.append(self.share)
            return forward(self, x)

        monkeypatch.setattr(Fading, "forward", noted)
        model = settled(conv_net())
        result = ActivationPruning(epochs=4, decay=0.5, layers="11").apply(
            model, context(train=batches(count=1), teacher=copy.deepcopy(model))
        )
        assert shares == [0, 0.5, 1, 1]
        assert not any(isinstance(module, Fading) for module in result.modules())
        shares.clear()
        ActivationPruning(layers="11").apply(model, context(train=batches(count=1), epochs=1))
        assert shares == [1]

    def test_data_is_needed(self) -> None:
        assert ActivationPruning().requires == {"train"}
        assert not ActivationPruning(epochs=0).requires
        with pytest.raises(UserMistake, match="fine-tuning needs data"):
            ActivationPruning().apply(settled(conv_net()), context())


class TestOptions:
    def test_registered(self) -> None:
        assert "activation_pruning" in list_passes()
        made = parse_pass("activation_pruning:share=0.5,layers=[a.*, b],schedule=cosine")
        assert made.options()["layers"] == ["a.*", "b"]
        assert str(made) == "activation_pruning:share=0.5,schedule=cosine,layers=[a.*, b]"
        assert isinstance(made, Adjustable)

    def test_share_takes_the_least_important_first(self) -> None:
        model = settled(deit())
        with torch.no_grad():
            model.blocks[1].mlp.fc2.weight.mul_(1e-4)  # what its activation does hardly reaches the output
        costs = []
        for strength in (0.0, 0.4, 0.7, 1.0):
            one = ActivationPruning(epochs=0).with_strength(strength)
            result: Any = one.apply(model, context(train=batches(), probe=True))
            costs.append(profile(result, IMAGE).macs)
            if strength == 0.4:
                assert tuple(result.blocks[1].mlp.fc1.weight.shape) == (12, 12)
                assert tuple(result.blocks[0].mlp.fc1.weight.shape) == (48, 12)
        assert costs == sorted(costs, reverse=True)
        assert len(set(costs)) == 4
        assert costs[0] == profile(model, IMAGE).macs

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"share": 1.5}, r"share=1\.5 must be in \[0, 1\]"),
            ({"epochs": -1}, "epochs=-1 must be at least 0"),
            ({"decay": 2}, r"decay=2 must be in \[0, 1\]"),
            ({"schedule": "step"}, "schedule='step' must be linear or cosine"),
            ({"learning_rate": 0}, "learning_rate=0 must be above 0"),
            ({"distillation": 3}, r"distillation=3 must be in \[0, 1\]"),
        ],
    )
    def test_out_of_range(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(UserMistake, match=f"activation_pruning: {text}"):
            ActivationPruning(**options)
