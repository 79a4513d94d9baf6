"""Official supernet weights in sub-networks of efficient_transformer.

The official supernet (OpenNLPLab/mixFormer, commit c1c57c5e435b188a9e9120b995e4e7aaeaf0462b) holds one weight set for
all architectures; a sub-network takes the first rows and columns of each. The query-key-value matrix is the
exception that is easy to get wrong: a sub-network takes its first 3*Q rows as a whole and cuts those into three, so
with fewer heads its keys and values come from rows that are queries and keys in the full network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spaces.errors import UserMistake
from spaces.sequence._efficient_transformer_image import RELATIVE_LENGTH, ImageTransformer, LayerSpec
from spaces.signature import ImageSignature

__all__ = ["convert_supernet_attention", "convert_supernet_state", "load_supernet"]

HEAD_DIM = 64
_BRANCHES = {
    "cosformer": "self_attn_cosformer",
    "cosformer_causal": "self_attn_cosformer",
    "softmax": "self_attn_multihead",
    "relative": "self_attn_relative",
}


def _take(state: Mapping[str, Tensor], key: str, *sizes: int | None) -> Tensor:
    """The first ``sizes`` entries along each dimension (None: all) of ``state[key]``."""
    if key not in state:
        raise UserMistake(f"state lacks {key!r}; expected the state dict of a mixFormer image supernet")
    value = state[key]
    for dim, size in enumerate(sizes):
        if size is not None and value.shape[dim] < size:
            raise UserMistake(
                f"{key} has shape {tuple(value.shape)}, but the architecture needs {size} along dimension {dim}; "
                "choose an architecture inside the supernet"
            )
    return value[tuple(slice(size) for size in sizes)].clone()


def convert_supernet_attention(
    state: Mapping[str, Tensor], *, dim: int, heads: int, head_dim: int = HEAD_DIM
) -> dict[str, Tensor]:
    """State of one of our attention mechanisms from one official attention module.

    Args:
        state: ``in_proj_weight``, ``in_proj_bias``, ``out_proj.weight``, ``out_proj.bias`` and, for relative
            positions, ``relative_position_keys``, all of supernet size; the frozen ``weight_index`` is not needed.
        dim: width of the sub-network.
        heads: number of heads of the sub-network.
        head_dim: width of a head.

    Raises:
        UserMistake: a key is missing, or the sub-network is larger than the supernet.
    """
    inner = heads * head_dim
    converted = {
        "in_proj.fused.weight": _take(state, "in_proj_weight", 3 * inner, dim),
        "in_proj.fused.bias": _take(state, "in_proj_bias", 3 * inner),
        "out_proj.weight": _take(state, "out_proj.weight", dim, inner),
        "out_proj.bias": _take(state, "out_proj.bias", dim),
    }
    if "relative_position_keys" in state:
        converted["position_keys"] = _take(state, "relative_position_keys", None, head_dim)
    return converted


def convert_supernet_state(
    state: Mapping[str, Tensor], architecture: Mapping[str, Any], *, head_dim: int = HEAD_DIM
) -> dict[str, Tensor]:
    """State dict of the ``ImageTransformer`` that ``architecture`` describes, cut from the official supernet's.

    Args:
        state: official keys ``encoder.embed_tokens.proj.weight``, ``encoder.layers.0.fc1.weight``, ...; the aliases
            ``encoder.layers.N.self_attn.*`` and ``encoder.version`` may be there and are not used.
        architecture: ``embed``, ``depth`` and ``layerN.ffn``, ``layerN.heads``, ``layerN.attention`` for N = 1...depth,
            as in the scale "cifar10"; values need not be in the choices of that scale.
        head_dim: width of a head, 64 in the published setting.

    Raises:
        UserMistake: a key is missing, or the architecture is larger than the supernet.
    """
    dim = int(architecture["embed"])
    converted = {
        "patches.proj.weight": _take(state, "encoder.embed_tokens.proj.weight", dim),
        "patches.proj.bias": _take(state, "encoder.embed_tokens.proj.bias", dim),
        "class_token": _take(state, "encoder.cls_token", None, None, dim),
        "positions": _take(state, "encoder.pos_embed", None, None, dim),
        "norm.weight": _take(state, "encoder.layer_norm.weight", dim),
        "norm.bias": _take(state, "encoder.layer_norm.bias", dim),
        "head.weight": _take(state, "encoder.head.weight", None, dim),
        "head.bias": _take(state, "encoder.head.bias"),
    }
    for index in range(int(architecture["depth"])):
        choice = {key: architecture[f"layer{index + 1}.{key}"] for key in ("ffn", "heads", "attention")}
        layer = _convert_layer(state, f"encoder.layers.{index}", dim, choice, head_dim)
        converted |= {f"layers.{index}.{key}": value for key, value in layer.items()}
    return converted


def _convert_layer(
    state: Mapping[str, Tensor], prefix: str, dim: int, choice: Mapping[str, Any], head_dim: int
) -> dict[str, Tensor]:
    ffn, kind = int(choice["ffn"]), str(choice["attention"])
    if kind not in _BRANCHES:
        raise UserMistake(
            f"attention={kind!r} must be one of {', '.join(_BRANCHES)}: the supernet has no other"
        )
    branch = f"{prefix}.{_BRANCHES[kind]}."
    part = {key.removeprefix(branch): value for key, value in state.items() if key.startswith(branch)}
    if not part:
        raise UserMistake(
            f"state lacks {branch}*; the supernet is less deep than the architecture, or another model"
        )
    attention = convert_supernet_attention(part, dim=dim, heads=int(choice["heads"]), head_dim=head_dim)
    return {
        **{f"attention.{key}": value for key, value in attention.items()},
        "attention_norm.weight": _take(state, f"{prefix}.self_attn_layer_norm.weight", dim),
        "attention_norm.bias": _take(state, f"{prefix}.self_attn_layer_norm.bias", dim),
        "ffn_norm.weight": _take(state, f"{prefix}.final_layer_norm.weight", dim),
        "ffn_norm.bias": _take(state, f"{prefix}.final_layer_norm.bias", dim),
        "ffn.fc1.weight": _take(state, f"{prefix}.fc1.weight", ffn, dim),
        "ffn.fc1.bias": _take(state, f"{prefix}.fc1.bias", ffn),
        "ffn.fc2.weight": _take(state, f"{prefix}.fc2.weight", dim, ffn),
        "ffn.fc2.bias": _take(state, f"{prefix}.fc2.bias", dim),
    }


def load_supernet(
    state: Mapping[str, Tensor],
    architecture: Mapping[str, Any],
    *,
    size: tuple[int, int] | None = None,
    head_dim: int = HEAD_DIM,
) -> ImageTransformer:
    """The sub-network that ``architecture`` describes, with the official supernet's weights, in evaluation mode.

    Patch size, channels, classes and the length of relative positions are read off the state.

    Args:
        state, architecture, head_dim: as for ``convert_supernet_state``.
        size: height and width of the images in pixels; ``None`` means square ones of as many patches as there are
            positions.

    Raises:
        UserMistake: as ``convert_supernet_state``; or ``size`` does not fit the number of positions.
    """
    converted = convert_supernet_state(state, architecture, head_dim=head_dim)
    _, channels, *patch = converted["patches.proj.weight"].shape
    tokens = converted["positions"].shape[1] - 1
    height, width = size or (math.isqrt(tokens) * patch[0], math.isqrt(tokens) * patch[1])
    if -(-height // patch[0]) * -(-width // patch[1]) != tokens:
        raise UserMistake(
            f"size={(height, width)} gives another number of {patch[0]}x{patch[1]} patches than the {tokens} positions "
            "of the state; give the size that the supernet was trained with"
        )
    tables = [value for key, value in converted.items() if key.endswith("position_keys")]
    model = ImageTransformer(
        ImageSignature(channels, height, width, converted["head.weight"].shape[0]),
        patch=(patch[0], patch[1]),
        dim=int(architecture["embed"]),
        layers=[
            LayerSpec(
                heads=int(architecture[f"layer{index}.heads"]),
                ffn=int(architecture[f"layer{index}.ffn"]),
                attention=str(architecture[f"layer{index}.attention"]),
            )
            for index in range(1, int(architecture["depth"]) + 1)
        ],
        head_dim=head_dim,
        relative_length=tables[0].shape[0] // 2 if tables else RELATIVE_LENGTH,
    )
    model.load_state_dict(converted)
    return model.eval()
