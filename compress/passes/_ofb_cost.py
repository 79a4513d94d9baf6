"""What a choice of widths costs: differentiable while searching, exact for whole numbers.

Source: OFB (Once for Both, CVPR 2024), cost penalty; closed forms of the code for ``OfficialMacs``, the toolkit's
own counting convention (nas.profile) for ``Macs``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes._ofb_sites import AttentionSite, Site, embedding_axes, find_sites, why_no_embedding
from compress.passes._ofb_supernet import OFFICIAL_COLOURS, Supernet
from nas.profile import profile

__all__ = ["Cost", "Macs", "OfficialMacs", "Parameters", "Widths", "Work", "cost_loss", "expected_widths"]

_ELEMENT = 100


@dataclass(frozen=True)
class Widths:
    """Sizes of a model, numbers or scalar tensors.

    Attributes:
        embedding: width, or None where it is not searched.
        units: of every site, in the order of ``Supernet.sites``: heads x channels, or hidden units.
        heads: of every site; 1 for an MLP.
        physical: embedding width that the norms work on while the search goes on; None is ``embedding``.
    """

    embedding: Any
    units: Sequence[Any]
    heads: Sequence[int]
    physical: int | None = None


def expected_widths(supernet: Supernet) -> Widths:
    """The widths that the gates expect; with gradient to alpha."""
    gates = [site.gated(supernet.host).gate for site in supernet.sites]
    embedding, physical = None, None
    if supernet.embedder is not None:
        embedding, physical = supernet.embedder.gate.expected_width(), supernet.embedder.gate.channels
    return Widths(embedding, [g.expected_width() for g in gates], [g.heads for g in gates], physical)


def cost_loss(cost: Any, target: float, dense: float) -> Tensor:
    """((cost - target) / dense) squared."""
    loss: Tensor = ((cost - target) / dense) ** 2
    return loss


class Cost(ABC):
    """Cost of ``model`` at given widths.

    Args:
        model: dense.
        sites: that are searched.
        example: inputs of one call, batch 1.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], example: Sequence[Tensor]):
        self.model: Any = model
        self.sites = list(sites)
        self.rows, self.context = _token_counts(model, self.sites, example)
        patch: Any = getattr(model, "patch_embed", None)
        self.stem: Any = getattr(patch, "proj", nn.Module())
        width: int | None = None if why_no_embedding(model, headless=True) else self.stem.out_channels
        units, heads = [], []
        for site in self.sites:
            units.append(site.last(model).in_features)
            heads.append(site.heads if isinstance(site, AttentionSite) else 1)
        self.dense_widths = Widths(width, units, heads)
        self.dense_embedding: int = width or 1

    @abstractmethod
    def __call__(self, widths: Widths) -> Any:
        """The cost; of the type of the widths."""

    @property
    def dense(self) -> float:
        """Cost of the model as it is."""
        return float(self(self.dense_widths))

    def _width(self, site: Site, widths: Widths) -> Any:
        return site.width if widths.embedding is None else widths.embedding

    def _share(self, widths: Widths) -> Any:
        return 1 if widths.embedding is None else widths.embedding / self.dense_embedding


