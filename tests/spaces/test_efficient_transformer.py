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
from spaces.attention import Attention, make_attention
from spaces.layers.embed import grid_waves
from spaces.sequence._efficient_transformer_translation import TranslationDecoderLayer
from spaces.sequence.efficient_transformer import (
    DecoderSpec,
    EncoderDecoder,
    EncoderSpec,
    ImageTransformer,
    TranslationOptions,
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

IMAGE_SCALES = ("small", "cifar10", "cifar10_extended")
TRANSLATION_SCALES = ("small_translation", "wmt14ende", "wmt14ende_hat", "wmt14_large")
DIGITS = ImageSignature(channels=1, height=8, width=8, classes=10)
CIFAR = ImageSignature(channels=3, height=224, width=224, classes=10)
SENTENCES = TranslationSignature(source_vocabulary=31, target_vocabulary=31, max_length=12)
TWO_VOCABULARIES = TranslationSignature(31, 17, max_length=12, shared_vocabulary=False)
VARIANTS = golden_json("efficient_transformer-variants")
HAT = golden_json("efficient_transformer-hat-subtransformers")
SAMPLES = golden_json("efficient_transformer-sampler-fixtures")


def scale(name: str) -> SearchSpace:
    return get_space(f"efficient_transformer:{name}")


def classifier(name: str, architecture: Architecture, signature: ImageSignature) -> ImageTransformer:
    model = scale(name).build(architecture, signature)
    assert isinstance(model, ImageTransformer)
    return model


def baseline(name: str) -> Architecture:
    space = scale(name)
    assert space.baseline is not None
    return space.published[space.baseline]


def _small_pairs(encoder: int) -> int:
    """Layers of small_translation with this encoder depth: three spans under softmax once there are three layers."""
    crossings = 2 if encoder < 3 else 3 + 1
    decoders = sum(int((4 * 3 * 3 * 3 * crossings) ** depth) for depth in range(1, 4))
    return int(36**encoder) * decoders


def without_gradient(model: nn.Module, *inputs: Tensor) -> list[str]:
    """Names of the parameters that one training step leaves without a gradient."""
    model.train()
    model(*inputs).square().mean().backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


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


def translation_of(config: dict[str, Any]) -> Architecture:
    """Our architecture for one of HAT's."""
    architecture: Architecture = {
        "encoder.embed": config["encoder-embed-dim"],
        "decoder.embed": config["decoder-embed-dim"],
        "decoder.depth": config["decoder-layer-num"],
    }
    for side, key, name in (
        ("encoder", "encoder-ffn-embed-dim", "ffn"),
        ("encoder", "encoder-self-attention-heads", "heads"),
        ("decoder", "decoder-ffn-embed-dim", "ffn"),
        ("decoder", "decoder-self-attention-heads", "self_heads"),
        ("decoder", "decoder-ende-attention-heads", "cross_heads"),
        ("decoder", "decoder-arbitrary-ende-attn", "span"),
    ):
        depth = config[f"{side}-layer-num"]
        architecture |= {f"{side}.layer{i + 1}.{name}": value for i, value in enumerate(config[key][:depth])}
    return architecture


class TestHat:
    @pytest.mark.parametrize("name", list(HAT))
    def test_published_parameters_and_flops(self, name: str) -> None:
        plan = translation_plan("wmt14ende_hat", translation_of(HAT[name]["config"]))
        with torch.device("meta"):
            model = EncoderDecoder(TranslationSignature(100, 100, max_length=64), **plan)
        facts = VARIANTS[f"HAT/{name}"]
        assert model.body_parameters() == facts["params"]
        assert round(model.body_parameters() / 1e6, 2) == HAT[name]["published"]["params_M"]
        length = 23 if "iwslt" in name else 30
        flops = 2 * count_translation_macs(length, length, **plan) / 1e9
        assert flops == pytest.approx(HAT[name]["published"]["flops_G"], abs=0.01)

    def test_published_architectures(self) -> None:
        ours = scale("wmt14ende_hat").published
        for name, facts in HAT.items():
            if name.startswith("HAT_wmt14ende_"):
                device, latency = name.removeprefix("HAT_wmt14ende_").split("_bleu")[0].split("@")
                assert ours[f"hat_{device}_{latency}"] == translation_of(facts["config"])
        assert len(ours) == 18
        assert set(scale("wmt14ende").published) == set(ours)


def tokens(rows: int, length: int, vocabulary: int = 31) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length))


