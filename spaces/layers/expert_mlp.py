"""Emergent experts: the hidden units of a dense feed-forward network in groups, of which every token uses some.

Paper: Qiu, Huang, Fu, "Emergent Mixture-of-Experts: Can Dense Pre-trained Transformers Benefit from Emergent Modular
Structures?" (later "Unlocking Emergent Modularity in Large Language Models", NAACL 2024), section 3.
Code: qiuzh20/EMoE, commit ba8e1757c3d862bdc1ed4c0ff2e459cbc7ec0ec4, MIT (read, not copied).

Letters: T tokens (of the whole batch), d width, h hidden units, N experts of s = h / N units each, k experts a token.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional

from spaces.errors import UserMistake, nearest
from spaces.layers.expert_choice import WEIGHTINGS, by_expert, choose
from spaces.layers.expert_gates import CosineGate, KeyGate

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ExpertMlp", "Experts", "restore", "stay_frozen"]

_FORMS = ("auto", "grouped", "masked")

# Of the arithmetic that is saved, one expert must save this much (MACs) to pay for its five small kernels; and up to
# this many numbers the inputs of all experts are gathered at once. Both from timings on one core of a CPU.
_WORTH_A_GROUP = 1_400_000
_AT_ONCE = 3 << 17


class Experts(nn.Module, ABC):
    """What the plain and the gated form share: choosing experts and computing those alone.

    Selected experts are summed with weight 1 (average gates), so that with k = N this is the dense network. The
    forms of the computation:

    - ``grouped``: tokens are gathered by expert, and only k / N of the arithmetic is done. In eager evaluation only.
    - ``masked``: all hidden units are computed and those of unselected experts set to zero. Nothing is saved; it is a
      tenth slower than the dense network. In training, under ``torch.compile``, in exported graphs (ONNX), and
      with the gates that read the hidden units, it is the only form.

    ``auto`` takes the grouped form where tokens and experts are many enough for it to beat the masked one. That does
    not mean that it beats the dense network: DeiT-Ti with N = 24 in all blocks takes, on one core of a CPU, about 0.9
    (k = 4) and 1.1 (k = 8) of the dense model's time at batch 1, 0.73 (k = 4), 0.88 (k = 8) and 1.02 (k = 12) at
    batch 16. With few tokens (a class token alone) or small layers it is slower. On GPUs nothing was measured. Counters
    see the work of the form that runs, experts taken as evenly loaded.

    Args:
        dim, hidden, out: d, h and the width of the outputs (None: d); ``hidden`` is a multiple of ``experts``.
        experts, k: N, and how many of them a token uses, in [1, N].
        gate: ``average`` (mean of the expert's keys), ``normalised`` (the same on inputs of length 1), ``learned``
            (cosine), or what a child class adds.
        capacity: an expert takes at most ``k * int(capacity * ceil(T / N))`` tokens; those with the highest score of
            their first choice come first, first choices before second ones. What does not fit contributes nothing,
            its share 1 / k of the bias included, so that outputs depend on the rest of the batch. 0: no limit.
        weighting: ``ones``; ``shares``: of the softmax, of ``total``; ``scores``: values of the softmax as they are.
            None: shares with a learned gate, else ones.
        total: what shares sum up to: k keeps the size of the dense network's outputs, 1 is the original's, whose bias
            is then divided by k as well. None: k.
        prioritised: with a capacity, the highest scores come first, as told; else what lies in front of the batch.
        own_biases: each expert adds a bias of its own, which is no share of a common one: that of the original after
            a training. The dense network's is then k times their mean.
        form: ``auto``, ``grouped`` or ``masked``.
        key_bias, value_bias: whether hidden units and outputs have a bias.
        gate_width: of the learned gate.
        act: activation; GELU, or SiLU where gated, by default.

    Raises:
        UserMistake: a number out of its range, or an unknown gate or form.
    """

    gates: tuple[str, ...] = ("average", "normalised", "learned")
    key_bias: Tensor | None
    bias: Tensor | None
    units: Tensor

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        k: int,
        *,
        out: int | None = None,
        gate: str = "average",
        capacity: float = 0.0,
        weighting: str | None = None,
        total: float | None = None,
        prioritised: bool = True,
        form: str = "auto",
        key_bias: bool = True,
        value_bias: bool = True,
        own_biases: bool = False,
        gate_width: int = 256,
        act: nn.Module | None = None,
    ):
        super().__init__()
        if experts < 1 or hidden % experts:
            fitting = [n for n in range(2, min(hidden, 256) + 1) if hidden % n == 0]
            raise UserMistake(
                f"experts={experts} must divide the {hidden} hidden units into equal parts; allowed here: {fitting}"
            )
        if not 1 <= k <= experts:
            raise UserMistake(f"k={k} must be in [1, {experts}], the number of experts")
        if not 0 <= capacity < math.inf or (total is not None and not total > 0) or gate_width < 1:
            raise UserMistake(
                f"capacity={capacity} must be 0 (no limit) or above, total={total} above 0, "
                f"gate_width={gate_width} at least 1"
            )
        weighting = weighting or ("shares" if gate == "learned" else "ones")
        for name, value, known in (
            ("gate", gate, self.gates),
            ("form", form, _FORMS),
            ("weighting", weighting, WEIGHTINGS),
        ):
            if value not in known:
                raise UserMistake(f"{name}={value!r}{nearest(value, known)}; allowed: {', '.join(known)}")
        self.dim, self.hidden, self.experts, self.k = dim, hidden, experts, k
        self.out = dim if out is None else out
        self.kind, self.capacity, self.form = gate, capacity, form
        self.weighting, self.prioritised, self.own_biases = weighting, prioritised, own_biases
        self.total = float(k) if total is None else float(total)
        self.act = nn.GELU() if act is None else act
        self.keys = nn.Parameter(torch.zeros(hidden, dim))
        self.register_parameter("key_bias", nn.Parameter(torch.zeros(hidden)) if key_bias else None)
        self.values = nn.Parameter(torch.zeros(hidden, self.out))
        biases = torch.zeros(experts, self.out) if own_biases else torch.zeros(self.out)
        self.register_parameter("bias", nn.Parameter(biases) if value_bias else None)
        self.register_buffer("units", torch.arange(hidden))
        self.gate: CosineGate | KeyGate = (
            CosineGate(dim, experts, gate_width)
            if gate == "learned"
            else KeyGate(dim, experts, normalise=gate == "normalised")
        )

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again; another activation is put in by name."""
        return {
            "dim": self.dim,
            "hidden": self.hidden,
            "experts": self.experts,
            "k": self.k,
            "out": self.out,
            "gate": self.kind,
            "capacity": self.capacity,
            "weighting": self.weighting,
            "total": self.total,
            "prioritised": self.prioritised,
            "form": self.form,
            "key_bias": self.key_bias is not None,
            "value_bias": self.bias is not None,
            "own_biases": self.own_biases,
            "gate_width": self.gate.width if isinstance(self.gate, CosineGate) else 256,
        }

    @property
    def size(self) -> int:
        """s, hidden units of one expert."""
        return self.hidden // self.experts

    @abstractmethod
    def dense(self) -> nn.Module:
        """The dense network of all units in their original order, each a copy: the way back.

        Weights come back bit for bit. A learned gate is dropped: every expert counts with weight 1.
        """

    @abstractmethod
    def projections(self, x: Tensor, units: slice) -> list[Tensor]:
        """What the activation is applied to, (T, d) -> (T, units) each, for hidden units in that range of positions."""

    @abstractmethod
    def combine(self, projections: Sequence[Tensor]) -> Tensor:
        """Hidden units (T, units) of their projections."""

    def activations(self, x: Tensor, units: slice) -> Tensor:
        """Of the hidden units in that range of positions, (T, d) -> (T, units)."""
        return self.combine(self.projections(x, units))

    @torch.no_grad()
    def refresh_gate(self, momentum: float = 0.0) -> None:
        """Make an average gate ``momentum * old + (1 - momentum) * mean of the keys``; a learned one stays as it is."""
        if isinstance(self.gate, KeyGate):
            mean = self._gating_rows().view(self.experts, self.size, self.dim).mean(1)
            self.gate.weight.mul_(momentum).add_(mean.to(self.gate.weight), alpha=1 - momentum)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., out)."""
        flat = x.reshape(-1, self.dim)
        return self.by_logits(flat, self.logits(flat)).reshape(*x.shape[:-1], self.out)

    def logits(self, x: Tensor) -> Tensor:
        """What the gate says, (T, d) -> (T, N), in float32 at least."""
        found: Tensor = self.gate(x)
        return found

    def by_logits(self, x: Tensor, logits: Tensor) -> Tensor:
        """Outputs (T, out) for inputs (T, d) where the gate says ``logits`` (T, N)."""
        if self.k == self.experts and self.weighting == "ones" and not self.capacity:
            made, bias = self.activations(x, slice(None)) @ self.values, self._common_bias()
            return made if bias is None else made + bias
        chosen, weights = self._choose(logits)
        if weights is not None:
            weights = weights.to(x.dtype)
        if not self._worth_grouping(x):
            return self._masked(self.activations(x, slice(None)), chosen, weights)
        return self._grouped(x, chosen, weights)

    def _gating_rows(self) -> Tensor:
        """Of which an average gate is the mean, (h, d)."""
        return self.keys

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Experts of each token, best first, (T, k), and their weights (T, k); None where all are 1."""
        return choose(
            logits,
            self.k,
            self.weighting,
            total=self.total,
            capacity=self.capacity,
            prioritised=self.prioritised,
        )

    def _worth_grouping(self, x: Tensor) -> bool:
        if self.training or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
            return False
        if (
            torch._C._get_tracing_state() is not None and not x.is_meta
        ):  # sizes of groups would become constants
            return False
        if self.form != "auto":
            return self.form == "grouped"
        saved = len(x) * (self.experts - self.k) * self.size * self._macs_per_unit()
        return saved > self.experts * _WORTH_A_GROUP

    def _macs_per_unit(self) -> int:
        return self.dim + self.out

    def _masked(self, hidden: Tensor, chosen: Tensor, weights: Tensor | None) -> Tensor:
        mask = self._mask(hidden, chosen, weights)
        kept = hidden.view(-1, self.experts, self.size) * mask[:, :, None]
        return self._summed(kept.reshape(-1, self.hidden) @ self.values, chosen, weights)

    def _mask(self, like: Tensor, chosen: Tensor, weights: Tensor | None) -> Tensor:
        """Weight of every expert for every token, (T, N), of the type of ``like``."""
        ones = like.new_ones(()).expand(chosen.shape) if weights is None else weights.to(like.dtype)
        return like.new_zeros(()).expand(chosen.shape[0], self.experts).scatter(1, chosen, ones)

    def _grouped(self, x: Tensor, chosen: Tensor, weights: Tensor | None) -> Tensor:
        order, loads = by_expert(chosen, weights, self.experts, self.capacity)
        tokens = order // self.k
        shares = None if weights is None else weights.reshape(-1)[order][:, None]
        if len(order) * self.dim <= _AT_ONCE:
            groups = x[tokens].split(loads)
            pieces = [self.projections(rows, self._span(e)) for e, rows in enumerate(groups)]
            # Activations are slow on small pieces: 18 us for each on a CPU.
            hidden = self.combine([torch.cat(part) for part in zip(*pieces, strict=True)])
            hidden = hidden if shares is None else hidden * shares
            parts = [rows @ self.values[self._span(e)] for e, rows in enumerate(hidden.split(loads))]
            made = x.new_zeros(len(x), self.out).index_add_(0, tokens, torch.cat(parts).to(x.dtype))
            return self._summed(made, chosen, weights)
        made = x.new_zeros(len(x), self.out)
        for e, (mine, at) in enumerate(
            zip(tokens.split(loads), torch.arange(len(order)).split(loads), strict=True)
        ):
            hidden = self.activations(x[mine], self._span(e))
            hidden = hidden if shares is None else hidden * shares[at]
            made.index_add_(0, mine, (hidden @ self.values[self._span(e)]).to(x.dtype))
        return self._summed(made, chosen, weights)

    def _span(self, expert: int) -> slice:
        return slice(expert * self.size, (expert + 1) * self.size)

    def _summed(self, made: Tensor, chosen: Tensor, weights: Tensor | None) -> Tensor:
        """With the bias, of which every expert has the share 1 / k, or one of its own."""
        if self.bias is None:
            return made
        if self.own_biases:
            return made + self._mask(made, chosen, weights) @ self.bias.to(made.dtype)
        if weights is None:
            return made + self.bias
        return made + self.bias * (weights.sum(dim=1, keepdim=True) / self.k)

    def _common_bias(self) -> Tensor | None:
        """What k experts of the mean bias add, (out,)."""
        if self.bias is None or not self.own_biases:
            return self.bias
        return self.bias.mean(0) * self.k

    @classmethod
    def _filled(
        cls,
        keys: nn.Linear,
        values: nn.Linear,
        act: nn.Module,
        labels: Tensor,
        k: int,
        options: dict[str, Any],
    ) -> Self:
        """With the sizes and the weights of ``keys`` and ``values``."""
        made = cls(
            keys.in_features,
            keys.out_features,
            int(labels.max()) + 1,
            k,
            out=values.out_features,
            key_bias=keys.bias is not None,
            value_bias=values.bias is not None,
            act=copy.deepcopy(act),
            **options,
        )
        made._fill(labels.to(keys.weight.device), keys, values)
        return made

    @torch.no_grad()
    def _fill(self, labels: Tensor, keys: nn.Linear, values: nn.Linear) -> None:
        """Take over the weights of a dense network whose units belong to the experts ``labels`` (h,)."""
        counts = torch.bincount(labels, minlength=self.experts)
        if len(labels) != self.hidden or bool((counts != self.size).any()):
            raise UserMistake(
                f"labels: must give each of {self.experts} experts {self.size} units, but give {counts.tolist()}"
            )
        self.to(device=keys.weight.device, dtype=keys.weight.dtype)
        self.units.copy_(labels.argsort(stable=True))
        self.keys.copy_(keys.weight[self.units])
        self.values.copy_(values.weight.t()[self.units])
        if self.key_bias is not None and keys.bias is not None:
            self.key_bias.copy_(keys.bias[self.units])
        if self.bias is not None and values.bias is not None:
            self.bias.copy_(values.bias)
        stay_frozen(self.keys, keys.weight)
        stay_frozen(self.key_bias, keys.bias)
        stay_frozen(self.values, values.weight)
        stay_frozen(self.bias, values.bias)

    def _original(self) -> Tensor:
        """Position in the experts of every unit in the original order, (h,)."""
        return self.units.argsort()


