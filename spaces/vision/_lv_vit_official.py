"""Official LV-ViT and SiT checkpoints in ours.

The files of TokenLabeling (LV-ViT) and of Sense-X/SiT (commit f5778084c45c93f2121685989fa35f930f7e8c54) share one
layout; SiT's has ``tsm.S.*`` for the slimmings and ``rtsm.N.*`` for the reverse modules beside it. Here a slimming is
one of ``blocks``, so that the blocks behind it count on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spaces.errors import UserMistake
from spaces.layers.token_slimming import ReverseTokenSlimming, TokenSlimming
from spaces.vision._lv_vit_network import LVViT, LVViTBlock
from spaces.vision._lv_vit_published import HEAD_DIM

__all__ = [
    "convert_lv_vit_state",
    "convert_token_slimming",
    "load_lv_vit",
    "load_reverse_module",
    "load_reverse_modules",
    "load_token_slimming",
]

_SLIMMING = {"weight.0": "norm", "weight.1": "fc1", "weight.3": "fc2"}


def convert_token_slimming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of ``TokenSlimming`` from that of the official ``TokenSlimmingModule``."""
    converted = {}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        converted[f"{_SLIMMING.get(stem, stem)}.{last}" if stem else key] = value
    return converted


def load_token_slimming(state: Mapping[str, Tensor], *, prefix: int = 0) -> TokenSlimming:
    """The official ``TokenSlimmingModule`` whose state this is, as ours.

    Raises:
        UserMistake: a weight is missing.
    """
    first, last = _need(state, "weight.1.weight"), _need(state, "weight.3.weight")
    module = TokenSlimming(first.shape[1], last.shape[0], hidden=first.shape[0], prefix=prefix)
    module.load_state_dict(convert_token_slimming(state))
    return module


def load_reverse_module(state: Mapping[str, Tensor]) -> ReverseTokenSlimming:
    """The official ``ReverseTSM`` whose state this is, as ours.

    Raises:
        UserMistake: a weight is missing.
    """
    over_tokens, over_width = _need(state, "mlp1.fc1.weight"), _need(state, "mlp2.fc1.weight")
    module = ReverseTokenSlimming(
        over_width.shape[1],
        over_tokens.shape[1],
        _need(state, "mlp1.fc2.weight").shape[0],
        hidden=(over_tokens.shape[0], over_width.shape[0]),
    )
    module.load_state_dict(state)
    return module


def load_reverse_modules(state: Mapping[str, Tensor]) -> nn.ModuleList:
    """The reverse modules of an official SiT, one per block; ``nn.Identity`` for the blocks before the first slimming.

    Args:
        state: of the whole network (``rtsm.N.*``).

    Raises:
        UserMistake: the state has none.
    """
    numbers = _reversed_blocks(state)
    if not numbers:
        raise UserMistake(
            "state has no reverse modules (rtsm.N.*): it is of a model for deployment or of a teacher"
        )
    modules = nn.ModuleList()
    for number in range(_depth(state)):
        own = _part(state, f"rtsm.{number}.")
        if not own:
            modules.append(nn.Identity())
            continue
        modules.append(load_reverse_module(own))
    return modules


