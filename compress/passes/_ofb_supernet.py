"""The supernet of the search: the user's model with gates put in, cut while it trains.

Source: OFB (Once for Both, CVPR 2024); code HankYe/Once-for-Both at beb72b6.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes import _ofb_gate as options_of
from compress.passes._ofb_gate import Gate
from compress.passes._ofb_losses import reconstruction_loss
from compress.passes._ofb_sites import (
    AttentionSite,
    MlpSite,
    Site,
    embedding_axes,
    find_sites,
    why_no_embedding,
)
from compress.passes._ofb_slicing import Slicer, sync_sizes
from nas.errors import UserMistake

__all__ = ["OFFICIAL_COLOURS", "Dimensions", "EmbeddingGate", "Supernet"]

OFFICIAL_COLOURS = 3
"""Channels of an image as the original's decoder and cost formula have them, whatever its patch embedding takes."""


@dataclass(frozen=True)
class Dimensions:
    """What is searched, and the original's peculiarities.

    Attributes:
        embedding, heads, channels, mlp: searched or left as they are.
        head_step: between numbers of heads; None is the original's 2 where the number is even, else 1. It is 1 for two
            heads as well if no channels are searched, since there would be nothing to choose.
        calibrated: see ``Gate``.
        masked_images: add the decoder of masked image modelling (plain ViTs only); dropping of patches is then off.
        refused: names of attentions and MLPs that are left as they are, with the reason.
        whole_heads: names of attentions of which only whole heads can go.
        normalised_residual: while the embedding width is undecided, add each branch to the normalised input as the
            original does.
        official_options: offer exactly the original's widths, of which the largest need not be all units: 2 of 3
            heads, 57 of 60 hidden units. A dimension of one option is then searched nonetheless (and decided by the
            first deletion, which turns its score into a multiplier; the original takes the bare score for one), the
            decoder gives images of 3 channels whatever comes in, and a model without a head has its embedding searched
            as well. Off, the largest option is everything.
    """

    embedding: bool = True
    heads: bool = True
    channels: bool = True
    mlp: bool = True
    head_step: int | None = None
    calibrated: bool = True
    masked_images: bool = True
    normalised_residual: bool = False
    official_options: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    whole_heads: frozenset[str] = frozenset()

    def head_options(self, heads: int) -> tuple[int, ...]:
        """The numbers of heads that an attention of ``heads`` can have."""
        only_choice = heads == 2 and not self.channels and not self.official_options
        step = self.head_step or (1 if only_choice else None)
        return options_of.head_options(heads, step, official=self.official_options)


