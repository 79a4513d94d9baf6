"""OFB: importance of units and widths of modules searched together in one training, then cut out physically.

Source: "Once for Both: Single Stage of Importance and Sparsity Search for Vision Transformer Compression" (CVPR 2024),
and its code (HankYe/Once-for-Both at beb72b6). Where the code's behaviour harms, ours differs, and an option brings the
original's back: multipliers are calibrated so that the pretrained function survives the start; units are ranked by a
Taylor criterion before the search; the tangent of the one-hot loss is clamped; what is undecided at the end is decided;
widths are then repaired until the exact cost meets the budget; the classification head is kept.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.finetune import epochs_of, finetune, require_trainable
from compress.passes import register_pass
from compress.passes._laws import FLAG, check_options, number, optional, whole, word
from compress.passes._ofb_cost import Cost, Macs, Parameters, Work
from compress.passes._ofb_extract import Plan, expand, extract, plan_of, repair
from compress.passes._ofb_fit import fitted_dimensions
from compress.passes._ofb_gate import Gate
from compress.passes._ofb_latency import fit_latency
from compress.passes._ofb_losses import CLAMP
from compress.passes._ofb_official import load_searched, load_searching
from compress.passes._ofb_search import (
    SearchOptions,
    begin_near,
    magnitude_importance,
    rank_by,
    search,
    taylor_importance,
)
from compress.passes._ofb_supernet import Dimensions, Supernet
from compress.passes.base import Context, Pass
from compress.probing import require_runs
from compress.structure import StructureError
from nas.errors import UserMistake

__all__ = ["Dimensions", "Ofb", "Supernet", "expand", "extract", "load_searched", "load_searching"]

Measure = Literal["macs", "params", "latency"]

_EPOCHS = 10
_TARGET = 0.5


_LAWS = {
    "target": optional(number("(0, 1]")),
    "measure": optional(word("macs", "params", "latency")),
    "epochs": optional(whole(0)),
    "finetune_epochs": optional(whole(0)),
    "learning_rate": number("above 0"),
    "alpha_learning_rate": optional(number("above 0")),
    "head_step": optional(whole(1)),
    "threshold": number("(0, 1)"),
    "one_hot_weight": number("at least 0"),
    "cost_weight": number("at least 0"),
    "distillation": number("[0, 1]"),
    "importance": word("taylor", "magnitude", "random"),
    "clamp": number("[0, 0.5)"),
    **dict.fromkeys(("embedding", "heads", "channels", "mlp", "masked_images", "grow"), FLAG),
    **dict.fromkeys(("tangent", "calibrated", "normalised_residual", "official_options", "fresh_head"), FLAG),
}


@register_pass("ofb")
class Ofb(Pass):
    """Searches widths of embedding, heads, q/k/v and MLPs, and extracts a plain, narrower model.

    Plain ViTs (DeiT, also distilled) are searched in all dimensions; other models with attentions (qkv, proj,
    num_heads) and MLPs (fc1, act, fc2), such as Swin, in heads, head widths and MLPs. Those of classes that are not
    known are tried first (``compress.probing``), and left as they are where a cut would not be exact. The cost of the
    result is at most the target, and as near below it as one step of a width allows.

    Frozen weights are searched by their importance like others, but keep their values and stay frozen.

    Args:
        target: share of the given model's cost, in (0, 1]; None: the context's budget, or 0.5.
        measure: what the target is of: ``macs``, ``params``, or ``latency`` (measured on the target); None: the kind of
            the context's budget, or macs.
        epochs: of the search; None: the pipeline's, or 10. 0 prunes by importance at once, without a search.
        finetune_epochs: after the cut, with distillation; None: as many as ``epochs``.
        learning_rate: of the weights, in both trainings; above 0.
        alpha_learning_rate: of the distributions over widths; None fits it to the length of the search.
        embedding, heads, channels, mlp: which dimensions are searched.
        head_step: between numbers of heads; None: 2 as in the original where the number is even, else 1 (and 1 for two
            heads where no channels are searched).
        threshold: options of at most this probability over their number are deleted, in (0, 1).
        one_hot_weight, cost_weight: of the adaptive one-hot loss and of the cost penalty, at least 0.
        masked_images: progressive masked image modelling beside the task (plain ViTs only), in place of patch dropping.
        distillation: share of the teacher in the losses of search and fine-tuning, in [0, 1].
        importance: what ranks the units at first, and so begins the distributions near the widths that it suggests:
            ``taylor``, ``magnitude``; or ``random`` (the original's).
        grow: widen the result again where the search ended below the target; off in the original.
        tangent, clamp: the term of the one-hot loss, and how far its argument stays from 0 and 1 (0 in the original).
        calibrated: False multiplies by the bare bi-mask, as the original does.
        normalised_residual: True adds branches to the normalised input while the embedding is undecided, likewise.
        official_options: True offers the original's widths only, which may leave some units out: see ``Dimensions``.
        fresh_head: True starts the fine-tuning with a new classification head, likewise.

    Raises:
        UserMistake: an option out of its range.
    """

    requires = frozenset({"train"})
    changes = frozenset({"widths"})

    def __init__(
        self,
        *,
        target: float | None = None,
        measure: Measure | None = None,
        epochs: int | None = None,
        finetune_epochs: int | None = None,
        learning_rate: float = 5e-4,
        alpha_learning_rate: float | None = None,
        embedding: bool = True,
        heads: bool = True,
        channels: bool = True,
        mlp: bool = True,
        head_step: int | None = None,
        threshold: float = 0.2,
        one_hot_weight: float = 0.5,
        cost_weight: float = 5.0,
        masked_images: bool = True,
        distillation: float = 0.5,
        importance: str = "taylor",
        grow: bool = True,
        tangent: bool = True,
        clamp: float = CLAMP,
        calibrated: bool = True,
        normalised_residual: bool = False,
        official_options: bool = False,
        fresh_head: bool = False,
    ):
        check_options("ofb", locals(), _LAWS)
        self.target = target
        self.measure = measure
        self.epochs = epochs
        self.finetune_epochs = finetune_epochs
        self.learning_rate = learning_rate
        self.alpha_learning_rate = alpha_learning_rate
        self.embedding = embedding
        self.heads = heads
        self.channels = channels
        self.mlp = mlp
        self.head_step = head_step
        self.threshold = threshold
        self.one_hot_weight = one_hot_weight
        self.cost_weight = cost_weight
        self.masked_images = masked_images
        self.distillation = distillation
        self.importance = importance
        self.grow = grow
        self.tangent = tangent
        self.clamp = clamp
        self.calibrated = calibrated
        self.normalised_residual = normalised_residual
        self.official_options = official_options
        self.fresh_head = fresh_head
        self._strength: float | None = None

    def with_strength(self, strength: float) -> Ofb:
        """A target between the cost of the model (0) and that of the narrowest widths (1).

        What is probed has widths chosen without training; those of the search then cost no more than it, in the unit
        of the context's budget.
        """
        if not 0 <= strength <= 1:
            raise UserMistake(f"ofb: strength={strength!r} must be in [0, 1]")
        other = copy.copy(self)
        other._strength = strength
        return other

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """The narrower model; see ``Pass.apply``.

        Raises:
            StructureError: a model of several inputs.
            UserMistake: nothing can be narrowed, or not far enough for the target; or tied weights.
            PassFailed: the loss became NaN or infinite.
        """
        if len(context.example) != 1:
            raise StructureError(
                f"{type(model).__name__} has {len(context.example)} inputs; widths are searched in models of one"
            )
        _refuse_tied(model)
        home = next(model.parameters()).device
        with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
            torch.manual_seed(context.seed)
            out = self._apply(model, context)
        return out.to(home).eval()

    def _apply(self, model: nn.Module, context: Context) -> nn.Module:
        dense = copy.deepcopy(model).to(context.device).eval()
        epochs = epochs_of(self.epochs, context, _EPOCHS, must=True)
        after = epochs if self.finetune_epochs is None else self.finetune_epochs
        require_trainable(dense, after, "finetune_epochs")
        dimensions = fitted_dimensions(dense, self._dimensions(), context)
        supernet = Supernet(dense, dimensions).to(context.device)
        for reason in supernet.left_out:
            context.report(f"ofb: not searched: {reason}")
        measure = self.measure or (context.budget.kind if context.budget else "macs")
        cost: Cost = (Parameters if measure == "params" else Macs)(dense, supernet.sites, context.example)
        magnitude = magnitude_importance(dense, dimensions)
        rank_by(supernet, magnitude)
        goal = self._goal(supernet, cost, measure, context)
        known = dict(zip(supernet.gates(), magnitude, strict=True))
        price = cost if measure == "params" else Work(dense, supernet.sites, context.example)
        untrained = repair(plan_of(supernet), supernet, cost, goal.limit, known, price=price)
        if context.probe:
            out = extract(dense, supernet, untrained)
            require_runs(out, context.example, "units")
            return out
        reference = dense if goal.share is not None else extract(dense, supernet, untrained)

        self._begin(dense, supernet, cost, price, goal, known, context)
        full, plan = self._searched(dense, supernet, cost, goal, epochs, measure, context)
        importance = dict(zip(supernet.gates(), self._taylor(full, supernet, context), strict=True))

        def at(limit: float) -> tuple[nn.Module, float]:
            fitted = repair(plan, supernet, cost, limit, importance, grow=self.grow, price=price)
            return extract(full, supernet, fitted), float(cost(fitted.widths()))

        if measure == "latency":
            out = fit_latency(at, goal.limit, reference, goal.share or 1.0, context)
        else:
            out, reached = at(goal.limit)
            unit = measure_name(measure)
            context.report(f"ofb: {unit} {reached:.6g} after the repair, of {goal.limit:.6g} allowed")
        if self.fresh_head:
            _renew_heads(out)
        require_runs(out, context.example, "units")
        finetune(
            out,
            context,
            epochs=after,
            learning_rate=self.learning_rate,
            distillation=self.distillation,
        )
        return out

    def _begin(
        self,
        dense: nn.Module,
        supernet: Supernet,
        cost: Cost,
        price: Cost,
        goal: _Goal,
        known: dict[Gate, Tensor],
        context: Context,
    ) -> None:
        """Rank the units, and begin the distributions near the widths that this suggests."""
        if self.importance == "random":
            for gate in supernet.gates():
                nn.init.trunc_normal_(gate.score, std=0.2)
            return
        if self.importance == "taylor":
            known = dict(zip(supernet.gates(), self._taylor(dense, supernet, context), strict=True))
            rank_by(supernet, list(known.values()))
        begin_near(supernet, repair(plan_of(supernet), supernet, cost, goal.limit, known, price=price))

    def _searched(
        self,
        dense: nn.Module,
        supernet: Supernet,
        cost: Cost,
        goal: _Goal,
        epochs: int,
        measure: str,
        context: Context,
    ) -> tuple[nn.Module, Plan]:
        """The model at full width with what was trained, and the widths that the search decided."""
        if not epochs:
            return dense, plan_of(supernet)
        found = search(supernet, cost, goal.limit, context, self._search_options(epochs))
        context.report(
            f"ofb: {found.undecided} widths decided at the end; {measure_name(measure)} "
            f"{found.reached:.4g}, {goal.limit:.4g} wanted"
        )
        plan = plan_of(supernet)
        supernet.fuse()
        return expand(dense, supernet), plan

    def _goal(self, supernet: Supernet, cost: Cost, measure: str, context: Context) -> _Goal:
        """The limit in the unit of ``cost``; for latencies a first guess, with the share of the reference's latency."""
        if self._strength is not None:
            narrowest = float(cost(_narrowest(supernet).widths()))
            return _Goal(cost.dense - self._strength * (cost.dense - narrowest), None)
        if self.target is not None or context.budget is None:
            share = self.target or _TARGET
            return _Goal(share * cost.dense, share)
        original = context.original.get(measure, cost.dense)
        allowed = context.budget.limit(original)
        if measure != "latency":
            return _Goal(allowed, allowed / cost.dense)
        if not context.budget.relative and "latency" not in context.original:
            raise UserMistake(
                "ofb: a budget in milliseconds needs the measured latency of the original; give a share"
            )
        share = min(1.0, allowed / original)
        return _Goal(share * cost.dense, share)

    def _taylor(self, model: nn.Module, supernet: Supernet, context: Context) -> list[Tensor]:
        if context.train is None:
            return magnitude_importance(model, supernet.dimensions)
        return taylor_importance(model, supernet.dimensions, context)

    def _dimensions(self) -> Dimensions:
        return Dimensions(
            embedding=self.embedding,
            heads=self.heads,
            channels=self.channels,
            mlp=self.mlp,
            head_step=self.head_step,
            calibrated=self.calibrated,
            masked_images=self.masked_images,
            normalised_residual=self.normalised_residual,
            official_options=self.official_options,
        )

    def _search_options(self, epochs: int) -> SearchOptions:
        return SearchOptions(
            epochs=epochs,
            learning_rate=self.learning_rate,
            alpha_learning_rate=self.alpha_learning_rate,
            threshold=self.threshold,
            one_hot_weight=self.one_hot_weight,
            cost_weight=self.cost_weight,
            tangent=self.tangent,
            clamp=self.clamp,
            distillation=self.distillation,
        )


class _Goal:
    """``limit`` in the unit of the cost; ``share`` of the given model's, None where a probe is the measure."""

    def __init__(self, limit: float, share: float | None):
        self.limit = limit
        self.share = share


def measure_name(measure: str) -> str:
    """Of the unit that the cost counts in."""
    return "parameters" if measure == "params" else "MACs"


def _narrowest(supernet: Supernet) -> Plan:
    gates = [site.gated(supernet.host).gate for site in supernet.sites]
    embedding = None
    if supernet.embedder is not None:
        embedding = supernet.embedder.gate.channel_options[0]
    return Plan(embedding, tuple((gate.head_options[0], max(gate.channel_options[0], 1)) for gate in gates))


def _refuse_tied(model: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name:
            raise UserMistake(
                f"ofb: {first} and {name} are one tensor (tied weights) and cannot be cut apart; give each its own copy"
            )


def _renew_heads(model: Any) -> None:
    for name in ("head", "head_dist"):
        layer = getattr(model, name, None)
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
