"""Official VanillaNet checkpoints in ours: huawei-noah/VanillaNet, commit 6aaf7311d8cadddcec9db7595f071bfda6c480f4."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from spaces.errors import UserMistake
from spaces.layers.series_activation import SeriesActivation
from spaces.vision._vanillanet_network import VanillaBlock, VanillaNet

__all__ = ["convert_vanillanet_state", "load_series_activation", "load_vanilla_block", "load_vanillanet"]

_RENAMED = (
    (r"stem1\.([01])\.", r"stem.\1."),
    (r"stem2\.0\.", "stem.3."),
    (r"stem2\.1\.", "stem.4."),
    (r"stem2\.2\.", "stem_act."),
    (r"stem\.1\.", "stem_act."),
    (r"stages\.(\d+)\.conv1\.", r"blocks.\1.convs."),
    (r"stages\.(\d+)\.conv2\.0\.", r"blocks.\1.convs.3."),
    (r"stages\.(\d+)\.conv2\.1\.", r"blocks.\1.convs.4."),
    (r"stages\.(\d+)\.conv\.", r"blocks.\1.convs.0."),
    (r"stages\.(\d+)\.act\.", r"blocks.\1.act."),
    (r"cls[12]?\.([23])\.", r"head.\1."),
    (r"cls2\.0\.", "head.5."),
)


def convert_vanillanet_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of ``VanillaNet`` from an official one, of the network in training or merged.

    Names that are not of a VanillaNet stay as they are.
    """
    return {_converted(key): value for key, value in state.items()}


def load_series_activation(state: Mapping[str, Tensor]) -> SeriesActivation:
    """The official ``activation`` whose state this is, in evaluation mode. Raises UserMistake: it is not one."""
    weight = _need(state, "weight")
    made = SeriesActivation(weight.shape[0], weight.shape[2] // 2, folded="bias" in state)
    _load(made, state)
    return made.eval()


def load_vanilla_block(
    state: Mapping[str, Tensor], *, stride: int = 2, pool: Sequence[int] | int | None = None
) -> VanillaBlock:
    """The official ``Block`` whose state this is, in training or merged form, in evaluation mode.

    Args:
        state: its keys begin with ``conv1``, ``conv2`` (or ``conv``) and ``act``.
        stride, pool: as of ``VanillaBlock``; no state tells them.

    Raises:
        UserMistake: not such a state.
    """
    deep = "conv.weight" not in state
    first = _need(state, "conv1.0.weight" if deep else "conv.weight")
    act = _need(state, "act.weight")
    made = VanillaBlock(
        first.shape[1],
        act.shape[0],
        terms=act.shape[2] // 2,
        stride=stride,
        pool=pool,
        form="deep" if deep else "merged",
    )
    named = {f"stages.0.{key}": value for key, value in state.items()}
    _load(made, {_converted(key).removeprefix("blocks.0."): value for key, value in named.items()})
    return made.eval()


def load_vanillanet(
    state: Mapping[str, Tensor],
    *,
    strides: Sequence[int] | None = None,
    pools: Sequence[Sequence[int] | int | None] | None = None,
    stem_stride: int | None = None,
    stem_padding: int = 0,
    dropout: float = 0.0,
) -> VanillaNet:
    """An official VanillaNet, in training (form ``deep``) or merged form, in evaluation mode.

    Args:
        state: official state dict, e.g. ``torch.load(path, weights_only=True)["model_ema"]``, without ``module.``.
        strides: None: 2 where the width changes by the rule of the published networks, V-5 to V-13, else 1.
        pools: of adaptive pooling, as of ``VanillaNet`` or as the original's ``ada_pool``; for these files
            ``stem_stride=3, stem_padding=1``.
        stem_stride, stem_padding: of the stem, as of ``VanillaNet``.
        dropout: before the classifier; files do not tell.

    Returns:
        Activations between two convolutions are the identity, as in every finished training; see ``set_identity``.

    Raises:
        UserMistake: not such a state.
    """
    deep = "stem.0.weight" not in state
    first = _need(state, "stem1.0.weight" if deep else "stem.0.weight")
    count = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("stages.")), default=-1)
    acts = [_need(state, "stem2.2.weight" if deep else "stem.1.weight")]
    acts += [_need(state, f"stages.{number}.act.weight") for number in range(count)]
    dims = [act.shape[0] for act in acts]
    if strides is None:
        strides = [2 if two > one else 1 for one, two in pairwise(dims)]
    made = VanillaNet(
        first.shape[1],
        _need(state, "cls2.0.weight" if deep else "cls.2.weight").shape[0],
        dims=dims,
        strides=strides,
        terms=[act.shape[2] // 2 for act in acts],
        dropout=dropout,
        patch=first.shape[2],
        stem_stride=stem_stride,
        stem_padding=stem_padding,
        pools=pools,
        form="deep" if deep else "merged",
    )
    _load(made, convert_vanillanet_state(state))
    return made.eval()


def _converted(key: str) -> str:
    for pattern, name in _RENAMED:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", name, key)
    return key


def _load(module: SeriesActivation | VanillaBlock | VanillaNet, state: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserMistake(f"state is not of a VanillaNet: {' '.join(' '.join(lines[1:3]).split())}") from None


def _need(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise UserMistake(f"state lacks {key!r}; expected the state dict of an official VanillaNet")
    return state[key]
