"""The network of vanillanet; facts and sources in ``vanillanet``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from spaces.errors import UserMistake
from spaces.layers.series_activation import SeriesActivation
from spaces.vision._vanillanet_merging import CONVOLUTIONS, NORMS, fold_norm, merge_layers

__all__ = ["FORMS", "VanillaBlock", "VanillaNet"]

FORMS = ("deep", "plain", "merged")
"""``deep``: two convolutions for each layer, a fading activation between them (deep training); ``plain``: one, with
batch norms; ``merged``: one, nothing else."""

_EPS = 1e-6

Pair: TypeAlias = tuple[int, int]


class VanillaBlock(nn.Module):
    """1x1 convolution(s), max-pooling where the map shrinks, series activation.

    Letters: B batch, C = ``dim``, D = ``dim_out``.

    Args:
        dim: C.
        dim_out: D.
        terms: of the series activation, at least 0.
        stride: 1, or 2 for a max-pool of 2x2.
        pool: height and width, or one number for both, that an adaptive max-pool leaves instead; for a stride of 2.
        form: of ``FORMS``.

    Raises:
        UserMistake: a stride or form that does not exist, or a ``pool`` without stride.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        terms: int = 3,
        stride: int = 2,
        pool: Sequence[int] | int | None = None,
        form: str = "deep",
    ):
        super().__init__()
        _check_form(form)
        if stride not in (1, 2) or (pool is not None and stride == 1):
            raise UserMistake(
                f"vanillanet: stride={stride} must be 1, or 2; pool={pool} is for a stride of 2"
            )
        first = nn.Conv2d(dim, dim if form == "deep" else dim_out, 1)
        self.convs = nn.Sequential(*_layers(first, dim, dim_out, form))
        self.pool: nn.Module = nn.Identity()
        if pool is not None:
            height, width = (pool, pool) if isinstance(pool, int) else pool
            self.pool = nn.AdaptiveMaxPool2d((height, width))
        elif stride == 2:
            self.pool = nn.MaxPool2d(2)
        self.act = SeriesActivation(dim_out, terms, folded=form == "merged")
        _draw(self)

    def config(self) -> dict[str, Any]:
        """Arguments that make a block of the same shape."""
        pool = self.pool.output_size if isinstance(self.pool, nn.AdaptiveMaxPool2d) else None
        return {
            "dim": self.convs[0].in_channels,
            "dim_out": self.act.weight.shape[0],
            "terms": self.act.terms,
            "stride": 1 if isinstance(self.pool, nn.Identity) else 2,
            "pool": None if pool is None else list(pool),  # type: ignore[arg-type]
            "form": _form(self.convs, self.act),
        }

    def set_identity(self, share: float) -> None:
        """As ``VanillaNet.set_identity``."""
        _set_identity(self, share)

    def merge(self) -> VanillaBlock:
        """As ``VanillaNet.merge``."""
        made = copy.deepcopy(self)
        made.convs, made.act = _merged(made.convs), made.act.fold()
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, D, height, width), height and width halved (rounded down) by a stride of 2."""
        return self.act(self.pool(self.convs(x)))  # type: ignore[no-any-return]


class VanillaNet(nn.Module):
    """A plain network: a convolution of patches, blocks of one layer each, a classifier. No shortcut, no attention.

    The forward pass is the same in all forms; they differ in what is in ``stem``, ``blocks.I.convs`` and ``head``.

    Args:
        channels: of the images.
        classes: number of classes.
        dims: widths, one more than blocks.
        strides: 1 or 2, one for each block.
        terms: of the series activations, at least 0; one number for all, or one for the stem and each block.
        dropout: before the classifier, in [0, 1).
        patch: kernel of the stem.
        stem_stride, stem_padding: of the stem; None and 0: patches side by side.
        pools: for each block the (height, width) of an adaptive max-pool, or one number for both; None or 0 for the
            ordinary one. None in place of the list: all ordinary.
        form: of ``FORMS``.

    Raises:
        UserMistake: arguments that contradict each other.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 1000,
        *,
        dims: Sequence[int] = (512, 1024, 2048, 4096),
        strides: Sequence[int] = (2, 2, 2),
        terms: int | Sequence[int] = 3,
        dropout: float = 0.0,
        patch: int = 4,
        stem_stride: int | None = None,
        stem_padding: int = 0,
        pools: Sequence[Sequence[int] | int | None] | None = None,
        form: str = "deep",
    ):
        super().__init__()
        _check_form(form)
        if len(dims) != len(strides) + 1 or len(dims) < 2 or min(dims) < 1:
            raise UserMistake(
                f"vanillanet: dims={list(dims)} must have one number more than strides={list(strides)}, all above 0"
            )
        if pools is not None and len(pools) != len(strides):
            raise UserMistake(f"vanillanet: pools={list(pools)} must have {len(strides)} entries, as strides")
        each = [terms] * len(dims) if isinstance(terms, int) else list(terms)
        if len(each) != len(dims):
            raise UserMistake(f"vanillanet: terms={each} must be one number, or {len(dims)}, as dims")
        first = nn.Conv2d(channels, dims[0], patch, stem_stride or patch, padding=stem_padding)
        self.stem = nn.Sequential(*_layers(first, dims[0], dims[0], form))
        self.stem_act = SeriesActivation(dims[0], each[0], folded=form == "merged")
        self.blocks = nn.Sequential()
        for number, stride in enumerate(strides):
            pool = pools[number] if pools is not None else None
            self.blocks.append(
                VanillaBlock(
                    dims[number],
                    dims[number + 1],
                    terms=each[number + 1],
                    stride=stride,
                    pool=pool if pool and stride != 1 else None,
                    form=form,
                )
            )
        last = nn.Conv2d(dims[-1], classes, 1)
        # No norm behind the classifier: only the doubled one has it, between its two convolutions.
        tail = _layers(last, classes, classes, form)[:-1] if form == "deep" else [last]
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout), *tail)
        _draw(self)

    def config(self) -> dict[str, Any]:
        """Arguments that make a network of the same shape; the form is that of the stem."""
        blocks = [block.config() for block in self.blocks]  # type: ignore[operator]
        first, dropout = self.stem[0], self.head[1]
        return {
            "channels": first.in_channels,
            "classes": self.head[-1].out_channels,
            "dims": [blocks[0]["dim"], *(block["dim_out"] for block in blocks)],
            "strides": [block["stride"] for block in blocks],
            "terms": [self.stem_act.terms, *(block["terms"] for block in blocks)],
            "dropout": dropout.p,
            "patch": first.kernel_size[0],  # type: ignore[index]
            "stem_stride": first.stride[0],  # type: ignore[index]
            "stem_padding": first.padding[0],  # type: ignore[index]
            "pools": [block["pool"] for block in blocks],
            "form": _form(self.stem, self.stem_act),
        }

    def set_identity(self, share: float) -> None:
        """How far the activations between the doubled convolutions have become the identity (see ``identity_share``).

        Args:
            share: 0 (ReLU) to 1 (none at all). It is no part of the state dict; a new network has 1.

        Raises:
            UserMistake: ``share`` is not in [0, 1].
        """
        _set_identity(self, share)

    def merge(self) -> VanillaNet:
        """A copy in the form ``merged``, of the same outputs in evaluation mode.

        Raises:
            UserMistake: an activation between two convolutions is not the identity yet.
        """
        made = copy.deepcopy(self)
        made.stem, made.stem_act = _merged(made.stem), made.stem_act.fold()
        for number, block in enumerate(self.blocks):
            made.blocks[number] = block.merge()  # type: ignore[operator]
        made.head = _merged(made.head)
        return made

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, dims[-1], rows, columns)."""
        return self.blocks(self.stem_act(self.stem(image)))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> Tensor:
        """(B, channels, height, width) -> logits (B, classes)."""
        return self.head(self.forward_features(image)).flatten(1)  # type: ignore[no-any-return]


def _layers(first: nn.Module, dim: int, dim_out: int, form: str) -> list[nn.Module]:
    if form == "merged":
        return [first]
    if form == "plain":
        return [first, nn.BatchNorm2d(dim_out, eps=_EPS)]
    second = nn.Conv2d(dim, dim_out, 1)
    norms = nn.BatchNorm2d(dim, eps=_EPS), nn.BatchNorm2d(dim_out, eps=_EPS)
    return [first, norms[0], nn.LeakyReLU(1.0), second, norms[1]]


def _draw(module: nn.Module) -> None:
    for one in module.modules():
        if isinstance(one, nn.Conv2d):
            nn.init.trunc_normal_(one.weight, std=0.02)
            if one.bias is not None:
                nn.init.zeros_(one.bias)


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise UserMistake(f"vanillanet: form={form!r} must be one of {', '.join(FORMS)}")


def _form(layers: nn.Sequential, act: SeriesActivation) -> str:
    if any(isinstance(layer, nn.LeakyReLU) for layer in layers):
        return "deep"
    return "merged" if act.bn is None else "plain"


def _set_identity(module: nn.Module, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserMistake(f"vanillanet: share={share} must be in [0, 1]")
    for one in module.modules():
        if isinstance(one, nn.LeakyReLU):
            one.negative_slope = float(share)


def _merged(layers: nn.Sequential) -> nn.Sequential:
    """The same without norms and without activations of slope 1."""
    made: list[nn.Module] = []
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, nn.LeakyReLU):
                if layer.negative_slope != 1:
                    raise UserMistake(
                        f"vanillanet: the activation between two convolutions is the identity only to a share of "
                        f"{layer.negative_slope:g}; merging needs 1 (train with a rising share, then set_identity(1))"
                    )
            elif isinstance(layer, NORMS):
                made[-1] = fold_norm(made[-1], layer)
            elif isinstance(layer, CONVOLUTIONS) and made and isinstance(made[-1], CONVOLUTIONS):
                made[-1] = merge_layers(made[-1], layer)
            else:
                made.append(layer)
    return nn.Sequential(*made)