def stay_frozen(own: Tensor | None, given: Tensor | None) -> None:
    """``own`` learns where ``given``, which it comes from, did."""
    if own is not None and given is not None:
        own.requires_grad_(given.requires_grad)


def restore(layer: nn.Module, name: str, value: Tensor | None, like: Tensor | None) -> None:
    """A copy of ``value`` as parameter ``name`` of ``layer``, which learns where ``like`` does; None leaves it."""
    if value is not None and like is not None:
        setattr(layer, name, nn.Parameter(value.detach().clone(), requires_grad=like.requires_grad))


class ExpertMlp(Experts):
    """``sum over a token's experts of act(x keys^T + key_bias) values``, plus the bias: see ``Experts``."""

    @classmethod
    def of(
        cls, fc1: nn.Linear, fc2: nn.Linear, act: nn.Module, labels: Tensor, k: int, **options: Any
    ) -> ExpertMlp:
        """From ``fc2(act(fc1(x)))``, with labels (h,) in [0, N) of the hidden units, as many of each.

        Raises:
            UserMistake: see ``Experts``; or the labels are not balanced.
        """
        made = cls._filled(fc1, fc2, act, labels, k, options)
        made.refresh_gate()
        return made.train(fc1.training)

    def projections(self, x: Tensor, units: slice) -> list[Tensor]:
        """See ``Experts.projections``."""
        bias = None if self.key_bias is None else self.key_bias[units]
        return [functional.linear(x, self.keys[units], bias)]

    def combine(self, projections: Sequence[Tensor]) -> Tensor:
        """See ``Experts.combine``."""
        hidden: Tensor = self.act(projections[0])
        return hidden

    def dense(self) -> Mlp:
        """See ``Experts.dense``."""
        back = self._original()
        biases = (self.key_bias is not None, self.bias is not None)
        options: dict[str, Any] = {"act_layer": lambda: copy.deepcopy(self.act), "bias": biases}
        made = Mlp(self.dim, self.hidden, self.out, **options)
        restore(made.fc1, "weight", self.keys[back], self.keys)
        restore(made.fc1, "bias", None if self.key_bias is None else self.key_bias[back], self.key_bias)
        restore(made.fc2, "weight", self.values[back].t().contiguous(), self.values)
        restore(made.fc2, "bias", self._common_bias(), self.bias)
        return made.train(self.training)