class TestTranslationModels:
    @pytest.mark.parametrize("signature", [SENTENCES, TWO_VOCABULARIES], ids=["shared", "two"])
    def test_small_samples_train(self, signature: TranslationSignature) -> None:
        space, rng = scale("small_translation"), random.Random(4)
        for _ in range(8):
            architecture = space.sample(rng)
            model = space.build(architecture, signature)
            source, target = tokens(3, 9), tokens(3, 7, signature.target_vocabulary)
            source[1, 4:] = signature.padding
            target[2, 3:] = signature.padding
            assert model.eval()(source, target).shape == (3, 7, signature.target_vocabulary)
            assert without_gradient(model, source, target) == [], architecture
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    @pytest.mark.parametrize("name", TRANSLATION_SCALES[1:])
    def test_large_samples_train(self, name: str) -> None:
        space, rng = scale(name), random.Random(4)
        for signature in (SENTENCES, TWO_VOCABULARIES):
            with torch.device("meta"):
                model = space.build(space.sample(rng), signature)
                source, target = (torch.ones(2, length, dtype=torch.long) for length in (9, 7))
                assert without_gradient(model, source, target) == []

    @pytest.fixture
    def mixed(self) -> EncoderDecoder:
        """Every kind of attention on both sides, widths apart, spans 1 and 3."""
        torch.manual_seed(0)
        model = EncoderDecoder(
            SENTENCES,
            dims=(24, 16),
            encoder=[EncoderSpec(2, 20, kind) for kind in ("cosformer", "relative", "softmax")],
            decoder=[
                DecoderSpec(2, 1, 20, "cosformer", "cosformer"),
                DecoderSpec(1, 2, 20, "relative", "softmax", span=2),
                DecoderSpec(1, 2, 20, "softmax", "softmax", span=1),
            ],
            options=TranslationOptions(head_dim=8, relative_length=2),
        )
        return model.double().eval()

    def test_a_prefix_gives_the_prefix_of_the_logits(self, mixed: EncoderDecoder) -> None:
        source, target = tokens(2, 9), tokens(2, 12)
        whole = mixed(source, target)
        for length in (1, 5, 11):
            torch.testing.assert_close(mixed(source, target[:, :length]), whole[:, :length])

    def test_padding_of_the_source_changes_nothing(self, mixed: EncoderDecoder) -> None:
        source, target = tokens(2, 7), tokens(2, 6)
        padded = torch.cat((source, torch.zeros(2, 5, dtype=torch.long)), dim=1)
        torch.testing.assert_close(mixed(padded, target), mixed(source, target))

    def test_padding_of_the_target_changes_nothing(self, mixed: EncoderDecoder) -> None:
        source, target = tokens(2, 7), tokens(2, 6)
        padded = torch.cat((target, torch.zeros(2, 3, dtype=torch.long)), dim=1)
        torch.testing.assert_close(mixed(source, padded)[:, :6], mixed(source, target))

    def test_sentences_of_a_batch_do_not_meet(self, mixed: EncoderDecoder) -> None:
        source, target = tokens(3, 9), tokens(3, 5)
        source[1, 4:] = 0
        together = mixed(source, target)
        torch.testing.assert_close(mixed(source[1:2, :4], target[1:2]), together[1:2])

    def test_the_source_is_encoded_once_for_all_beams(self, mixed: EncoderDecoder) -> None:
        source, target = tokens(2, 9), tokens(6, 5)
        memory = tuple(part.repeat_interleave(3, dim=0) for part in mixed.encode(source))
        torch.testing.assert_close(
            mixed.decode(target, (memory[0], memory[1])), mixed(source.repeat_interleave(3, dim=0), target)
        )

    def test_memory_holds_the_encoder_layers_that_are_read(self, mixed: EncoderDecoder) -> None:
        states, padding = mixed.encode(tokens(2, 9))
        assert states.shape == (2, 3, 9, 24)
        assert padding.shape == (2, 9)
        plan = translation_plan("small_translation", baseline("small_translation"))
        assert EncoderDecoder(SENTENCES, **plan).encode(tokens(2, 9))[0].shape == (2, 1, 9, 128)

    def test_a_span_reads_the_last_layers(self, mixed: EncoderDecoder) -> None:
        states, padding = mixed.encode(tokens(2, 9))
        changed = states.clone()
        changed[:, 0] += 1  # the third layer from the end: only the decoder layer with span 2 sees it
        target = tokens(2, 4)
        assert not torch.allclose(
            mixed.decode(target, (states, padding)), mixed.decode(target, (changed, padding))
        )
        layer = mixed.decoder[1]
        assert isinstance(layer, TranslationDecoderLayer)
        layer.encoder_layers = 2
        torch.testing.assert_close(
            mixed.decode(target, (states, padding)), mixed.decode(target, (changed, padding))
        )

    def test_embeddings_are_shared(self) -> None:
        plan = {
            "encoder": [EncoderSpec(1, 4)],
            "decoder": [DecoderSpec(1, 1, 4)],
            "options": TranslationOptions(),
        }
        shared = EncoderDecoder(SENTENCES, dims=(24, 16), **plan)  # type: ignore[arg-type]
        apart = EncoderDecoder(TWO_VOCABULARIES, dims=(24, 16), **plan)  # type: ignore[arg-type]
        names = {name: tuple(p.shape) for name, p in shared.named_parameters() if "embedding" in name}
        assert names == {"target_embedding.weight": (31, 24)}
        names = {name: tuple(p.shape) for name, p in apart.named_parameters() if "embedding" in name}
        assert names == {"target_embedding.weight": (17, 16), "source_embedding.weight": (31, 24)}

    def test_the_large_scale_is_pre_norm(self) -> None:
        with torch.device("meta"):
            model = scale("wmt14_large").build(scale("wmt14_large").published["transformer_big"], SENTENCES)
        assert {name for name, _ in model.named_parameters() if name.startswith("encoder_norm")}
        attention = model.get_submodule("encoder.0.attention")
        assert isinstance(attention, Attention)
        assert attention.inner_dim == 1024

    @pytest.mark.parametrize(
        ("decoder", "text"),
        [
            (
                DecoderSpec(1, 1, 4, span=2),
                r"decoder\.layer1\.span=2 reads 3 encoder layers, but the encoder has 2",
            ),
            (DecoderSpec(1, 1, 4, span=0), r"decoder\.layer1\.span=0 must be -1, 1 or 2"),
            (DecoderSpec(1, 1, 4, cross_attention="cosformer", span=1), "needs softmax cross-attention"),
        ],
    )
    def test_impossible_spans(self, decoder: DecoderSpec, text: str) -> None:
        encoder = [EncoderSpec(1, 4)] * 2
        with pytest.raises(UserMistake, match=text):
            EncoderDecoder(
                SENTENCES, dims=(8, 8), encoder=encoder, decoder=[decoder], options=TranslationOptions()
            )

    def test_spans_never_go_beyond_the_encoder(self) -> None:
        space = scale("small_translation")
        shallow = {**space.published["softmax_baseline"], "decoder.layer1.span": 2}
        assert "decoder.layer1.span" not in space.canonical(shallow)

    def test_too_long_a_sentence(self, mixed: EncoderDecoder) -> None:
        with pytest.raises(
            UserMistake, match="sequence of 13 tokens is longer than the model's max_length=12"
        ):
            mixed(tokens(1, 13), tokens(1, 2))

    def test_a_task_of_another_kind_is_refused(self) -> None:
        space = scale("small_translation")
        with pytest.raises(SpaceError, match="is for translation, but the task is image_classification"):
            space.build(space.published["softmax_baseline"], DIGITS)