class Macs(Cost):
    """Multiply-accumulates of one sample as nas.profile counts them: products only, prefix tokens included.

    What lies outside of the sites is counted on the dense model; with a searched embedding it is proportional to it.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], example: Sequence[Tensor]):
        super().__init__(model, sites, example)
        self.outside = 0
        self.outside = profile(model, example).macs - Macs.__call__(self, self.dense_widths)

    def __call__(self, widths: Widths) -> Any:
        total = self.outside * self._share(widths)
        for index, site in enumerate(self.sites):
            rows, units, width = self.rows[index], widths.units[index], self._width(site, widths)
            if isinstance(site, AttentionSite):
                total = total + 4 * rows * width * units + 2 * rows * self.context[index] * units
            else:
                total = total + 2 * rows * width * units
        return total


class Work(Macs):
    """Multiply-accumulates plus what element-wise work costs beside them; only to weigh one width against another.

    A softmax score, a hidden unit through its activation and a channel through norm and residual count as 100 each,
    about what they take on a CPU core with vector units: halving the embedding of a DeiT-Ti of 65 tokens leaves 0.53
    of the MACs but 0.66 of the time, halving its MLPs and head widths 0.50 and 0.49.
    """

    def __call__(self, widths: Widths) -> Any:
        total = super().__call__(widths)
        for index, site in enumerate(self.sites):
            rows, width = self.rows[index], self._width(site, widths)
            attends = isinstance(site, AttentionSite)
            inner = widths.heads[index] * self.context[index] if attends else widths.units[index]
            total = total + _ELEMENT * rows * (inner + width)
        return total


class OfficialMacs(Cost):
    """The original's closed form for a plain ViT: no prefix tokens, biases and norms counted, softmax 5 a score.

    Images count as of 3 channels whatever they have. Attentions and MLPs that are not searched count as they are.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], example: Sequence[Tensor]):
        super().__init__(model, sites, example)
        searched = {site.name for site in self.sites}
        self.others = [site for site in find_sites(model)[0] if site.name not in searched]

    def __call__(self, widths: Widths) -> Any:
        patches = self.model.patch_embed.num_patches
        embedding = self.stem.out_channels if widths.embedding is None else widths.embedding
        heads = [
            one for one in (getattr(self.model, n, None) for n in ("head", "head_dist")) if one is not None
        ]
        kernel = OFFICIAL_COLOURS * self.stem.kernel_size[0] * self.stem.kernel_size[1]
        classes = sum(one.out_features for one in heads if isinstance(one, nn.Linear))
        total = patches * embedding * kernel + embedding * classes
        norms = embedding if widths.physical is None else widths.physical
        sizes = list(zip(self.sites, widths.units, widths.heads, strict=True))
        sizes += [
            (site, site.last(self.model).in_features, getattr(site, "heads", 1)) for site in self.others
        ]
        for site, units, count in sizes:
            if isinstance(site, AttentionSite):
                total = (
                    total + patches * (4 * embedding * units + 3 * units + embedding) + 2 * patches * norms
                )
                total = total + patches**2 * (2 * units + 6 * count)
            else:
                total = total + patches * (2 * embedding * units + embedding + units)
        return total


class Parameters(Cost):
    """Numbers in all parameters of the model."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], example: Sequence[Tensor]):
        super().__init__(model, sites, example)
        inside = {
            id(parameter)
            for site in self.sites
            for layer in (site.first(model), site.last(model))
            for parameter in layer.parameters()
        }
        inside |= {id(_table(site, model)) for site in self.sites}
        wide = [] if why_no_embedding(model, headless=True) else embedding_axes(model)
        proportional = {id(getattr(owner, name)) for owner, name, _ in wide}
        self.outside = self.constant = 0
        for parameter in model.parameters():
            if id(parameter) in proportional - inside:
                self.outside += parameter.numel()
            elif id(parameter) not in inside:
                self.constant += parameter.numel()

    def __call__(self, widths: Widths) -> Any:
        total = self.outside * self._share(widths) + self.constant
        for index, site in enumerate(self.sites):
            units, width = widths.units[index], self._width(site, widths)
            first, last = site.first(self.model), site.last(self.model)
            parts = first.out_features // last.in_features
            total = total + (parts + 1) * units * width
            total = (
                total
                + (parts * units if first.bias is not None else 0)
                + (width if last.bias is not None else 0)
            )
            table = _table(site, self.model)
            if table is not None:
                total = total + table.shape[0] * widths.heads[index]
        return total


def _table(site: Site, model: nn.Module) -> Any:
    return getattr(site.holder(model), "relative_position_bias_table", None)


@torch.no_grad()
def _token_counts(
    model: nn.Module, sites: Sequence[Site], example: Sequence[Tensor]
) -> tuple[list[int], list[int]]:
    """Per site: rows that its first linear sees in one call, and how many of them attend to each other."""
    model = copy.deepcopy(model).eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows, context = [0] * len(sites), [0] * len(sites)

    def watch(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows[index] += output.numel() // output.shape[-1]
            context[index] = output.shape[-2]

        return hook

    handles = [site.first(model).register_forward_hook(watch(i)) for i, site in enumerate(sites)]
    model(*(x.to(device) for x in example))
    for handle in handles:
        handle.remove()
    return rows, context