class EmbeddingGate(nn.Module):
    """Stands behind patch and position embedding: multiplies the tokens, and hides patches while training.

    Hidden patches are ``mask_token`` times the gate; positions were added before, so that a hidden one has none.

    Attributes:
        keep_ratio: share of the patches that is shown in training, in (0, 1].
        noise: (B, patches) random numbers for the next call, the smallest are shown; None draws them.
        hidden: (B, patches) of the last call, 1 where hidden; None when nothing was.
    """

    def __init__(self, gate: Gate, width: int, prefix: int, masked: bool, like: Tensor):
        super().__init__()
        self.gate = gate
        self.prefix = prefix
        self.mask_token = nn.Parameter(like.new_zeros(1, 1, width)) if masked else None
        self.keep_ratio = 1.0
        self.noise: Tensor | None = None
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, prefix + patches, D) -> the same shape."""
        factor = self.gate.multiplier()
        if factor is not None:
            factor = factor.to(x.dtype)
            x = x * factor
        self.hidden = None
        patches = x.shape[1] - self.prefix
        shown = int(patches * self.keep_ratio)
        if not self.training or self.mask_token is None or shown == patches:
            return x
        noise = torch.rand(x.shape[0], patches, device=x.device) if self.noise is None else self.noise
        rank = noise.argsort(dim=1).argsort(dim=1)
        self.hidden = (rank >= shown).to(x.dtype)
        token = self.mask_token if factor is None else self.mask_token * factor
        hidden = self.hidden[:, :, None]
        images = x[:, self.prefix :] * (1 - hidden) + token * hidden
        return torch.cat([x[:, : self.prefix], images], dim=1)


class _NormalisedResidual(nn.Module):
    """A block whose branches are added to the normalised input while the embedding is undecided.

    It has the children of the block under their own names, so that they are found and cut as ever.
    """

    def __init__(self, block: nn.Module, gate: Gate):
        super().__init__()
        self._block: Any
        self._gate: Any
        for name, child in block.named_children():
            self.add_module(name, child)
        # Neither is a child once more: the first has the same children, the second sits in the embedding's gate.
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_gate", gate)

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self._block
        if self._gate.decided:
            return block(x)  # type: ignore[no-any-return]
        x = block.norm1(x)
        x = x + block.drop_path1(block.ls1(block.attn(x)))
        x = block.norm2(x)
        return x + block.drop_path2(block.ls2(block.mlp(x)))  # type: ignore[no-any-return]


class Supernet(nn.Module):
    """A copy of ``model`` with a gate in every searchable place.

    Args:
        model: plain ViT of timm or one like it; or any model with attentions and MLPs of the usual form, whose
            embedding width then stays.
        dimensions: what to search.

    Attributes:
        host: the copy, gates within.
        sites: the searched attentions and MLPs, by their names in ``model``.
        left_out: what is not searched, and why.

    Raises:
        UserMistake: there is nothing to search.
    """

    def __init__(self, model: nn.Module, dimensions: Dimensions | None = None):
        super().__init__()
        self.dimensions = dimensions = dimensions or Dimensions()
        self.host: Any = copy.deepcopy(model)
        found, self.left_out = find_sites(self.host)
        self.left_out += [f"{name} {reason}" for name, reason in dimensions.refused.items()]
        found = [site for site in found if site.name not in dimensions.refused]
        reason = why_no_embedding(self.host, headless=dimensions.official_options)
        plain = not why_no_embedding(self.host, headless=True)
        self.sites: list[Site] = [site for site in found if self._wrap(site)]
        self.decoder: nn.Sequential | None = None
        if reason:
            self.dimensions = replace(dimensions, embedding=False)
            self.left_out += [f"embedding: {reason}"] if dimensions.embedding else []
        if plain:
            self._add_embedding()
        if not self.sites and not (self.embedder is not None and self.dimensions.embedding):
            why = "; ".join(self.left_out[:3]) or "it has no attention (qkv, proj) and no MLP (fc1, act, fc2)"
            raise UserMistake(f"ofb: nothing to search in {type(model).__name__}: {why}")

    def _wrap(self, site: Site) -> bool:
        wanted = self.dimensions
        official = wanted.official_options
        if isinstance(site, AttentionSite):
            heads = wanted.head_options(site.heads) if wanted.heads else ()
            if wanted.heads and not heads:
                self.left_out.append(
                    f"attention {site.name}: the original has no option for {site.heads} heads"
                )
                return False
            channels = wanted.channels and not site.whole_heads and site.name not in wanted.whole_heads
            if len(heads) < (1 if official else 2) and not channels:
                return False
            widths = options_of.channel_options(site.head_dim, official=official) if channels else ()
            gate = Gate(
                "attention",
                site.heads,
                site.head_dim,
                head_options=heads,
                channel_options=widths,
                calibrated=wanted.calibrated,
            )
        elif isinstance(site, MlpSite) and wanted.mlp:
            widths = options_of.hidden_options(site.hidden, official=official)
            gate = Gate("mlp", 1, site.hidden, channel_options=widths, calibrated=wanted.calibrated)
        else:
            return False
        self._place(gate, site.first(self.host).weight)
        site.wrap(self.host, gate)
        return True

    @staticmethod
    def _place(gate: Gate, like: Tensor) -> None:
        # Probabilities near 0 and 1, and steps of a search, are lost in numbers of two bytes.
        wide = torch.promote_types(like.dtype, torch.float32)
        gate.to(device=like.device, dtype=wide)

    def _add_embedding(self) -> None:
        host, wanted = self.host, self.dimensions
        projection = host.patch_embed.proj
        width = projection.out_channels
        options: tuple[int, ...] = ()
        if wanted.embedding:
            options = options_of.embedding_options(width, official=wanted.official_options)
        gate = Gate("embedding", 1, width, channel_options=options, calibrated=wanted.calibrated)
        if not wanted.embedding:
            gate.decided = gate.fused = True
            gate.alpha.requires_grad_(False)
            gate.score.requires_grad_(False)
        self._place(gate, projection.weight)
        square = projection.kernel_size[0] == projection.kernel_size[1] == projection.stride[0]
        prefix = getattr(host, "num_prefix_tokens", 1)
        masked = wanted.masked_images and square
        host.norm_pre = EmbeddingGate(gate, width, prefix, masked, projection.weight)
        if masked:
            self.add_decoder(OFFICIAL_COLOURS if wanted.official_options else projection.in_channels)
            host.norm.register_forward_hook(self._keep_latent)
            # The hidden patches have to be where the decoder looks for them; the extracted model drops them as before.
            if isinstance(getattr(host, "patch_drop", None), nn.Module):
                host.patch_drop = nn.Identity()
        if wanted.normalised_residual:
            host.blocks = nn.Sequential(*(_NormalisedResidual(block, gate) for block in host.blocks))

    def add_decoder(self, colours: int) -> None:
        """A new decoder of masked images, into ``colours`` channels."""
        projection = self.host.patch_embed.proj
        patch = projection.kernel_size[0]
        decode = nn.Conv2d(projection.out_channels, colours * patch**2, 1)
        self.decoder = nn.Sequential(decode, nn.PixelShuffle(patch)).to(projection.weight)

    def _keep_latent(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        object.__setattr__(self, "_latent", output)

    @property
    def embedder(self) -> EmbeddingGate | None:
        """Where the embedding's gate is, or None."""
        module = getattr(self.host, "norm_pre", None)
        return module if isinstance(module, EmbeddingGate) else None

    def gates(self) -> Iterator[Gate]:
        """Every gate that is searched: the embedding's first, then those of the sites in their order."""
        if self.embedder is not None and self.dimensions.embedding:
            yield self.embedder.gate
        for site in self.sites:
            yield site.gated(self.host).gate

    @property
    def decided(self) -> bool:
        """Whether every gate has one width."""
        return all(gate.decided for gate in self.gates())

    def schedule(self, lam: float, keep_ratio: float) -> None:
        """Set the mixture of importance and sparsity, and the share of patches that is shown."""
        for gate in self.gates():
            gate.lam = lam
        if self.embedder is not None:
            self.embedder.keep_ratio = keep_ratio

    def forward(self, x: Tensor) -> Any:
        """What the model gives."""
        return self.host(x)

    def reconstruction(self, images: Tensor) -> Tensor | None:
        """The loss on the patches that the last forward in training hid; None when it hid none.

        Raises:
            UserMistake: the original's decoder for images of neither 1 nor 3 channels.
        """
        if self.embedder is None or self.decoder is None or self.embedder.hidden is None:
            return None
        latent: Tensor = self.__dict__.pop("_latent")[:, self.embedder.prefix :]
        patch = self.host.patch_embed.proj.kernel_size[0]
        height, width = (size // patch for size in images.shape[-2:])
        grid = latent.transpose(1, 2).reshape(latent.shape[0], -1, height, width)
        rebuilt = self.decoder(grid)
        if images.shape[1] not in (1, rebuilt.shape[1]):
            raise UserMistake(
                f"ofb: the original's decoder gives {rebuilt.shape[1]} channels, the images have {images.shape[1]}; "
                "search without masked_images or without official_options"
            )
        return reconstruction_loss(images, rebuilt, self.embedder.hidden)

    def compress(self, tau: float, slicer: Slicer | None = None, *, force: bool = False) -> bool:
        """Delete improbable options and cut what no option needs; with ``force`` decide everything.

        Returns:
            Whether anything was physically cut.
        """
        slicer = slicer or Slicer()
        cut = False
        if self.embedder is not None and self.dimensions.embedding:
            gate = self.embedder.gate
            keep = gate.decide(slicer) if force else gate.compress(tau, slicer)
            if keep is not None:
                self.cut_embedding(keep.channels[0], slicer)
                cut = True
        for site in self.sites:
            gate = site.gated(self.host).gate
            grid = (gate.heads, gate.channels)
            keep = gate.decide(slicer) if force else gate.compress(tau, slicer)
            if keep is not None:
                site.cut(self.host, keep, grid, slicer)
                cut = True
        return cut

    def cut_embedding(self, index: Tensor, slicer: Slicer) -> None:
        """Keep the embedding channels ``index`` everywhere."""
        for owner, name, dim in embedding_axes(self.host):
            slicer.select(owner, name, index, dim)
            sync_sizes(owner)
        assert self.embedder is not None
        slicer.select(self.embedder, "mask_token", index, -1)
        if self.decoder is not None:
            slicer.select(self.decoder[0], "weight", index, 1)
            decode: Any = self.decoder[0]
            decode.in_channels = decode.weight.shape[1]
        set_embedding_width(self.host, len(index))

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold every decided score into the weights; the outputs stay the same."""
        if not self.decided:
            raise UserMistake("ofb: fuse: some widths are undecided; call compress(..., force=True) first")
        for site in self.sites:
            site.gated(self.host).fuse()
        if self.embedder is None or self.embedder.gate.fused:
            return
        gate, stem = self.embedder.gate, self.host.patch_embed
        factor = gate.score.detach()[0]
        inner = stem.norm if isinstance(getattr(stem, "norm", None), nn.LayerNorm) else stem.proj
        for parameter in (inner.weight, inner.bias):
            if parameter is not None:
                parameter.mul_(factor.reshape(-1, *[1] * (parameter.ndim - 1)))
        for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
            token = getattr(self.host, name, None)
            if token is not None:
                token.mul_(factor)
        if self.embedder.mask_token is not None:
            self.embedder.mask_token.mul_(factor)
        gate.fused = True
        gate.score.requires_grad_(False)


def set_embedding_width(host: Any, width: int) -> None:
    """The attributes of a ViT that tell its width."""
    for name in ("embed_dim", "num_features", "head_hidden_size"):
        if isinstance(getattr(host, name, None), int):
            setattr(host, name, width)
