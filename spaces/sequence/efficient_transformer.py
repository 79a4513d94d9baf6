"""Transformers that mix softmax and linear attention layer by layer, for images and for translation.

Paper: Liu, Li, Lu, Qin, Sun, Xu, Zhong, "Neural Architecture Search on Efficient Transformers and Beyond", 2022,
arXiv 2207.13955; on top of HAT (Wang et al., ACL 2020), RankNAS (Hu et al., EMNLP 2021) and cosFormer (Qin et al., ICLR
2022).
Code: OpenNLPLab/mixFormer, commit c1c57c5e435b188a9e9120b995e4e7aaeaf0462b, no licence file (read, not copied);
mit-han-lab/hardware-aware-transformers, commit 70e5a279d080670208249fdd98ed731fa9bcc466, MIT.

Deviations, all in what the original leaves out or leaves broken:
- sub-networks are built on their own, with exactly the parameters they use; ``load_supernet`` fills one from official
  supernet weights;
- causal cosFormer runs in chunks, relative positions through the 2R+1 distinct products: the same numbers;
- translation with cosFormer layers, which the official code cannot build; there, positions are divided by the longest
  length of the task, so that a prefix gives the same result as in training;
- in the pre-norm translation model all encoder layers that are read get the final norm, not the last one alone.

The scales "small" and "small_translation" are ours, for a laptop; "small" also starts positions as waves instead of
near zero and leaves out the factor sqrt(E), because with the paper's start a few epochs learn next to nothing.
This module is free of torch until a model is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spaces.parameters import Architecture, Choice, Int, Parameter, Scalar, When
from spaces.registry import register_space
from spaces.sequence import _efficient_transformer_published as published
from spaces.sequence._efficient_transformer_published import (
    CIFAR_DEPTH,
    CIFAR_EMBED,
    CIFAR_FFN,
    CIFAR_HEADS,
    CIFAR_KINDS,
    HAT_EMBED,
    HAT_FFN,
    HAT_HEADS,
    SMALL_DEPTH,
    SPANS,
    WMT_DEPTH,
    WMT_ENCODER_DEPTH,
    official_sample,
)
from spaces.signature import Signature
from spaces.space import SearchSpace

if TYPE_CHECKING:
    from spaces.sequence._efficient_transformer_image import (
        ImageTransformer,
        LayerSpec,
        count_macs,
        image_plan,
    )
    from spaces.sequence._efficient_transformer_official import (
        convert_supernet_attention,
        convert_supernet_state,
        load_supernet,
    )
    from spaces.sequence._efficient_transformer_translation import (
        DecoderSpec,
        EncoderDecoder,
        EncoderSpec,
        TranslationOptions,
        count_translation_macs,
        translation_plan,
    )

__all__ = [
    "DecoderSpec",
    "EncoderDecoder",
    "EncoderSpec",
    "ImageTransformer",
    "LayerSpec",
    "TranslationOptions",
    "convert_supernet_attention",
    "convert_supernet_state",
    "count_macs",
    "count_translation_macs",
    "image_plan",
    "load_supernet",
    "official_sample",
    "translation_plan",
]

_HOMES = {
    "_efficient_transformer_image": ("ImageTransformer", "LayerSpec", "count_macs", "image_plan"),
    "_efficient_transformer_official": (
        "convert_supernet_attention",
        "convert_supernet_state",
        "load_supernet",
    ),
    "_efficient_transformer_translation": (
        "DecoderSpec",
        "EncoderDecoder",
        "EncoderSpec",
        "TranslationOptions",
        "count_translation_macs",
        "translation_plan",
    ),
}

KINDS = ("softmax", "cosformer", "relative")
CROSS_KINDS = ("softmax", "cosformer")
FFN_EXTENDED = (1792, 1568, 1536, 1344, 1152, 896, 672)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"spaces.sequence.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _reaches(depth: str, index: int) -> When:
    """The layer number ``index`` exists."""
    return lambda architecture: bool(architecture[depth] >= index)


def _layers(
    prefix: str, count: int, depth: str | None, values: Mapping[str, Sequence[Scalar]]
) -> dict[str, Parameter]:
    """``values`` for each of ``count`` layers, those beyond the parameter ``depth`` inactive; layer by layer."""
    return {
        f"{prefix}layer{index}.{name}": Choice(
            choices, when=None if depth is None else _reaches(depth, index)
        )
        for index in range(1, count + 1)
        for name, choices in values.items()
    }


def _build_image(architecture: Architecture, signature: Signature) -> ImageTransformer:
    from spaces.sequence._efficient_transformer_image import build_image

    return build_image(architecture, signature)


def _build_translation(scale: str, architecture: Architecture, signature: Signature) -> EncoderDecoder:
    from spaces.sequence._efficient_transformer_translation import build_translation

    return build_translation(scale, architecture, signature)


@register_space("efficient_transformer", scale="small")
def _small() -> SearchSpace:
    plain: Architecture = {"grid": 4, "embed": 96, "head_dim": 24, "depth": 4}
    for index in range(1, 5):
        plain |= {
            f"layer{index}.heads": 4,
            f"layer{index}.ffn_ratio": 4,
            f"layer{index}.attention": "softmax",
        }
    return SearchSpace(
        "efficient_transformer:small",
        {
            "grid": Choice((4, 8)),
            "embed": Choice((48, 64, 96, 128)),
            "head_dim": Choice((16, 24, 32)),
            "depth": Int(1, SMALL_DEPTH),
            **_layers(
                "", SMALL_DEPTH, "depth", {"heads": (4, 2, 1), "ffn_ratio": (4, 3, 2, 1), "attention": KINDS}
            ),
        },
        build=_build_image,
        task="image_classification",
        # 4x4 patches: on 8x8 images they are both faster and better than one token per pixel
        published={"softmax_baseline": plain},
        baseline="softmax_baseline",
        description="Transformers of 4x4 or 8x8 patches for images of 8 to 64 pixels, attention chosen per layer.",
    )


def _cifar_space(scale: str, ffn: Sequence[int], kinds: Sequence[str], description: str) -> SearchSpace:
    variants = {
        "searched_87.4": published.SEARCHED_87_4,
        "largest": (max(CIFAR_EMBED), (max(CIFAR_FFN),) * 14, (7,) * 14),
        "smallest": (min(CIFAR_EMBED), (min(CIFAR_FFN),) * 12, (5,) * 12),
    }
    if scale == "cifar10_extended":
        variants["subnet-S"] = published.SUBNET_S
    labels = {"cos": "cosformer_causal", "softmax": "softmax", "relative": "relative"}
    return SearchSpace(
        f"efficient_transformer:{scale}",
        {
            "embed": Choice(CIFAR_EMBED),
            "depth": Choice(CIFAR_DEPTH),
            **_layers("", max(CIFAR_DEPTH), "depth", {"ffn": ffn, "heads": CIFAR_HEADS, "attention": kinds}),
        },
        build=_build_image,
        task="image_classification",
        published={
            f"{name}_{label}": published.classifier(variant, kind)
            for name, variant in variants.items()
            for label, kind in labels.items()
        },
        baseline="largest_softmax",
        description=description,
    )


@register_space("efficient_transformer", scale="cifar10")
def _cifar10() -> SearchSpace:
    return _cifar_space(
        "cifar10", CIFAR_FFN, CIFAR_KINDS, "The paper's mixed-attention space for CIFAR-10 at 224 pixels."
    )


@register_space("efficient_transformer", scale="cifar10_extended")
def _cifar10_extended() -> SearchSpace:
    return _cifar_space(
        "cifar10_extended",
        FFN_EXTENDED,
        (*CIFAR_KINDS, "cosformer"),
        "The CIFAR-10 space with the FFN widths of subnet-S and with non-causal cosFormer.",
    )


def _spanned(index: int, *, encoder: bool, kinds: bool) -> When:
    """Decoder layer ``index`` exists and can choose among encoder layers: it has to have three, read by softmax."""

    def condition(architecture: Mapping[str, Any]) -> bool:
        if architecture["decoder.depth"] < index or (encoder and architecture["encoder.depth"] < len(SPANS)):
            return False
        return not kinds or architecture[f"decoder.layer{index}.cross_attention"] == "softmax"

    return condition


def _translation_space(
    scale: str,
    *,
    embed: Sequence[int],
    ffn: Sequence[int],
    heads: Sequence[int],
    encoder_depth: Int | None,
    decoder_depth: Parameter,
    deepest: int,
    kinds: bool,
    variants: Mapping[str, Architecture],
    baseline: str,
    description: str,
) -> SearchSpace:
    """Encoder and decoder alike for every scale; parameters layer by layer, in the order of HAT's sampler."""
    encoder: dict[str, Sequence[Scalar]] = {"ffn": ffn, "heads": heads}
    decoder: dict[str, Sequence[Scalar]] = {"ffn": ffn, "self_heads": heads, "cross_heads": heads}
    if kinds:
        encoder["attention"] = KINDS
        decoder |= {"self_attention": KINDS, "cross_attention": CROSS_KINDS}
    parameters: dict[str, Parameter] = {"encoder.embed": Choice(embed), "decoder.embed": Choice(embed)}
    if encoder_depth is not None:
        parameters["encoder.depth"] = encoder_depth
    parameters["decoder.depth"] = decoder_depth
    encoder_layers = WMT_ENCODER_DEPTH if encoder_depth is None else encoder_depth.high
    depth_name = None if encoder_depth is None else "encoder.depth"
    parameters |= _layers("encoder.", encoder_layers, depth_name, encoder)
    parameters |= _layers("decoder.", deepest, "decoder.depth", decoder)
    for index in range(1, deepest + 1):
        condition = _spanned(index, encoder=encoder_depth is not None, kinds=kinds)
        parameters[f"decoder.layer{index}.span"] = Choice(SPANS, when=condition)
    return SearchSpace(
        f"efficient_transformer:{scale}",
        parameters,
        build=lambda architecture, signature: _build_translation(scale, architecture, signature),
        task="translation",
        published={
            name: {key: value for key, value in _with_kinds(variant, kinds).items() if key in parameters}
            for name, variant in variants.items()
        },
        baseline=baseline,
        description=description,
    )


