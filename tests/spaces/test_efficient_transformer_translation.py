"""efficient_transformer's translation models: HAT's published counts, masks, spans, and models that train."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from spaces import SpaceError, TranslationSignature, UserMistake
from spaces.attention import Attention
from spaces.sequence._efficient_transformer_translation import TranslationDecoderLayer
from spaces.sequence.efficient_transformer import (
    DecoderSpec,
    EncoderDecoder,
    EncoderSpec,
    TranslationOptions,
    count_translation_macs,
    translation_plan,
)
from tests.golden_vectors import golden_json
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

TWO_VOCABULARIES = TranslationSignature(31, 17, max_length=12, shared_vocabulary=False)
HAT = golden_json("efficient_transformer-hat-subtransformers")


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
        plan: dict[str, Any] = {
            "encoder": [EncoderSpec(1, 4)],
            "decoder": [DecoderSpec(1, 1, 4)],
            "options": TranslationOptions(),
        }
        shared = EncoderDecoder(SENTENCES, dims=(24, 16), **plan)
        apart = EncoderDecoder(TWO_VOCABULARIES, dims=(24, 16), **plan)
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