def convert_lv_vit_state(
    state: Mapping[str, Tensor], *, slim_after: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """State dict of ``LVViT`` from an official one; reverse modules are left out.

    Args:
        state: official keys. A wrapping ``{"model": ...}`` or ``module.`` prefixes have to be taken off before.
        slim_after: see ``load_lv_vit``.

    Raises:
        UserMistake: as ``load_lv_vit``.
    """
    after = _places(state, slim_after)
    converted = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        number, _, name = rest.partition(".")
        if part == "blocks":
            shift = sum(place <= int(number) for place in after)
            key = f"blocks.{int(number) + shift}.{name}"
        elif part == "tsm":
            [(name, value)] = convert_token_slimming({name: value}).items()
            key = f"blocks.{after[int(number)] + int(number)}.{name}"
        elif part == "rtsm":
            continue
        converted[key] = value
    return converted


def load_lv_vit(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    skip_division: float | None = None,
    slim_after: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    aux_head: bool = True,
    qk_scale: float | None = None,
) -> LVViT:
    """An official LV-ViT or SiT, teacher or student, in evaluation mode.

    Args:
        state: official state dict, e.g. ``torch.load(path, weights_only=True)["model"]`` of a SiT file.
        heads: None: one for 64 channels, as in all published sizes.
        skip_division: None: 2, or 3 for a width of 768, as in all published sizes.
        slim_after: numbers of the blocks, from 1, that a slimming follows. None: read from the reverse modules, which
            files for deployment do not have.
        size: height and width of the images; None: square.
        aux_head: keep the classifier of token labelling, which inference does not use.
        qk_scale: what products of queries and keys were multiplied by; None: 1 / sqrt(head width), as in all published
            sizes. Another one goes into the queries' weights.

    Raises:
        UserMistake: not such a state, or one that lacks what the arguments leave open.
    """
    _need(state, "pos_embed")
    after = _places(state, slim_after)
    convolutions = sum(bool(re.fullmatch(r"patch_embed\.conv\d+\.weight", key)) for key in state)
    stem = f"{convolutions}c" if convolutions else "patch"
    first = _need(state, "patch_embed.conv1.weight" if convolutions else "patch_embed.proj.weight")
    reduction = 16 if convolutions else first.shape[2]
    dim, patches = state["pos_embed"].shape[2], state["pos_embed"].shape[1] - 1
    side = math.isqrt(patches) * reduction
    head = _need(state, "head.weight")
    slimmings = [_need(state, f"tsm.{number}.weight.3.weight") for number in range(len(after))]
    aux_head = aux_head and "aux_head.weight" in state
    model = LVViT(
        first.shape[1],
        size or (side, side),
        head.shape[0],
        dim=dim,
        depth=_depth(state),
        heads=heads or max(1, dim // HEAD_DIM),
        mlp_ratio=_need(state, "blocks.0.mlp.fc1.weight").shape[0] / dim,
        stem=stem,
        reduction=reduction,
        skip_division=(3.0 if dim == 768 else 2.0) if skip_division is None else skip_division,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        slim_after=after,
        tokens=[value.shape[0] for value in slimmings],
        slim_ratio=slimmings[0].shape[1] / dim if slimmings else 0.5,
        aux_head=aux_head,
    )
    if model.pos_embed.shape[1] != patches + 1:
        raise UserMistake(
            f"size={size} does not give the {patches} patches of the state; give the size of its training"
        )
    converted = convert_lv_vit_state(state, slim_after=after)
    if not aux_head:
        converted = {key: value for key, value in converted.items() if not key.startswith("aux_head.")}
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserMistake(
            f"state is not of an LV-ViT or SiT: {' '.join(' '.join(lines[1:3]).split())}"
        ) from None
    if qk_scale is not None:
        _rescale(model, qk_scale)
    return model.eval()


@torch.no_grad()
def _rescale(model: LVViT, qk_scale: float) -> None:
    # Fused kernels take 1 / sqrt(head width), whatever the attention's own attribute says.
    for block in (one for one in model.blocks if isinstance(one, LVViTBlock)):
        queries = block.attn.qkv.out_features // 3
        factor = qk_scale * (queries / block.attn.num_heads) ** 0.5
        for parameter in block.attn.qkv.parameters():
            parameter[:queries] *= factor


def _places(state: Mapping[str, Tensor], given: Sequence[int] | None) -> list[int]:
    """The blocks, from 1, that a slimming follows."""
    count = len({key.split(".")[1] for key in state if key.startswith("tsm.")})
    if given is not None:
        if len(given) != count:
            raise UserMistake(
                f"slim_after={list(given)} must name {count} blocks, one for each slimming of the state"
            )
        return list(given)
    if not count:
        return []
    numbers = _reversed_blocks(state)
    lengths = [_need(state, f"rtsm.{number}.mlp1.fc1.weight").shape[1] for number in numbers]
    found = [
        number + 1
        for place, number in enumerate(numbers)
        if place == 0 or lengths[place] != lengths[place - 1]
    ]
    if len(found) != count:
        raise UserMistake(
            f"state has {count} slimmings, but does not tell after which blocks; give slim_after, such as (9, 12, 14)"
        )
    return found


def _reversed_blocks(state: Mapping[str, Any]) -> list[int]:
    return sorted({int(key.split(".")[1]) for key in state if key.startswith("rtsm.")})


def _depth(state: Mapping[str, Any]) -> int:
    return 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _need(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise UserMistake(f"state lacks {key!r}; expected the state dict of an official LV-ViT or SiT")
    return state[key]