def _with_kinds(architecture: Architecture, kinds: bool) -> Architecture:
    """``architecture`` with softmax wherever a space with attention kinds asks for one."""
    extra: Architecture = {}
    for key in architecture if kinds else ():
        layer = key.removesuffix(".ffn")
        if layer != key and layer.startswith("encoder."):
            extra[f"{layer}.attention"] = "softmax"
        elif layer != key:
            extra |= {f"{layer}.self_attention": "softmax", f"{layer}.cross_attention": "softmax"}
    return architecture | extra


def _plain(embed: int, ffn: int, heads: int, encoder_depth: int, decoder_depth: int) -> Architecture:
    """A translation architecture with all layers alike, each decoder layer reading the last encoder layer."""
    architecture: Architecture = {
        "encoder.embed": embed,
        "decoder.embed": embed,
        "encoder.depth": encoder_depth,
        "decoder.depth": decoder_depth,
    }
    for index in range(1, encoder_depth + 1):
        architecture |= {f"encoder.layer{index}.ffn": ffn, f"encoder.layer{index}.heads": heads}
    for index in range(1, decoder_depth + 1):
        layer = f"decoder.layer{index}"
        architecture |= {
            f"{layer}.ffn": ffn,
            f"{layer}.self_heads": heads,
            f"{layer}.cross_heads": heads,
            f"{layer}.span": -1,
        }
    return architecture


