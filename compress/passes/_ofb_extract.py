"""From a decided search to a plain model: which units stay, a repair of the cost, and the physical cut.

The released search ends at whatever cost it reached; here the widths are then changed one step at a time, cheapest
first, until the exact cost meets the budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes._ofb_cost import Cost, Widths
from compress.passes._ofb_gate import Gate, Keep
from compress.passes._ofb_sites import AttentionSite, GatedLinear, Site, embedding_axes
from compress.passes._ofb_slicing import Slicer, sync_sizes
from compress.passes._ofb_supernet import Supernet, set_embedding_width
from compress.surgery import kernel_multiple
from nas.errors import UserMistake

__all__ = ["Plan", "expand", "extract", "keep_temperature", "plan_of", "repair", "step_of"]


@dataclass(frozen=True)
class Plan:
    """Widths of every searched module.

    Attributes:
        embedding: channels, or None where the embedding is not searched.
        sites: (heads, channels) of each; (1, hidden) for an MLP.
    """

    embedding: int | None
    sites: tuple[tuple[int, int], ...]

    def widths(self) -> Widths:
        """As the cost takes them."""
        return Widths(self.embedding, [h * c for h, c in self.sites], [h for h, _ in self.sites])


def plan_of(supernet: Supernet) -> Plan:
    """The widths that are physically there."""
    gates = [site.gated(supernet.host).gate for site in supernet.sites]
    embedding = None if supernet.embedder is None else supernet.embedder.gate.channels
    return Plan(embedding, tuple((gate.heads, gate.channels) for gate in gates))


@torch.no_grad()
def expand(model: nn.Module, supernet: Supernet) -> nn.Module:
    """A copy of ``model`` at full width in which what the search kept has its fused, trained values.

    Units that were cut have the values of ``model``, so that a repair can take them back; so has what is frozen in it.

    Args:
        model: the dense model that the supernet was made from.
        supernet: fused.
    """
    full: Any = copy.deepcopy(model)
    embedder = supernet.embedder
    places = None
    if embedder is not None:
        places = torch.tensor([channel for _, channel in embedder.gate.present()])
    inner: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for site in supernet.sites:
        rows, columns = _rows_of(site, site.gated(supernet.host).gate)
        name = f"{site.name}." if site.name else ""
        first, last = ("qkv", "proj") if isinstance(site, AttentionSite) else ("fc1", "fc2")
        inner[f"{name}{first}.weight"] = (rows, places)
        inner[f"{name}{first}.bias"] = (rows, None)
        inner[f"{name}{last}.weight"] = (places, columns)
        inner[f"{name}{last}.bias"] = (places, None)
        if isinstance(site, AttentionSite):
            heads = torch.tensor(site.gated(supernet.host).gate.head_ids)
            inner[f"{name}relative_position_bias_table"] = (None, heads)
    trained = _trained(supernet)
    axes = {} if places is None else _axes_by_name(full)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, value in full.state_dict().items():
        if name in frozen:  # its gate is not folded into it either
            continue
        new = trained[name].to(value.dtype)
        if new.shape == value.shape and name not in inner and name not in axes:
            value.copy_(new)
            continue
        index: list[Tensor | None] = [None] * value.ndim
        if name in inner:
            for dim, one in zip(range(value.ndim), inner[name], strict=False):
                index[dim] = one
        for dim in axes.get(name, ()):
            index[dim % value.ndim] = places
        value[_mesh(index, value)] = new
    return full  # type: ignore[no-any-return]


def _rows_of(site: Site, gate: Gate) -> tuple[Tensor, Tensor]:
    heads, channels = torch.tensor(gate.head_ids), torch.tensor(gate.channel_ids)
    return site.rows(heads, channels, gate.dense)


def _trained(supernet: Supernet) -> Mapping[str, Tensor]:
    """The host's tensors under the names of the dense model."""
    gated = {site.gated(supernet.host) for site in supernet.sites}
    names = {id(module): name for name, module in supernet.host.named_modules() if module in gated}
    out = {}
    for key, value in supernet.host.state_dict().items():
        for name in names.values():
            if key.startswith(f"{name}.linear."):
                key = f"{name}.{key.removeprefix(f'{name}.linear.')}"
                break
        out[key] = value
    return out


