"""What emergent experts need in training only: noise on the gate, its refresh, and the balancing loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.passes._emoe_sites import put
from spaces.layers.expert_mlp import Experts

__all__ = ["TrainedExperts", "balance_loss", "in_training", "summed_balance"]


def balance_loss(logits: Tensor, noisy: Tensor, k: int, noise: float, *, official: bool = False) -> Tensor:
    """How unevenly experts are used: the mean of two squared coefficients of variation over the experts.

    Of the importance, which is the sum over tokens of the gate's softmax; and of the load, the expected number of
    tokens that would choose the expert if the noise were drawn anew.

    Args:
        logits, noisy: (T, N), without and with noise.
        k: experts of a token.
        noise: above 0; its standard deviation is ``noise / N``.
        official: compare softmax values with the noisy logit of the k-th choice, as the original does, instead of
            logits with logits.

    Source: the paper's code (Tutel); after Shazeer et al., "Outrageously Large Neural Networks", section 4 and
    appendix A, where logits are compared with logits.
    """
    scores = logits.softmax(dim=1)
    last = noisy.topk(k, dim=1).values[:, -1:]
    ahead = (scores if official else logits) - last
    load = torch.special.ndtr(ahead * (logits.shape[1] / noise)).sum(0)
    return (_variation(scores.sum(0)) + _variation(load)) / 2


def _variation(amounts: Tensor) -> Tensor:
    return amounts.var() / (amounts.mean().square() + 1e-10)


class TrainedExperts(nn.Module):
    """Experts during a training: forwards in training mode refresh an average gate, add noise and note the loss.

    Refreshing before a step what the last step changed comes to the same as refreshing after each step.

    Args:
        experts: what is trained.
        noise: at least 0; its standard deviation is ``noise / N``.
        momentum: of the refresh, in [0, 1).
        official: see ``balance_loss``.
    """

    def __init__(self, experts: Experts, noise: float, momentum: float, official: bool):
        super().__init__()
        self.experts, self.noise, self.momentum, self.official = experts, noise, momentum, official
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., out)."""
        if not self.training:
            return self.experts(x)  # type: ignore[no-any-return]
        self.experts.refresh_gate(self.momentum)
        flat = x.reshape(-1, x.shape[-1])
        logits = self.experts.logits(flat)
        count = self.experts.experts
        noisy = logits + torch.randn_like(logits) * (self.noise / count) if self.noise else logits
        if count > 1:
            # Without noise the load would be a step; the loss then takes the usual width.
            self.balance = balance_loss(
                logits, noisy, self.experts.k, self.noise or 1.0, official=self.official
            )
        return self.experts.by_logits(flat, noisy).reshape(*x.shape[:-1], -1)


@contextmanager
def in_training(model: nn.Module, *, noise: float, momentum: float, official: bool) -> Iterator[None]:
    """All experts of ``model`` are ``TrainedExperts`` while entered; afterwards plain ones, with refreshed gates."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    for name, module in found.items():
        put(model, name, TrainedExperts(module, noise, momentum, official).train(module.training))
    try:
        yield
    finally:
        for name, module in found.items():
            module.refresh_gate(momentum)
            put(model, name, module)


def summed_balance(model: nn.Module) -> Tensor:
    """Balancing losses of the last forward, added up."""
    found = [
        module.balance
        for module in model.modules()
        if isinstance(module, TrainedExperts) and module.balance is not None
    ]
    return torch.stack([one.float() for one in found]).sum() if found else torch.tensor(0.0)
