"""The entangled bi-mask of one searchable module: importance of units and a distribution over widths.

Source: OFB (Once for Both, CVPR 2024), bi-mask section, and the code of HankYe/Once-for-Both at beb72b6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compress.passes._ofb_slicing import Slicer
from nas.errors import UserMistake

__all__ = [
    "Gate",
    "Keep",
    "channel_options",
    "embedding_options",
    "head_options",
    "hidden_options",
    "official_options",
]

LAMBDA_START, LAMBDA_END = 0.99, 0.1
SCORE_STD = 0.2

Kind = Literal["attention", "mlp", "embedding"]


def _range(low: int, high: int, step: int, official: bool) -> tuple[int, ...]:
    """From ``low`` in steps of ``step``; ``high`` is included whether or not a step meets it, but not if ``official``.

    Raises:
        UserMistake: ``official``, and the step is 0: the original cannot be built in this size.
    """
    if not official:
        return tuple(sorted({*range(max(low, 1), high + 1, max(step, 1)), high}))
    if step < 1:
        raise UserMistake(
            f"ofb: official_options: the original has none for {high} units, since its step would be 0; "
            "leave this dimension out, or official_options off"
        )
    # The original keeps shares and rounds share * high down, which loses one at some sizes: 50, not 51, of 84.
    return tuple(int(size / high * high) for size in range(low, high + 1, step))


def embedding_options(dim: int, *, official: bool = False) -> tuple[int, ...]:
    """Embedding widths: half of ``dim`` to ``dim`` in steps of dim // 32, at most 12.

    >>> len(embedding_options(384)), len(embedding_options(768)), embedding_options(640, official=True)[-1]
    (17, 33, 632)
    """
    step = min(dim // 32, 12)
    return _range(dim // 2, dim, step if official else max(step, 1), official)


def head_options(heads: int, step: int | None = None, *, official: bool = False) -> tuple[int, ...]:
    """Numbers of heads: 2, 4, ... as in the original where ``heads`` is even, else every number from 1.

    With ``official`` 2, 4, ... for every ``heads``: never all of an odd number, and none of a single head.

    >>> head_options(6), head_options(3), head_options(4, step=1)
    ((2, 4, 6), (1, 2, 3), (1, 2, 3, 4))
    >>> head_options(5, official=True)
    (2, 4)
    """
    if official:
        step = step or 2
        return tuple(range(step, heads + 1, step))
    step = step or (2 if heads % 2 == 0 else 1)
    return _range(step, heads, step, official)


def channel_options(head_dim: int, *, official: bool = False) -> tuple[int, ...]:
    """Channels of each head: a quarter to all in eighths. ``official`` has a width of 0 for fewer than 4."""
    return _range(head_dim // 4, head_dim, max(head_dim // 8, 1), official)


def hidden_options(hidden: int, *, official: bool = False) -> tuple[int, ...]:
    """Hidden units of an MLP: a quarter to all in eighths."""
    return _range(hidden // 4, hidden, hidden // 8, official)


_CHANNEL_OPTIONS = {"attention": channel_options, "mlp": hidden_options, "embedding": embedding_options}


@dataclass(frozen=True)
class Keep:
    """Which units of a module stay, by their present places: heads (h,), and channels of each of these (h, c)."""

    heads: Tensor
    channels: Tensor


class Gate(nn.Module):
    """Importance and sparsity of the units of one module; a grid of heads x channels (one head for MLP and embedding).

    While undecided the multiplier of a unit is ``lam * sigmoid(score) + (1 - lam) * V``, where V is the expected prefix
    mask of the softmax over the options that are alive, at the unit's rank: heads ranked by the sum of sigmoid(score)
    over their channels, channels within their head by score. Decided, the multiplier is ``score`` itself, until fused.

    Args:
        kind: ``attention``, ``mlp`` or ``embedding``.
        heads, channels: of the dense module.
        head_options, channel_options: widths to choose from, rising. A dimension without any is not searched: it stays
            whole, and the score is shared over it. Units beyond the last option have V = 0.
        calibrated: divide by the multiplier of a kept unit of average score, ``lam / 2 + 1 - lam``, so that the
            pretrained function survives the start and the schedule of lam. Off in the original.

    Attributes:
        alpha: (len(head_options), len(channel_options)) logits of the options; ``alive`` marks those not deleted.
        score: (heads or 1, channels or 1), by which dimensions are searched; ``by_head`` and ``by_channel`` tell.
        lam: in [0, 1].
        decided, fused: see above.
    """

    alive: Tensor

    def __init__(
        self,
        kind: Kind,
        heads: int,
        channels: int,
        *,
        head_options: Sequence[int] = (),
        channel_options: Sequence[int] = (),
        calibrated: bool = False,
    ):
        super().__init__()
        self.kind: Kind = kind
        self.dense = (heads, channels)
        self.calibrated = calibrated
        self.by_head = bool(head_options)
        self.by_channel = bool(channel_options) or not head_options
        self.alpha = nn.Parameter(torch.empty(0))
        self.register_buffer("alive", torch.empty(0, dtype=torch.bool))
        self.offer(tuple(head_options) or (heads,), tuple(channel_options) or (channels,))
        shape = (heads if self.by_head else 1, channels if self.by_channel else 1)
        self.score = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=SCORE_STD))
        self.lam = LAMBDA_START
        self.decided = False
        self.fused = False
        self.probe: Tensor | None = None
        self.head_ids = list(range(heads))
        self.channel_ids = [list(range(channels)) for _ in range(heads)]
        self.lost_heads: list[int] = []
        self.lost_channels: dict[int, list[int]] = {head: [] for head in range(heads)}
        self._channel_ids_of_lost: dict[int, list[int]] = {}

    def offer(self, head_options: Sequence[int], channel_options: Sequence[int]) -> None:
        """Choose among these options from now on; alpha starts anew, uniform in [0, 1). Of a gate that was not cut."""
        self.head_options, self.channel_options = tuple(head_options), tuple(channel_options)
        alpha = torch.rand(len(self.head_options), len(self.channel_options))
        self.alpha = nn.Parameter(alpha.to(self.alpha))
        self.alive = torch.ones_like(self.alpha, dtype=torch.bool)

    @property
    def heads(self) -> int:
        """Heads that are physically there."""
        return len(self.head_ids)

    @property
    def channels(self) -> int:
        """Channels of each head that are physically there."""
        return len(self.channel_ids[0])

    def probabilities(self) -> Tensor:
        """Softmax over the options that are alive, 0 elsewhere; shape of alpha."""
        logits = self.alpha.masked_fill(~self.alive, -math.inf)
        return torch.softmax(logits.reshape(-1), dim=0).reshape_as(self.alpha)

    def sparsity_sorted(self) -> Tensor:
        """V before it is given to the units: (heads, channels), falling along both."""
        p = self.probabilities()
        device, kind = p.device, p.dtype
        rows = torch.arange(self.heads, device=device) < self._sizes(self.head_options)[:, None]
        columns = torch.arange(self.channels, device=device) < self._sizes(self.channel_options)[:, None]
        return rows.to(kind).T @ p @ columns.to(kind)

    def _sizes(self, options: Sequence[int]) -> Tensor:
        return torch.tensor(options, device=self.alpha.device)

    def sparsity(self) -> Tensor:
        """V of every unit (heads, channels): the sorted one at the unit's rank."""
        head_rank, channel_rank = self._ranks()
        return self.sparsity_sorted()[head_rank[:, None], channel_rank]

    def expected_width(self) -> Tensor:
        """Sum of V: the expected number of units; the physical number once decided. A scalar with gradient to alpha."""
        if self.decided:
            return torch.tensor(float(self.heads * self.channels), device=self.alpha.device)
        return self.sparsity_sorted().sum()

    def importance(self) -> Tensor:
        """sigmoid(score) of every unit (heads, channels); what ranks them."""
        score = self.score if self.decided else self.score.sigmoid()
        return score.expand(self.heads, self.channels)

    def _orders(self) -> tuple[Tensor, Tensor]:
        score = self.score.detach().expand(self.heads, self.channels)
        sums = self.importance().detach().sum(-1)
        heads = torch.argsort(sums, descending=True, stable=True)
        return heads, torch.argsort(score, dim=1, descending=True, stable=True)

    def _ranks(self) -> tuple[Tensor, Tensor]:
        heads, channels = self._orders()
        return torch.argsort(heads), torch.argsort(channels, dim=1)

    def bimask(self) -> Tensor:
        """``lam * sigmoid(score) + (1 - lam) * V``, (heads, channels), in [0, 1]."""
        return self.lam * self.score.sigmoid() + (1 - self.lam) * self.sparsity()

    def multiplier(self) -> Tensor | None:
        """What the units are multiplied by, (heads, channels); None once fused."""
        factor: Tensor | None
        if self.fused:
            factor = None
        elif self.decided:
            factor = self.score.expand(self.heads, self.channels)
        else:
            factor = self.bimask() / self._reference()
        if self.probe is not None:
            factor = self.probe if factor is None else factor * self.probe
        return factor

    def _reference(self) -> float:
        return 0.5 * self.lam + 1 - self.lam if self.calibrated else 1.0

    @torch.no_grad()
    def compress(self, tau: float, slicer: Slicer | None = None) -> Keep | None:
        """Delete options of probability at most ``tau`` / (number alive), never the most probable one.

        With one option left the units are cut to it and the score becomes their multiplier; where the largest heads or
        channels died they are cut to the largest that survive; otherwise the options are only marked.

        Returns:
            The units that stay, in falling order of importance, when some had to go or their order changed.
        """
        if self.decided:
            return None
        p = self.probabilities()
        dying = self.alive & (p <= tau / int(self.alive.sum()))
        dying.view(-1)[p.argmax()] = False
        if not dying.any() and int(self.alive.sum()) > 1:
            return None
        return self._delete(dying, slicer or Slicer())

    @torch.no_grad()
    def decide(self, slicer: Slicer | None = None) -> Keep | None:
        """Leave the most probable option only."""
        if self.decided:
            return None
        dying = self.alive.clone()
        dying.view(-1)[self.probabilities().argmax()] = False
        return self._delete(dying, slicer or Slicer())

    def _delete(self, dying: Tensor, slicer: Slicer) -> Keep | None:
        self.alive &= ~dying
        slicer.renew(self, "alpha", self.alpha.detach() * self.alive)
        rows, columns = (int(x.max()) for x in self.alive.nonzero(as_tuple=True))
        last = (len(self.head_options) - 1, len(self.channel_options) - 1)
        decided = int(self.alive.sum()) == 1
        if not decided and (rows, columns) == last:
            return None
        if self.channel_options[columns] == 0:
            raise UserMistake(
                f"ofb: an {self.kind} of {self.dense[1]} channels is left with none, which the original offers; "
                "search without official_options"
            )
        keep = self._narrow(self.head_options[rows], self.channel_options[columns], slicer)
        if decided:
            self._finish(slicer)
        else:
            slicer.transform(self, "alpha", lambda x: x[: rows + 1, : columns + 1])
            self.alive = self.alive[: rows + 1, : columns + 1].clone()
            self.head_options = self.head_options[: rows + 1]
            self.channel_options = self.channel_options[: columns + 1]
        return keep

    def _finish(self, slicer: Slicer) -> None:
        multiplier = (self.lam * self.score.detach().sigmoid() + 1 - self.lam) / self._reference()
        slicer.renew(self, "score", multiplier)
        slicer.freeze(self, "alpha")
        self.decided = True

    def _narrow(self, heads: int, channels: int, slicer: Slicer) -> Keep:
        head_order, channel_order = self._orders()
        kept = head_order[:heads]
        keep = Keep(kept, channel_order[kept][:, :channels])
        self._remember(head_order.tolist(), channel_order.tolist(), heads, channels)

        def cut(x: Tensor) -> Tensor:
            x = x[keep.heads] if self.by_head else x
            if not self.by_channel:
                return x
            return x.gather(1, keep.channels if self.by_head else keep.channels[:1])

        slicer.transform(self, "score", cut)
        return keep

    def _remember(
        self, heads: Sequence[int], channels: Sequence[Sequence[int]], kept_heads: int, kept: int
    ) -> None:
        """Note, by their places in the dense module, which units stay and which go, best first."""
        ordered = {
            self.head_ids[head]: [self.channel_ids[head][channel] for channel in channels[head]]
            for head in heads
        }
        names = [self.head_ids[head] for head in heads]
        self.head_ids, gone = names[:kept_heads], names[kept_heads:]
        self.lost_heads = gone + self.lost_heads
        for head in gone:
            self._channel_ids_of_lost[head] = ordered[head]
        for head in self.head_ids:
            self.lost_channels[head] = ordered[head][kept:] + self.lost_channels[head]
        self.channel_ids = [ordered[head][:kept] for head in self.head_ids]

    def head_order(self) -> list[int]:
        """All heads of the dense module: those still there by importance, then the cut ones, last cut first."""
        return [self.head_ids[place] for place in self._orders()[0].tolist()] + self.lost_heads

    def channel_order(self, head: int) -> list[int]:
        """All channels of a head of the dense module, best first, as for ``head_order``."""
        if head in self.head_ids:
            place = self.head_ids.index(head)
            present = [self.channel_ids[place][c] for c in self._orders()[1][place].tolist()]
        else:
            present = self._channel_ids_of_lost[head]
        return present + self.lost_channels[head]

    def present(self) -> Iterator[tuple[int, int]]:
        """(head, channel) in the dense module of every unit that is physically there, in physical order."""
        for head, channels in zip(self.head_ids, self.channel_ids, strict=True):
            for channel in channels:
                yield head, channel

    def extra_repr(self) -> str:
        state = "fused" if self.fused else "decided" if self.decided else f"{int(self.alive.sum())} options"
        return f"{self.kind}, {self.heads}x{self.channels} of {self.dense[0]}x{self.dense[1]}, {state}"


def official_options(gate: Gate) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The original's options of heads and of channels for a module like that of ``gate``, which is uncut.

    Raises:
        UserMistake: the original has none in this size.
    """
    heads, channels = gate.dense
    of_heads: tuple[int, ...] = (heads,)
    of_channels: tuple[int, ...] = (channels,)
    if gate.by_head:
        of_heads = head_options(heads, official=True)
        if not of_heads:
            raise UserMistake("ofb: official_options: the original has no number of heads for a single head")
    if gate.by_channel:
        of_channels = _CHANNEL_OPTIONS[gate.kind](channels, official=True)
    return of_heads, of_channels