def _axes_by_name(model: nn.Module) -> dict[str, list[int]]:
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, list[int]] = {}
    for owner, parameter, dim in embedding_axes(model):
        if getattr(owner, parameter, None) is not None:
            prefix = names[id(owner)]
            found.setdefault(f"{prefix}.{parameter}" if prefix else parameter, []).append(dim)
    return found


def _mesh(index: Sequence[Tensor | None], value: Tensor) -> tuple[Tensor, ...]:
    """Open index vectors that broadcast against each other, one for each dimension."""
    full = [torch.arange(size) if one is None else one for one, size in zip(index, value.shape, strict=True)]
    return tuple(
        one.to(value.device).reshape([-1 if place == dim else 1 for place in range(value.ndim)])
        for dim, one in enumerate(full)
    )


@torch.no_grad()
def extract(full: nn.Module, supernet: Supernet, plan: Plan | None = None) -> nn.Module:
    """A plain model of the widths of ``plan`` (those of the search by default), in evaluation mode.

    Units are taken best first, in the order that the search gave them. q is scaled so that the softmax keeps the
    temperature of the dense head width while the attention has the scale of its new one.

    Args:
        full: what ``expand`` gave; not changed.
    """
    plan = plan or plan_of(supernet)
    model: Any = copy.deepcopy(full)
    slicer = Slicer()
    for site, (heads, channels) in zip(supernet.sites, plan.sites, strict=True):
        gate = site.gated(supernet.host).gate
        kept = gate.head_order()[:heads]
        units = [gate.channel_order(head)[:channels] for head in kept]
        if (heads, channels) == gate.dense:  # nothing goes: leave the order as it was
            kept, units = list(range(heads)), [list(range(channels))] * heads
        site.cut(model, Keep(torch.tensor(kept), torch.tensor(units)), gate.dense, slicer)
        if isinstance(site, AttentionSite) and channels != gate.dense[1]:
            keep_temperature(site.first(model), (channels / gate.dense[1]) ** 0.5)
    if supernet.embedder is not None and plan.embedding is not None:
        gate = supernet.embedder.gate
        if plan.embedding < gate.dense[1]:
            index = torch.tensor(gate.channel_order(0)[: plan.embedding])
            for owner, name, dim in embedding_axes(model):
                slicer.select(owner, name, index, dim)
                sync_sizes(owner)
            set_embedding_width(model, plan.embedding)
    if any(isinstance(module, (Gate, GatedLinear)) for module in model.modules()):
        raise RuntimeError("ofb: a gate is left in the extracted model")
    return model.eval()  # type: ignore[no-any-return]


def keep_temperature(qkv: nn.Linear, factor: float) -> None:
    third = qkv.out_features // 3
    qkv.weight[:third] *= factor
    if qkv.bias is not None:
        qkv.bias[:third] *= factor


def repair(
    plan: Plan,
    supernet: Supernet,
    cost: Cost,
    limit: float,
    importance: Mapping[Gate, Tensor],
    *,
    grow: bool = True,
    price: Callable[[Widths], Any] | None = None,
) -> Plan:
    """The plan, narrowed one step at a time until its exact cost is at most ``limit``, then widened while it fits.

    Widths come to lie on multiples that kernels like (see ``step_of``): first all are rounded up to them. A step takes
    the units that cost most for the importance they have (or gives back those that have most for what they cost): one
    step of embedding channels, one head, channels of every head, or hidden units of one module.

    Args:
        importance: of every unit of the dense model, (heads, channels) for each gate, comparable between gates.
        grow: whether to widen; without it nothing is rounded up either.
        price: what importance is weighed against; ``cost`` by default.

    Raises:
        UserMistake: even the narrowest widths cost more than ``limit``.
    """
    steps = _Steps(supernet, importance)
    price = price or cost
    plan = steps.aligned(plan) if grow else plan
    while cost(plan.widths()) > limit:
        options = list(steps.narrower(plan))
        if not options:
            raise UserMistake(
                f"ofb: budget {limit:.4g} is out of reach: the narrowest widths of its search space cost "
                f"{cost(plan.widths()):.4g}; raise the budget, or combine ofb with a pass that changes something else"
            )
        now = price(plan.widths())
        plan = min(options, key=lambda one: one[1] / max(now - price(one[0].widths()), 1e-9))[0]
    while grow:
        now = price(plan.widths())
        fitting = [one for one in steps.wider(plan) if cost(one[0].widths()) <= limit]
        if not fitting:
            break
        plan = max(fitting, key=lambda one: one[1] / max(price(one[0].widths()) - now, 1e-9))[0]
    return plan