@register_space("efficient_transformer", scale="small_translation")
def _small_translation() -> SearchSpace:
    return _translation_space(
        "small_translation",
        embed=(128, 192, 96, 64),
        ffn=(512, 384, 256, 128),
        heads=(4, 2, 1),
        encoder_depth=Int(1, 4),
        decoder_depth=Int(1, 3),
        deepest=3,
        kinds=True,
        variants={"softmax_baseline": _plain(128, 512, 4, 2, 2)},
        baseline="softmax_baseline",
        description="Small encoder-decoders for short sentences (Multi30k), attention chosen per layer.",
    )


def _hat_space(scale: str, kinds: bool, description: str) -> SearchSpace:
    hat = {name: published.translation(variant) for name, variant in published.HAT_WMT14_EN_DE.items()}
    return _translation_space(
        scale,
        embed=HAT_EMBED,
        ffn=HAT_FFN,
        heads=HAT_HEADS,
        encoder_depth=None,
        decoder_depth=Choice(WMT_DEPTH),
        deepest=max(WMT_DEPTH),
        kinds=kinds,
        variants={"transformer_base": _plain(512, 2048, 8, WMT_ENCODER_DEPTH, 6), **hat},
        baseline="transformer_base",
        description=description,
    )


@register_space("efficient_transformer", scale="wmt14ende")
def _wmt14ende() -> SearchSpace:
    return _hat_space(
        "wmt14ende", True, "HAT's space for WMT'14 En-De with the kind of attention chosen per layer."
    )


@register_space("efficient_transformer", scale="wmt14ende_hat")
def _wmt14ende_hat() -> SearchSpace:
    return _hat_space("wmt14ende_hat", False, "HAT's space 0 for WMT'14 En-De, softmax attention throughout.")


@register_space("efficient_transformer", scale="wmt14_large")
def _wmt14_large() -> SearchSpace:
    return _translation_space(
        "wmt14_large",
        embed=(1024, 768, 640),
        ffn=(5120, 4096, 3072, 2048),
        heads=(16, 8, 4),
        encoder_depth=None,
        decoder_depth=Choice(WMT_DEPTH),
        deepest=max(WMT_DEPTH),
        kinds=True,
        variants={"transformer_big": _plain(1024, 4096, 16, WMT_ENCODER_DEPTH, 6)},
        baseline="transformer_big",
        description="The large pre-norm space of RankNAS for WMT'14 with the kind of attention chosen per layer.",
    )
