"""What the papers of ``efficient_transformer`` name: values to choose from, architectures, samplers; no torch.

CIFAR-10: OpenNLPLab/mixFormer, commit c1c57c5e435b188a9e9120b995e4e7aaeaf0462b.
Translation: mit-han-lab/hardware-aware-transformers, commit 70e5a279d080670208249fdd98ed731fa9bcc466 (MIT); all with
6 encoder layers, q/k/v width 512 and softmax attention.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from spaces.errors import UnknownNameError
from spaces.parameters import Architecture

__all__ = [
    "CIFAR_DEPTH",
    "CIFAR_EMBED",
    "CIFAR_FFN",
    "CIFAR_HEADS",
    "CIFAR_KINDS",
    "HAT_EMBED",
    "HAT_FFN",
    "HAT_HEADS",
    "HAT_WMT14_EN_DE",
    "SEARCHED_87_4",
    "SMALL_DEPTH",
    "SPANS",
    "SUBNET_S",
    "WMT_DEPTH",
    "WMT_ENCODER_DEPTH",
    "HatVariant",
    "classifier",
    "official_sample",
    "translation",
]

SMALL_DEPTH = 6

# in the order of the official lists, on which the official samplers depend
CIFAR_EMBED = (320, 384, 448)
CIFAR_DEPTH = (12, 13, 14)
CIFAR_FFN = (1792, 1568, 1344, 896, 672)
CIFAR_HEADS = (5, 6, 7)
CIFAR_KINDS = ("cosformer_causal", "softmax", "relative")  # official labels 1, 2, 3
HAT_EMBED = (640, 512)
HAT_FFN = (3072, 2048, 1024)
HAT_HEADS = (8, 4)
WMT_ENCODER_DEPTH = 6
WMT_DEPTH = (6, 5, 4, 3, 2, 1)
SPANS = (-1, 1, 2)

Classifier = tuple[int, tuple[int, ...], tuple[int, ...]]  # embedding width, FFN widths, heads

SEARCHED_87_4: Classifier = (
    448,
    (1792, 1792, 1344, 1568, 1344, 1344, 1344, 1344, 1568, 672, 1568, 1344),
    (7, 7, 6, 7, 5, 7, 5, 7, 5, 6, 7, 6),
)
SUBNET_S: Classifier = (
    384,
    (1152, 1344, 1152, 1344, 1536, 1536, 1536, 1536, 1536, 1536, 1536, 1344, 1536),
    (6, 6, 5, 7, 5, 5, 5, 6, 6, 7, 7, 6, 7),
)


def classifier(variant: Classifier, attention: str) -> Architecture:
    """The architecture of a published classifier with one kind of attention in all layers."""
    embed, ffn, heads = variant
    architecture: Architecture = {"embed": embed, "depth": len(ffn)}
    for index, (width, count) in enumerate(zip(ffn, heads, strict=True), start=1):
        architecture |= {
            f"layer{index}.ffn": width,
            f"layer{index}.heads": count,
            f"layer{index}.attention": attention,
        }
    return architecture


@dataclass(frozen=True)
class HatVariant:
    """One published sub-transformer. FFN widths in units of 1024, one digit a layer; heads one digit a layer.

    Args:
        encoder_ffn, encoder_heads: the 6 encoder layers.
        decoder_ffn, decoder_heads, cross_heads: the decoder layers.
        spans: the decoder layers' cross-attention: -1, 1 or 2.
        encoder_dim, decoder_dim: embedding widths.
    """

    encoder_ffn: str
    encoder_heads: str
    decoder_ffn: str
    decoder_heads: str
    cross_heads: str
    spans: Sequence[int]
    encoder_dim: int = 512
    decoder_dim: int = 512


def translation(variant: HatVariant) -> Architecture:
    """The architecture of a published sub-transformer, all attention softmax."""
    architecture: Architecture = {
        "encoder.embed": variant.encoder_dim,
        "decoder.embed": variant.decoder_dim,
        "decoder.depth": len(variant.decoder_ffn),
    }
    for index, (ffn, heads) in enumerate(
        zip(variant.encoder_ffn, variant.encoder_heads, strict=True), start=1
    ):
        architecture |= {
            f"encoder.layer{index}.ffn": int(ffn) * 1024,
            f"encoder.layer{index}.heads": int(heads),
        }
    layers = zip(variant.decoder_ffn, variant.decoder_heads, variant.cross_heads, variant.spans, strict=True)
    for index, (ffn, heads, cross, span) in enumerate(layers, start=1):
        architecture |= {
            f"decoder.layer{index}.ffn": int(ffn) * 1024,
            f"decoder.layer{index}.self_heads": int(heads),
            f"decoder.layer{index}.cross_heads": int(cross),
            f"decoder.layer{index}.span": span,
        }
    return architecture


HAT_WMT14_EN_DE: dict[str, HatVariant] = {
    "hat_raspberrypi_3.5s": HatVariant("133222", "484448", "3", "8", "8", (-1,)),
    "hat_raspberrypi_4.0s": HatVariant("323232", "888488", "12", "44", "88", (-1, -1)),
    "hat_raspberrypi_4.5s": HatVariant("333333", "488488", "33", "88", "88", (-1, 1)),
    "hat_raspberrypi_5.0s": HatVariant("333233", "888884", "123", "488", "488", (-1, 1, -1)),
    "hat_raspberrypi_6.0s": HatVariant("333333", "444884", "2233", "4884", "4888", (-1, -1, 1, -1)),
    "hat_raspberrypi_6.9s": HatVariant("333333", "848888", "22332", "88848", "48888", (-1, 1, 1, 1, -1)),
    "hat_titanxp_126.0ms": HatVariant("333333", "448884", "333", "888", "488", (-1, 1, 1)),
    "hat_titanxp_146.7ms": HatVariant("333333", "488844", "333", "888", "488", (-1, 1, 1), 640, 640),
    "hat_titanxp_208.1ms": HatVariant("333333", "848884", "22333", "88848", "48888", (-1, 1, 1, 1, -1)),
    "hat_titanxp_57.1ms": HatVariant("333333", "488888", "3", "8", "8", (1,)),
    "hat_titanxp_91.2ms": HatVariant("333333", "488488", "33", "88", "88", (-1, 1)),
    "hat_xeon_137.9ms": HatVariant("333333", "488888", "3", "8", "8", (1,)),
    "hat_xeon_204.2ms": HatVariant("333333", "488488", "33", "88", "88", (-1, 1)),
    "hat_xeon_278.7ms": HatVariant("333333", "448884", "333", "888", "488", (-1, 1, 1)),
    "hat_xeon_340.2ms": HatVariant("333333", "448884", "3333", "8884", "4888", (-1, 1, 1, -1)),
    "hat_xeon_369.6ms": HatVariant("333333", "848884", "33333", "88848", "48888", (-1, 1, 1, 1, -1)),
    "hat_xeon_450.9ms": HatVariant("333333", "448884", "333333", "888444", "488888", (-1, 1, 1, 1, -1, -1)),
}


def official_sample(scale: str, seed: int) -> Architecture:
    """The architecture that the official sampler draws after ``random.seed(seed)``.

    Args:
        scale: "cifar10" (mixFormer) or "wmt14ende_hat" (HAT's space 0).
        seed: any integer; the supernet trainers use the number of the update.

    Raises:
        UnknownNameError: the official sampler of another scale is not known.
    """
    draw = random.Random(seed).choice
    if scale == "cifar10":
        embed, depth = draw(CIFAR_EMBED), draw(CIFAR_DEPTH)
        architecture: Architecture = {"embed": embed, "depth": depth}
        for index in range(1, depth + 1):
            architecture[f"layer{index}.ffn"] = draw(CIFAR_FFN)
            architecture[f"layer{index}.heads"] = draw(CIFAR_HEADS)
            architecture[f"layer{index}.attention"] = draw(CIFAR_KINDS)
        return architecture
    if scale != "wmt14ende_hat":
        raise UnknownNameError("official sampler", scale, ("cifar10", "wmt14ende_hat"))
    architecture = {"encoder.embed": draw(HAT_EMBED), "decoder.embed": draw(HAT_EMBED)}
    draw((WMT_ENCODER_DEPTH,))  # the one choice of the encoder's depth uses up a draw
    depth = draw(WMT_DEPTH)
    architecture["decoder.depth"] = depth
    for side, layers, parts in (
        ("encoder", WMT_ENCODER_DEPTH, ("ffn", "heads")),
        ("decoder", depth, ("ffn", "self_heads", "cross_heads")),
    ):
        for index in range(1, layers + 1):
            for part in parts:
                architecture[f"{side}.layer{index}.{part}"] = draw(
                    (3072, 2048, 1024) if part == "ffn" else (8, 4)
                )
    spans = [draw(SPANS) for _ in WMT_DEPTH]  # also for layers that do not exist
    return architecture | {f"decoder.layer{i}.span": spans[i - 1] for i in range(1, depth + 1)}