def step_of(size: int) -> int:
    """Between widths of a module that has ``size`` units: about a 64th of them, in whole ``kernel_multiple``."""
    whole = kernel_multiple(size)
    return max(whole, size // 64 // whole * whole)


class _Steps:
    """The neighbours of a plan, each with the importance that it loses or gains."""

    def __init__(self, supernet: Supernet, importance: Mapping[Gate, Tensor]):
        self.gates = [site.gated(supernet.host).gate for site in supernet.sites]
        self.sums = [_sums(gate, importance[gate]) for gate in self.gates]
        self.embedding: list[float] | None = None
        self.embedding_bounds = (1, 1)
        if supernet.embedder is not None and supernet.dimensions.embedding:
            gate = supernet.embedder.gate
            self.embedding = _sums(gate, importance[gate])[1]
            self.embedding_bounds = (max(gate.dense[1] // 2, 1), gate.dense[1])
        self.wanted = supernet.dimensions

    def aligned(self, plan: Plan) -> Plan:
        """The plan with every searched width rounded up to a multiple of its step."""
        embedding = plan.embedding
        if self.embedding is not None and embedding is not None:
            embedding = _next(embedding - 1, 1, *self.embedding_bounds)
        sites = []
        for gate, (heads, channels) in zip(self.gates, plan.sites, strict=True):
            whole = not self._narrows_channels(gate)
            low, high = max(1, gate.dense[1] // 4), gate.dense[1]
            sites.append((heads, channels if whole else _next(channels - 1, 1, low, high)))
        return Plan(embedding, tuple(sites))

    def narrower(self, plan: Plan) -> Iterator[tuple[Plan, float]]:
        for other in self._neighbours(plan, -1):
            yield other, self._value(plan) - self._value(other)

    def wider(self, plan: Plan) -> Iterator[tuple[Plan, float]]:
        for other in self._neighbours(plan, 1):
            yield other, self._value(other) - self._value(plan)

    def _neighbours(self, plan: Plan, sign: int) -> Iterator[Plan]:
        if self.embedding is not None and plan.embedding is not None:
            width = _next(plan.embedding, sign, *self.embedding_bounds)
            if width != plan.embedding:
                yield replace(plan, embedding=width)
        for index, (gate, now) in enumerate(zip(self.gates, plan.sites, strict=True)):
            for size in self._sizes(gate, now, sign):
                yield replace(plan, sites=(*plan.sites[:index], size, *plan.sites[index + 1 :]))

    def _sizes(self, gate: Gate, now: tuple[int, int], sign: int) -> Iterator[tuple[int, int]]:
        heads, channels = now
        all_heads, all_channels = gate.dense
        if gate.kind == "attention" and self.wanted.heads:
            wider = [one for one in self.wanted.head_options(all_heads) if (one - heads) * sign > 0]
            if wider:
                yield (min(wider) if sign > 0 else max(wider)), channels
        if self._narrows_channels(gate):
            size = _next(channels, sign, max(1, all_channels // 4), all_channels)
            if size != channels:
                yield heads, size

    def _narrows_channels(self, gate: Gate) -> bool:
        return gate.kind == "mlp" or (gate.by_channel and self.wanted.channels)

    def _value(self, plan: Plan) -> float:
        total = 0.0
        if self.embedding is not None and plan.embedding is not None:
            total += self.embedding[plan.embedding]
        return total + sum(
            sums[heads][channels] for sums, (heads, channels) in zip(self.sums, plan.sites, strict=True)
        )


def _next(size: int, sign: int, low: int, high: int) -> int:
    """The next multiple of the step beyond ``size`` in the direction of ``sign``, within [low, high]."""
    step = step_of(high)
    other = (size // step + 1) * step if sign > 0 else (-(-size // step) - 1) * step
    return min(max(other, low), high)


def _sums(gate: Gate, importance: Tensor) -> list[list[float]]:
    """[h][c]: importance of the first h heads with their first c channels, in the order in which units are taken."""
    heads = gate.head_order()
    order = torch.tensor([gate.channel_order(head) for head in heads])
    table = importance.detach().double().cpu()[torch.tensor(heads)].gather(1, order)
    return nn.functional.pad(table.cumsum(0).cumsum(1), (1, 0, 1, 0)).tolist()
