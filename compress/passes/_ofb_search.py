"""The search: one training in which widths are chosen, units ranked and weights adapted together.

Source: OFB (Once for Both, CVPR 2024), algorithm; constants of the code. The rates of small runs, the clamps, and the
decision at the end are ours (the released search can end undecided).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from compress.data import answer
from compress.finetune import distillation_loss
from compress.passes._ofb_cost import Cost, cost_loss, expected_widths
from compress.passes._ofb_extract import Plan
from compress.passes._ofb_gate import LAMBDA_END, LAMBDA_START, SCORE_STD, Gate
from compress.passes._ofb_losses import CLAMP, sparsity_losses
from compress.passes._ofb_slicing import Slicer
from compress.passes._ofb_supernet import Dimensions, Supernet
from compress.passes.base import Context, Inputs, PassFailed, batches_of, class_axis

__all__ = [
    "History",
    "SearchOptions",
    "begin_near",
    "magnitude_importance",
    "rank_by",
    "search",
    "search_loss",
    "taylor_importance",
]

_TAYLOR_BATCHES = 8


@dataclass(frozen=True)
class SearchOptions:
    """How to search; the values in brackets are the original's on ImageNet.

    Attributes:
        epochs: at least 1 (100).
        warmup: share of the epochs in which lam falls from 0.99 to 0.1 and the hidden patches rise (0.2).
        learning_rate, weight_decay: of the weights and scores (1e-3, 1e-3).
        alpha_learning_rate: of the distributions; None takes 10 / steps, in [1e-3, 0.05], since Adam moves a logit by
            at most the rate in one step (1e-3).
        threshold: options of a probability at most this over their number die (0.2).
        compressions: per epoch (3).
        one_hot_weight, cost_weight: of the losses (0.5, 5).
        tangent, clamp: of the adaptive one-hot loss (True, 0).
        hidden: share of hidden patches at the start and after the warm-up (0.05, 0.25).
        distillation: share of the teacher in the loss (0).
        clip_norm: of the gradients of weights, and of alpha (none).
    """

    epochs: int = 10
    warmup: float = 0.2
    learning_rate: float = 5e-4
    weight_decay: float = 1e-3
    alpha_learning_rate: float | None = None
    threshold: float = 0.2
    compressions: int = 3
    one_hot_weight: float = 0.5
    cost_weight: float = 5.0
    tangent: bool = True
    clamp: float = CLAMP
    hidden: tuple[float, float] = (0.05, 0.25)
    distillation: float = 0.5
    clip_norm: float = 1.0


@dataclass(frozen=True)
class History:
    """What came out of a search.

    Attributes:
        steps: optimiser steps.
        compressions: calls until every width was decided, or all of them.
        undecided: modules whose width had to be decided at the end.
        reached: cost of the decided widths.
    """

    steps: int
    compressions: int
    undecided: int
    reached: float


def search_loss(supernet: Supernet, cost: Cost, target: float, options: SearchOptions) -> Tensor:
    """one_hot_weight * adaptive one-hot losses + cost_weight * cost penalty; with gradients to alpha and scores."""
    kinds = sparsity_losses(supernet.gates(), tangent=options.tangent, clamp=options.clamp)
    penalty = cost_loss(cost(expected_widths(supernet)), target, cost.dense)
    return options.cost_weight * penalty + options.one_hot_weight * sum(
        kinds.values(), torch.zeros_like(penalty)
    )


def search(
    supernet: Supernet, cost: Cost, target: float, context: Context, options: SearchOptions
) -> History:
    """Train and cut ``supernet`` in place, until every width is decided and the epochs are over.

    Args:
        cost: in whose unit ``target`` is.
        context: with training batches.

    Raises:
        PassFailed: the loss is not finite, or there is no batch.
    """
    run = _Run(supernet, cost, target, context, options)
    return run.go()


class _Run:
    def __init__(
        self, supernet: Supernet, cost: Cost, target: float, context: Context, options: SearchOptions
    ):
        self.net, self.cost, self.target = supernet, cost, target
        self.context, self.options = context, options
        self.per_epoch = sum(1 for _ in batches_of(context))
        if self.per_epoch == 0:
            raise PassFailed("ofb: the training data gave no batch")
        self.total = self.per_epoch * options.epochs
        alphas = [gate.alpha for gate in supernet.gates() if not gate.decided]
        ours = {id(alpha) for alpha in alphas}
        weights = [p for p in supernet.parameters() if p.requires_grad and id(p) not in ours]
        # Scores, tokens, norms and biases are not decayed; the positions (1, N, D) are not matrices either.
        flat = {id(gate.score) for gate in supernet.gates()}
        decayed = [p for p in weights if p.ndim in (2, 4) and id(p) not in flat]
        chosen = {id(p) for p in decayed}
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": [p for p in weights if id(p) not in chosen], "weight_decay": 0.0},
        ]
        rate = options.alpha_learning_rate or min(max(10 / self.total, 1e-3), 0.05)
        self.weights = AdamW(groups, lr=options.learning_rate)
        self.optimizers = [self.weights]
        if alphas:
            self.optimizers.append(AdamW(alphas, lr=rate, betas=(0.5, 0.999), weight_decay=1e-3))
        self.slicer = Slicer(self.optimizers)

    def go(self) -> History:
        every = max(1, self.per_epoch // self.options.compressions)
        calls = step = 0
        self.net.train()
        for epoch in range(self.options.epochs):
            for batch in batches_of(self.context):
                self._schedule(step)
                self._step(batch)
                step += 1
                if step % every == 0 and not self.net.decided:
                    self.net.compress(self.options.threshold, self.slicer)
                    calls += 1
            undecided = sum(not gate.decided for gate in self.net.gates())
            self.context.report(
                f"ofb: search epoch {epoch + 1}/{self.options.epochs}, {undecided} widths undecided"
            )
        undecided = sum(not gate.decided for gate in self.net.gates())
        self.net.compress(0.0, self.slicer, force=True)
        self.net.eval()
        return History(step, calls, undecided, float(self.cost(expected_widths(self.net))))

    def _schedule(self, step: int) -> None:
        warm = max(self.options.warmup * self.total, 1)
        progress = min(1.0, step / warm)
        start, end = self.options.hidden
        shown = 1.0 if self.net.decided else 1 - start - (end - start) * progress
        self.net.schedule(LAMBDA_START + (LAMBDA_END - LAMBDA_START) * progress, shown)
        ramp = min(1.0, (step + 1) / max(0.1 * self.total, 1))
        rate = self.options.learning_rate * ramp * (0.505 + 0.495 * math.cos(math.pi * step / self.total))
        for group in self.weights.param_groups:
            group["lr"] = rate

    def _step(self, batch: tuple[Inputs, Tensor]) -> None:
        found = answer(self.net, batch, self.context)
        loss = found.loss
        share = self.options.distillation if self.context.teacher is not None else 0.0
        if share and self.context.teacher is not None:
            with torch.no_grad():
                taught = self.context.teacher(*found.inputs)
            taught_loss = distillation_loss(found.outputs, taught, axis=class_axis(self.context))
            loss = (1 - share) * loss + share * taught_loss
        rebuilt = self.net.reconstruction(*found.inputs)
        total = loss
        if rebuilt is not None:  # both terms then have the same value, as in the original
            total = total + (loss / rebuilt.clamp(min=1e-8)).detach() * rebuilt
        if not self.net.decided:
            total = total + search_loss(self.net, self.cost, self.target, self.options)
        if not torch.isfinite(total):
            raise PassFailed(
                f"ofb: the loss of the search became {total.item()}; lower learning_rate "
                f"({self.options.learning_rate:g}) or look at the data"
            )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        for optimizer in self.optimizers:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(held, self.options.clip_norm)
            optimizer.step()


def taylor_importance(model: nn.Module, dimensions: Dimensions, context: Context) -> list[Tensor]:
    """Squared change of the loss, to first order, when a unit is taken away; summed over some training batches.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), the gate form.

    Returns:
        (heads, channels) for every gate, in the order of ``Supernet(model, dimensions).gates()``.
    """
    net = Supernet(model, dimensions).to(context.device).eval()
    gates = list(net.gates())
    for gate in gates:
        gate.fused = True
        gate.probe = torch.ones_like(gate.score).expand(gate.dense).clone().requires_grad_(True)
    probes = [gate.probe for gate in gates if gate.probe is not None]
    totals = [torch.zeros(gate.dense) for gate in gates]
    for batch in itertools.islice(batches_of(context), _TAYLOR_BATCHES):
        gradients = torch.autograd.grad(answer(net, batch, context).loss, probes)
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.detach().cpu().float() ** 2
    return totals


@torch.no_grad()
def magnitude_importance(model: nn.Module, dimensions: Dimensions) -> list[Tensor]:
    """Share of a unit in the squared norm of its module's weights, times the number of the module's units.

    Nothing is known of one module against another without data; the average unit of each counts 1 for each weight
    that it has. Same form as ``taylor_importance``.
    """
    net = Supernet(model, dimensions)
    found = []
    for gate, weight in _weights_of(net):
        norms = weight.detach().float().cpu().square().flatten(1).sum(1)
        norms = norms.reshape(-1, *gate.dense).sum(0)
        found.append(norms / norms.mean().clamp(min=1e-12) * weight.shape[1:].numel())
    return found


def _weights_of(net: Supernet) -> Iterator[tuple[Gate, Tensor]]:
    for gate in net.gates():
        if net.embedder is not None and gate is net.embedder.gate:
            columns = [site.first(net.host).weight.T for site in net.sites if site.width == gate.dense[1]]
            stem = net.host.patch_embed.proj.weight.flatten(1)
            yield gate, torch.cat([stem, *columns], dim=1)
    for site in net.sites:
        yield site.gated(net.host).gate, site.first(net.host).weight


@torch.no_grad()
def rank_by(supernet: Supernet, importance: list[Tensor]) -> None:
    """Set the scores from ``importance``: its logarithm with mean 0 and the original's standard deviation of 0.2."""
    for gate, value in zip(supernet.gates(), importance, strict=True):
        if not gate.by_head:
            value = value.mean(0, keepdim=True)
        if not gate.by_channel:
            value = value.mean(1, keepdim=True)
        score = (value + 1e-12 * value.max() + 1e-30).log()
        score = (score - score.mean()) / score.std().clamp(min=1e-6) if score.numel() > 1 else score * 0
        gate.score.copy_(score.clamp(-3, 3) * SCORE_STD)


@torch.no_grad()
def begin_near(supernet: Supernet, plan: Plan) -> None:
    """Set every alpha to 1 at the widths of ``plan``, falling to 0 at the farthest: the range of the random start."""
    if supernet.embedder is not None and plan.embedding is not None and supernet.dimensions.embedding:
        _slope(supernet.embedder.gate, 1, plan.embedding)
    for site, (heads, channels) in zip(supernet.sites, plan.sites, strict=True):
        _slope(site.gated(supernet.host).gate, heads, channels)


def _slope(gate: Gate, heads: int, channels: int) -> None:
    rows = torch.tensor([abs(one - heads) / gate.dense[0] for one in gate.head_options])
    columns = torch.tensor([abs(one - channels) / gate.dense[1] for one in gate.channel_options])
    distance = rows[:, None] + columns
    gate.alpha.copy_(1 - distance / distance.max().clamp(min=1e-6))
