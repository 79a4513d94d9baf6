"""Activations that fade to the identity while a model trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from compress.passes.base import Batches, Inputs
from spaces.vision.vanillanet import identity_share

__all__ = ["AnnealedBatches", "Fading"]


class Fading(nn.Module):
    """A'(x) = (1 - share) A(x) + share x; for a ReLU this is a leaky ReLU of slope ``share``.

    Args:
        act: A.
        share: in [0, 1].
    """

    def __init__(self, act: nn.Module, share: float = 0.0):
        super().__init__()
        # One that writes into its input would take away the x of the second term.
        if getattr(act, "inplace", False):
            act.inplace = False  # type: ignore[assignment]
        self.act, self.share = act, share

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        if self.share == 1:
            return x
        return (1 - self.share) * self.act(x) + self.share * x  # type: ignore[no-any-return]


class AnnealedBatches:
    """Batches that set the share of some fading activations whenever they are gone through again.

    Args:
        batches: of the caller.
        fading: whose share is set.
        decay_epochs: the first round, from 0, with a share of 1.
        schedule: see ``identity_share``.
    """

    def __init__(self, batches: Batches, fading: Sequence[Fading], decay_epochs: float, schedule: str):
        self._batches, self._fading = batches, fading
        self._decay_epochs, self._schedule = decay_epochs, schedule
        self._epoch = 0
        try:
            self._length = len(batches)  # type: ignore[arg-type]
        except TypeError:
            self._length = sum(1 for _ in batches)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        share = identity_share(self._epoch, self._decay_epochs, self._schedule)
        for one in self._fading:
            one.share = share
        self._epoch += 1
        yield from self._batches
