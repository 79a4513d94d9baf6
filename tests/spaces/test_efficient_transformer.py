"""efficient_transformer: official numbers, official counts, the spaces, and models that build and train."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spaces import (
    Architecture,
    ImageSignature,
    SearchSpace,
    SpaceError,
    TranslationSignature,
    UserMistake,
    get_space,
)
from spaces.attention import make_attention
from spaces.layers.embed import grid_waves
from spaces.sequence.efficient_transformer import (
    ImageTransformer,
    convert_supernet_attention,
    convert_supernet_state,
    count_macs,
    count_translation_macs,
    image_plan,
    load_supernet,
    official_sample,
    translation_plan,
)
from tests.conformance.space import SpaceConformance
from tests.golden_vectors import golden, golden_json
from tests.spaces._efficient_transformer import (
    DIGITS,
    SENTENCES,
    TRANSLATION_SCALES,
    VARIANTS,
    baseline,
    scale,
    translation_of,
    without_gradient,
)

IMAGE_SCALES = ("small", "cifar10", "cifar10_extended")
CIFAR = ImageSignature(channels=3, height=224, width=224, classes=10)
SAMPLES = golden_json("efficient_transformer-sampler-fixtures")


def classifier(name: str, architecture: Architecture, signature: ImageSignature) -> ImageTransformer:
    model = scale(name).build(architecture, signature)
    assert isinstance(model, ImageTransformer)
    return model


def _small_pairs(encoder: int) -> int:
    """Layers of small_translation with this encoder depth: three spans under softmax once there are three layers."""
    crossings = 2 if encoder < 3 else 3 + 1
    decoders = sum(int((4 * 3 * 3 * 3 * crossings) ** depth) for depth in range(1, 4))
    return int(36**encoder) * decoders


@pytest.mark.parametrize("name", IMAGE_SCALES + TRANSLATION_SCALES)
class TestSpaces(SpaceConformance):
    samples = 8

    @pytest.fixture
    def space(self, name: str) -> SearchSpace:
        return scale(name)

    def test_sizes(self, name: str) -> None:
        expected = {
            "small": 2 * 4 * 3 * sum((3 * 4 * 3) ** depth for depth in range(1, 7)),
            "cifar10": int(SAMPLES["space_sizes"]["cifar10_mix"]),
            "cifar10_extended": 3 * sum((7 * 3 * 4) ** depth for depth in (12, 13, 14)),
            "small_translation": 16 * sum(_small_pairs(encoder) for encoder in range(1, 5)),
            "wmt14ende": 4 * (6 * 3) ** 6 * sum((12 * 3 * (3 + 1)) ** depth for depth in range(1, 7)),
            "wmt14ende_hat": 4 * 6**6 * sum((12 * 3) ** depth for depth in range(1, 7)),
            "wmt14_large": 9 * (12 * 3) ** 6 * sum((36 * 3 * (3 + 1)) ** depth for depth in range(1, 7)),
        }
        assert scale(name).cardinality() == expected[name]

    def test_the_baseline_is_published(self, name: str) -> None:
        space = scale(name)
        assert space.baseline in space.published
        kinds = {value for key, value in space.published[space.baseline].items() if key.endswith("attention")}
        assert kinds <= {"softmax"}


def test_scales_in_order_and_by_task() -> None:
    from spaces import list_spaces

    assert list_spaces()["efficient_transformer"] == ["small", *IMAGE_SCALES[1:], *TRANSLATION_SCALES]
    assert get_space("efficient_transformer") is scale("small")
    assert get_space("efficient_transformer", task="translation") is scale("small_translation")


def test_sizes_of_the_paper() -> None:
    without_spans = sum(4 * 6**6 * 12**depth for depth in range(1, 7))
    assert without_spans == int(SAMPLES["space_sizes"]["wmt14ende_space0"])


def test_looking_at_the_spaces_does_not_import_torch() -> None:
    code = (
        "import sys; from spaces import get_space; space = get_space('efficient_transformer:cifar10'); "
        "space.key(space.published['largest_cos']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestImageModels:
    @pytest.mark.parametrize(
        "signature",
        [DIGITS, ImageSignature(3, 32, 32, 100), ImageSignature(2, 9, 13, 3), ImageSignature(1, 64, 48, 2)],
        ids=["8x8x1", "32x32x3", "9x13x2", "64x48x1"],
    )
    def test_small_samples_train(self, signature: ImageSignature) -> None:
        space, rng = scale("small"), random.Random(3)
        for _ in range(6):
            architecture = space.sample(rng)
            model = space.build(architecture, signature)
            image = torch.randn(2, signature.channels, signature.height, signature.width)
            assert model.eval()(image).shape == (2, signature.classes)
            assert without_gradient(model, image) == [], architecture

    @pytest.mark.parametrize("name", ["cifar10", "cifar10_extended"])
    def test_large_samples_train(self, name: str) -> None:
        space, rng = scale(name), random.Random(3)
        for signature in (DIGITS, ImageSignature(3, 32, 32, 10), CIFAR):
            with torch.device("meta"):
                model = space.build(space.sample(rng), signature)
                image = torch.randn(2, signature.channels, signature.height, signature.width)
                assert without_gradient(model, image) == []

    @pytest.mark.parametrize("grid", [4, 8])
    @pytest.mark.parametrize("side", [8, 9, 28, 32, 64])
    def test_small_grids(self, grid: int, side: int) -> None:
        architecture = {**baseline("small"), "grid": grid}
        signature = ImageSignature(1, side, side, 10)
        (rows, columns) = image_plan(architecture, signature)["patch"]
        model = classifier("small", architecture, signature)
        assert rows == columns == -(-side // grid)
        assert model.patches.grid == (-(-side // rows),) * 2
        assert model.patches.grid[0] <= grid

    def test_the_class_token_feeds_but_is_not_read(self) -> None:
        model = classifier("small", baseline("small"), DIGITS).eval()
        image = torch.randn(1, 1, 8, 8)
        before = model(image)
        hidden: list[Tensor] = []
        model.norm.register_forward_hook(lambda module, args, output: hidden.append(output))
        torch.testing.assert_close(model(image), before)
        assert hidden[0].shape == (1, 16, 96)
        torch.testing.assert_close(before, model.head(hidden[0].mean(1)))

    def test_initial_values(self) -> None:
        model = classifier("small", baseline("small"), DIGITS)
        # one Xavier bound for the whole (3Q, E) matrix
        weight = model.get_parameter("layers.0.attention.in_proj.fused.weight")
        bound = math.sqrt(6 / (3 * 96 + 96))
        assert 0.98 * bound < weight.abs().max() <= bound
        assert model.class_token.std().item() == pytest.approx(0.02, rel=0.3)
        assert model.scale == 1.0
        torch.testing.assert_close(model.positions[0, 1:], grid_waves((4, 4), 96))
        assert all(not p.any() for name, p in model.named_parameters() if name.endswith("fused.bias"))

    def test_the_scale_of_the_paper_starts_as_the_paper(self) -> None:
        model = classifier("cifar10", scale("cifar10").published["smallest_softmax"], DIGITS)
        assert model.scale == math.sqrt(320)
        assert model.positions.std().item() == pytest.approx(0.02, rel=0.1)

    def test_waves_tell_all_patches_apart(self) -> None:
        for grid, dim in (((4, 4), 48), ((8, 8), 97), ((3, 1), 16), ((5, 8), 128)):
            waves = grid_waves(grid, dim)
            assert waves.shape == (grid[0] * grid[1], dim)
            assert waves.abs().max() <= 1
            distances = torch.cdist(waves, waves) + torch.eye(len(waves))
            assert distances.min() > 0.5

    def test_drop_path_grows_over_the_layers_of_the_space(self) -> None:
        plan = image_plan(scale("cifar10").published["searched_87.4_cos"], CIFAR)
        rates = [layer.drop_path for layer in plan["layers"]]
        assert rates == pytest.approx(torch.linspace(0, 0.1, 14)[:12].tolist())

    def test_dropout_is_scaled_by_the_width(self) -> None:
        with torch.device("meta"):
            model = classifier("cifar10", scale("cifar10").published["smallest_softmax"], CIFAR)
        dropout = model.get_submodule("layers.0.ffn.drop1")
        assert isinstance(dropout, nn.Dropout)
        assert dropout.p == pytest.approx(0.1 * 320 / 448)

    def test_a_task_of_another_kind_is_refused(self) -> None:
        with pytest.raises(
            SpaceError, match=r"for images, but the task is translation; use .*:small_translation"
        ):
            scale("small").build(baseline("small"), SENTENCES)


def published_classifier(name: str) -> Architecture:
    """The architecture of an entry of the golden variants, from our own table."""
    space = scale("cifar10_extended" if name.startswith("subnet-S") else "cifar10")
    return space.published[name]


CLASSIFIERS = [name for name, facts in VARIANTS.items() if "config" in facts]


class TestPublishedClassifiers:
    def test_all_are_here(self) -> None:
        assert set(CLASSIFIERS) == set(scale("cifar10_extended").published)

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_architecture(self, name: str) -> None:
        config, ours = VARIANTS[name]["config"]["encoder"], published_classifier(name)
        layers = range(1, config["encoder_layer_num"] + 1)
        kinds = {1: "cosformer_causal", 2: "softmax", 3: "relative"}
        assert ours["embed"] == config["encoder_embed_dim"]
        assert [ours[f"layer{i}.ffn"] for i in layers] == config["encoder_ffn_embed_dim"]
        assert [ours[f"layer{i}.heads"] for i in layers] == config["encoder_self_attention_heads"]
        assert [ours[f"layer{i}.attention"] for i in layers] == [
            kinds[choice] for choice in config["encoder_attention_choices"]
        ]

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_parameters(self, name: str) -> None:
        with torch.device("meta"):
            model = scale("cifar10_extended").build(published_classifier(name), CIFAR)
        assert sum(p.numel() for p in model.parameters()) == VARIANTS[name]["params"]

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_multiply_adds_as_published(self, name: str) -> None:
        plan = image_plan(published_classifier(name), CIFAR)
        assert count_macs(CIFAR, **plan, official=True) == VARIANTS[name]["macs"]


def counted_macs(model: nn.Module, *inputs: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return float(counter.get_total_flops()) / 2


class TestMultiplyAdds:
    @pytest.mark.parametrize("name", IMAGE_SCALES)
    def test_image_closed_form(self, name: str) -> None:
        space, rng = scale(name), random.Random(5)
        for signature in (DIGITS, ImageSignature(3, 30, 50, 7), CIFAR):
            architecture = space.sample(rng)
            with torch.device("meta"):
                model = space.build(architecture, signature)
                image = torch.empty(1, signature.channels, signature.height, signature.width)
                expected = counted_macs(model, image)
            assert count_macs(signature, **image_plan(architecture, signature)) == expected

    @pytest.mark.parametrize("name", TRANSLATION_SCALES)
    def test_translation_closed_form(self, name: str) -> None:
        space, rng = scale(name), random.Random(5)
        signature = TranslationSignature(50, 50, max_length=300)
        for source, target in ((9, 11), (200, 150)):
            architecture = space.sample(rng)
            plan = translation_plan(name, architecture)
            with torch.device("meta"):
                model = space.build(architecture, signature)
                tokens = [torch.ones(1, length, dtype=torch.long) for length in (source, target)]
                expected = counted_macs(model, *tokens) - target * plan["dims"][1] * 50
            assert count_translation_macs(source, target, **plan) == expected

    def test_unknown_kind(self) -> None:
        architecture = {**baseline("small"), "layer1.attention": "local"}
        with pytest.raises(SpaceError, match="attention='local' has no closed form"):
            count_macs(DIGITS, **image_plan(architecture, DIGITS))


def classifier_of(config: dict[str, Any]) -> Architecture:
    """Our architecture for an official one."""
    encoder = config["encoder"]
    architecture: Architecture = {
        "embed": encoder["encoder_embed_dim"],
        "depth": encoder["encoder_layer_num"],
    }
    kinds = {1: "cosformer_causal", 2: "softmax", 3: "relative"}
    for i in range(encoder["encoder_layer_num"]):
        architecture |= {
            f"layer{i + 1}.ffn": encoder["encoder_ffn_embed_dim"][i],
            f"layer{i + 1}.heads": encoder["encoder_self_attention_heads"][i],
            f"layer{i + 1}.attention": kinds[encoder["encoder_attention_choices"][i]],
        }
    return architecture


class TestGoldenSupernet:
    vectors = golden("efficient_transformer-supernet-e2e")

    @pytest.mark.parametrize("name", list(vectors.facts["subnetworks"]))
    def test_sub_networks_of_one_weight_set(self, name: str) -> None:
        model = load_supernet(self.vectors.state, classifier_of(self.vectors.facts["subnetworks"][name]))
        between: list[Tensor] = []
        for layer in model.layers:
            layer.register_forward_hook(lambda module, args, output: between.append(output.transpose(0, 1)))
        out = model(self.vectors.inputs["image"])
        between += between[-1:] * (2 - len(between))  # the supernet has two layers, identity beyond the depth
        for index, tokens in enumerate(between):
            expected = self.vectors.mid[f"{name}.layer{index}"]
            torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(out, self.vectors.outputs[name], atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize(
        ("case", "kind", "options"),
        [
            ("cos", "cosformer", {"causal": True, "eps": 1e-3, "own_lengths": True}),
            ("cos-full", "cosformer", {"eps": 1e-3, "own_lengths": True}),
            ("softmax", "softmax", {}),
            ("relative", "relative", {"distance": 3}),
        ],
    )
    def test_attention_modules(self, case: str, kind: str, options: dict[str, Any]) -> None:
        vectors = golden(f"efficient_transformer-super-{case}")
        sample = vectors.facts["sample"]
        dim, heads = sample["sample_embed_dim"], sample["sample_attention_heads"]
        head_dim = sample["sample_q_embed_dim"] // heads
        attention = make_attention(kind, dim, heads, head_dim=head_dim, **options)
        attention.load_state_dict(
            convert_supernet_attention(vectors.state, dim=dim, heads=heads, head_dim=head_dim)
        )
        out = attention(vectors.inputs["x"].transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(out, vectors.outputs["y"], atol=1e-5, rtol=1e-5)

    def test_keys_of_a_narrow_sub_network_come_from_rows_of_the_query(self) -> None:
        state = {"in_proj_weight": torch.arange(12.0)[:, None], "in_proj_bias": torch.zeros(12)}
        state |= {"out_proj.weight": torch.zeros(1, 4), "out_proj.bias": torch.zeros(1)}
        ours = convert_supernet_attention(state, dim=1, heads=1, head_dim=2)
        assert ours["in_proj.fused.weight"].flatten().tolist() == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"embed": 128}, r"proj.weight has shape \(64, .*the architecture needs 128 along dimension 0"),
            ({"layer1.ffn": 64}, "fc1.weight has shape .* needs 64 along dimension 0"),
            (
                {"depth": 3, "layer3.ffn": 8, "layer3.heads": 1, "layer3.attention": "softmax"},
                "supernet is less deep",
            ),
            ({"layer1.attention": "linear"}, "attention='linear' must be one of cosformer"),
        ],
    )
    def test_architectures_outside_the_supernet(self, change: dict[str, Any], text: str) -> None:
        architecture = classifier_of(self.vectors.facts["subnetworks"]["cos_full"]) | change
        with pytest.raises(UserMistake, match=text):
            convert_supernet_state(self.vectors.state, architecture)

    def test_a_foreign_state(self) -> None:
        with pytest.raises(UserMistake, match=r"state lacks 'encoder\.embed_tokens\.proj\.weight'"):
            convert_supernet_state({"weight": torch.zeros(1)}, {"embed": 1, "depth": 1})

    def test_a_size_that_does_not_fit(self) -> None:
        architecture = classifier_of(self.vectors.facts["subnetworks"]["one_layer"])
        with pytest.raises(UserMistake, match="another number of 8x8 patches than the 9 positions"):
            load_supernet(self.vectors.state, architecture, size=(32, 32))


class TestOfficialSampler:
    @pytest.mark.parametrize(
        "sample", SAMPLES["samples"]["cifar10_mix"], ids=lambda sample: str(sample["seed"])
    )
    def test_cifar10(self, sample: dict[str, Any]) -> None:
        drawn = official_sample("cifar10", sample["seed"])
        assert drawn == classifier_of(sample["config"])
        scale("cifar10").validate(drawn)

    @pytest.mark.parametrize(
        "sample", SAMPLES["samples"]["wmt14ende_space0"], ids=lambda sample: str(sample["seed"])
    )
    def test_wmt14(self, sample: dict[str, Any]) -> None:
        drawn = official_sample("wmt14ende_hat", sample["seed"])
        flat = {**sample["config"]["encoder"], **sample["config"]["decoder"]}
        assert drawn == translation_of({key.replace("_", "-"): value for key, value in flat.items()})
        scale("wmt14ende_hat").validate(drawn)

    def test_other_scales(self) -> None:
        with pytest.raises(UserMistake, match="unknown official sampler 'small'"):
            official_sample("small", 0)
