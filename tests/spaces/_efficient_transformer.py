"""What the tests of efficient_transformer's classifiers and of its translation models share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spaces import Architecture, ImageSignature, SearchSpace, TranslationSignature, get_space
from tests.golden_vectors import golden_json

TRANSLATION_SCALES = ("small_translation", "wmt14ende", "wmt14ende_hat", "wmt14_large")
DIGITS = ImageSignature(channels=1, height=8, width=8, classes=10)
SENTENCES = TranslationSignature(source_vocabulary=31, target_vocabulary=31, max_length=12)
VARIANTS = golden_json("efficient_transformer-variants")


def scale(name: str) -> SearchSpace:
    return get_space(f"efficient_transformer:{name}")


def baseline(name: str) -> Architecture:
    space = scale(name)
    assert space.baseline is not None
    return space.published[space.baseline]


def without_gradient(model: nn.Module, *inputs: Tensor) -> list[str]:
    """Names of the parameters that one training step leaves without a gradient."""
    model.train()
    model(*inputs).square().mean().backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


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
