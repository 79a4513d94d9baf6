"""Emergent experts of a gated feed-forward network. Source: ``spaces.layers.expert_mlp``, and its LLaMA code."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.mlp import GluMlp, SwiGLU
from torch import Tensor, nn
from torch.nn import functional

from spaces.layers.expert_mlp import Experts, restore, stay_frozen

__all__ = ["ExpertSwiGLU"]


class ExpertSwiGLU(Experts):
    """``act(x keys^T) * (x factors^T)`` as hidden units: the gated networks of LLaMA, DINOv2 and EVA; see ``Experts``.

    Further gates: ``up`` (mean of the expert's factors' rows), and three that score an expert by the mean over its
    hidden units of ``|x factors^T|`` (``up_abs``), of the hidden units (``inter``), or of their sizes (``inter_abs``).
    These three need all hidden units first, so that no arithmetic is saved.

    Args:
        packed: keys and factors were one layer: the dense network is timm's ``GluMlp``, else its ``SwiGLU``.
        keys_last: in that layer, the keys come behind the factors.
        options: as of ``Experts``.
    """

    gates = (*Experts.gates, "up", "up_abs", "inter", "inter_abs")
    factor_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        k: int,
        *,
        packed: bool = False,
        keys_last: bool = False,
        act: nn.Module | None = None,
        **options: Any,
    ):
        super().__init__(dim, hidden, experts, k, act=nn.SiLU() if act is None else act, **options)
        self.packed, self.keys_last = packed, keys_last
        self.factors = nn.Parameter(torch.zeros(hidden, dim))
        bias = nn.Parameter(torch.zeros(hidden)) if self.key_bias is not None else None
        self.register_parameter("factor_bias", bias)

    @classmethod
    def of(
        cls,
        keys: nn.Linear,
        factors: nn.Linear,
        values: nn.Linear,
        act: nn.Module,
        labels: Tensor,
        k: int,
        **options: Any,
    ) -> ExpertSwiGLU:
        """From ``values(act(keys(x)) * factors(x))``, as ``ExpertMlp.of``."""
        made = cls._filled(keys, values, act, labels, k, options)
        with torch.no_grad():
            made.factors.copy_(factors.weight[made.units])
            if made.factor_bias is not None and factors.bias is not None:
                made.factor_bias.copy_(factors.bias[made.units])
        stay_frozen(made.factors, factors.weight)
        stay_frozen(made.factor_bias, factors.bias)
        made.refresh_gate()
        return made.train(keys.training)

    def config(self) -> dict[str, Any]:
        """See ``Experts.config``."""
        return {**super().config(), "packed": self.packed, "keys_last": self.keys_last}

    def projections(self, x: Tensor, units: slice) -> list[Tensor]:
        """See ``Experts.projections``: of the keys and of the factors."""
        keys = functional.linear(x, self.keys[units], None if self.key_bias is None else self.key_bias[units])
        bias = None if self.factor_bias is None else self.factor_bias[units]
        return [keys, functional.linear(x, self.factors[units], bias)]

    def combine(self, projections: Sequence[Tensor]) -> Tensor:
        """See ``Experts.combine``."""
        hidden: Tensor = self.act(projections[0]) * projections[1]
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., out)."""
        if self.kind not in ("up_abs", "inter", "inter_abs"):
            return super().forward(x)
        flat = x.reshape(-1, self.dim)
        made = self.projections(flat, slice(None))
        hidden = self.combine(made)
        chosen, weights = self._choose(self._scores(hidden, made[1]))
        if weights is not None:
            weights = weights.to(x.dtype)
        return self._masked(hidden, chosen, weights).reshape(*x.shape[:-1], self.out)

    def logits(self, x: Tensor) -> Tensor:
        """See ``Experts.logits``; the gates that read the hidden units compute them here."""
        if self.kind not in ("up_abs", "inter", "inter_abs"):
            return super().logits(x)
        made = self.projections(x, slice(None))
        return self._scores(self.combine(made), made[1])

    def dense(self) -> GluMlp | SwiGLU:
        """See ``Experts.dense``."""
        back, has_bias = self._original(), self.key_bias is not None
        rows = [self.keys[back], self.factors[back]]
        biases = [b[back] for b in (self.key_bias, self.factor_bias) if b is not None]
        options: dict[str, Any] = {
            "act_layer": lambda: copy.deepcopy(self.act),
            "bias": (has_bias, self.bias is not None),
        }
        made: GluMlp | SwiGLU
        if self.packed:
            step = -1 if self.keys_last else 1
            made = GluMlp(self.dim, 2 * self.hidden, self.out, gate_last=self.keys_last, **options)
            restore(made.fc1, "weight", torch.cat(rows[::step]), self.keys)
            restore(made.fc1, "bias", torch.cat(biases[::step]) if has_bias else None, self.key_bias)
        else:
            made = SwiGLU(self.dim, self.hidden, self.out, **options)
            pairs = zip(rows, biases or (None, None), strict=True)
            likes = ((self.keys, self.key_bias), (self.factors, self.factor_bias))
            for layer, (weight, bias), like in zip((made.fc1_g, made.fc1_x), pairs, likes, strict=True):
                restore(layer, "weight", weight, like[0])
                restore(layer, "bias", bias, like[1])
        restore(made.fc2, "weight", self.values[back].t().contiguous(), self.values)
        restore(made.fc2, "bias", self._common_bias(), self.bias)
        return made.train(self.training)

    def _gating_rows(self) -> Tensor:
        return self.factors if self.kind == "up" else self.keys

    def _macs_per_unit(self) -> int:
        return 2 * self.dim + self.out

    def _scores(self, hidden: Tensor, factors: Tensor) -> Tensor:
        source = {"up_abs": factors.abs(), "inter": hidden}.get(self.kind, hidden.abs())
        source = source if source.dtype == torch.float64 else source.float()
        return source.view(-1, self.experts, self.size).mean(2)
