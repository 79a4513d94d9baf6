"""EMoE: the hidden units of dense feed-forward networks become experts, of which every token uses some, and back.

Paper: Qiu, Huang, Fu, "Emergent Mixture-of-Experts: Can Dense Pre-trained Transformers Benefit from Emergent Modular
Structures?" (later "Unlocking Emergent Modularity in Large Language Models", NAACL 2024), sections 3 and 4.
Code: qiuzh20/EMoE, commit ba8e1757c3d862bdc1ed4c0ff2e459cbc7ec0ec4, MIT (read, not copied).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.finetune import epochs_of, finetune
from compress.measuring import compare_on_target
from compress.passes import register_pass
from compress.passes._emoe_grouping import Grouping, group_units
from compress.passes._emoe_sites import Site, find_sites, put, split
from compress.passes._emoe_training import in_training, summed_balance
from compress.passes.base import Context, Pass
from compress.structure import StructureError
from nas.errors import UserMistake, nearest
from spaces.layers.expert_mlp import Experts
from spaces.layers.expert_swiglu import ExpertSwiGLU

__all__ = ["Emoe", "merge_experts"]

Keep = Literal["faster", "anyway"]

_EPOCHS = 3
_EXPERTS = 24  # the paper's, for vision
_FEWEST, _MOST = 8, 64  # what the paper's settings span, but for the largest language model
_DECAY = 1e-4  # the paper's, for vision
_NOT_RECOGNISED = "blocks whose units are experts are not recognised any more; put emoe behind that pass"
_NO_UNITS = "replaced layers have no hidden units to group any more; put emoe in front of that pass"


@register_pass("emoe")
class Emoe(Pass):
    """Groups hidden units by their keys (rows of the first layer) into experts with a gate of their mean keys.

    Meant by its authors for better fine-tuning (``back=true``: experts while fine-tuning, a dense network afterwards);
    as compression it leaves k of N experts' arithmetic to every token, at a price in accuracy. How much of that is
    time, and where none is, see ``spaces.layers.expert_mlp.Experts``.

    Args:
        layers: which feed-forward networks, by position from 0 in the order of the model (in a ViT that of the
            blocks), negative from the end; or ``all``; None takes every second one of the last ``2 * last`` but the
            last, as the paper does (8 and 10 of 12).
        last: how many networks that pattern takes, at least 1.
        experts: N, divides the number of hidden units; one number, or one for each of ``layers``. None takes for each
            network the divisor in 8..64 that is nearest to the paper's 24; a network that has none stays dense.
        k: experts of each token, in [1, N]; likewise. A network with k = N stays dense. 4 where ``strength`` is not
            given either.
        strength: in [0, 1], instead of ``k``: 0 takes all experts, 1 a single one.
        gate: ``average`` (mean key), ``normalised``, ``learned`` (cosine; needs training, it starts at random); with
            gated networks (SwiGLU) also ``up``, ``up_abs``, ``inter``, ``inter_abs``.
        grouping: ``kmeans`` (balanced, of the keys' directions) or ``random``.
        capacity: how many times its even share of tokens an expert takes; 0 for no limit. The original has 1.5, also
            in evaluation: predictions then depend on the rest of the batch.
        balance: weight of the loss that keeps experts evenly used, for each network, at least 0.
        noise: of the gate in training, at least 0; its standard deviation is ``noise / N``.
        momentum: of the average gate's refresh from the keys after each step, in [0, 1).
        official: as in the authors' code: the experts of a learned gate sum up to weight 1 instead of k (far from the
            dense network, until trained; a single expert has its value of the softmax), and the balancing loss compares
            softmax values with logits.
        keep: only networks that are ``faster`` on the target as experts (measured, on the example) are split, or
            ``anyway``. With ``back`` nothing is measured.
        seconds: of measuring for each kind of network, above 0.
        back: merge the experts into dense networks after fine-tuning.
        epochs: of fine-tuning; None takes the pipeline's, else 3. Without training data there is none.
        learning_rate, distillation: of the fine-tuning.

    Dropout within the networks is left out.
    """

    changes = frozenset({"experts"})
    cannot_follow: Mapping[str, str] = MappingProxyType(
        {**Pass.cannot_follow, "ranks": _NO_UNITS, "activations": _NO_UNITS}
    )
    cannot_precede: Mapping[str, str] = MappingProxyType(
        dict.fromkeys(("ofb", "tokens", "widths"), _NOT_RECOGNISED)
    )

    def __init__(
        self,
        layers: Sequence[int] | str | None = None,
        *,
        last: int = 2,
        experts: int | Sequence[int] | None = None,
        k: int | Sequence[int] | None = None,
        strength: float | None = None,
        gate: str = "average",
        grouping: Grouping = "kmeans",
        capacity: float = 0.0,
        balance: float = 0.01,
        noise: float = 1.0,
        momentum: float = 0.0,
        official: bool = False,
        keep: Keep = "faster",
        seconds: float = 4.0,
        back: bool = False,
        epochs: int | None = None,
        learning_rate: float = 5e-5,
        distillation: float = 0.5,
    ):
        if not (layers is None or layers == "all" or (_numbers(layers) and not isinstance(layers, int))):
            raise UserMistake(f"emoe: layers={layers!r} must be a list of positions, 'all', or left out")
        if k is not None and strength is not None:
            raise UserMistake("emoe: give k or strength, not both")
        k = 4 if k is None and strength is None else k
        for name, given in (("experts", experts), ("k", k), ("last", last)):
            least = (
                1 if given is None else min(given if isinstance(given, (list, tuple)) else [given], default=0)
            )
            if given is not None and (not _numbers(given) or least < 1):
                raise UserMistake(f"emoe: {name}={given!r} must be at least 1, whole, or a list of such")
        if strength is not None and not 0 <= strength <= 1:
            raise UserMistake(f"emoe: strength={strength} must be in [0, 1]")
        for name, word, known in (
            ("gate", gate, ExpertSwiGLU.gates),
            ("grouping", grouping, ("kmeans", "random")),
            ("keep", keep, ("faster", "anyway")),
        ):
            if word not in known:
                raise UserMistake(f"emoe: {name}={word!r}{nearest(word, known)}; allowed: {', '.join(known)}")
        if min(capacity, balance, noise) < 0 or not 0 <= momentum < 1 or not seconds > 0:
            raise UserMistake(
                f"emoe: capacity={capacity}, balance={balance} and noise={noise} must be at least 0, "
                f"momentum={momentum} in [0, 1), seconds={seconds} above 0"
            )
        self.layers, self.last, self.experts, self.k, self.strength = layers, last, experts, k, strength
        self.gate, self.grouping, self.capacity = gate, grouping, capacity
        self.balance, self.noise, self.momentum, self.official = balance, noise, momentum, official
        self.keep, self.seconds, self.back = keep, seconds, back
        self.epochs, self.learning_rate, self.distillation = epochs, learning_rate, distillation
        self.requires = frozenset({"train"}) if epochs else frozenset()
        if back:  # what it leaves behind is dense again
            self.cannot_precede = MappingProxyType({})
        self._groups: dict[Any, Tensor] = {}
        self._verdicts: dict[Any, tuple[bool, str]] = {}

    def options(self) -> dict[str, Any]:
        """See ``Pass.options``."""
        return {name: value for name, value in super().options().items() if name != "cannot_precede"}

    def with_strength(self, strength: float) -> Pass:
        """k from all experts to one, in ``layers``, or in all networks where these were not given."""
        options = self.options() | {"k": None, "strength": strength, "layers": self.layers or "all"}
        made = Emoe(**options)
        made._groups, made._verdicts = self._groups, self._verdicts
        return made

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See ``Pass.apply``."""
        result = copy.deepcopy(model).eval()
        plan = self._plan(find_sites(result), type(model).__name__, context.report)
        measured = self.keep == "faster" and not self.back
        inputs = _inputs(result, [site.name for site, _, _ in plan], context) if measured else {}
        placed, said = list[str](), set[str]()
        for number, (site, count, k) in enumerate(plan):
            if k == count and self.gate != "learned":
                continue
            made = self._experts(site, count, k, context.seed + number)
            if not measured or self._faster(site, made, inputs[site.name], context, said):
                put(result, site.name, made)
                placed.append(f"{site.name} ({k} of {count})")
        if not placed:
            context.report("no network is split into experts: the model stays as it was")
            return result
        context.report(f"experts in {', '.join(placed)}")
        self._finetune(result, context)
        if self.back:
            context.report("the experts are merged into dense networks")
            return merge_experts(result)
        return result

    def _plan(
        self, sites: list[Site], kind: str, report: Callable[[str], None]
    ) -> list[tuple[Site, int, int]]:
        """Networks with their N and k."""
        if not sites:
            raise StructureError(
                f"{kind}: within it is no feed-forward network of plain nn.Linear layers "
                "(fc1, act, fc2; or fc1_g, fc1_x, act, fc2)"
            )
        chosen = [sites[place] for place in self._positions(len(sites))]
        counts = self._counts(chosen)
        if self.strength is not None:
            used = [max(1, round(count * (1 - self.strength))) for count in counts]
        else:
            used = _each(self.k or 1, len(chosen), "k")
        for site, count in zip(chosen, counts, strict=True):
            if site.kind == "experts":
                raise StructureError(f"{site.name} is split into experts already; choose others")
            if not count:
                report(
                    f"{site.name} stays dense: its {site.hidden} hidden units cannot be shared out evenly to "
                    f"{_FEWEST} to {_MOST} experts"
                )
        return [one for one in zip(chosen, counts, used, strict=True) if one[1]]

    def _counts(self, sites: Sequence[Site]) -> list[int]:
        """N of each network; 0 where it was left open and no number suits."""
        if self.experts is None:
            return [_usual_count(site.hidden) for site in sites]
        return _each(self.experts, len(sites), "experts")

    def _positions(self, depth: int) -> list[int]:
        if self.layers == "all":
            return list(range(depth))
        if self.layers is None:
            if 2 * self.last > depth:
                raise UserMistake(
                    f"emoe: last={self.last} needs {2 * self.last} feed-forward networks, the model has "
                    f"{depth}; give layers"
                )
            return list(range(depth - 2 * self.last, depth, 2))
        wanted = [int(one) for one in self.layers]
        if not all(-depth <= one < depth for one in wanted):
            raise UserMistake(f"emoe: layers={wanted} must be in [{-depth}, {depth}), the model has {depth}")
        found = sorted({one % depth for one in wanted})
        if len(found) != len(wanted) or not found:
            raise UserMistake(f"emoe: layers={wanted} must name at least one network, each once")
        return [one % depth for one in wanted]

    def _experts(self, site: Site, count: int, k: int, seed: int) -> Experts:
        if site.hidden % count:
            fitting = [n for n in range(2, min(site.hidden, 257)) if site.hidden % n == 0]
            raise UserMistake(
                f"emoe: experts={count} must divide the {site.hidden} hidden units of {site.name}; "
                f"allowed here: {fitting}"
            )
        if k > count:
            raise UserMistake(f"emoe: k={k} must be in [1, {count}], the number of experts of {site.name}")
        keys = site.keys.float().cpu()
        # A pipeline that adjusts strengths asks for the same groups again and again.
        known = (hashlib.blake2b(keys.numpy().tobytes()).hexdigest(), count, self.grouping, seed)
        if known not in self._groups:
            self._groups[known] = group_units(keys, count, self.grouping, seed)
        form: dict[str, Any] = {"gate": self.gate, "capacity": self.capacity}
        if self.official and self.gate == "learned":
            form |= {"weighting": "shares", "total": 1.0} if k > 1 else {"weighting": "scores"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a learned gate starts at random
            return split(site, self._groups[known], k, **form)

    def _faster(self, site: Site, made: Experts, x: Tensor, context: Context, said: set[str]) -> bool:
        """What the target says, measured once; each run of the pass tells it again, as others may not be heard."""
        key = (site.kind, tuple(made.config().values()), tuple(x.shape), str(context.target))
        if key not in self._verdicts:
            pair = compare_on_target(
                made, site.module, context.with_changes(example=(x,)), seconds=self.seconds
            )
            faster = pair.verdict == "faster"
            self._verdicts[key] = (
                faster,
                f"networks like {site.name} with {made.k} of {made.experts} experts take {pair.ratio:.3f} "
                f"[{pair.low:.3f}, {pair.high:.3f}] of the time on {context.target}: "
                f"{'split' if faster else 'they stay dense'}",
            )
        faster, words = self._verdicts[key]
        if words not in said:
            said.add(words)
            context.report(words)
        return faster

    def _finetune(self, model: nn.Module, context: Context) -> None:
        def balance(model: nn.Module, inputs: tuple[Tensor, ...], outputs: Any, taught: Any) -> Tensor:
            return self.balance * summed_balance(model)

        with in_training(model, noise=self.noise, momentum=self.momentum, official=self.official):
            finetune(
                model,
                context,
                epochs=epochs_of(self.epochs, context, _EPOCHS),
                learning_rate=self.learning_rate,
                weight_decay=_DECAY,
                distillation=self.distillation,
                extra=balance if self.balance else None,
            )


def merge_experts(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which experts are dense networks again, all units in their original order.

    Weights come back bit for bit, so that splitting and merging alone changes nothing. What a dense network computes
    is what all of its experts together would: its outputs are not those of k of them. A learned gate is dropped.

    Raises:
        UserMistake: there are no experts in it.
    """
    result = copy.deepcopy(model)
    found = {name: module for name, module in result.named_modules() if isinstance(module, Experts)}
    if not found:
        raise UserMistake(f"merge_experts: {type(model).__name__} has no experts to merge")
    for name, module in found.items():
        if not name:
            return module.dense()
        put(result, name, module.dense())
    return result


def _inputs(model: nn.Module, names: Sequence[str], context: Context) -> dict[str, Tensor]:
    """What each of these networks is called with on the example."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen[name] = given[0].detach().clone()

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    home = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(*(x.to(home) for x in context.example))
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if name not in seen or len(seen[name]) != 1:
            raise StructureError(
                f"{name}: is not called once with one sample of the batch, so its speed cannot be measured; "
                "give keep=anyway"
            )
    return {name: x.cpu() for name, x in seen.items()}


def _usual_count(hidden: int) -> int:
    """The divisor of ``hidden`` nearest to the paper's number, the smaller of two; 0 where none is near enough."""
    most = min(_MOST, hidden // 2)  # an expert of a single unit is no group
    fitting = [count for count in range(_FEWEST, most + 1) if hidden % count == 0]
    return min(fitting, key=lambda count: abs(count - _EXPERTS), default=0)


def _numbers(given: Any) -> bool:
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    return bool(several) and all(isinstance(one, int) and not isinstance(one, bool) for one in several)


def _each(given: int | Sequence[int], count: int, name: str) -> list[int]:
    if isinstance(given, int):
        return [given] * count
    if len(given) != count:
        raise UserMistake(f"emoe: {name} has {len(given)} numbers for {count} networks")
    return list(given)
